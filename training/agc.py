"""Anti-gradient control: keep the gradient of memorised samples out of the step (Liu et al. 2024)."""

import torch
from torch import nn

ANTI_GRADS = ("skip", "ascend", "random", "off")


def shuffled(keep):
    """Verdicts (B,) in a random order, by torch's default generator, seeded for every step."""
    return keep[torch.rand(keep.shape, device=keep.device).argsort()]


class AntiGradientControl(nn.Module):
    """A memory bank of the running mean loss of every timestep, and the loss that it allows.

    A sample is taken for memorised where mem_ratio times its loss is below the bank's entry of its t.

    Args:
        T: number of timesteps.
        mem_ratio: the larger, the fewer samples are taken for memorised.
        ema_decay: d in [0, 1] of the bank's running mean.
        anti_grad: what happens to the gradient of a memorised sample: `skip` drops it, `ascend` turns it
            round with weight `ascend_weight`, `off` keeps it (the bank and verdicts are still recorded).
            The control `random` drops as many samples of the batch as `skip` would, drawn by chance.
        ascend_weight: w >= 0 of `ascend`.
        bins: entries of the bank, for T / bins timesteps each: few are kept fresher by small batches.
        bar: samples up to so many times the threshold are near it, and in no sum; 1 for none.
    """

    def __init__(self, T, mem_ratio=2.0, ema_decay=0.8, anti_grad="skip", ascend_weight=0.0, bins=None, bar=1.0):
        super().__init__()
        self.T, self.bar = T, bar
        self.mem_ratio = mem_ratio
        self.ema_decay = ema_decay
        self.anti_grad = anti_grad
        self.ascend_weight = ascend_weight
        self.register_buffer("bank", torch.zeros(bins or T))

    def forward(self, losses, t):
        """The scalar loss of a batch, judged by the bank before it takes in all samples.

        Args:
            losses: (B,) float32 per-sample losses.
            t: (B,) int64 timesteps in 0..T-1.

        Returns:
            loss: scalar, (sum_i keep_i l_i - w sum_i (1 - keep_i) l_i) / max(1, sum_i keep_i), w = 0
                unless `ascend`; the plain mean if `off`. Samples near the threshold count in no sum.
            keep: (B,) bool, False where a sample was taken for memorised; of `random`, left out.
        """
        # so that NaN is kept, and seen in the loss
        keep = ~(self.mem_ratio * losses.detach() < self.bank[self.entry(t)])
        if self.anti_grad == "random":
            keep = shuffled(keep)
        trains = keep & (self.near_threshold(losses, t) == 0)
        self.remember(losses.detach(), self.entry(t))
        if self.anti_grad == "off":
            return losses.mean(), keep
        memorised_weight = -self.ascend_weight if self.anti_grad == "ascend" else 0.0
        total = torch.where(trains, losses, memorised_weight * ~keep * losses).sum()
        return total / trains.sum().clamp(min=1), keep

    def entry(self, t):
        """The bank's entry of each timestep (B,)."""
        return t * len(self.bank) // self.T

    def near_threshold(self, losses, t):
        """How near samples just above the threshold are to it, for TAA (Guan et al. 2025).

        losses, t: as for `forward`, before it. Returns (B,) float32: exp(-5 (m l - b) / b) where
        b <= m l < bar b, for the entry b of the bank and m = mem_ratio; 0 elsewhere.
        """
        if self.bar == 1:
            return torch.zeros_like(losses)
        b, scaled = self.bank[self.entry(t)], self.mem_ratio * losses.detach()
        return torch.where((b <= scaled) & (scaled < self.bar * b), torch.exp(-5 * (scaled - b) / b), 0.0)

    @torch.no_grad()
    def remember(self, losses, entry):
        """bank[e_i] <- d bank[e_i] + (1 - d) l_i for i = 0..B-1 in order, in closed form.

        An entry that occurs m times, with losses l_1..l_m, ends as d^m bank + (1 - d) sum_j d^(m-j) l_j:
        each later occurrence discounts a loss once. Nothing is taken in where a loss is not finite.
        """
        d = self.ema_decay
        same = entry[:, None] == entry[None, :]
        later = same.triu(diagonal=1).sum(dim=1)
        discounted = (1 - d) * d**later * losses
        updated = d ** same.sum(dim=1) * self.bank[entry] + torch.where(same, discounted, 0.0).sum(dim=1)
        # every occurrence of an entry computes the same sum, so it does not matter which one writes last
        self.bank[entry] = torch.where(losses.isfinite().all(), updated, self.bank[entry])

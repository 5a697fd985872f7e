"""Anti-gradient control: keep the gradient of memorised samples out of the step (Liu et al. 2024)."""

import torch
from torch import nn

ANTI_GRADS = ("skip", "ascend", "off")


class AntiGradientControl(nn.Module):
    """A memory bank of the running mean loss of every timestep, and the loss that it allows.

    A sample is taken for memorised where mem_ratio times its loss is below the bank's entry of its timestep.

    Args:
        T: number of timesteps, the length of `bank`.
        mem_ratio: the larger, the fewer samples are taken for memorised.
        ema_decay: d in [0, 1] of the bank's running mean.
        anti_grad: what happens to the gradient of a memorised sample: `skip` drops it, `ascend` turns it round with
            weight `ascend_weight`, `off` keeps it (the bank and the verdicts are still recorded).
        ascend_weight: w >= 0 of `ascend`.

    Raises:
        ValueError: no such anti_grad.
    """

    def __init__(self, T, mem_ratio=2.0, ema_decay=0.8, anti_grad="skip", ascend_weight=0.0):
        super().__init__()
        if anti_grad not in ANTI_GRADS:
            raise ValueError(f"anti_grad is {anti_grad!r}: must be one of {', '.join(ANTI_GRADS)}")
        self.mem_ratio = mem_ratio
        self.ema_decay = ema_decay
        self.anti_grad = anti_grad
        self.ascend_weight = ascend_weight
        self.register_buffer("bank", torch.zeros(T))

    def forward(self, losses, t):
        """The scalar loss of a batch, judged by the bank as it was before; the bank then takes in every sample.

        Args:
            losses: (B,) float32 per-sample losses.
            t: (B,) int64 timesteps in 0..T-1.

        Returns:
            loss: scalar, (sum_i keep_i l_i - w sum_i (1 - keep_i) l_i) / max(1, sum_i keep_i), w = 0 unless
                `ascend`; the plain mean if `off`.
            keep: (B,) bool, False where the sample was taken for memorised.
        """
        keep = ~(self.mem_ratio * losses.detach() < self.bank[t])  # so that NaN is kept, and seen in the loss
        self.remember(losses.detach(), t)
        if self.anti_grad == "off":
            return losses.mean(), keep
        memorised_weight = -self.ascend_weight if self.anti_grad == "ascend" else 0.0
        total = torch.where(keep, losses, memorised_weight * losses).sum()
        return total / keep.sum().clamp(min=1), keep

    @torch.no_grad()
    def remember(self, losses, t):
        """bank[t_i] <- d bank[t_i] + (1 - d) l_i for i = 0..B-1 in order, in closed form.

        A timestep that occurs m times, with losses l_1..l_m, ends as d^m bank + (1 - d) sum_j d^(m-j) l_j: a loss is
        discounted once for every later occurrence of its timestep. Nothing is taken in where a loss is not finite.
        """
        d = self.ema_decay
        same = t[:, None] == t[None, :]
        later = same.triu(diagonal=1).sum(dim=1)
        discounted = (1 - d) * d**later * losses
        updated = d ** same.sum(dim=1) * self.bank[t] + torch.where(same, discounted, 0.0).sum(dim=1)
        # every occurrence of a timestep computes the same sum, so it does not matter which one writes last
        self.bank[t] = torch.where(losses.isfinite().all(), updated, self.bank[t])

"""score/gap.py against losses written out and scikit-learn's ROC curve."""

import numpy as np
import pytest
import sklearn.metrics
import torch

from diffusion import GaussianDiffusionTrainer
from score import gap
from score.gap import denoising_gap, losses_by_t, membership, timesteps
from tests.networks import tiny_unet, visible


class KnowsSome(torch.nn.Module):
    """Predicts half of the noise that leads to x_t from the nearest of the images that it knows."""

    def __init__(self, known, T):
        super().__init__()
        self.known = known
        self.abar = torch.cumprod(1 - torch.linspace(0.01, 0.2, T, dtype=torch.float64), 0).float()

    def forward(self, x, t, labels=None):
        abar = self.abar[t][:, None, None, None]
        eps = (x[:, None] - abar[:, None].sqrt() * self.known) / (1 - abar[:, None]).sqrt()
        distance = eps.flatten(2).square().mean(dim=2)
        return eps[range(len(x)), distance.argmin(dim=1)] * 0.5


@pytest.mark.parametrize(("T", "expected"), [(1000, range(25, 1000, 50)), (20, range(20)), (3, range(3))])
def test_timesteps_are_spread(T, expected):
    assert timesteps(T) == list(expected)


@pytest.mark.parametrize("conditional", [False, True])
def test_losses_are_those_of_training(conditional, monkeypatch):
    monkeypatch.setattr(gap, "TIMESTEPS", 4)
    net = visible(tiny_unet(T=20, num_labels=3 if conditional else None, dropout=0.5)).train()
    trainer = GaussianDiffusionTrainer(net, 1e-3, 0.2, 20)
    images = torch.randint(0, 256, (7, 3, 8, 8), dtype=torch.uint8)
    labels = torch.randint(3, (7,)) if conditional else None
    losses = losses_by_t(trainer, images, labels, 5, 3)
    assert losses.shape == (7, 4) and losses.dtype == torch.float64
    again = losses_by_t(trainer, images.flip(0), None if labels is None else labels.flip(0), 5, 7)
    torch.testing.assert_close(losses, again.flip(0), rtol=1e-4, atol=0)
    assert not torch.allclose(losses, losses_by_t(trainer, images, labels, 6, 3), rtol=1e-2)
    abar = torch.cumprod(1 - torch.linspace(1e-3, 0.2, 20), 0)
    for i, t in enumerate([2, 7, 12, 17]):
        stream = torch.Generator().manual_seed(gap.generator("cpu", 5, "gap").initial_seed())
        eps = torch.randn(4, 3, 8, 8, generator=stream)[i]
        for j in (0, 6):
            x_t = abar[t].sqrt() * (images[j] / 127.5 - 1) + (1 - abar[t]).sqrt() * eps
            with torch.no_grad():
                predicted = net(x_t[None], torch.tensor([t]), labels[j : j + 1] if conditional else None)
            assert losses[j, i].item() == pytest.approx((predicted[0] - eps).square().mean().item(), rel=1e-3)


@pytest.mark.parametrize(("N", "L"), [(300, 500), (40, 30), (200, 100), (1, 1)])
def test_membership_against_scikit_learn(N, L):
    rng = np.random.default_rng(N)
    training, heldout = rng.normal(0, 1, N).round(2), rng.normal(0.7, 1, L).round(2)
    found = membership(torch.from_numpy(training), torch.from_numpy(heldout))
    is_member, score = np.repeat([1, 0], [N, L]), -np.concatenate([training, heldout])
    assert found["auc"] == pytest.approx(sklearn.metrics.roc_auc_score(is_member, score))
    false, true, _ = sklearn.metrics.roc_curve(is_member, score, drop_intermediate=False)
    assert found["tpr"] == pytest.approx(true[false <= 0.01].max())


def test_a_network_that_knows_its_training_images_gives_them_away():
    random = torch.Generator().manual_seed(0)
    training, heldout = (torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=random) for n in (30, 40))
    net = KnowsSome(training.float() / 127.5 - 1, 50)
    found = denoising_gap(GaussianDiffusionTrainer(net, 0.01, 0.2, 50), (training, None), (heldout, None), 0, 16)
    assert found["auc"] == 1 == found["tpr"] and found["images"] == [30, 40]
    assert len(found["t"]) == 20 == len(found["training"]) == len(found["heldout"])
    assert found["best_t"] in found["t"] and found["best_auc"] == 1
    np.testing.assert_allclose(found["training"], 0.25, rtol=0.3)  # half of the noise is left over
    assert all(a < b for a, b in zip(found["training"][:10], found["heldout"][:10], strict=True))

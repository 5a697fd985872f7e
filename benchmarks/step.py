"""One IET-AGC training step against bare forward and backward."""

from functools import partial

import torch

from benchmarks.timing import alternate, row
from diffusion import GaussianDiffusionTrainer
from model import UNet
from training.agc import AntiGradientControl
from training.batches import ShardBatches
from training.learner import Learner

T = 1000
CIFAR10 = {"ch": 128, "ch_mult": [1, 2, 2, 2], "attn": [1], "num_res_blocks": 2}
DIGITS = {"ch": 32, "ch_mult": [1, 2], "attn": [1], "num_res_blocks": 1, "groups": 8}


def noise(number, size=32, device="cpu"):
    """Random images, uint8 (number, 3, size, size)."""
    return torch.randint(0, 256, (number, 3, size, size), dtype=torch.uint8, device=device)


def make_net(architecture, device):
    torch.manual_seed(0)
    net = UNet(T=T, dropout=0.1, **architecture).to(device)
    with torch.no_grad():
        for value in net.parameters():
            # the last layers start with a gain of 1e-5, whose numbers are denormal and slow; training makes them larger
            if value.abs().max() < 1e-3:
                value.mul_(1e5)
    return net


def make_learner(net, **changes):
    """As main_fed.py does; changes: of the settings."""
    objective = partial(GaussianDiffusionTrainer, beta_1=1e-4, beta_T=0.02, T=T)
    return Learner(net, objective, lr=2e-4, warmup=0, grad_clip=1.0, ema_decay=0.9999, **changes)


def make_step(learner, size, batch_size):
    """A step of main_fed.py on random images, to be called."""
    device = learner.device
    images = noise(4 * batch_size, size, device)
    batches = ShardBatches(images, None, torch.arange(len(images)), batch_size=batch_size, T=T, seed=0, hflip=True)
    agc = AntiGradientControl(T).to(device)
    skip_counts = torch.zeros(len(images), dtype=torch.int64, device=device)

    def step():
        batch = batches(learner.step)
        loss, keep = agc(learner.losses(batch), batch.t)
        learner.update(loss)
        skip_counts[batch.index] += ~keep

    return step


def forward_backward(net, x, t, eps):
    net.zero_grad()
    (net(x, t) - eps).square().mean().backward()


def measure(scale):
    """Rows of both networks; a scale below 1 repeats less often."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for name, architecture, size, batch_size, repeats in (
        ("CIFAR-10 UNet, batch 4", CIFAR10, 32, 4, 15),
        ("DIGITS UNet, batch 64", DIGITS, 8, 64, 41),
    ):
        net = make_net(architecture, device)
        x, eps = torch.randn(2, batch_size, 3, size, size, device=device)
        t = torch.randint(T, (batch_size,), device=device)
        works = {
            "step": make_step(make_learner(make_net(architecture, device)), size, batch_size),
            "bare": partial(forward_backward, net, x, t, eps),
        }
        seconds = alternate(works, max(1, round(repeats * scale)), warmup=2)
        what = f"training step / forward + backward, {name} (s)"
        rows.append(row(what, seconds["step"], seconds["bare"], at_most=1.10))
    return rows

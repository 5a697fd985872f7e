"""One IET-AGC training step, against bare forward and backward and against the published procedure."""

import copy

import torch

from benchmarks.plain import PlainProcedure, plain_copy
from benchmarks.timing import alternate, row
from model import UNet
from training.agc import AntiGradientControl
from training.batches import ShardBatches
from training.learner import Learner

T = 1000
NETWORKS = {
    "CIFAR-10 UNet, batch 4": ({"ch": 128, "ch_mult": [1, 2, 2, 2], "attn": [1], "num_res_blocks": 2}, 32, 4, 15),
    "DIGITS UNet, batch 64": ({"ch": 32, "ch_mult": [1, 2], "attn": [1], "num_res_blocks": 1}, 8, 64, 41),
}


def forward_backward(net, x, t, eps):
    net.zero_grad()
    (net(x, t) - eps).square().mean().backward()


@torch.no_grad()
def undo_small_gains(net):
    """Weights of the size that training gives them: the initial gains of 1e-5 make denormal numbers, which are slow."""
    for name, value in net.named_parameters():
        if name.endswith(("block2.3.weight", "tail.2.weight")):
            value.mul_(1e5)
    return net


def measure(scale=1.0):
    """Rows of the table; `scale` < 1 repeats less often, for a trial."""
    rows = []
    for name, (architecture, size, batch_size, repeats) in NETWORKS.items():
        rows += measure_network(name, architecture, size, batch_size, max(1, round(repeats * scale)))
    return rows


def make_net(architecture, device):
    torch.manual_seed(0)
    return undo_small_gains(UNet(T=T, dropout=0.1, **architecture)).to(device)


def make_step(net, size, batch_size, device, **changes):
    """One step of main_fed.py on a copy of the network and random images, to be called; and its images and batches.

    changes: of the learner's settings.
    """
    images = torch.randint(0, 256, (4 * batch_size, 3, size, size), dtype=torch.uint8, device=device)
    batches = ShardBatches(images, None, torch.arange(len(images)), batch_size=batch_size, T=T, seed=0, hflip=True)
    settings = {"beta_1": 1e-4, "beta_T": 0.02, "T": T, "mean_type": "epsilon", "lr": 2e-4, "warmup": 0}
    learner = Learner(copy.deepcopy(net), **settings, grad_clip=1.0, ema_decay=0.9999, **changes)
    agc = AntiGradientControl(T).to(device)
    skip_counts = torch.zeros(len(images), dtype=torch.int64, device=device)

    def our_step():
        batch = batches(learner.step)
        loss, keep = agc(learner.losses(batch), batch.t)
        learner.update(loss)
        skip_counts[batch.index] += ~keep

    return our_step, images, batches


def measure_network(name, architecture, size, batch_size, repeats):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = make_net(architecture, device)
    our_step, images, batches = make_step(net, size, batch_size, device)
    plain = plain_copy(net)
    published = PlainProcedure(plain_copy(net), T)
    batch = batches(0)
    works = {
        "step": our_step,
        "bare": lambda: forward_backward(net, batch.x_0, batch.t, batch.eps),
        "plain": lambda: forward_backward(plain, batch.x_0, batch.t, batch.eps),
        "published": lambda: published.step(images[:batch_size]),
    }
    seconds = alternate(works, repeats, warmup=2)
    return [
        row(f"training step / forward + backward, {name}", seconds["step"], seconds["bare"], 1.10, at_most=True),
        row(f"published procedure / our step, {name}", seconds["step"], seconds["published"], 1.25, at_most=False),
        row(f"plainest layers / our UNet, {name}", seconds["bare"], seconds["plain"], 1.10, at_most=False),
    ]

"""Networks, learners and flags small enough for tests."""

from functools import partial

import torch

from diffusion import GaussianDiffusionTrainer
from model import UNet
from training.learner import Learner

# 64 channels in 32 groups: with one channel a group, GroupNorm would take out the time and class embeddings
TINY = {"T": 10, "ch": 32, "ch_mult": [2], "attn": [0], "num_res_blocks": 1, "dropout": 0.1}
TINY_FLAGS = [
    "--dataset=digits", "--img_size=8", "--num_train=48", "--ch=32", "--ch_mult=2", "--attn=0", "--num_res_blocks=1",
    "--T=20", "--sample_steps=4", "--batch_size=8", "--lr=1e-3", "--warmup=0", "--sample_step=0", "--device=cpu",
]  # fmt: skip

# for trainings of which no test loads the network: four groups of four channels
TINIER = ["--ch=16", "--ch_mult=1"]


def tiny_unet(seed=0, **changes):
    torch.manual_seed(seed)
    return UNet(**{**TINY, **changes})


def tiny_learner(seed=0, num_labels=None, dropout=0.1, net=None, **changes):
    settings = {"lr": 1e-3, "warmup": 0, "grad_clip": 1.0, "ema_decay": 0.9}
    net = net or tiny_unet(seed, num_labels=num_labels, dropout=dropout)
    objective = partial(GaussianDiffusionTrainer, beta_1=1e-4, beta_T=0.02, T=10)
    return Learner(net, objective, **{**settings, **changes})


def visible(net):
    """Undo the tiny initial gains, so that the output depends on the inputs enough to compare."""
    with torch.no_grad():
        for name, value in net.named_parameters():
            if name.endswith(("block2.3.weight", "tail.2.weight")):
                value.mul_(1e5)
    return net.eval()

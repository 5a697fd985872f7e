"""CIFAR-10 images that occur once each: every arm as flags of main_fed.py, and what is measured."""

import functools

import torch

from experiments.images import fpd, load
from score.evaluate import mean_of
from score.measure import measure_against
from score.samples import evenly_spaced
from score.swd import sliced_wasserstein

K = 4
STEPS = 16_800  # of default training: its MQ@30 passes the floor by 2 points near 10,000
POINT = 0  # every round is measured
POINTS = 20  # of a training of one round
IMAGES = 512  # of a measurement

# No two of these 500 images are alike: the least ratio of one among the others is 23 %.
DATA = {"dataset": "cifar10", "img_size": 16, "num_train": 500, "subset_seed": 0, "hflip": False}
NETWORK = {"ch": 32, "ch_mult": [1, 2, 2], "attn": 1, "num_res_blocks": 1, "dropout": 0.0}
# a bank of T / 4 entries is as fresh with batches of 32 as the paper's is with 128
TRAINING = {"batch_size": 32, "lr": 1e-3, "warmup": 500, "ema_decay": 0.999, "bank_bins": 250}
SAMPLER = {"sampler": "dpmpp", "sample_steps": 20}

# 20 rounds: of 840 steps of one network, or of 630 steps of each shard. steps: over all shards
ONE = {"client_num": 1, "local_epoch": 56, "steps": STEPS}
PLAIN = {**ONE, "anti_grad": "off"}
ENSEMBLE = {"client_num": K, "local_epoch": 210, "steps": 3 * STEPS}
AVERAGED = {**ENSEMBLE, "anti_grad": "off"}

COMPARED = {"default": PLAIN, "AGC": ONE, "random skip": {**ONE, "anti_grad": "random"}, "IET-AGC": ENSEMBLE}
SHOWN = {
    "IET": AVERAGED,
    "score ensemble": {**AVERAGED, "local_epoch": 20 * 210, "one_round": True},
    "IET-AGC+": {**ENSEMBLE, "exchange": "ring", "augment_near_threshold": True},
    "dropout 0.1": {**PLAIN, "dropout": 0.1},
    "mirror images": {**PLAIN, "hflip": True},
    "ambient": {**PLAIN, "ambient_t": 300},
    "AGC (mem_ratio 1.5)": {**ONE, "mem_ratio": 1.5},
    # as many steps for each image
    "250 images": {**PLAIN, "num_train": 250, "local_epoch": 60, "steps": STEPS // 2},
    "1000 images": {**PLAIN, "num_train": 1000, "local_epoch": 54, "steps": 2 * STEPS},
}
ARMS = COMPARED | SHOWN
SEEDS = {**dict.fromkeys(COMPARED, range(1, 4)), **dict.fromkeys(SHOWN, range(1, 2))}


def measure(images, data):
    """{measure: number} of uint8 images (N, 3, H, W); shares are in [0, 1].

    fpd and swd are those to the held-out images. `near copies` are nearer to their training image than
    that one is to any other, 1 - AuthPct of Alaa et al. 2022. `above` is MQ less its floor, that of the
    held-out images."""
    numbers = measure_of(**data)(images)
    of_all, above = numbers["mq_fraction"], numbers["mq_above_floor"]
    return {
        "fpd": numbers["fpd"], "swd": numbers["swd"], "f_mem": numbers["f_mem"],
        "extracted": numbers["extracted"], "near copies": 1 - numbers["auth_pct"] / 100,
        **{f"MQ@{p}": of_all[p] for p in ("15", "30", "50")},
        **{f"MQ@{p} above": above[p] for p in ("15", "30", "50")}, "images": len(images),
    }  # fmt: skip


@functools.cache
def measure_of(**data):
    """`measure_against` the training and the held-out images of a data set."""
    loaded = load(**data)
    return measure_against(loaded.train.images, loaded.heldout.images)


def floor(data):
    """What held-out real images reach in place of generated ones; fpd, swd: of disjoint sets of them."""
    real = load(**data).heldout.images
    chosen = torch.zeros(len(real), dtype=torch.bool)
    chosen[evenly_spaced(len(real), IMAGES)] = True
    some, rest = real[chosen], real[~chosen]
    return {**measure(real, data), "fpd": fpd(some, rest), "swd": mean_of(sliced_wasserstein(rest, some))}

"""Repeated digits: one data set, every arm as flags of main_fed.py, and what is measured of them."""

import torch

from experiments.images import fpd, load
from score.evaluate import evaluate
from score.memorization import closer_than_third, group_of

K = 4
STEPS = 18_000  # of default training: more than three times those at which it begins to copy
POINT = 1500  # about so many steps between two measurements
POINTS = 6  # of a training of one round
IMAGES = 4096  # of a measurement
OTHER_IMAGES = 1800  # at most, of "fpd of others", which depends on their number

# 2,000 single images of 8x8 pixels and 20 that stand there 100 times
DATA = {"dataset": "mnist5k", "img_size": 8, "num_train": 2020, "duplicates": 20, "copies": 100}
NETWORK = {"ch": 16, "ch_mult": [1, 2], "attn": 1, "num_res_blocks": 1, "dropout": 0.0}
# a bank of T / 4 entries is as fresh with batches of 32 as the paper's is with 128
TRAINING = {"batch_size": 32, "lr": 2e-3, "warmup": 500, "ema_decay": 0.999, "bank_bins": 250}
SAMPLER = {"sampler": "dpmpp", "sample_steps": 20}

# local_epoch: of one model 12 epochs make a point; of a shard 15 are 465 steps. steps: over all shards
ONE = {"client_num": 1, "local_epoch": 12, "steps": STEPS}
PLAIN = {**ONE, "anti_grad": "off"}
ENSEMBLE = {"client_num": K, "local_epoch": 15, "steps": 2 * STEPS, "duplicates_in": "cluster"}
AVERAGED = {**ENSEMBLE, "anti_grad": "off"}
PLUS = {"exchange": "ring", "augment_near_threshold": True}

# "clustered": all copies of an image in one shard; "spread": over all shards, as a random split does
MAIN = {
    "default": PLAIN, "AGC": ONE, "clustered IET": AVERAGED, "clustered IET-AGC": ENSEMBLE,
    "clustered IET-AGC+": {**ENSEMBLE, **PLUS}, "ambient": {**PLAIN, "ambient_t": 300},
}  # fmt: skip
OTHERS = {
    "dropout 0.1": {**PLAIN, "dropout": 0.1},
    "dropout 0.3": {**PLAIN, "dropout": 0.3},
    "ambient at 500": {**PLAIN, "ambient_t": 500},
    "large batch": {**PLAIN, "batch_size": 32 * K, "local_epoch": 24, "steps": STEPS // 2},
    "25 copies": {**PLAIN, "copies": 25, "local_epoch": 19},
    "deduplicated": {**PLAIN, "duplicates": 0, "copies": 1, "local_epoch": 24},
    "local SGD": {**AVERAGED, "split": "all", "local_epoch": 4},
    "spread IET": {**AVERAGED, "duplicates_in": "spread"},
    "spread IET-AGC": {**ENSEMBLE, "duplicates_in": "spread"},
    "spread IET-AGC+": {**ENSEMBLE, **PLUS, "duplicates_in": "spread"},
    "spread score ensemble": {**AVERAGED, "duplicates_in": "spread", "local_epoch": 288, "one_round": True},
    "clustered score ensemble": {**AVERAGED, "local_epoch": 288, "one_round": True},
    "clustered reshuffled": {**AVERAGED, "reshard": True},
    "clustered IET (62 steps a round)": {**AVERAGED, "local_epoch": 2},
    "clustered IET (2976 steps a round)": {**AVERAGED, "local_epoch": 96},
}
# from default training at two thirds of its steps, when it copies, for STEPS / 3 steps in all
START = 2 / 3  # of the rounds of default training
FINE_TUNED = {
    f"{arm} (fine-tuned)": {**MAIN[arm], "from": "default", "steps": STEPS // 3, "local_epoch": epochs}
    for arm, epochs in {"default": 12, "AGC": 12, "clustered IET-AGC": 6, "clustered IET-AGC+": 6}.items()
}
LARGER = {f"{arm} (16x16)": {**MAIN[arm], "img_size": 16} for arm in ("default", "clustered IET-AGC")}
LEARNING_RATES = {f"lr {lr:g}": {**PLAIN, "lr": lr, "steps": STEPS // 3} for lr in (1e-3, 2e-3, 4e-3)}

ARMS = MAIN | OTHERS | FINE_TUNED | LARGER | LEARNING_RATES
SEEDS = {
    **dict.fromkeys(MAIN, range(1, 6)),
    "default": range(1, 9),  # since fine-tuning starts from it
    **dict.fromkeys(OTHERS, range(1, 4)),
    "clustered score ensemble": range(1, 6),  # it turned out to be the strongest rival
    **dict.fromkeys(FINE_TUNED, range(1, 9)),
    **dict.fromkeys(LARGER, range(1, 2)),
    **dict.fromkeys(LEARNING_RATES, range(11, 12)),
}


def real_images(data):
    """(distinct training images, which repeated (M,), held-out ones) of `load`: uint8 (N, 3, H, W)."""
    repeated = load(**{**data, "duplicates": DATA["duplicates"], "copies": DATA["copies"]})
    distinct, is_repeated = repeated.without_copies().train.images, repeated.slot_image.bincount() > 1
    return distinct, is_repeated, repeated.heldout.images


def measure(images, data):
    """The `numbers_of` uint8 images (N, 3, H, W) that a training on such data has generated."""
    return numbers_of(images, *real_images(data))


def numbers_of(images, training, repeated, heldout, groups=None):
    """{measure: number} of uint8 images (N, 3, H, W); shares are in [0, 1].

    fpd is that to the held-out images; a generator that draws the repeated images less often has a
    better one, and so `fpd of others` is that of the images whose nearest is no repeated one. `near
    copies` is the share of the rest. f_mem (Gu et al. 2023) is also taken of repeated images alone;
    `extracted` counts those of which there is a copy.

    Args:
        training, heldout: (M, 3, H, W) and (L, 3, H, W), uint8.
        repeated: (M,) bool, which training images are repeated ones.
        groups: (M,) int64, which training images are one and the same, altered; None: none are."""
    numbers, (sq_distance, index) = evaluate(images, training, groups=groups)
    pixels = numbers["pixels"]
    copies, of_repeated = closer_than_third(sq_distance), repeated[index[:, 0]]
    return {
        "fpd": fpd(images, heldout),
        "fpd of others": fpd(images[~of_repeated.cpu()][:OTHER_IMAGES], heldout),
        "f_mem": pixels["f_mem"], "f_mem of copies": (copies & of_repeated).double().mean().item(),
        "extracted": len(group_of(index[copies & of_repeated, 0], groups).unique()),
        "near copies": of_repeated.double().mean().item(),
        **{f"MQ@{p}": pixels["mq_fraction"][p] for p in ("15", "30")}, "images": len(images),
    }  # fmt: skip


def floor(data):
    """What held-out real images reach in place of generated ones, and the fpd of training images."""
    distinct, repeated, heldout = real_images(data)
    sets = {"the training set": load(**data).train.images, "distinct training images": distinct}
    return measure(heldout, data) | fpd_of_real(heldout, sets, distinct[~repeated])


def fpd_of_real(heldout, sets, single):
    """The fpd of sets of real images, {name: (N, 3, H, W)}, and of single ones; "fpd": of halves."""
    shuffled = heldout[torch.randperm(len(heldout), generator=torch.Generator().manual_seed(0))]
    half, sets = len(heldout) // 2, {**sets, "single images": single[:OTHER_IMAGES]}
    fpds = {f"fpd of {name}": fpd(images, heldout) for name, images in sets.items()}
    of_halves = fpd(shuffled[:half], shuffled[half:])
    return {"fpd": of_halves, "fpd of others": of_halves, **fpds}

"""Repeated digits whose copies are altered: what a user does who finds them, and what the methods do."""

import csv
import functools
import hashlib
from collections import Counter, defaultdict

import numpy as np
import torch

from experiments import digits
from experiments.digits import STEPS, K
from experiments.images import load
from score.measure import measure_against
from training.watch import ABOVE
from utils.files import file_hash
from utils.images import firsts

POINT, POINTS, IMAGES = digits.POINT, digits.POINTS, digits.IMAGES

# 2,000 single images of 8x8 pixels and 20 of which there are 50 altered copies. groups: the finder's
DATA = {"dataset": "mnist5k", "img_size": 8, "num_train": 2020, "duplicates": 20, "copies": 50}
DATA |= {"alter_copies": True, "groups": "groups.csv"}
NETWORK, TRAINING, SAMPLER = digits.NETWORK, digits.TRAINING, digits.SAMPLER

# local_epoch: of one model 16 epochs of 93 steps make a point, 25 of 60 with the 1,924 groups that are
# found; of a shard 20 are 460 steps. steps: over all shards
ONE = {"client_num": 1, "local_epoch": 16, "steps": STEPS}
PLAIN = {**ONE, "anti_grad": "off"}
ENSEMBLE = {"client_num": K, "local_epoch": 20, "steps": 2 * STEPS}
AVERAGED = {**ENSEMBLE, "anti_grad": "off"}
TOGETHER = {"split": "together"}

ARMS = {
    "default": PLAIN,
    "AGC": ONE,
    "keep list": {**PLAIN, "local_epoch": 25, "keep_list": "keep.txt"},
    "balanced groups": {**PLAIN, "local_epoch": 25, "balance_groups": True},
    "IET": {**AVERAGED, "split": "random"},
    "IET-AGC": {**ENSEMBLE, "split": "random"},
    "together IET": {**AVERAGED, **TOGETHER},
    "together IET-AGC": {**ENSEMBLE, **TOGETHER},
    "together score ensemble": {**AVERAGED, **TOGETHER, "local_epoch": 390, "one_round": True},
    # the checkpoints of another arm
    "held back": {**PLAIN, "of": "default", "reject_below": 30},
}
WATCHED = ("default", "AGC")  # of which best.json is shown
SEEDS = dict.fromkeys(ARMS, range(1, 4))


def original(name):
    """The name of the image that a training image is, or is an altered copy of."""
    return str(name).partition(" copy ")[0]


def real_images(data):
    """(training images, their true groups (M,) int64, held-out images) of `load`: uint8 (N, 3, H, W)."""
    loaded = load(**data)
    _, groups = np.unique([original(name) for name in loaded.train.names], return_inverse=True)
    return loaded.train.images, torch.from_numpy(groups), loaded.heldout.images


def measure(images, data):
    """`digits.numbers_of` uint8 images (N, 3, H, W) by the true groups, and what --watch_step sees."""
    training, groups, heldout = real_images(data)
    numbers = digits.numbers_of(images, training, groups.bincount()[groups] > 1, heldout, groups)
    return numbers | {ABOVE: watching(**data)(images)["mq_above_floor"]["30"]}


@functools.cache
def watching(**data):
    """What a training with the groups that the finder found is watched by."""
    loaded = load(**data)
    return measure_against(loaded.train.images, loaded.heldout.images, groups=loaded.groups)


def floor(data):
    """What held-out real images reach in place of generated ones, and the fpd of training images."""
    training, groups, heldout = real_images(data)
    sets = {"the training set": training, "one image of each group": training[firsts(groups)]}
    single = training[groups.bincount()[groups] == 1]
    return measure(heldout, data) | digits.fpd_of_real(heldout, sets, single)


def hash_of_groups(path):
    """What names who is in which group of a groups.csv: scores, and its order, differ between processors."""
    members = defaultdict(list)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            members[row["group"]].append((row["kept"] == "no", row["image"]))  # the kept one is first
    return hashlib.sha256(repr(sorted(map(sorted, members.values()))).encode()).hexdigest()


def found_copies(lists, data):
    """What the finder has found of the altered copies, by the true groups: JSON values.

    lists: the directory of its files. Pairs are exact or near ones of training images."""
    size = Counter(map(original, load(**data).train.names))
    kept = Counter(map(original, (lists / "keep.txt").read_text().splitlines()))
    with (lists / "pairs.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["part"] == "train"]
    found = [row for row in rows if row["kind"] != "similar"]
    is_true = [original(row["image"]) == original(row["other"]) for row in found]
    return {
        "sha256": {
            "groups": hash_of_groups(lists / "groups.csv"), "keep.txt": file_hash(lists / "keep.txt"),
        },
        "true pairs": sum(n * (n - 1) // 2 for n in size.values()),
        "true pairs found": sum(is_true), "false pairs": len(found) - sum(is_true),
        "kept": kept.total(), "copies kept of each": [kept[name] for name in size if size[name] > 1],
        "single images": sum(n == 1 for n in size.values()),
        "single images kept": sum(kept[name] for name in size if size[name] == 1),
    }  # fmt: skip

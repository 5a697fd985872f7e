"""What is compared: the data sets, the four arms of the ablation, and the settings that were tried in tuning."""

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from utils.files import read_json

ROOT = Path(__file__).parent.parent
SHARDS = 4
BATCH = 16
ENSEMBLE_STEPS = 2  # times those of default training, over all shards: a sub-model makes a part of them only
SAMPLER = ("--sampler=dpmpp", "--sample_steps=20")
COPIES = 10  # of a repeated patch
SINGLES_PER_REPEATED = 15  # patches that occur once, for every one that occurs COPIES times
TEXTURED = 1 / 3  # of all patches


@dataclass(frozen=True)
class Data:
    """A data set to train on.

    `steps` are those of default training; ensembles are given ENSEMBLE_STEPS times as many. A round has `round_steps`
    steps over all shards. About `points` checkpoints are measured, with `images` generated images each.
    """

    name: str
    flags: tuple[str, ...]
    num_train: int
    steps: int
    round_steps: int
    points: int
    images: int


@dataclass(frozen=True)
class Arm:
    """A way to train: flags of main_fed.py. A round is made of 1 / `more_rounds` of the data set's steps.

    `setting` is the name of the trial that a tuned arm repeats: another choice is another training.
    """

    name: str
    shards: int
    flags: tuple[str, ...]
    more_rounds: int = 1
    setting: str = ""


DIGITS = "--flagfile=config/DIGITS.txt"
PATCHES = ("--flagfile=config/PATCHES.txt", "--data_root=data/patches128/train")
DATA = {
    "digits64": Data("digits64", (DIGITS, "--num_train=64"), 64, 5600, 400, 12, 512),
    "patches128": Data("patches128", PATCHES, 128, 1600, 400, 4, 256),
    "digits256": Data("digits256", (DIGITS, "--num_train=256"), 256, 6000, 500, 6, 384),
}
OFF = ("--anti_grad=off",)
ARMS = {
    "default": Arm("default", 1, OFF),
    "IET": Arm("IET", SHARDS, OFF),
    "AGC": Arm("AGC", 1, ()),
    "IET-AGC": Arm("IET-AGC", SHARDS, ()),
}
# equal effort: as many trials for both, every knob of each at least once; every checkpoint of a trial is measured, with
# raw and EMA weights, which is early stopping
TRIALS = {
    "default": [
        ARMS["default"],
        *(Arm(f"dropout {p}", 1, (*OFF, f"--dropout={p}")) for p in (0.3, 0.5, 0.7, 0.8, 0.9)),
        Arm("shift 1", 1, (*OFF, "--shift=1")),
        Arm("shift 1, dropout 0.3", 1, (*OFF, "--shift=1", "--dropout=0.3")),
        Arm("EMA decay 0.999", 1, (*OFF, "--ema_decay=0.999")),
        Arm("EMA decay 0.999, dropout 0.5", 1, (*OFF, "--ema_decay=0.999", "--dropout=0.5")),
        Arm("EMA decay 0.999, dropout 0.7", 1, (*OFF, "--ema_decay=0.999", "--dropout=0.7")),
    ],
    "IET-AGC": [
        ARMS["IET-AGC"],
        Arm("2 shards", 2, ()),
        Arm("5 times as many rounds", SHARDS, (), more_rounds=5),
        Arm("mem_ratio 1.25", SHARDS, ("--mem_ratio=1.25",)),
        Arm("arr_ema_decay 0.95", SHARDS, ("--arr_ema_decay=0.95",)),
        Arm("ascend 0.1", SHARDS, ("--anti_grad=ascend", "--anti_grad_weight=0.1")),
        *(Arm(f"1 shard, dropout {p}", 1, (f"--dropout={p}",)) for p in (0.5, 0.7, 0.8)),
        Arm("1 shard, dropout 0.5, mem_ratio 1.25", 1, ("--dropout=0.5", "--mem_ratio=1.25")),
        Arm("2 shards, dropout 0.7", 2, ("--dropout=0.7",)),
    ],
}
BASELINES = {"IET": "default", "AGC": "default", "IET-AGC": "default", "tuned IET-AGC": "tuned default"}


def tuned_arms(out):
    """{"tuned default": arm, "tuned IET-AGC": arm} as tuning.json has chosen them, or {} if there is none yet."""
    path = out / "tuning.json"
    if not path.exists():
        return {}
    best = {method: row["setting"] for method, row in read_json(path)["best"].items()}
    chosen = {f"tuned {method}": arm for method in TRIALS for arm in TRIALS[method] if arm.name == best[method]}
    return {name: replace(arm, name=name, setting=arm.name) for name, arm in chosen.items()}


def command_line(data, arm, seed, logdir):
    """(flags of main_fed.py, steps of a round over all shards). A checkpoint is kept for each measurement."""
    batch = min(BATCH, data.num_train // arm.shards)
    per_epoch = arm.shards * (data.num_train // arm.shards // batch)
    total = data.steps * (1 if arm.shards == 1 else ENSEMBLE_STEPS)
    epochs = max(1, min(data.round_steps, total // data.points) // arm.more_rounds // per_epoch)
    rounds = max(1, total // (epochs * per_epoch))
    save_round = max(1, round(rounds / data.points))
    flags = (
        *data.flags, "--train", "--device=cpu", "--save_step=0", "--sample_step=0", "--log_step=500",
        f"--batch_size={batch}", f"--client_num={arm.shards}", f"--local_epoch={epochs}", f"--total_round={rounds}",
        f"--save_round={save_round}", f"--seed={seed}", f"--logdir={logdir}", *SAMPLER, *arm.flags,
    )  # fmt: skip
    return flags, epochs * per_epoch


def patches(side):
    """Patches of scikit-learn's two photographs without a pixel in common: uint8 (N, side, side, 3).

    Only the third with most contrast: smooth ones, of sky or out of focus, are so near to each other and so far from
    the rest that half of those that were not trained on would count as copies at MQ@15.
    """
    import sklearn.datasets  # takes a second, which only those need who make patches

    parts = []
    for photograph in sklearn.datasets.load_sample_images().images:
        rows, columns = photograph.shape[0] // side, photograph.shape[1] // side
        cut = photograph[: rows * side, : columns * side].reshape(rows, side, columns, side, 3)
        parts.append(cut.swapaxes(1, 2).reshape(-1, side, side, 3))
    contrast = np.concatenate(parts).std(axis=(1, 2)).mean(axis=1)
    return np.concatenate(parts)[contrast >= np.quantile(contrast, 1 - TEXTURED)]


def choose(number, size, seed=0):
    """Which of `number` patches every training file shows, (size,) in random order, and which are held out.

    One in 1 + SINGLES_PER_REPEATED of the distinct ones, rounded, is repeated COPIES times. Shards are consecutive
    files, so copies are spread over the shards.
    """
    repeated = round(size / (COPIES + SINGLES_PER_REPEATED))
    singles = size - COPIES * repeated
    random = np.random.default_rng(seed)
    order = random.permutation(number)
    used = np.concatenate([order[:repeated].repeat(COPIES), order[repeated : repeated + singles]])
    return random.permutation(used), np.sort(order[repeated + singles :])


def write_patches(root, size, side):
    """Write `root`/train, `size` files, and `root`/heldout as PNG, unless they are there."""
    if root.exists():
        return
    images = patches(side)
    unfinished = root.with_name(f".{root.name}.{os.getpid()}")
    for name, chosen in zip(("train", "heldout"), choose(len(images), size), strict=True):
        (unfinished / name).mkdir(parents=True)
        for place, patch in enumerate(chosen):
            Image.fromarray(images[patch]).save(unfinished / name / f"{place:05d}_patch{patch:05d}.png")
    try:
        unfinished.rename(root)
    except OSError:  # another process was faster
        shutil.rmtree(unfinished)

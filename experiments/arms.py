"""What is compared, as flags of main_fed.py: data sets, the arms of the ablation, the settings that tuning tries."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from utils.files import read_json

ROOT = Path(__file__).parent.parent
BATCH = 16
ENSEMBLE_STEPS = 2  # times those of default training, over all shards: a sub-model makes a part of them only
SAMPLER = {"sampler": "dpmpp", "sample_steps": 20}
COPIES = 10  # of a repeated patch

# steps: of default training; round_steps: of a round, over all shards; points: about so many checkpoints are measured,
# each by so many images
DATA = {
    "digits64": {"num_train": 64, "steps": 5600, "round_steps": 400, "points": 12, "images": 512},
    "patches128": {"num_train": 128, "steps": 1600, "round_steps": 400, "points": 4, "images": 256},
    "digits256": {"num_train": 256, "steps": 6000, "round_steps": 500, "points": 6, "images": 384},
}
DATA["digits64"]["flags"] = {"flagfile": "config/DIGITS.txt", "num_train": 64}
DATA["patches128"]["flags"] = {"flagfile": "config/PATCHES.txt", "data_root": "data/patches128/train"}
DATA["digits256"]["flags"] = {"flagfile": "config/DIGITS.txt", "num_train": 256}
ARMS = {
    "default": {"client_num": 1, "anti_grad": "off"},
    "IET": {"client_num": 4, "anti_grad": "off"},
    "AGC": {"client_num": 1},
    "IET-AGC": {"client_num": 4},
}
BASELINES = {"IET": "default", "AGC": "default", "IET-AGC": "default", "tuned IET-AGC": "tuned default"}
# flags besides the arm's own. Equal effort: as many trials for both, every knob of each at least once; every checkpoint
# of a trial is measured, with raw and EMA weights, which is early stopping
TRIALS = {
    "default": {
        "default": {},
        **{f"dropout {p}": {"dropout": p} for p in (0.3, 0.5, 0.7, 0.8, 0.9)},
        "shift 1": {"shift": 1},
        "shift 1, dropout 0.3": {"shift": 1, "dropout": 0.3},
        "EMA decay 0.999": {"ema_decay": 0.999},
        "EMA decay 0.999, dropout 0.5": {"ema_decay": 0.999, "dropout": 0.5},
        "EMA decay 0.999, dropout 0.7": {"ema_decay": 0.999, "dropout": 0.7},
    },
    "IET-AGC": {
        "IET-AGC": {},
        "2 shards": {"client_num": 2},
        "5 times as many rounds": {"local_epoch": 20},
        "mem_ratio 1.25": {"mem_ratio": 1.25},
        "arr_ema_decay 0.95": {"arr_ema_decay": 0.95},
        "ascend 0.1": {"anti_grad": "ascend", "anti_grad_weight": 0.1},
        **{f"1 shard, dropout {p}": {"client_num": 1, "dropout": p} for p in (0.5, 0.7, 0.8)},
        "1 shard, dropout 0.5, mem_ratio 1.25": {"client_num": 1, "dropout": 0.5, "mem_ratio": 1.25},
        "2 shards, dropout 0.7": {"client_num": 2, "dropout": 0.7},
    },
}


def tuned_arms(out):
    """The arms "tuned default" and "tuned IET-AGC" as tuning.json has chosen them, or {} if there is none yet."""
    path = out / "tuning.json"
    best = read_json(path)["best"] if path.exists() else {}
    return {f"tuned {method}": ARMS[method] | TRIALS[method][row["setting"]] for method, row in best.items()}


def patches(side):
    """Patches of scikit-learn's two photographs without a pixel in common: uint8 (N, side, side, 3).

    Only the third with most contrast: smooth ones, of sky or out of focus, are so near to each other and so far from
    the rest that half of those that were not trained on would count as copies at MQ@15.
    """
    import sklearn.datasets  # takes a second, which only those need who make patches

    windows, shape = np.lib.stride_tricks.sliding_window_view, (side, side, 3)
    photographs = sklearn.datasets.load_sample_images().images
    found = np.concatenate([windows(p, shape)[::side, ::side].reshape(-1, *shape) for p in photographs])
    contrast = found.std(axis=(1, 2)).mean(axis=1)
    return found[contrast >= np.quantile(contrast, 2 / 3)]


def write_patches(root, size, side):
    """Write `root`/train, `size` files, and `root`/heldout as PNG, unless they are there.

    One in 16 of the distinct patches of train, rounded, is there COPIES times. Shards are
    consecutive files, and the order is random, so copies are spread over the shards.
    """
    if root.exists():
        return
    images, random = patches(side), np.random.default_rng(0)
    order, repeated = random.permutation(len(images)), round(size / (COPIES + 15))
    distinct = size - (COPIES - 1) * repeated
    train = random.permutation(np.concatenate([order[:repeated].repeat(COPIES), order[repeated:distinct]]))
    unfinished = root.with_name(f".{root.name}.{os.getpid()}")
    for name, chosen in {"train": train, "heldout": np.sort(order[distinct:])}.items():
        (unfinished / name).mkdir(parents=True)
        for place, patch in enumerate(chosen):
            Image.fromarray(images[patch]).save(unfinished / name / f"{place:05d}_patch{patch:05d}.png")
    unfinished.rename(root)

"""Colour patches of scikit-learn's two photographs, some of them repeated ten times: duplicated training samples."""

import os
import shutil
from pathlib import Path

import numpy as np
import sklearn.datasets
from PIL import Image

COPIES = 10
SINGLES_PER_REPEATED = 15  # distinct patches that occur once, for every one that occurs COPIES times
TEXTURED = 1 / 3


def tiles(side):
    """Patches of the photographs without a pixel in common, the third with most contrast: uint8 (N, side, side, 3).

    Smooth ones, of sky or out of focus, are so near to each other and so far from the rest that half of those that
    were not trained on would count as copies at MQ@15.
    """
    parts = []
    for photograph in sklearn.datasets.load_sample_images().images:
        rows, columns = photograph.shape[0] // side, photograph.shape[1] // side
        cut = photograph[: rows * side, : columns * side].reshape(rows, side, columns, side, 3)
        parts.append(cut.swapaxes(1, 2).reshape(-1, side, side, 3))
    patches = np.concatenate(parts)
    contrast = patches.std(axis=(1, 2)).mean(axis=1)
    return patches[contrast >= np.quantile(contrast, 1 - TEXTURED)]


def choose(num_tiles, num_files, seed=0):
    """Which tile every training file shows, int64 (num_files,), in random order, and which tiles are held out.

    One in 1 + SINGLES_PER_REPEATED of the distinct tiles, rounded, is repeated COPIES times: of 256 files ten times ten
    and 156 others. Shards are consecutive files, so copies are spread over the shards.
    """
    repeated = round(num_files / (COPIES + SINGLES_PER_REPEATED))
    singles = num_files - COPIES * repeated
    random = np.random.default_rng(seed)
    order = random.permutation(num_tiles)
    used = np.concatenate([order[:repeated].repeat(COPIES), order[repeated : repeated + singles]])
    return random.permutation(used), np.sort(order[repeated + singles :])


def write_patches(root, num_files, side):
    """Write `root`/train and `root`/heldout as PNG files, unless they are there; the names begin with the place."""
    root = Path(root)
    if root.exists():
        return
    images = tiles(side)
    train, heldout = choose(len(images), num_files)
    unfinished = root.with_name(f".{root.name}.{os.getpid()}")
    for name, chosen in (("train", train), ("heldout", heldout)):
        (unfinished / name).mkdir(parents=True)
        for place, tile in enumerate(chosen):
            Image.fromarray(images[tile]).save(unfinished / name / f"{place:05d}_tile{tile:05d}.png")
    try:
        unfinished.rename(root)
    except OSError:  # another process was faster
        shutil.rmtree(unfinished)

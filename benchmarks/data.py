"""Reading a folder of JPEGs: the second time, from the cache of decoded images, against the first."""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import sklearn.datasets
from PIL import Image

from dataset import load_dataset

TARGET = 20  # times faster
SIDE = 64  # pixels
NUM_FOLDERS = 3
READS_PER_FOLDER = 5


def measure(scale: float = 1.0) -> list[dict]:
    """One row: median seconds of the second read (`ours`) and of the first (`baseline`), and how many times faster.

    Both read in this process and end with the images in memory; the first includes writing the cache.
    `scale` multiplies the 5,000 images of the folder.
    """
    num_images = max(1, round(5000 * scale))
    first, second = [], []
    for seed in range(NUM_FOLDERS):
        with tempfile.TemporaryDirectory() as folder:
            write_photograph_patches(Path(folder), num_images, seed)
            first.append(seconds_to_read(folder))
            second += [seconds_to_read(folder) for _ in range(READS_PER_FOLDER)]
    ours, baseline = statistics.median(second), statistics.median(first)
    return [
        {
            "what": f"reading a folder of {num_images:,} {SIDE}x{SIDE} JPEGs: second time against first",
            "ours": ours,
            "baseline": baseline,
            "ratio": baseline / ours,
            "target": TARGET,
            "ok": baseline / ours >= TARGET,
        }
    ]


def write_photograph_patches(folder: Path, num_images: int, seed: int):
    """JPEGs cut at random from scikit-learn's two photographs."""
    photographs = sklearn.datasets.load_sample_images().images
    generator = np.random.default_rng(seed)
    for index in range(num_images):
        photograph = photographs[index % len(photographs)]
        top, left = (generator.integers(length - SIDE + 1) for length in photograph.shape[:2])
        patch = photograph[top : top + SIDE, left : left + SIDE]
        Image.fromarray(patch).save(folder / f"{index:06d}.jpg")


def seconds_to_read(folder: str) -> float:
    """Wall-clock seconds until the images are in memory; giving the memory back is not counted."""
    start = time.perf_counter()
    dataset = load_dataset("folder", folder, img_size=SIDE)
    seconds = time.perf_counter() - start
    del dataset
    return seconds

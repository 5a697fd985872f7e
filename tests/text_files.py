"""A pipeline with random weights, and a folder of captioned images, small enough for tests."""

import functools
import json
import shutil

import numpy as np
from PIL import Image

from text_to_image import tiny

SIDE, NUMBER = 16, 16
CAPTIONS = {f"{i:02}.png": [f"picture number {i}", f"image {i}", f"the {i} th"] for i in range(NUMBER)}


@functools.cache
def tiny_pipeline():
    return tiny.make_pipeline()


@functools.cache
def saved_pipeline(directory):
    """The folder of `tiny_pipeline` in a directory."""
    tiny_pipeline().save_pretrained(directory / "pipeline")
    return directory / "pipeline"


def copy_pipeline(folder, to):
    return shutil.copytree(folder, to / "pipeline")


def save_images(folder, names=tuple(CAPTIONS), side=SIDE):
    """Random images under these names."""
    rng = np.random.default_rng(0)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)
    return folder


def save_captions(path, captions):
    path.write_text(json.dumps(captions))
    return path

"""The images of an experiment, loaded once in every process, and their quality."""

import functools

from dataset import load_dataset
from score.fid import compute_statistics, frechet_distance


@functools.cache
def load(**data):
    """The `dataset.Dataset` of keyword arguments of `load_dataset`, with `dataset` for its name."""
    return load_dataset(data.pop("dataset"), **data)


def fpd(images, reference):
    """Frechet distance on pooled pixels between two sets of images."""
    return frechet_distance(*compute_statistics(images), *compute_statistics(reference))

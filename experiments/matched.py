"""Memorisation at matched quality: a method that has merely learned less also memorises less.

A training is a path of (quality, memorisation) over its checkpoints. Quality is a Frechet distance: less is better.
Memorisation is the share of generated images that a criterion takes for copies.
"""

from typing import NamedTuple

import numpy as np


class Point(NamedTuple):
    """A checkpoint: the Frechet distance of its images and its standard deviation, the share of copies, of how many."""

    distance: float
    spread: float
    share: float
    images: int


def at_quality(distances, shares, quality):
    """The share of each training when it first reaches a quality: (draws,), NaN where it never does.

    distances, shares: (draws, S), of S checkpoints in the order of their steps. Between the first one at or below
    `quality` and the one before it both change linearly; a training that begins there is given its first share.
    """
    reached = distances <= quality
    first = reached.argmax(axis=1)
    row, before = np.arange(len(first)), np.maximum(first - 1, 0)
    gap = distances[row, before] - distances[row, first]
    weight = np.where(first > 0, (distances[row, before] - quality) / np.where(gap > 0, gap, 1), 0)
    found = shares[row, before] + weight * (shares[row, first] - shares[row, before])
    return np.where(reached.any(axis=1), found, np.nan)


def mean_at_quality(paths, quality):
    """(mean share at a quality over the paths that reach it, None if none does; how many reach it)."""
    found = np.array([at_quality(*np.array(path).T[[0, 2], None], quality)[0] for path in paths])
    reached = int((~np.isnan(found)).sum())
    return (float(np.nanmean(found)) if reached else None), reached


def bootstrap(paths, quality, draws, seed):
    """`mean_at_quality` of seeds and images drawn again with replacement: (draws,), NaN where none reaches the quality.

    Of images drawn again the share is binomial, and their Frechet distance is taken to be normal and independent of it.
    """
    random = np.random.default_rng(seed)
    chosen = random.integers(len(paths), size=(draws, len(paths)))
    found = np.full(chosen.shape, np.nan)
    for place, k in np.ndindex(len(paths), len(paths)):
        distance, spread, share, images = np.array(paths[k]).T
        distances = distance + random.standard_normal((draws, len(share))) * spread
        shares = random.binomial(images.astype(int), share, size=distances.shape) / images
        again = at_quality(distances, shares, quality)
        found[:, place] = np.where(chosen[:, place] == k, again, found[:, place])
    number = (~np.isnan(found)).sum(axis=1)
    return np.where(number > 0, np.nansum(found, axis=1) / np.maximum(number, 1), np.nan)


def with_interval(mean, drawn):
    return [float(mean), *map(float, np.nanquantile(drawn, [0.025, 0.975]))]


def interval(paths, quality, floor, images, draws=1000, seed=0):
    """Mean share above the floor at a quality over seeds, with a 95 % bootstrap interval over seeds and images.

    paths: one per seed, lists of `Point` in the order of the steps; floor: the share of so many held-out real images.
    Returns [mean, low, high], or None if no seed reaches the quality. Draws in which none reaches it are left out.
    """
    mean, reached = mean_at_quality(paths, quality)
    if not reached:
        return None
    floors = np.random.default_rng((seed, 1)).binomial(images, floor, size=draws) / images
    return with_interval(mean - floor, bootstrap(paths, quality, draws, seed) - floors)


def difference(paths, others, quality, draws=1000, seed=0):
    """Mean share of `paths` less that of `others` at the same quality, as `interval`; the floor cancels.

    Returns [mean, low, high], or None where a side does not reach the quality with all its seeds.
    """
    (mean, reached), (other, others_reached) = mean_at_quality(paths, quality), mean_at_quality(others, quality)
    if reached < len(paths) or others_reached < len(others):
        return None
    drawn, again = (bootstrap(side, quality, draws, (seed, i)) for i, side in enumerate((paths, others)))
    return with_interval(mean - other, drawn - again)

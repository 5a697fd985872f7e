"""Memorisation at matched quality: a method that has merely learned less also memorises less.

A training is a path of (quality, memorisation) over its checkpoints. Quality is a Frechet distance: less is better.
"""

from typing import NamedTuple

import numpy as np


class Point(NamedTuple):
    """A checkpoint: the Frechet distance of its images, its standard deviation, and their ratios (N,)."""

    distance: float
    spread: float
    ratios: np.ndarray


def at_quality(distances, shares, quality):
    """The memorisation of a training when it first reaches a quality; None if it never does.

    distances, shares: of its checkpoints in the order of their steps. Between the first one at or below `quality` and
    the one before it both are taken to change linearly; a training that begins there is given its first share.
    """
    for i, distance in enumerate(distances):
        if distance <= quality:
            if i == 0:
                return shares[0]
            weight = (distances[i - 1] - quality) / (distances[i - 1] - distance)
            return shares[i - 1] + weight * (shares[i] - shares[i - 1])
    return None


def share_below(ratios, threshold):
    """MQ as a share: of the ratios (N,) those below `threshold` percent."""
    return float(np.mean(100 * np.asarray(ratios) < threshold))


def mean_at_quality(paths, quality, threshold):
    """(mean share at a quality over the paths that reach it, None if none does; how many reach it)."""
    found = [
        at_quality([p.distance for p in path], [share_below(p.ratios, threshold) for p in path], quality)
        for path in paths
    ]
    found = [share for share in found if share is not None]
    return (float(np.mean(found)) if found else None), len(found)


def at_quality_of_draws(distances, shares, quality):
    """`at_quality` of many paths at once: distances, shares (draws, S) -> (draws,), NaN where it is not reached."""
    reached = distances <= quality
    first = reached.argmax(axis=1)
    row, before = np.arange(len(first)), np.maximum(first - 1, 0)
    gap = distances[row, before] - distances[row, first]
    weight = np.where(first > 0, (distances[row, before] - quality) / np.where(gap > 0, gap, 1), 0)
    found = shares[row, before] + weight * (shares[row, first] - shares[row, before])
    return np.where(reached.any(axis=1), found, np.nan)


def bootstrap(paths, quality, threshold, draws, seed):
    """`mean_at_quality` of seeds and images drawn again with replacement: (draws,), NaN where none reaches the quality.

    Of images drawn again MQ is binomial, and their Frechet distance is taken to be normal and independent of it.
    """
    random = np.random.default_rng(seed)
    chosen = random.integers(len(paths), size=(draws, len(paths)))
    found = np.full(chosen.shape, np.nan)
    for place, k in np.ndindex(len(paths), len(paths)):
        N = np.array([len(p.ratios) for p in paths[k]])
        share = np.array([share_below(p.ratios, threshold) for p in paths[k]])
        noise = random.standard_normal((draws, len(N))) * [p.spread for p in paths[k]]
        distances = noise + [p.distance for p in paths[k]]
        again = at_quality_of_draws(distances, random.binomial(N, share, size=(draws, len(N))) / N, quality)
        found[:, place] = np.where(chosen[:, place] == k, again, found[:, place])
    number = (~np.isnan(found)).sum(axis=1)
    return np.where(number > 0, np.nansum(found, axis=1) / np.maximum(number, 1), np.nan)


def summary(mean, drawn):
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return {"mean": float(mean), "low": float(low), "high": float(high)}


def interval(paths, quality, threshold, floor, draws=1000, seed=0):
    """Mean MQ above floor at a quality over seeds, with a 95 % bootstrap interval over seeds and images.

    Args:
        paths: one per seed, lists of `Point` in the order of the steps.
        threshold: p of MQ, in percent.
        floor: ratios (L,) of held-out real images.

    Returns:
        {"mean", "low", "high", "reached"} with `reached` the number of seeds that reach the quality, or only that if
        none of them does. Draws in which no seed reaches it are left out.
    """
    mean, reached = mean_at_quality(paths, quality, threshold)
    if mean is None:
        return {"reached": 0}
    of_floor = share_below(floor, threshold)
    floors = np.random.default_rng((seed, 1)).binomial(len(floor), of_floor, size=draws) / len(floor)
    return {**summary(mean - of_floor, bootstrap(paths, quality, threshold, draws, seed) - floors), "reached": reached}


def difference(paths, others, quality, threshold, draws=1000, seed=0):
    """Mean MQ of `paths` less that of `others` at the same quality, as `interval`; the floor cancels.

    Returns {"mean", "low", "high"}, or None where a side does not reach the quality with all its seeds.
    """
    (mean, reached), (other, others_reached) = (mean_at_quality(p, quality, threshold) for p in (paths, others))
    if reached < len(paths) or others_reached < len(others):
        return None
    drawn, again = (bootstrap(p, quality, threshold, draws, (seed, i)) for i, p in enumerate((paths, others)))
    return summary(mean - other, drawn - again)

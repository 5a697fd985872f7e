"""Memorisation at matched quality: a method that has merely learned less also memorises less.

A training is a path of (quality, memorisation) over its checkpoints: a list of points in the order of its steps, each
{"fpd", "fpd_std", "images", measure: share}. Quality is fpd, a Frechet distance: less is better. A measure is the share
of so many generated images that some criterion takes for copies.
"""

import numpy as np

COMPARED = ("MQ@15", "MQ@30")  # in which arms are compared with default training


def paths_of(points, arm, weights):
    """[[point]] per seed of an arm, in the order of the steps."""
    chosen = [p for p in points if (p["arm"], p["weights"]) == (arm, weights)]
    return [[p for p in chosen if p["seed"] == seed] for seed in dict.fromkeys(p["seed"] for p in chosen)]


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


def columns(path, *names):
    """An array (S,) for each name, of the S points of a training."""
    return [np.array([point[name] for point in path]) for name in names]


def mean_at_quality(paths, quality, measure):
    """(mean share at a quality over the paths that reach it, None if none does; how many reach it)."""
    found = np.array([at_quality(*np.array(columns(p, "fpd", measure))[:, None], quality)[0] for p in paths])
    reached = int((~np.isnan(found)).sum())
    return (float(np.nanmean(found)) if reached else None), reached


def bootstrap(paths, quality, measure, draws, seed):
    """`mean_at_quality` of seeds and images drawn again with replacement: (draws,), NaN where none reaches the quality.

    Of images drawn again the share is binomial, and their Frechet distance is taken to be normal and independent of it.
    """
    random = np.random.default_rng(seed)
    chosen = random.integers(len(paths), size=(draws, len(paths)))
    found = np.full(chosen.shape, np.nan)
    for place, k in np.ndindex(len(paths), len(paths)):
        distance, spread, share, images = columns(paths[k], "fpd", "fpd_std", measure, "images")
        distances = distance + random.standard_normal((draws, len(share))) * spread
        shares = random.binomial(images, share, size=distances.shape) / images
        again = at_quality(distances, shares, quality)
        found[:, place] = np.where(chosen[:, place] == k, again, found[:, place])
    number = (~np.isnan(found)).sum(axis=1)
    return np.where(number > 0, np.nansum(found, axis=1) / np.maximum(number, 1), np.nan)


def interval(paths, quality, measure, floor, draws=1000, seed=0):
    """Mean share above the floor at a quality over seeds, with a 95 % bootstrap interval over seeds and images.

    paths: one per seed; floor: {measure: share, "images"} of held-out real images. Returns [mean, low, high], or None
    if no seed reaches the quality. Draws in which none reaches it are left out.
    """
    mean, reached = mean_at_quality(paths, quality, measure)
    if not reached:
        return None
    share, images = floor[measure], floor["images"]
    floors = np.random.default_rng((seed, 1)).binomial(images, share, size=draws) / images
    drawn = bootstrap(paths, quality, measure, draws, seed) - floors
    return [mean - share, *np.nanquantile(drawn, [0.025, 0.975]).tolist()]


def difference(paths, others, quality, measure, draws=1000, seed=0):
    """Mean share of `paths` less that of `others` at the same quality, as `interval`; the floor cancels.

    Returns [mean, low, high], or None where a side does not reach the quality with all its seeds.
    """
    (mean, reached), (other, others_reached) = (mean_at_quality(p, quality, measure) for p in (paths, others))
    if reached < len(paths) or others_reached < len(others):
        return None
    drawn, again = (bootstrap(p, quality, measure, draws, (seed, i)) for i, p in enumerate((paths, others)))
    return [mean - other, *np.nanquantile(drawn - again, [0.025, 0.975]).tolist()]

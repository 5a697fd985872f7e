"""Memorisation at matched quality: a method that has merely learned less also memorises less.

A training is a path of (quality, memorisation) over its checkpoints: a list of points in the order of its steps, each
{"fpd", "fpd_std", "images", measure: share}. Quality is fpd, a Frechet distance: less is better. A measure is the share
of so many generated images that some criterion takes for copies.
"""

import itertools

import numpy as np

COMPARED = ("MQ@15", "MQ@30")  # in which arms are compared with default training
WEIGHTS = ("raw", "ema")
FACTORS = (1.0, 1.15, 1.4, 1.8)  # of the best quality that those compared reach with all seeds


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
    return [np.array([[point[name] for point in path]]) for name in names]


def mean_at_quality(paths, quality, measure):
    """Mean share of trainings at a quality; NaN if one of them does not reach it."""
    return float(np.mean([at_quality(*columns(path, "fpd", measure), quality) for path in paths]))


def bootstrap(paths, quality, measure, draws, seed):
    """`mean_at_quality` of seeds and images drawn again with replacement, of those that reach it: (draws,).

    Of images drawn again the share is binomial, and their Frechet distance is taken to be normal and independent of it.
    """
    random = np.random.default_rng(seed)
    chosen = random.integers(len(paths), size=(draws, len(paths)))
    found = np.full(chosen.shape, np.nan)
    for place, k in np.ndindex(len(paths), len(paths)):
        distance, spread, share, images = columns(paths[k], "fpd", "fpd_std", measure, "images")
        distances = distance + random.standard_normal((draws, share.size)) * spread
        shares = random.binomial(images, share, size=distances.shape) / images
        again = at_quality(distances, shares, quality)
        found[:, place] = np.where(chosen[:, place] == k, again, found[:, place])
    number = (~np.isnan(found)).sum(axis=1)
    return np.where(number > 0, np.nansum(found, axis=1) / np.maximum(number, 1), np.nan)


def difference(paths, others, quality, measure, draws=1000, seed=0):
    """Mean share of `paths` less that of `others` at a quality, with a 95 % bootstrap interval over seeds and images.

    Both hold a path per seed. Returns [mean, low, high], or None where one of them does not reach the quality. Draws in
    which none of a side reaches it are left out.
    """
    mean = mean_at_quality(paths, quality, measure) - mean_at_quality(others, quality, measure)
    if np.isnan(mean):
        return None
    drawn, again = (bootstrap(side, quality, measure, draws, (seed, i)) for i, side in enumerate((paths, others)))
    return [mean, *np.nanquantile(drawn - again, [0.025, 0.975]).tolist()]


def differences(pairs, measures, **about):
    """Rows {**about, "fpd", "arm", measure: `difference`} at FACTORS times the best fpd that every training reaches.

    pairs: {arm: (paths, others)}.
    """
    best = max(min(point["fpd"] for point in path) for sides in pairs.values() for side in sides for path in side)
    return [
        {**about, "fpd": round(best * factor, 3), "arm": arm}
        | {name: difference(*sides, best * factor, name) for name in measures}
        for factor, (arm, sides) in itertools.product(FACTORS, pairs.items())
    ]

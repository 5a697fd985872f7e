"""The statistics of the experiments: a method that has merely learned less also memorises less.

A training is a path of (quality, memorisation) over its checkpoints: a list of points in the order of
its steps, each {"steps", "fpd", measure: number}. Quality is a distance to held-out images: less is
better.
"""

import operator

import numpy as np
from scipy import stats

LEAST_SEEDS = 3  # of which an interval says something
COPIES = "MQ@30 above", 0.02  # a checkpoint copies if this measure is above this number


def paths_of(points, arm, network=None):
    """{seed: its points} of an arm, in the order of the steps."""
    chosen = [point for point in points if (point["arm"], point.get("network")) == (arm, network)]
    return {seed: [p for p in chosen if p["seed"] == seed] for seed in dict.fromkeys(p["seed"] for p in chosen)}


def at_quality(path, quality, measure, axis="fpd"):
    """The measure of a training when it first reaches a quality; NaN if it never does.

    Between the first checkpoint at or below `quality` and the one before it both change linearly; a
    training that begins there is given its first number. axis: which distance is the quality."""
    return at_first(path, axis, operator.le, quality, measure)


def onset(path):
    """The steps after which a training begins to copy, linear between checkpoints; NaN if never."""
    measure, limit = COPIES
    return at_first(path, measure, operator.gt, limit, "steps")


def at_first(path, axis, compare, level, measure):
    """The measure where the number `axis` of a path first reaches a level, as `at_quality`; or NaN."""
    first = next((i for i, point in enumerate(path) if compare(point[axis], level)), None)
    if first is None:
        return float("nan")
    if first == 0:
        return float(path[0][measure])
    ends = sorted((end[axis], end[measure]) for end in path[first - 1 : first + 1])
    return float(np.interp(level, *zip(*ends, strict=True)))


def best_without_copying(path, axis, copies=COPIES):
    """The best quality of the checkpoints of a training that do not copy; NaN if all of them do."""
    measure, limit = copies
    return min((point[axis] for point in path if point[measure] <= limit), default=float("nan"))


def welch(values, others):
    """Numbers of one arm against those of another, one a seed, by Welch's t: (difference, low, high, p).

    The difference of the means, its 95 % interval and the p-value. The last three are None where there
    is no test: of fewer than three seeds, or if all seeds of each arm are alike. A NaN makes all of it
    NaN and None."""
    difference = float(np.mean(values) - np.mean(others))
    too_few = min(len(values), len(others)) < LEAST_SEEDS
    if too_few or np.isnan(difference) or np.ptp(values) == np.ptp(others) == 0:
        return difference, None, None, None
    found = stats.ttest_ind(values, others, equal_var=False)
    return difference, *map(float, found.confidence_interval()), float(found.pvalue)


def holm(p_values):
    """Holm's correction: the p-values, in the order given, each for all of them together."""
    order = np.argsort(p_values)
    factors = np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.maximum.accumulate(np.minimum(1, factors * np.asarray(p_values, float)[order]))
    return corrected.tolist()


def corrected(comparisons):
    """{key: what `welch` returns} with the p-values of all of them corrected by `holm`."""
    tested = [key for key, (*_, p) in comparisons.items() if p is not None]
    p_values = dict(zip(tested, holm([comparisons[key][-1] for key in tested]), strict=True))
    return {key: (*found[:3], p_values.get(key)) for key, found in comparisons.items()}

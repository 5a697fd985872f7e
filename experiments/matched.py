"""Memorisation at matched quality: a method that has merely learned less also memorises less.

A training is a path of (quality, memorisation) over its checkpoints: a list of points in the order of its steps, each
{"fpd", "images", measure: number}. Quality is a Frechet distance: less is better.
"""

import math

import numpy as np
from scipy import stats

BASELINE = "default"
MEMORISES = 0.01  # f_mem of the baseline, below which nothing can be compared
LEAST_SEEDS = 3  # of which an interval says something
NEAR_BEST = 1.5  # times the baseline's best fpd, above which nothing is compared


def paths_of(points, arm, network=None):
    """{seed: its points} of an arm, in the order of the steps."""
    chosen = [point for point in points if (point["arm"], point.get("network")) == (arm, network)]
    return {seed: [p for p in chosen if p["seed"] == seed] for seed in dict.fromkeys(p["seed"] for p in chosen)}


def at_quality(path, quality, measure, axis="fpd"):
    """The measure of a training when it first reaches a quality; NaN if it never does.

    Between the first checkpoint at or below `quality` and the one before it both change linearly; a training that
    begins there is given its first number. axis: which distance is the quality.
    """
    first = next((i for i, point in enumerate(path) if point[axis] <= quality), None)
    if first is None:
        return float("nan")
    if first == 0:
        return float(path[0][measure])
    ends = path[first], path[first - 1]
    return float(np.interp(quality, [end[axis] for end in ends], [end[measure] for end in ends]))


def best_common(*paths, axis="fpd"):
    """The best quality that all of the trainings reach."""
    return max(min(point[axis] for point in path) for path in paths)


def interval(values):
    """Mean of numbers, one a seed, and its 95 % interval by Student's t: (mean, low, high); of too few None."""
    mean = float(np.mean(values))
    if len(values) < LEAST_SEEDS:
        return mean, None, None
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def comparison(points, arm, axis="fpd"):
    """An arm against the baseline, seed by seed, each pair at the best quality that both reach: a row of JSON values.

    `untested` says why it is no test, or is None: there are fewer than three pairs, the baseline does not memorise
    there, or the arm is never near the baseline's best quality.
    """
    paths, others = paths_of(points, arm), paths_of(points, BASELINE)
    pairs = [(paths[seed], others[seed]) for seed in paths if seed in others]
    qualities = [best_common(*pair, axis=axis) for pair in pairs]
    row = {"arm": arm, "seeds": len(pairs), axis: float(np.mean(qualities)), "untested": None}
    for measure in ("f_mem", "extracted"):
        both = zip(pairs, qualities, strict=True)
        values = np.array([[at_quality(path, quality, measure, axis) for path in pair] for pair, quality in both])
        row[measure], row[f"{BASELINE} {measure}"] = values.mean(axis=0).tolist()
        row[f"{measure} difference"] = interval(values[:, 0] - values[:, 1])
    if len(pairs) < LEAST_SEEDS:
        row["untested"] = f"{len(pairs)} of {LEAST_SEEDS} seeds"
    elif row[axis] > NEAR_BEST * np.mean([best_common(path, axis=axis) for path in others.values()]):
        row["untested"] = f"above {NEAR_BEST:g} times {BASELINE}'s best"
    elif row[f"{BASELINE} f_mem"] < MEMORISES:
        row["untested"] = f"{BASELINE} does not copy there"
    return row


def verdict(row, measure):
    """What a comparison says of a measure, in a word or two."""
    if row["untested"]:
        return f"not tested: {row['untested']}"
    _, low, high = row[f"{measure} difference"]
    return "less" if high < 0 else "more" if low > 0 else "not shown"

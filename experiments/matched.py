"""Memorisation at matched quality: a method that has merely learned less also memorises less.

A training is a path of (quality, memorisation) over its checkpoints: a list of points in the order of its steps, each
{"fpd", "images", measure: number}. Quality is fpd, a Frechet distance: less is better.
"""

import numpy as np

BASELINE = "default"
MEMORISES = 0.01  # f_mem of the baseline, below which nothing can be compared
NEAR_BEST = 1.5  # times the baseline's best fpd, above which nothing is compared
DRAWS = 2000


def paths_of(points, arm, network=None):
    """[[point]] per seed of an arm, in the order of the steps."""
    chosen = [point for point in points if (point["arm"], point.get("network")) == (arm, network)]
    return [[p for p in chosen if p["seed"] == seed] for seed in dict.fromkeys(p["seed"] for p in chosen)]


def at_quality(path, quality, measure):
    """The measure of a training when it first reaches a quality; NaN if it never does.

    Between the first checkpoint at or below `quality` and the one before it both change linearly; a training that
    begins there is given its first number.
    """
    first = next((i for i, point in enumerate(path) if point["fpd"] <= quality), None)
    if first is None:
        return float("nan")
    if first == 0:
        return float(path[0][measure])
    ends = path[first], path[first - 1]
    return float(np.interp(quality, [end["fpd"] for end in ends], [end[measure] for end in ends]))


def best_common(*sides):
    """The lowest fpd that every training of all sides reaches; a side is a path per seed."""
    return max(min(point["fpd"] for point in path) for paths in sides for path in paths)


def difference(paths, others, quality, measure, seed=0):
    """Mean measure of `paths` less that of `others` at a quality, with a 95 % bootstrap interval.

    Seeds are drawn again with replacement and, for measures that are shares of images, the images too (binomial).

    Args:
        paths, others: a path per seed, all of which reach the quality.
        quality: an fpd.
        measure: a name; "extracted" is a count.
        seed: of the draws.

    Returns:
        (mean, low, high); low and high are None where a side has one seed only.
    """
    sides = [np.array([at_quality(path, quality, measure) for path in side]) for side in (paths, others)]
    mean = float(sides[0].mean() - sides[1].mean())
    if min(map(len, sides)) < 2:
        return mean, None, None
    random, means = np.random.default_rng(seed), []
    for side, values in zip((paths, others), sides, strict=True):
        drawn = random.choice(values, (DRAWS, len(values)))
        if measure != "extracted":
            images = side[0][0]["images"]
            drawn = random.binomial(images, drawn.clip(0, 1)) / images
        means.append(drawn.mean(axis=1))
    return mean, *np.quantile(means[0] - means[1], [0.025, 0.975]).tolist()


def comparison(points, arm, baseline=BASELINE):
    """An arm against a baseline at the best fpd that both reach: a row of JSON values.

    `untested` says why it is no test, or is None: the baseline does not memorise there, or neither side is near the
    baseline's best quality.
    """
    paths, others = paths_of(points, arm), paths_of(points, baseline)
    quality = best_common(paths, others)
    best = best_common(others)
    row = {"arm": arm, "baseline": baseline, "seeds": [len(paths), len(others)], "fpd": quality}
    for measure in ("f_mem", "extracted"):
        row[measure], row[f"{baseline} {measure}"] = (
            float(np.mean([at_quality(path, quality, measure) for path in side])) for side in (paths, others)
        )
        row[f"{measure} difference"] = difference(paths, others, quality, measure)
    row["untested"] = None
    if quality > NEAR_BEST * best:
        row["untested"] = f"fpd above {NEAR_BEST:g} times the best of {baseline}"
    elif row[f"{baseline} f_mem"] < MEMORISES:
        row["untested"] = f"{baseline} does not copy at that fpd"
    elif None in row["f_mem difference"]:
        row["untested"] = "one seed"
    return row


def verdict(row, measure):
    """What a comparison says of a measure, in a word or two."""
    if row["untested"]:
        return f"not tested: {row['untested']}"
    _, low, high = row[f"{measure} difference"]
    return "less" if high < 0 else "more" if low > 0 else "no difference"

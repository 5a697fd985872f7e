"""Memorisation at matched quality: a method that has merely learned less also memorises less.

A training is a path of (quality, memorisation) over its checkpoints. Quality is a Frechet distance: less is better.
"""

import numpy as np


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


def interval(paths, quality, threshold, floor, draws=1000, seed=0):
    """Mean MQ above floor at a quality over seeds, with a 95 % bootstrap interval over seeds and generated images.

    Args:
        paths: one per seed, lists of (distance, ratios (N,)) in the order of the steps.
        threshold: p of MQ, in percent.
        floor: ratios (L,) of held-out real images.

    Returns:
        {"mean", "low", "high", "reached"} with `reached` the number of seeds that reach the quality, or only that if
        none of them does. Draws in which no seed reaches it are left out.
    """

    def share(ratios):
        return np.mean(100 * np.asarray(ratios) < threshold)

    def mean_of(chosen, of_floor):
        found = [at_quality([d for d, _ in path], [s for _, s in path], quality) for path in chosen]
        found = [value for value in found if value is not None]
        return (np.mean(found) - of_floor if found else None), len(found)

    mean, reached = mean_of([[(d, share(r)) for d, r in path] for path in paths], share(floor))
    if mean is None:
        return {"reached": 0}
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(draws):
        chosen = []
        for k in random.integers(len(paths), size=len(paths)):
            # MQ of images drawn again is binomial
            chosen.append([(d, random.binomial(len(r), share(r)) / len(r)) for d, r in paths[k]])
        drawn.append(mean_of(chosen, random.binomial(len(floor), share(floor)) / len(floor))[0])
    low, high = np.quantile([value for value in drawn if value is not None], [0.025, 0.975])
    return {"mean": float(mean), "low": float(low), "high": float(high), "reached": reached}

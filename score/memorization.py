"""How much of the training set the generated images give away.

Everything is computed from the squared L2 distances of `nearest_neighbors`: images in [0, 1], summed over all 3*H*W
values, d_1 <= d_2 <= ... for each generated image.
"""

import torch

from score.neighbors import nearest_neighbors, nearest_other
from utils import distributed

__all__ = [
    "THRESHOLDS",
    "above_floor",
    "authenticity",
    "measures",
    "memorization_ratio",
    "memorized_quantity",
    "nearest_neighbors",
    "nearest_other",
    "neighbors_by_all",
    "share_closer_than_third",
]

THRESHOLDS = (15, 20, 30, 40, 50, 60, 70, 80, 90)


def neighbors_by_all(generated, training, **settings):
    """`nearest_neighbors`, each process searching for its part of the generated images; all are given the whole."""
    part = generated[distributed.share(len(generated))]
    # a process without images searches for one, to know the shape of nothing
    found = nearest_neighbors(part if len(part) else generated[:1], training, **settings)
    sq_distance, index = (rows[: len(part)] for rows in found)
    return distributed.join_rows(sq_distance), distributed.join_rows(index)


def memorization_ratio(sq_distance):
    """ratio(g) = d_1 / mean(d_1 .. d_k), the criterion of Liu et al. 2024 (IET-AGC) with k = 50.

    sq_distance: (N, k) ascending squared distances; all that there are when the training set has fewer than 50 images.
    Returns (N,) in [0, 1]. A mean of 0 (a copy of an image that fills the training set) gives 0.
    """
    _check_distances(sq_distance)
    mean = sq_distance.mean(dim=1)
    return torch.where(mean > 0, sq_distance[:, 0] / mean, torch.zeros_like(mean))


def memorized_quantity(ratio, thresholds=THRESHOLDS):
    """MQ at p of Liu et al. 2024: the number of generated images with 100 * ratio < p, for every p (in percent).

    ratio: (N,) of `memorization_ratio`. Returns {p: count}.
    """
    return {p: int((100 * ratio < p).sum()) for p in thresholds}


def mq_curve(ratio):
    """MQ as a share for all thresholds p = 0, 1, .. 100 percent, of the ratios (N,): a list of 101 floats."""
    ordered = (100 * ratio.double()).sort().values
    below = torch.searchsorted(ordered, torch.arange(101, dtype=torch.float64, device=ratio.device))
    return (below.double() / len(ratio)).tolist()


def measures(sq_distance, index, training):
    """All criteria of one set of images, as JSON values: counts and shares at the published thresholds, and the rest.

    sq_distance, index: (N, k) as `nearest_neighbors` returns them for `training`, which is (M, 3, H, W).
    """
    counts = {str(p): count for p, count in memorized_quantity(memorization_ratio(sq_distance)).items()}
    return {
        "mq": counts,
        "mq_fraction": {p: count / len(sq_distance) for p, count in counts.items()},
        "mq_curve": mq_curve(memorization_ratio(sq_distance)),
        "share_sqrt_d1_d2_below_third": share_closer_than_third(sq_distance),
        "auth_pct": 100 * authenticity(sq_distance, index, training),
    }


def above_floor(result, floor):
    """MQ above floor: the share of generated images below each threshold less that of held-out real images.

    result, floor: `measures` of the generated images and of real ones that were not trained on. {p: difference}.
    """
    return {p: share - floor["mq_fraction"][p] for p, share in result["mq_fraction"].items()}


def share_closer_than_third(sq_distance):
    """Share of generated images with sqrt(d_1) / sqrt(d_2) < 1/3 (Gu et al. 2023).

    sq_distance: (N, k) ascending squared distances. Returns a float in [0, 1].
    An exact copy always counts, also where it copies a repeated training image (d_1 = d_2 = 0) or where there is only
    one training image (k = 1, no d_2); without a d_2 nothing else counts.
    """
    _check_distances(sq_distance)
    memorized = sq_distance[:, 0] == 0
    if sq_distance.shape[1] > 1:
        memorized = memorized | (9 * sq_distance[:, 0] < sq_distance[:, 1])
    return memorized.double().mean().item()


def authenticity(sq_distance, index, training):
    """AuthPct of Alaa et al. 2022 ("How Faithful is your Synthetic Data?"), in pixel space, as a share in [0, 1].

    A generated image is authentic if it is farther from its nearest training image than that one is from its own
    nearest other training image.

    sq_distance, index: (N, k) as `nearest_neighbors` returns them for `training`, which is (M, 3, H, W).
    A training set of one image has no other, and nothing is authentic.
    """
    _check_distances(sq_distance)
    nearest, of_generated = index[:, 0].unique(return_inverse=True)
    own = distributed.join_rows(nearest_other(training, nearest[distributed.share(len(nearest))], index.device))
    return (sq_distance[:, 0] > own[of_generated].to(sq_distance.device)).double().mean().item()


def _check_distances(sq_distance):
    if sq_distance.ndim != 2 or sq_distance.numel() == 0:
        raise ValueError(f"sq_distance must be (N, k) with at least one row and column, not {tuple(sq_distance.shape)}")

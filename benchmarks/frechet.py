"""Frechet distance of 2,048 features: ours against pytorch-fid's."""

import contextlib
import io
import statistics
import time
import warnings

import numpy as np
import sklearn.datasets
import torch
from pytorch_fid.fid_score import calculate_frechet_distance

from score.fid import Statistics, frechet_distance

PATCH = 16
IMAGES = 5000
DIMENSION = 2048
REPEATS = 3


def photo_patches(rng, photos, N):
    """N patches (N, 3 * 16 * 16) in [-1, 1] of the photographs, at random places and exposures."""
    patches = np.empty((N, PATCH, PATCH, 3), np.float32)
    for patch in patches:
        photo = photos[rng.integers(len(photos))]
        y, x = (rng.integers(side - PATCH) for side in photo.shape[:2])
        patch[:] = photo[y : y + PATCH, x : x + PATCH] / 127.5 * rng.uniform(0.5, 1) - 1
    return torch.from_numpy(patches.reshape(N, -1))


def feature_statistics(patches, projection):
    """Mean and covariance of relu(patches projection): sparse, skewed and correlated, as Inception's features are."""
    running = Statistics(projection.shape[1])
    running.update((patches @ projection).relu())
    return running.mean_and_covariance()


def measure(scale=1.0):
    """Rows of the benchmark table. `scale` < 1 takes fewer features, for a trial; the targets hold for 1.

    The first row is in seconds, medians of alternating runs, ratio = baseline / ours. The second row holds the
    distances themselves, and its ratio is their relative difference. The covariances have full rank: where they have
    not, the baseline's matrix square root is inaccurate, and there is nothing to be equal to.
    """
    rng = np.random.default_rng(0)
    photos = sklearn.datasets.load_sample_images().images
    dimension = max(16, round(DIMENSION * scale))
    N = max(64, round(IMAGES * scale))
    projection = torch.from_numpy(rng.normal(size=(3 * PATCH**2, dimension)).astype(np.float32) / PATCH)
    arguments = [array for _ in range(2) for array in feature_statistics(photo_patches(rng, photos, N), projection)]
    seconds, distances = {}, {}
    for _ in range(REPEATS):
        for name, distance in (("ours", frechet_distance), ("baseline", calculate_frechet_distance)):
            # The baseline prints and warns about singular products.
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                start = time.perf_counter()
                distances[name] = float(distance(*arguments))
                seconds.setdefault(name, []).append(time.perf_counter() - start)
    ours, baseline = (statistics.median(seconds[name]) for name in ("ours", "baseline"))
    difference = abs(distances["ours"] - distances["baseline"]) / abs(distances["baseline"])
    return [
        {
            "what": f"Frechet distance, {dimension} features, against pytorch-fid (s)",
            "ours": ours,
            "baseline": baseline,
            "ratio": baseline / ours,
            "target": 5.0,
            "ok": baseline / ours >= 5.0,
        },
        {
            "what": "the same: relative difference of the distances",
            "ours": distances["ours"],
            "baseline": distances["baseline"],
            "ratio": difference,
            "target": 1e-6,
            "ok": difference <= 1e-6,
        },
    ]

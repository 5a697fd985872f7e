"""Scores of sets of images by their features: Frechet distances, Inception score, precision, recall."""

import os
import warnings
from pathlib import Path

import numpy as np
import torch
from scipy.linalg.lapack import dpstrf

from score.features import POOLED_PIXELS
from score.samples import read_npz
from utils import distributed
from utils.bar import progress_bar
from utils.errors import DataError
from utils.files import atomic_write, file_hash, make_directory
from utils.images import fingerprint

PUBLISHED = {2048: "inception", 192: "pixels"}  # {D: features} of files that do not say what they are of
LONG_POOLING, LONG_COVER = 3e8, 10_000  # from so many values, and images, on there is a bar
CACHE = Path("results/stats")


def mean_and_covariance(batches, dimension, device="cpu"):
    """The mean and the covariance, with N - 1, of features that come in batches, summed in float64.

    Args:
        batches: of features (B, D), those of this process. All processes take part.
        dimension: D.
        device: where to sum.

    Returns:
        mu (D,) and sigma (D, D), float64 arrays, of the features of all processes, which are all given
        them."""
    count = torch.zeros((), dtype=torch.int64, device=device)
    total = torch.zeros(dimension, dtype=torch.float64, device=device)
    outer = torch.zeros(dimension, dimension, dtype=torch.float64, device=device)
    for features in batches:
        features = features.to(total)
        count += len(features)
        total += features.sum(dim=0)
        outer.addmm_(features.T, features)
    for summed in (count, total, outer):
        distributed.total(summed)
    mu = total / count
    sigma = (outer - count * torch.outer(mu, mu)) / (count - 1)
    return mu.cpu().numpy(), sigma.cpu().numpy()


@torch.no_grad()
def feature_batches(images, space=POOLED_PIXELS, order=None):
    """Yield (features (B, D), class probabilities (B, C)) of the batches that fall to this process.

    Batch j is that of process j mod P, so that what is in a batch does not depend on P.

    Args:
        images: (N, 3, H, W) uint8.
        space: a `FeatureSpace`; of one without classes C is 0.
        order: (N,) int64, the order to take the images in; None for their own."""
    size, P = space.batch_size, distributed.world_size()
    batches = images.split(size) if order is None else (images[rows] for rows in order.split(size))
    is_short = space is POOLED_PIXELS and images.numel() < LONG_POOLING
    with progress_bar(desc=space.title, total=len(images), unit="image", disable=is_short) as bar:
        for j, batch in enumerate(batches):
            if j % P == distributed.rank():
                features = space.features(batch)
                logits = space.logits(features) if space.logits else torch.empty(len(batch), 0)
                yield features, logits.softmax(dim=1)
            bar.update(len(batch))


def compute_statistics(images, space=POOLED_PIXELS):
    """(mu, sigma) of the features of uint8 images (N, 3, H, W), by and for all processes."""
    batches = (features for features, _ in feature_batches(images, space))
    return mean_and_covariance(batches, space.dimension, space.device)


def factor(sigma):
    """L (D, r) with L L^T = sigma for a positive semi-definite sigma (D, D) of numerical rank r.

    Cholesky with complete pivoting (Higham, Accuracy and Stability of Numerical Algorithms, 10.3). It
    needs no positive definite matrix, costs D r^2 instead of an eigendecomposition's 9 D^3, and drops
    the directions in which the covariance of few images has nothing but rounding errors, whose square
    roots would add up."""
    triangle, pivots, rank, _ = dpstrf(sigma, lower=1)
    L = np.zeros((len(sigma), rank))
    L[pivots - 1] = np.tril(triangle)[:, :rank]
    return L


def frechet_distance(mu_1, sigma_1, mu_2, sigma_2):
    """|mu_1 - mu_2|^2 + Tr(sigma_1 + sigma_2 - 2 (sigma_1 sigma_2)^(1/2)), Dowson and Landau 1982.

    With sigma_1 = L L^T, the non-zero eigenvalues of sigma_1 sigma_2 = L (L^T sigma_2) are those of the
    symmetric L^T sigma_2 L, so the trace of the root is the sum of the roots of symmetric eigenvalues:
    no matrix square root, and no imaginary parts to throw away. Of the two covariances the one of lower
    rank is factored, which leaves L^T sigma_2 L no needless null space.

    mu_1, mu_2: (D,); sigma_1, sigma_2: (D, D), symmetric positive semi-definite, of any rank. Computed
    in float64. Returns a float >= 0, which is 0 up to rounding for equal arguments."""
    mu_1, sigma_1, mu_2, sigma_2 = (np.asarray(x, np.float64) for x in (mu_1, sigma_1, mu_2, sigma_2))
    ways = (factor(sigma_1), sigma_2), (factor(sigma_2), sigma_1)
    L, other = min(ways, key=lambda way: way[0].shape[1])
    eigenvalues = np.linalg.eigvalsh(L.T @ (other @ L))
    # rounding leaves the smallest eigenvalues, and the distance of equals, a little below zero
    trace_of_root = np.sqrt(eigenvalues.clip(min=0)).sum()
    distance = np.square(mu_1 - mu_2).sum() + np.trace(sigma_1) + np.trace(sigma_2) - 2 * trace_of_root
    return max(0.0, float(distance))


def inception_score(probs, splits=10):
    """exp(E_x KL(p(y|x) || p(y))) over consecutive splits of the images: (mean, population deviation).

    Split k holds the images from k N // splits up to (k + 1) N // splits, p(y) is the mean over the
    split, and 0 log 0 = 0. The score lies between 1 and the number of classes. Computed in float64, by
    E_x KL(p(y|x) || p(y)) = E_x sum_y p(y|x) log p(y|x) - sum_y p(y) log p(y), which needs one pass over
    the split.

    probs: (N, classes) class probabilities, one row an image, in the order of the images; N is at least
    `splits`."""
    N = len(probs)
    scores = torch.empty(splits, dtype=torch.float64)
    for k in range(splits):
        p = probs[k * N // splits : (k + 1) * N // splits].double()
        marginal = p.mean(dim=0)
        scores[k] = (torch.xlogy(p, p).sum(dim=1).mean() - torch.xlogy(marginal, marginal).sum()).exp()
    return scores.mean().item(), scores.std(correction=0).item()


def precision_recall(real, generated, k=3, block=1024):
    """Improved precision and recall (Kynkaanniemi et al. 2019), each a share in [0, 1].

    A set covers the balls around its points that reach to the k-th nearest other point. Precision is the
    share of generated images that real ones cover, recall the share of real images that generated ones
    cover.

    Args:
        real, generated: features (M, D) and (N, D), at least 2 each, on one device. Computed in float64;
            squared distances below 1e-12 of the points' squared norms, which may be rounding errors, are
            taken for 0.
        k: of the radius; one less than there are points where those are fewer.
        block: rows of distances at a time."""

    def sq_distance(a, b):
        sums = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)
        distance = sums - 2 * a @ b.T
        return distance.where(distance > 1e-12 * sums, 0)

    def covered(points, by):
        nearest = min(k, len(by) - 1) + 1  # the first is the point itself
        radii = [sq_distance(rows, by).kthvalue(nearest, dim=1).values for rows in blocks(by)]
        radius = torch.cat(radii)
        inside = torch.cat([(sq_distance(rows, by) <= radius).any(dim=1) for rows in blocks(points)])
        return inside.double().mean().item()

    def blocks(points):
        for rows in points.split(block):
            yield rows
            bar.update(len(rows))

    real, generated = real.double(), generated.double()
    total = 2 * (len(real) + len(generated))
    is_short = total < LONG_COVER
    with progress_bar(total=total, desc="precision, recall", unit="image", disable=is_short) as bar:
        return {"precision": covered(generated, real), "recall": covered(real, generated)}


def load_statistics(path):
    """(mu (D,), sigma (D, D), provenance) of a statistics file, float64; published ones have {} for it.

    Raises:
        DataError: the file is missing or damaged, or has other shapes, values that are not finite, or no
            covariance."""
    arrays = read_npz(path, ("mu", "sigma", "features", "images", "weights"))
    mu, sigma = (arrays.pop(name, np.zeros(0)) for name in ("mu", "sigma"))
    are_floats = mu.dtype.kind == sigma.dtype.kind == "f"
    fits = are_floats and mu.size > 0 and sigma.shape == (mu.size, *mu.shape)
    if fits:
        mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
        variances = sigma.diagonal()
        fits = np.isfinite(mu).all() and np.isfinite(sigma).all() and variances.min() >= 0
        fits = fits and np.allclose(sigma, sigma.T, rtol=1e-3, atol=1e-6 * variances.max())
    if not fits:
        what = "mu and sigma are no finite mean (D,) and covariance (D, D)"
        raise DataError(f"{path}: {what}; compute it again")
    return mu, sigma, {name: str(text) for name, text in arrays.items()}


def provenance_of(images, space=POOLED_PIXELS):
    """What decides the statistics of uint8 images (N, 3, H, W): features, pixels, weights."""
    provenance = {"features": space.name, "images": fingerprint(images)}
    return provenance | ({"weights": space.weights_hash} if space.weights_hash else {})


def reference_statistics(images, space=POOLED_PIXELS, cache=None):
    """As `compute_statistics`, but read from a file if it exists, else kept there.

    Args:
        images, space: as there.
        cache: the file; None for one in ./results/stats, named by what it is made from. A file that does
            not say what it was made from, as the published ones, is taken at its word, with a warning.

    Raises:
        DataError: the file cannot be read, was made from other images, features or weights, or could not
            be written, which shows before the work."""
    provenance = provenance_of(images, space)
    path = Path(cache or CACHE / ("-".join(text[:16] for text in provenance.values()) + ".npz"))
    statistics = None
    if distributed.is_main():
        if os.path.exists(path):  # noqa: PTH110 - False also where a directory may not be read
            statistics = known_statistics(path, provenance, space.dimension)
        else:
            make_directory(path.parent, "fid_cache")
    statistics = distributed.from_main(statistics)
    if statistics is None:
        statistics = compute_statistics(images, space)
        if distributed.is_main():
            with atomic_write(path) as file:  # the published format, and what it was computed from
                np.savez(file, mu=statistics[0], sigma=statistics[1], **provenance)
    return statistics


def taken_at_its_word(path):
    """The hash of a file of statistics that does not say what images it is of, or None."""
    found = None
    if distributed.is_main() and Path(path).exists() and "images" not in load_statistics(path)[2]:
        found = file_hash(path)
    return distributed.from_main(found)


def known_statistics(path, expected, dimension):
    """(mu, sigma) in a file; a DataError if it says that they are of something else than `expected`."""
    mu, sigma, saved = load_statistics(path)
    if len(mu) == dimension:
        saved.setdefault("features", expected["features"])
    else:
        saved["features"] = PUBLISHED.get(len(mu), f"{len(mu)} of them")
    for name, text in expected.items():
        if saved.get(name, text) != text:
            difference = f"{name} ({saved[name][:16]}, not {text[:16]})"
            advice = "give another --fid_cache or remove the file"
            raise DataError(f"{path}: statistics of other {difference}; {advice}")
    if saved.keys() != expected.keys():
        what = "doesn't say what it was computed from; taken to be of these images"
        warnings.warn(f"{path}: {what}", stacklevel=4)
    return mu, sigma

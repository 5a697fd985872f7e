"""Scores of sets of images by their features: FID on Inception's, `fpd` on pooled pixels, and the Inception score."""

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg.lapack import dpstrf

from score.inception import FEATURES
from utils import distributed

POOLED_SIZE = 8
DIMENSIONS = {"inception": FEATURES, "pixels": 3 * POOLED_SIZE**2}
PIXEL_BATCH = 1024


class Statistics:
    """Running sums of features (..., D) in float64: the count, the sum and the sum of outer products."""

    def __init__(self, dimension, device="cpu"):
        self.count = 0
        self.sum = torch.zeros(dimension, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dimension, dimension, dtype=torch.float64, device=device)

    def update(self, features):
        """Takes in a batch of features (B, D)."""
        features = features.to(self.sum)
        self.count += len(features)
        self.sum += features.sum(dim=0)
        self.outer.addmm_(features.T, features)

    def merge(self, other):
        """Takes in all that another instance, of another process for example, has taken in."""
        self.count += other.count
        self.sum += other.sum.to(self.sum)
        self.outer += other.outer.to(self.outer)

    def merge_processes(self):
        """Takes in what the other processes' instances have taken in; returns itself, then the same in all of them."""
        self.count = int(distributed.total(torch.tensor(self.count)))
        distributed.total(self.sum)
        distributed.total(self.outer)
        return self

    def mean_and_covariance(self):
        """(mu (D,), sigma (D, D)), float64 arrays, covariance with N - 1. Raises ValueError for less than 2 rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}")
        mu = self.sum / self.count
        sigma = (self.outer - self.count * torch.outer(mu, mu)) / (self.count - 1)
        return mu.cpu().numpy(), sigma.cpu().numpy()


def pixel_features(images):
    """uint8 images (N, 3, H, W) -> float32 (N, 192): pixels in [0, 1], average-pooled to 8 x 8, in the order (3, 8, 8).

    Where 8 does not divide the size the pooling windows overlap by a pixel, and images smaller than 8 x 8 have pixels
    repeated (torch's adaptive average pooling).
    """
    return F.adaptive_avg_pool2d(images.float() / 255, POOLED_SIZE).flatten(1)


def pixel_statistics(images):
    """`Statistics` of the pixel features of uint8 images (N, 3, H, W), on their device, by all processes."""
    statistics = Statistics(DIMENSIONS["pixels"], images.device)
    for batch in images.split(PIXEL_BATCH)[distributed.rank() :: distributed.world_size()]:
        statistics.update(pixel_features(batch))
    return statistics.merge_processes()


def inception_statistics(images, inception, batch_size=50):
    """`Statistics` of the Inception features of uint8 images (N, 3, H, W), with a progress bar, by all processes."""
    statistics = Statistics(FEATURES, inception.class_weight.device)
    for features, _ in inception.batches(images, batch_size):
        statistics.update(features)
    return statistics.merge_processes()


def inception_statistics_and_probs(images, inception, batch_size=50):
    """As `inception_statistics`, and the class probabilities for the Inception score.

    Those are (N, 1008), float32 on the CPU, in the order of the images, and on rank 0 only (None elsewhere).
    """
    statistics, probs = Statistics(FEATURES, inception.class_weight.device), []
    for features, logits in inception.batches(images, batch_size):
        statistics.update(features)
        probs.append(logits.softmax(dim=1).cpu())
    gathered = distributed.gather(probs)
    if gathered:
        in_turn = itertools.chain.from_iterable(itertools.zip_longest(*gathered))
        probs = torch.cat([batch for batch in in_turn if batch is not None])
    return statistics.merge_processes(), probs if gathered else None


def compute_statistics(images, features, inception=None, batch_size=50):
    """(mu, sigma) of uint8 images (N, 3, H, W) for features "inception" (then an `Inception` is needed) or "pixels"."""
    if features == "inception":
        return inception_statistics(images, inception, batch_size).mean_and_covariance()
    return pixel_statistics(images).mean_and_covariance()


def factor(sigma):
    """L (D, r) with L L^T = sigma for a positive semi-definite sigma (D, D) of numerical rank r.

    Cholesky with complete pivoting (Higham, Accuracy and Stability of Numerical Algorithms, 10.3). It needs no
    positive definite matrix, costs D r^2 instead of an eigendecomposition's 9 D^3, and drops the directions in which
    the covariance of few images has nothing but rounding errors, whose square roots would add up.
    """
    triangle, pivots, rank, _ = dpstrf(sigma, lower=1)
    L = np.zeros((len(sigma), rank))
    L[pivots - 1] = np.tril(triangle)[:, :rank]
    return L


def frechet_distance(mu_1, sigma_1, mu_2, sigma_2):
    """|mu_1 - mu_2|^2 + Tr(sigma_1 + sigma_2 - 2 (sigma_1 sigma_2)^(1/2)), Dowson and Landau 1982, Heusel et al. 2017.

    With sigma_1 = L L^T, the non-zero eigenvalues of sigma_1 sigma_2 = L (L^T sigma_2) are those of the symmetric
    L^T sigma_2 L, so the trace of the root is the sum of the roots of symmetric eigenvalues: no matrix square root,
    and no imaginary parts to throw away. Of the two covariances the one of lower rank is factored, which leaves
    L^T sigma_2 L no needless null space.

    mu_1, mu_2: (D,); sigma_1, sigma_2: (D, D), symmetric positive semi-definite, of any rank; computed in float64.
    Returns a float >= 0, and 0 up to rounding for equal arguments. Raises ValueError for shapes that do not fit
    together and for values that are not finite.
    """
    mu_1, sigma_1, mu_2, sigma_2 = (np.asarray(x, np.float64) for x in (mu_1, sigma_1, mu_2, sigma_2))
    D = mu_1.size
    if mu_1.shape != (D,) or mu_2.shape != (D,) or sigma_1.shape != (D, D) or sigma_2.shape != (D, D) or D == 0:
        shapes = ", ".join(str(x.shape) for x in (mu_1, sigma_1, mu_2, sigma_2))
        raise ValueError(f"expected mu_1 (D,), sigma_1 (D, D), mu_2 (D,), sigma_2 (D, D), got {shapes}")
    if not all(np.isfinite(x).all() for x in (mu_1, sigma_1, mu_2, sigma_2)):
        raise ValueError("the mean or the covariance holds values that are not finite")
    L, other = factor(sigma_1), sigma_2
    L_2 = factor(sigma_2)
    if L_2.shape[1] < L.shape[1]:
        L, other = L_2, sigma_1
    eigenvalues = np.linalg.eigvalsh(L.T @ (other @ L))
    # Rounding leaves the smallest eigenvalues a little below zero, and the distance of equal distributions too.
    trace_of_root = np.sqrt(eigenvalues.clip(min=0)).sum()
    distance = np.square(mu_1 - mu_2).sum() + np.trace(sigma_1) + np.trace(sigma_2) - 2 * trace_of_root
    return max(0.0, float(distance))


def inception_score(probs, splits=10):
    """exp(E_x KL(p(y|x) || p(y))) over consecutive splits of the images: (mean, population standard deviation).

    probs: (N, classes) class probabilities, one row an image, in the order of the images. Split k holds the images
    from k N // splits up to (k + 1) N // splits, p(y) is the mean over the split, and 0 log 0 = 0. The score lies
    between 1 and the number of classes. Computed in float64. Raises ValueError if there are fewer images than splits.

    E_x KL(p(y|x) || p(y)) = E_x sum_y p(y|x) log p(y|x) - sum_y p(y) log p(y), which needs one pass over the split.
    """
    N = len(probs)
    if splits > N:
        raise ValueError(f"the inception score of {splits} splits needs at least {splits} images, got {N}")
    scores = []
    for k in range(splits):
        p = probs[k * N // splits : (k + 1) * N // splits].double()
        marginal = p.mean(dim=0)
        divergence = torch.xlogy(p, p).sum(dim=1).mean() - torch.xlogy(marginal, marginal).sum()
        scores.append(divergence.exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()

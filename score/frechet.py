"""Frechet distance between two Gaussians: FID on Inception features, `fpd` on pooled pixels."""

import numpy as np
from scipy.linalg.lapack import dpstrf


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

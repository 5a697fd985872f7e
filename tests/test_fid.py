"""score/fid.py against scipy's matrix square root, NumPy's covariance and closed forms."""

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import sklearn.datasets
import sklearn.neighbors
import torch

from score import fid
from score.features import pooled
from score.fid import (
    compute_statistics,
    frechet_distance,
    load_statistics,
    mean_and_covariance,
    precision_recall,
    reference_statistics,
)
from utils.errors import DataError


def covariance(rng, dimension, samples):
    """A mean and a covariance of correlated, skewed features, of rank min(dimension, samples - 1)."""
    features = np.maximum(rng.normal(size=(samples, dimension)) @ rng.normal(size=(dimension, dimension)), 0)
    return features.mean(axis=0), np.cov(features, rowvar=False)


def rotation(rng, dimension):
    return np.linalg.qr(rng.normal(size=(dimension, dimension)))[0]


def distance_by_sqrtm(mu_1, sigma_1, mu_2, sigma_2):
    root = scipy.linalg.sqrtm(sigma_1 @ sigma_2)
    return ((mu_1 - mu_2) ** 2).sum() + np.trace(sigma_1 + sigma_2 - 2 * root.real)


@pytest.mark.parametrize("dimension", [1, 2, 30, 192])
def test_equals_the_matrix_square_root(dimension):
    rng = np.random.default_rng(dimension)
    one, two = covariance(rng, dimension, 5 * dimension + 5), covariance(rng, dimension, 4 * dimension + 5)
    one, two = ((mu.reshape(dimension), sigma.reshape(dimension, dimension)) for mu, sigma in (one, two))
    expected = distance_by_sqrtm(*one, *two)
    assert expected > 1e-5
    assert frechet_distance(*one, *two) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(*two, *one) == pytest.approx(expected, rel=1e-9)


def test_singular_covariances_equal_the_square_root_on_their_range():
    rng = np.random.default_rng(0)
    (mu_1, sigma_1), (mu_2, sigma_2) = covariance(rng, 20, 100), covariance(rng, 20, 90)
    expected = distance_by_sqrtm(mu_1, sigma_1, mu_2, sigma_2)
    embedding = rotation(rng, 150)[:, :20]
    embedded = [
        embedding @ mu_1,
        embedding @ sigma_1 @ embedding.T,
        embedding @ mu_2,
        embedding @ sigma_2 @ embedding.T,
    ]
    assert frechet_distance(*embedded) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("N_1", "N_2"), [(40, 60), (60, 40), (5, 1000), (1000, 5), (2, 2)])
def test_fewer_images_than_features(N_1, N_2):
    """For centred features X, Y the trace of the root is the nuclear norm of X Y^T / sqrt((N_1 - 1)(N_2 - 1))."""
    rng = np.random.default_rng(N_1)
    X, Y = (np.maximum(rng.normal(size=(N, 300)), 0) for N in (N_1, N_2))
    centred_x, centred_y = X - X.mean(axis=0), Y - Y.mean(axis=0)
    root = np.linalg.norm(centred_x @ centred_y.T, "nuc") / np.sqrt((N_1 - 1) * (N_2 - 1))
    traces = X.var(axis=0, ddof=1).sum() + Y.var(axis=0, ddof=1).sum()
    expected = ((X.mean(axis=0) - Y.mean(axis=0)) ** 2).sum() + traces - 2 * root
    result = frechet_distance(X.mean(0), np.cov(X, rowvar=False), Y.mean(0), np.cov(Y, rowvar=False))
    assert result == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("decades", [0, 6, 12, 16])
def test_ill_conditioned_covariances_with_a_closed_form(decades):
    """Covariances with common eigenvectors: the distance is the sum of (sqrt(a) - sqrt(b))^2."""
    rng = np.random.default_rng(decades)
    a, b = np.logspace(0, -decades, 100), np.logspace(0, -decades, 100)[rng.permutation(100)]
    axes = rotation(rng, 100)
    mu = rng.normal(size=100)
    sigma_1, sigma_2 = (axes * a) @ axes.T, (axes * b) @ axes.T
    expected = 4 * (mu**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(mu, sigma_1, -mu, sigma_2) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("samples", [3, 50, 1000])
def test_equal_distributions_have_distance_zero(samples):
    mu, sigma = covariance(np.random.default_rng(samples), 200, samples)
    assert 0 <= frechet_distance(mu, sigma, mu, sigma) < 1e-9 * np.trace(sigma)


def test_degenerate_covariances():
    zero, one = np.zeros((3, 3)), np.eye(3)
    mu = np.array([1.0, 2.0, 2.0])
    assert frechet_distance(mu, zero, 0 * mu, zero) == pytest.approx(9)
    assert frechet_distance(mu, one, mu, zero) == pytest.approx(3)


def test_agrees_with_pytorch_fid():
    fid_score = pytest.importorskip("pytorch_fid.fid_score")
    rng = np.random.default_rng(0)
    one, two = covariance(rng, 256, 2000), covariance(rng, 256, 1500)
    assert frechet_distance(*one, *two) == pytest.approx(fid_score.calculate_frechet_distance(*one, *two), rel=1e-6)


def test_statistics_equal_numpy_for_any_batches():
    features = np.maximum(np.random.default_rng(0).normal(1, 1, size=(500, 40)), 0).astype(np.float32)
    mu, sigma = mean_and_covariance(torch.from_numpy(features).split(90), 40)
    np.testing.assert_allclose(mu, features.astype(np.float64).mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-12)


def test_pooled_pixels_are_block_means():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8))
    expected = images.numpy().reshape(5, 3, 8, 4, 8, 4).mean(axis=(3, 5)) / 255
    np.testing.assert_allclose(pooled(images), expected.reshape(5, 192), rtol=1e-5)
    eight = images[:, :, :8, :8]
    np.testing.assert_allclose(pooled(eight), eight.numpy().reshape(5, 192) / 255, rtol=1e-6)
    four = images[:, :, :4, :4]
    np.testing.assert_allclose(pooled(four), four.numpy().repeat(2, 2).repeat(2, 3).reshape(5, 192) / 255, rtol=1e-6)


def random_images(seed, N=30):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (N, 3, 16, 16), dtype=np.uint8))


def test_reference_is_kept_and_belongs_to_its_images(tmp_path):
    cache = tmp_path / "new" / "reference.npz"
    computed = reference_statistics(random_images(0), cache=cache)
    with np.load(cache) as file:
        np.testing.assert_array_equal(file["mu"], computed[0])
        np.testing.assert_array_equal(file["sigma"], computed[1])
    before = cache.stat()
    for kept, fresh in zip(reference_statistics(random_images(0), cache=cache), computed, strict=True):
        np.testing.assert_array_equal(kept, fresh)
    assert cache.stat().st_mtime_ns == before.st_mtime_ns
    with pytest.raises(DataError, match=r"reference\.npz.* other images"):
        reference_statistics(random_images(1), cache=cache)


def test_a_cache_that_nobody_named_is_kept_under_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    computed = reference_statistics(random_images(0))
    (kept,) = (tmp_path / "results/stats").iterdir()
    monkeypatch.setattr(fid, "compute_statistics", None)
    np.testing.assert_array_equal(reference_statistics(random_images(0))[0], computed[0])
    kept.write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"not a readable \.npz"):
        reference_statistics(random_images(0))


def test_a_cache_that_was_named_and_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(fid, "compute_statistics", None)
    with pytest.raises(DataError, match=r"--fid_cache=.*file: cannot be written"):
        reference_statistics(random_images(0), cache=tmp_path / "file" / "reference.npz")


def test_published_reference_is_used_with_a_warning(tmp_path):
    cache = tmp_path / "published.npz"
    np.savez_compressed(cache, mu=np.full(192, 0.25), sigma=np.eye(192))
    with pytest.warns(UserWarning, match=r"published\.npz"):
        mu, sigma = reference_statistics(random_images(0), cache=cache)
    assert (mu == 0.25).all()
    assert (sigma == np.eye(192)).all()


def test_reference_of_other_features_is_refused(tmp_path):
    np.savez(tmp_path / "inception.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(DataError, match=r"inception\.npz.* other features \(inception, not pixels"):
        reference_statistics(random_images(0), cache=tmp_path / "inception.npz")


BAD_STATISTICS = {
    "no sigma": {"mu": np.zeros(3)},
    "shapes": {"mu": np.zeros(3), "sigma": np.eye(4)},
    "integers": {"mu": np.zeros(3, int), "sigma": np.eye(3)},
    "objects": {"mu": np.array([None] * 3), "sigma": np.eye(3)},
    "not finite": {"mu": np.array([0, np.nan, 0]), "sigma": np.eye(3)},
    "negative variance": {"mu": np.zeros(3), "sigma": -np.eye(3)},
    "not symmetric": {"mu": np.zeros(3), "sigma": np.triu(np.ones((3, 3)))},
}


@pytest.mark.parametrize("arrays", BAD_STATISTICS.values(), ids=BAD_STATISTICS.keys())
def test_bad_statistics_are_refused(tmp_path, arrays):
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(DataError, match=r"bad\.npz"):
        load_statistics(path)


def test_damaged_and_missing_statistics_are_refused(tmp_path):
    path = tmp_path / "bad.npz"
    with pytest.raises(DataError, match=r"bad\.npz: .*No such file"):
        load_statistics(path)
    np.savez(path, mu=np.zeros(50), sigma=np.eye(50), features="pixels")
    good = path.read_bytes()
    damaged = bytearray(good)
    damaged[len(good) // 2] ^= 1
    for content in (b"", b"text", good[: len(good) // 2], bytes(damaged)):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"bad\.npz"):
            load_statistics(path)


def test_pixel_statistics_equal_numpy():
    images = random_images(3, N=2500)
    features = images.numpy().reshape(2500, 3, 8, 2, 8, 2).mean(axis=(3, 5)).reshape(2500, 192) / 255
    mu, sigma = compute_statistics(images)
    np.testing.assert_allclose(mu, features.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(sigma, np.cov(features, rowvar=False), atol=1e-7)


def test_precision_and_recall_against_scikit_learn():
    """Two clouds that overlap, of which one is wider and has points that are repeated five times."""
    rng = np.random.default_rng(0)
    real, generated = rng.normal(size=(130, 5)), 1.4 * rng.normal(size=(90, 5)) + 0.5
    real[:10] = np.repeat(real[:2], 5, axis=0)
    generated[:2] = real[:2]
    found = precision_recall(*map(torch.from_numpy, (real, generated)), block=32)
    for name, points, by in (("precision", generated, real), ("recall", real, generated)):
        search = sklearn.neighbors.NearestNeighbors(n_neighbors=3, algorithm="brute").fit(by)
        radius = search.kneighbors()[0][:, 2]  # of each point itself is left out
        distance = scipy.spatial.distance.cdist(points, by)
        assert found[name] == np.mean([np.any(row <= radius) for row in distance]) and 0.2 < found[name] < 1
    far = {"precision": 0, "recall": 0}
    assert precision_recall(torch.from_numpy(real[:20]), torch.from_numpy(generated + 99)) == far


def test_precision_and_recall_of_few_images():
    real, generated = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.5], [3.0], [4.0]])
    assert precision_recall(real, generated) == {"precision": 1 / 3, "recall": 1.0}

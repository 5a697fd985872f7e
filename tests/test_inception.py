"""score/inception.py and score/fid.py against pytorch-fid and sums written out."""

import dataclasses
import math
import re
import time

import numpy as np
import pytest
import pytorch_fid.inception
import torch
from pytorch_fid import fid_score

from score import inception as inception_module
from score.features import inception_space
from score.fid import (
    compute_statistics,
    feature_batches,
    frechet_distance,
    inception_score,
    load_statistics,
    reference_statistics,
)
from score.inception import WEIGHTS_NAME, build_network, find_weights, load_inception
from score.samples import save_pngs
from tests.inception_weights import write_weights
from utils.errors import DataError


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A torch home whose hub cache holds random weights under the published name."""
    home = tmp_path_factory.mktemp("torch")
    (home / "hub" / "checkpoints").mkdir(parents=True)
    write_weights(home / "hub" / "checkpoints" / WEIGHTS_NAME)
    return home


@pytest.fixture(scope="module")
def inception(hub):
    with pytest.warns(UserWarning, match="not the published"):
        return inception_space(hub / "hub" / "checkpoints" / WEIGHTS_NAME)


def smooth_images(seed, N, contrast):
    """Random waves in colour, (N, 3, 16, 16)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:16, :16]
    frequency, phase = rng.uniform(0, 1, (2, N, 3, 1, 1)), rng.uniform(0, 6, (N, 3, 1, 1))
    waves = np.sin(frequency[0] * y + frequency[1] * x + phase)
    return torch.from_numpy((127.5 + contrast * waves).astype(np.uint8))


def test_features_and_fid_agree_with_pytorch_fid(tmp_path, hub, inception, monkeypatch):
    """Their features of the same images as PNG files; their distance takes half a minute of all 2,048, so of 8."""
    monkeypatch.setenv("TORCH_HOME", str(hub))
    network = pytorch_fid.inception.InceptionV3([3])
    ours, theirs = [], []
    for name, images in (("one", smooth_images(0, 12, 120)), ("two", smooth_images(1, 10, 60))):
        save_pngs(tmp_path / name, images)
        files = sorted((tmp_path / name).iterdir())
        theirs += fid_score.calculate_activation_statistics(files, network, batch_size=5, num_workers=0)
        ours += compute_statistics(images, dataclasses.replace(inception, batch_size=7))
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4 * np.abs(y).max())
    some = [x[:8] if x.ndim == 1 else x[:8, :8] for x in (*ours, *theirs)]
    distance = fid_score.calculate_frechet_distance(*some[4:])
    assert distance > 0.01 and frechet_distance(*some[:4]) == pytest.approx(distance, rel=1e-3)


def test_logits_are_the_class_scores_without_bias(hub, inception):
    """The whole network of torchvision, unchanged, adds the bias and nothing else."""
    images = smooth_images(2, 3, 100)
    weights = torch.load(hub / "hub" / "checkpoints" / WEIGHTS_NAME, weights_only=True)
    network = build_network().eval()
    network.load_state_dict(weights)
    x = torch.nn.functional.interpolate(images / 127.5 - 1, size=(299, 299), mode="bilinear", align_corners=False)
    with torch.no_grad():
        expected = network(x) - weights["fc.bias"]
    probs = torch.cat([probs for _, probs in feature_batches(images, dataclasses.replace(inception, batch_size=2))])
    torch.testing.assert_close(probs, expected.softmax(dim=1), rtol=1e-3, atol=1e-6)
    assert probs.max() > 0.01
    torch.testing.assert_close(probs.sum(dim=1), torch.ones(3))


def test_reference_belongs_to_its_weights(tmp_path, inception):
    images = smooth_images(3, 2, 100)
    mu, _ = reference_statistics(images, inception, tmp_path / "reference.npz")
    kept, _, provenance = load_statistics(tmp_path / "reference.npz")
    np.testing.assert_array_equal(kept, mu)
    assert provenance["weights"] == inception.weights_hash

    other = dataclasses.replace(inception, weights_hash="0" * 64)
    with pytest.raises(DataError, match=r"reference\.npz.*other weights"):
        reference_statistics(images, other, tmp_path / "reference.npz")


def test_weights_are_found_in_their_places(tmp_path, hub, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(hub))
    assert find_weights() == hub / "hub" / "checkpoints" / WEIGHTS_NAME
    (tmp_path / "mine.pth").touch()
    assert find_weights(tmp_path / "mine.pth") == tmp_path / "mine.pth"
    with pytest.raises(DataError, match=r"--inception_weights.*nowhere\.pth"):
        find_weights(tmp_path / "nowhere.pth")


def test_weights_out_of_reach_are_reported_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(inception_module, "FID_WEIGHTS_URL", "http://127.0.0.1:9/weights.pth")
    start = time.monotonic()
    with pytest.raises(DataError, match=f"{WEIGHTS_NAME}.*--inception_weights.*--fid_features=pixels") as error:
        find_weights()
    assert time.monotonic() - start < 1
    assert str(tmp_path / "hub" / "checkpoints") in str(error.value)


def test_download_is_checked_and_kept_whole(tmp_path, monkeypatch):
    published = tmp_path / "published.pth"
    published.write_bytes(b"not what was published")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(inception_module, "FID_WEIGHTS_URL", published.as_uri())
    cached = tmp_path / "hub" / "checkpoints" / WEIGHTS_NAME
    with pytest.raises(DataError, match="hash"):
        find_weights()
    assert not list(cached.parent.iterdir())
    # The SHA-256 of these bytes, by the sha256sum command, begins with 28fe8f95.
    monkeypatch.setattr(inception_module, "WEIGHTS_HASH", "28fe8f95")
    assert find_weights() == cached
    assert cached.read_bytes() == b"not what was published"


def test_wrong_weights_are_named(tmp_path):
    weights = build_network().state_dict()
    wrong = {
        'Missing key(s) in state_dict: "fc.bias"': {key: value for key, value in weights.items() if key != "fc.bias"},
        'Unexpected key(s) in state_dict: "extra"': weights | {"extra": torch.zeros(1)},
        "size mismatch for fc.bias: copying a param with shape torch.Size([3])": weights | {"fc.bias": torch.zeros(3)},
        "Expected state_dict to be dict-like": [1, 2, 3],
    }
    path = tmp_path / "wrong.pth"
    for message, content in wrong.items():
        torch.save(content, path)
        with pytest.raises(DataError, match=rf"wrong\.pth: .*{re.escape(message)}"):
            load_inception(path)


def test_weights_without_batch_counters_load(tmp_path):
    weights = build_network().state_dict()
    torch.save({key: value for key, value in weights.items() if "num_batches_tracked" not in key}, tmp_path / "old.pth")
    assert torch.equal(load_inception(tmp_path / "old.pth")[1], weights["fc.weight"])


class MarkerWriter:
    """Unpickling this writes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (self.marker, "w")


def test_weights_with_code_run_nothing(tmp_path):
    torch.save({"fc.bias": MarkerWriter(str(tmp_path / "marker"))}, tmp_path / "evil.pth")
    (tmp_path / "text.pth").write_text("text")
    for name in ("evil.pth", "text.pth"):
        with pytest.raises(DataError, match=name) as error:
            load_inception(tmp_path / name)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "marker").exists()


def inception_score_by_loops(probs, splits):
    scores = []
    for k in range(splits):
        split = probs[k * len(probs) // splits : (k + 1) * len(probs) // splits]
        marginal = [sum(p[y] for p in split) / len(split) for y in range(len(split[0]))]
        divergences = [sum(q * math.log(q / m) for q, m in zip(p, marginal, strict=True) if q > 0) for p in split]
        scores.append(math.exp(sum(divergences) / len(divergences)))
    mean = sum(scores) / splits
    return mean, math.sqrt(sum((score - mean) ** 2 for score in scores) / splits)


@pytest.mark.parametrize(("N", "splits"), [(10, 10), (57, 10), (40, 3), (5, 1)])
def test_inception_score_equals_the_sums_written_out(N, splits):
    logits = 4 * np.random.default_rng(N).normal(size=(N, 6))
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    probs[::3] = np.eye(6)[np.arange(N)[::3] % 6]
    expected = inception_score_by_loops(probs.tolist(), splits)
    assert inception_score(torch.from_numpy(probs), splits) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_inception_score_of_the_extremes():
    assert inception_score(torch.full((20, 7), 1 / 7)) == pytest.approx((1, 0), abs=1e-6)
    assert inception_score(torch.eye(5).repeat(10, 1)) == pytest.approx((5, 0), abs=1e-6)


def test_the_download_is_that_of_pytorch_fid():
    assert inception_module.FID_WEIGHTS_URL == pytorch_fid.inception.FID_WEIGHTS_URL

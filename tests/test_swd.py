"""The sliced Wasserstein distance against scipy's filters, scipy's 1-d distance, and what must hold for any."""

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch

from score import swd
from score.evaluate import Quality
from score.features import POOLED_PIXELS


def noise(n, side, seed=0):
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_levels_go_down_to_16_pixels():
    assert swd.level_sides(8) == [] and swd.level_sides(16) == [16] and swd.level_sides(28) == [28]
    assert (
        swd.level_sides(64) == [64, 32, 16] and swd.level_sides(50) == [50, 25] and swd.level_sides(96) == [96, 48, 24]
    )


def test_the_pyramid_is_that_of_scipy():
    kernel = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256

    def convolved(x, scale=1):
        return scipy.ndimage.convolve(x, scale * kernel[None, None], mode="mirror")

    x = noise(2, 64).double().numpy()
    half = convolved(x)[:, :, ::2, ::2]
    quarter = convolved(half)[:, :, ::2, ::2]
    for level, (image, next_one) in enumerate(((x, half), (half, quarter))):
        wide = np.zeros_like(image)
        wide[:, :, ::2, ::2] = next_one
        ours = swd.laplacian_level(torch.from_numpy(x), level, 3)
        np.testing.assert_allclose(ours, image - convolved(wide, 4), atol=1e-9)
    np.testing.assert_allclose(swd.laplacian_level(torch.from_numpy(x), 2, 3), quarter, atol=1e-9)


def test_patches_are_squares_of_the_image_and_normalised_by_channel():
    images = noise(30, 16) // torch.tensor([1, 2, 4]).view(3, 1, 1)
    patches = swd.level_patches(images, 0, 1, "a", "cpu")
    assert patches.shape == (30 * 128, 147)
    by_channel = patches.view(-1, 49, 3)
    np.testing.assert_allclose(by_channel.mean(dim=(0, 1)), 0, atol=1e-5)
    np.testing.assert_allclose(by_channel.std(dim=(0, 1)), 1, atol=1e-4)
    pixels = images.permute(0, 2, 3, 1).double().numpy()
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (7, 7), axis=(1, 2)).transpose(0, 1, 2, 4, 5, 3)
    drawn = patches.view(30, 128, 7, 7, 3).double().numpy()
    for i in (0, 29):  # each patch is a window of its own image, up to the scale and shift of its channels
        red, every = drawn[i, 0, :, :, 0].ravel(), windows[i].reshape(-1, 49, 3)[:, :, 0]
        misfits = np.sort([np.polyfit(red, window, 1, full=True)[1][0] for window in every])
        assert misfits[0] < 1e-3 < misfits[1]
    assert len({tuple(row) for row in patches[:128].tolist()}) > 60  # of 100 places


def test_projections_are_compared_as_scipy_does():
    random = torch.Generator().manual_seed(1)
    a, b = torch.randn(200, 147, generator=random), torch.randn(200, 147, generator=random) * 1.5 + 0.1
    directions = torch.nn.functional.normalize(torch.randn(147, 20, generator=random), dim=0)
    expected = np.mean([scipy.stats.wasserstein_distance(a @ d, b @ d) for d in directions.T])
    assert swd.projected_distance(a, b, directions) == pytest.approx(expected, rel=1e-5)


def test_what_must_hold():
    a, b = noise(80, 32), noise(80, 32, seed=1)
    blurred = swd.blurred(b.float()).to(torch.uint8)
    alike, detail = swd.sliced_wasserstein(a, b), swd.sliced_wasserstein(a, blurred)
    assert set(alike) == {"32", "16"} and alike == swd.sliced_wasserstein(a, b)
    assert detail["32"] > 3 * alike["32"]
    brighter = swd.sliced_wasserstein(a, b // 2)  # of each set its own deviation
    assert brighter["32"] == pytest.approx(alike["32"], rel=0.3)
    assert swd.sliced_wasserstein(noise(4, 8), noise(4, 8)) == {}
    grey = torch.full((10, 3, 16, 16), 128, dtype=torch.uint8)
    assert swd.sliced_wasserstein(grey, grey) == {"16": 0.0}
    fewer = swd.sliced_wasserstein(a, b[:20])
    assert fewer == swd.sliced_wasserstein(a[::4], b[:20]) and fewer["32"] > alike["32"]


def test_quality_reports_it_with_what_real_images_reach(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    real, generated = noise(60, 32), noise(40, 32, seed=1)
    scores = Quality(real, 40, POOLED_PIXELS, "cpu", heldout=real)(generated)
    levels = swd.sliced_wasserstein(real, generated)
    assert scores["swd_32"] == levels["32"] and scores["swd_16"] == levels["16"]
    assert scores["swd"] == np.mean(list(levels.values()))
    halves = swd.sliced_wasserstein(real[::2], real[1::2])
    assert scores["swd_floor"] == np.mean(list(halves.values()))
    assert "swd_floor" not in Quality(real, 40, POOLED_PIXELS, "cpu")(generated)
    assert not {
        name for name in Quality(real[..., :8, :8], 40, POOLED_PIXELS, "cpu")(generated[..., :8, :8]) if "swd" in name
    }

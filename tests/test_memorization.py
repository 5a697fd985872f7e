"""The memorisation search against brute force in float64, and the figures made from it."""

import numpy as np
import pytest
import torch

from score import memorization
from score.memorization import (
    authenticity,
    closer_than_third,
    data_copying,
    extraction,
    measure_distances,
    memorization_ratio,
    memorized_quantity,
    nearer_of_both,
    nearest_neighbors,
    neighbors_of_groups,
)


def as_images(array):
    return torch.from_numpy(np.ascontiguousarray(array))


def uint8_images(random, number, size=6):
    return random.integers(0, 256, (number, 3, size, size), dtype=np.uint8)


def brute_force(generated, training, k):
    """All pairs in float64, whose sums of integers are exact, sorted by (distance, index)."""
    a, b = (images.reshape(len(images), -1).astype("f8") for images in (generated, training))
    distance = np.stack([((x - b) ** 2).sum(axis=1) for x in a])
    index = np.argsort(distance, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distance, index, axis=1) / 255**2, index


def check(generated, training, k=50, **settings):
    sq_distance, index = nearest_neighbors(as_images(generated), as_images(training), k, **settings)
    expected, expected_index = brute_force(generated, training, k)
    assert sq_distance.dtype == torch.float64 and index.dtype == torch.int64
    np.testing.assert_allclose(sq_distance.numpy(), expected, rtol=1e-12)
    np.testing.assert_array_equal(index.numpy(), expected_index)
    return sq_distance, index


def hard_cases():
    random = np.random.default_rng(0)
    noise = uint8_images(random, 300)
    levels = np.broadcast_to(np.arange(200, dtype=np.uint8)[:, None, None, None], (200, 3, 6, 6)).copy()
    one_level = np.repeat(noise[:1], 120, axis=0)
    for i in range(1, 108):
        one_level[i].reshape(-1)[i] ^= 1
    outlier = np.full_like(noise[:150], 7) + random.integers(0, 2, (150, 3, 6, 6), dtype=np.uint8)
    outlier[70] = 255
    return {
        "noise": (uint8_images(random, 40), noise),
        "copies": (noise[100:140], noise),
        "duplicates": (noise[:9], np.repeat(noise[:20], 8, axis=0)),
        "constant images": (levels[50:60], levels),
        "all equal": (noise[:3], np.repeat(noise[:1], 400, axis=0)),
        "one level in one pixel": (one_level[:30], one_level),
        "one far outlier": (outlier[60:80], outlier),
        "black and white": (np.array([0, 255], np.uint8).repeat(108).reshape(2, 3, 6, 6), noise),
        "fewer than k": (noise[:5], noise[10:30]),
        "one training image": (noise[:5], noise[:1]),
        "one generated image": (noise[:1], noise[1:]),
        "neighbouring levels": (noise[:20], np.concatenate([noise[:20] ^ 1, noise[:20]] * 3)),
    }


@pytest.fixture(params=[True, False])
def integers(request, monkeypatch):
    """Both ways of multiplying; that of floats is also a GPU's."""
    monkeypatch.setattr(memorization, "integers_are_faster", lambda D, device: request.param)
    return request.param


@pytest.mark.parametrize("case", hard_cases())
def test_exact_on_hard_images(case, integers):
    check(*hard_cases()[case])


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_floats_of_256_levels_equal_their_uint8(dtype):
    generated, training = hard_cases()["duplicates"]
    every_level = np.arange(256).repeat(3).reshape(256, 3, 1, 1).astype("u1") * np.ones((1, 1, 6, 6), "u1")
    training = np.concatenate([training, every_level])
    of_levels = nearest_neighbors(as_images(generated), as_images(training))
    of_floats = nearest_neighbors(*(as_images(x.astype(dtype) / 255) for x in (generated, training)))
    assert all(torch.equal(a, b) for a, b in zip(of_levels, of_floats, strict=True))


def test_batch_sizes_do_not_matter():
    random = np.random.default_rng(2)
    training = np.repeat(uint8_images(random, 70), 2, axis=0)
    generated = np.concatenate([training[:10], uint8_images(random, 13)])
    whole = check(generated, training, k=7)
    for batch_generated, batch_training in ((1, 1), (5, 9), (23, 30), (1000, 1000)):
        part = check(generated, training, 7, batch_generated=batch_generated, batch_training=batch_training)
        assert all(torch.equal(a, b) for a, b in zip(whole, part, strict=True))


@pytest.mark.parametrize("k", [1, 2, 5, 50, 1000])
def test_every_k(k):
    random = np.random.default_rng(3)
    check(uint8_images(random, 11), uint8_images(random, 200), k, batch_training=64)


def test_images_of_natural_size_and_structure():
    """Smooth images, where most pairs can be ruled out, with a few near copies among them."""
    random = np.random.default_rng(4)
    coarse = random.integers(0, 256, (600, 3, 4, 4)).astype("f4")
    training = torch.nn.functional.interpolate(torch.from_numpy(coarse), size=32, mode="bilinear").byte().numpy()
    generated = training[:40].copy()
    generated[:, :, ::3, ::5] ^= random.integers(0, 4, generated[:, :, ::3, ::5].shape, dtype=np.uint8)
    sq_distance, index = check(generated, training, batch_training=128)
    assert index[:, 0].tolist() == list(range(40)) and sq_distance[:, 0].max() < sq_distance[:, 1].min()


def test_larger_search_in_many_blocks():
    random = np.random.default_rng(5)
    check(uint8_images(random, 150), uint8_images(random, 3000), batch_generated=64, batch_training=256)


@pytest.mark.parametrize("D", [5, 1024, 3000])
def test_products_are_exact(D, integers):
    random = np.random.default_rng(9)
    a, b = (random.integers(-128, 128, (size, D), dtype=np.int8) for size in (7, 9))
    a[0] = b[0] = -128
    slices = (memorization.slices_of(as_images(x.view(np.uint8) ^ 128), integers) for x in (a, b))
    np.testing.assert_array_equal(memorization.multiply(*slices, integers), a.astype(int) @ b.astype(int).T)


@pytest.mark.parametrize("size", [128, 256])
@pytest.mark.parametrize("level", [1, 254])
def test_large_images_do_not_overflow(size, level, integers):
    """Nearly black or nearly white images, whose sums of products exceed 32 bits at 256x256."""
    random = np.random.default_rng(11)
    training = np.full((6, 3, size, size), level, np.uint8)
    training ^= random.integers(0, 2, training.shape, dtype=np.uint8)
    training[3] = 255 - level
    check(training[1:3], training)


def test_copies_have_distance_zero_not_rounding_error():
    training = torch.rand(200, 3, 8, 8, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255
    sq_distance, index = nearest_neighbors(training[50:60], training)
    assert not sq_distance[:, 0].any() and index[:, 0].tolist() == list(range(50, 60))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generated": torch.zeros(0, 3, 4, 4)}, "generated"),
        ({"training": torch.zeros(0, 3, 4, 4)}, "training"),
        ({"training": torch.zeros(5, 3, 4, 5)}, "have no distance"),
        ({"generated": torch.full((2, 3, 4, 4), torch.nan)}, "generated holds values other than"),
        ({"training": torch.full((2, 3, 4, 4), torch.inf)}, "training holds values other than"),
        ({"training": torch.full((2, 3, 4, 4), 0.5)}, "training holds values other than 0/255 .* round them to uint8"),
        ({"training": torch.full((2, 3, 4, 4), 256 / 255)}, "training holds values other than"),
        ({"generated": torch.full((2, 3, 4, 4), -1 / 255)}, "generated holds values other than"),
        ({"training": torch.zeros(5, 48)}, "have no distance"),
        ({"training": torch.zeros(5, 3, 4, 4, dtype=torch.int32)}, "uint8 or float"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    arguments = {"generated": torch.zeros(2, 3, 4, 4), "training": torch.zeros(5, 3, 4, 4), **changes}
    with pytest.raises(ValueError, match=message):
        nearest_neighbors(**arguments)


def test_ratio_and_mq():
    sq_distance = torch.tensor([[0.0, 1.0, 2.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.3, 1.0, 4.7]])
    ratio = memorization_ratio(sq_distance)
    np.testing.assert_allclose(ratio, [0, 1, 0, 0.15], rtol=1e-6)
    assert memorized_quantity(torch.tensor([0.0, 1e-5, 0.1499, 0.15, 0.5, 0.95], dtype=torch.float64)) == {
        15: 3, 20: 4, 30: 4, 40: 4, 50: 4, 60: 5, 70: 5, 80: 5, 90: 5,
    }  # fmt: skip


def test_closer_than_a_third():
    """sqrt(1) / sqrt(9) is exactly a third and does not count; a copy does, also of a repeated image."""
    found = closer_than_third(torch.tensor([[1.0, 9.0], [1.0, 9.1], [0.0, 0.0], [2.0, 3.0]]))
    assert found.tolist() == [False, True, True, False]
    assert closer_than_third(torch.tensor([[0.0], [0.1]])).tolist() == [True, False]


def test_extracted_images_are_counted_once():
    sq_distance = torch.tensor([[0.0, 5.0], [1.0, 90.0], [1.0, 90.0], [4.0, 5.0]])
    index = torch.tensor([[3, 0], [3, 1], [7, 1], [2, 1]])
    assert extraction(sq_distance, index) == {"f_mem": 0.75, "extracted": 2}
    assert extraction(sq_distance[3:], index[3:])["extracted"] == 0


@pytest.mark.parametrize("M", [1, 2, 40])
def test_mirror_images_against_brute_force(M):
    """An image and its mirror image are one training image; symmetric ones are as near both ways."""
    random = np.random.default_rng(M)
    training = uint8_images(random, M, 4)
    training[::5] = np.maximum(training[::5], training[::5, :, :, ::-1])
    generated = uint8_images(random, 50, 4)
    for i in range(30):
        generated[i] = training[i % M, :, :, :: 1 if i % 2 else -1] ^ random.integers(0, 2, (3, 4, 4), dtype=np.uint8)
    a, b = (x.reshape(len(x), -1).astype("f8") for x in (generated, training))
    c = training[..., ::-1].reshape(M, -1).astype("f8")
    distance = np.minimum(((a[:, None] - b) ** 2).sum(-1), ((a[:, None] - c) ** 2).sum(-1)) / 255**2
    found = nearest_neighbors(as_images(generated), as_images(training), 50)
    mirrored = nearest_neighbors(as_images(generated[..., ::-1]), as_images(training), 2)
    sq_distance, index = nearer_of_both(found, mirrored)
    np.testing.assert_allclose(sq_distance[:, :M], np.sort(distance, axis=1)[:, :2])
    np.testing.assert_array_equal(index[:, 0], distance.argmin(axis=1))
    if M > 1:
        np.testing.assert_array_equal(index[:, 1], distance.argsort(axis=1)[:, 1])
        near = np.sort(distance, axis=1)[:, 0] * 9 < np.sort(distance, axis=1)[:, 1]
        expected = {"f_mem": near.mean(), "extracted": len(set(distance.argmin(axis=1)[near]))}
        assert extraction(sq_distance, index) == expected and near.sum() >= 30


def z_score(generated, real):
    """Of pairs counted one by one."""
    U = sum((g > r) + 0.5 * (g == r) for g in generated for r in real)
    n, m = len(generated), len(real)
    return (U - n * m / 2) / np.sqrt(n * m * (n + m + 1) / 12)


def near(images, random, level):
    return images ^ random.integers(0, level, images.shape, dtype=np.uint8)


def test_data_copying_in_cells_that_are_plain_to_see():
    """Dark, middle and bright images; the generated ones copy the dark, are far from the middle, and few are bright."""
    random = np.random.default_rng(1)
    draw = lambda number, low: random.integers(low, low + 30, (number, 3, 8, 8), dtype=np.uint8)  # noqa: E731
    training = np.concatenate([draw(100, 0), draw(200, 100), draw(100, 200)])
    heldout = np.concatenate([draw(120, 0), draw(130, 100), draw(100, 200)])
    generated = np.concatenate([near(training[np.arange(110) % 100], random, 8), draw(200, 104), draw(5, 200)])
    d, d_heldout = (brute_force(x, training, 1)[0] for x in (generated, heldout))
    found = data_copying(*map(as_images, (generated, training, heldout, d, d_heldout)))
    z = [z_score(d[:110, 0], d_heldout[:120, 0]), z_score(d[110:310, 0], d_heldout[120:250, 0])]
    assert found == {"c_t": pytest.approx(np.average(z, weights=[120, 130])), "c_t_cells": 2}
    assert z[0] < -10 and z[1] > 3
    none = data_copying(*map(as_images, (generated[:9], training, heldout, d[:9], d_heldout)))
    assert none == {}


def test_authenticity_against_brute_force():
    random = np.random.default_rng(8)
    training, generated = uint8_images(random, 40, 2), uint8_images(random, 60, 2)
    generated[:5] = training[:5]
    training[20] = training[4]
    generated[7] = training[20] ^ 1
    distance, index = brute_force(generated, training, 40)
    own = brute_force(training, training, 2)[0][:, 1]
    expected = np.mean(distance[:, 0] > own[index[:, 0]])
    sq_distance, nearest = nearest_neighbors(as_images(generated), as_images(training))
    assert authenticity(sq_distance, nearest, as_images(training)) == pytest.approx(expected)
    assert 0 < expected < 1
    assert authenticity(sq_distance[:, :1], nearest[:, :1] * 0, as_images(training[:1])) == 0


def of_other_groups(distance, groups):
    """Row by row, each image's nearest and then those of other groups: distances and indices."""
    rows = []
    for row in distance:
        order = np.argsort(row, kind="stable")
        first = order[0]
        kept = [first] + [j for j in order[1:] if groups[j] != groups[first]]
        rows.append((row[kept[:50]], kept[:50]))
    return zip(*rows, strict=True)


def altered_repeats(random, groups, M, size=4):
    """M training images, those of a group alike but not equal, and generated copies and others."""
    training = uint8_images(random, M, size)
    for group in set(groups.tolist()):
        members = np.flatnonzero(groups == group)
        training[members] = near(training[members[[0] * len(members)]], random, 4)
    copies = near(training[random.integers(0, M, 30)], random, 4)
    return training, np.concatenate([copies, uint8_images(random, 20, size)])


@pytest.mark.parametrize(
    ("M", "sizes"), [(200, [40, 7, 7, 2]), (90, [60, 20]), (60, [60]), (55, []), (1, [])]
)  # fmt: skip
def test_neighbours_of_other_groups_against_brute_force(M, sizes, monkeypatch):
    """Altered repeats, also where fewer than 50 images or none are of other groups."""
    monkeypatch.setattr(memorization, "LIST_ENTRIES", 1500)  # some images at a time
    random = np.random.default_rng(M)
    groups = np.arange(M)
    for number, members in enumerate(np.split(random.permutation(M), np.cumsum(sizes))[: len(sizes)]):
        groups[members] = M + number
    groups = np.unique(groups, return_inverse=True)[1]
    training, generated = altered_repeats(random, groups, M)
    of_training, of_generated = as_images(training), as_images(generated)
    a, b = (x.reshape(len(x), -1).astype("f8") for x in (generated, training))
    expected, indices = of_other_groups(((a[:, None] - b) ** 2).sum(-1) / 255**2, groups)

    found, index = neighbors_of_groups(of_generated, of_training, torch.from_numpy(groups))
    for row, numbers, d, kept in zip(found, index, expected, indices, strict=True):
        np.testing.assert_allclose(row[: len(d)], d, rtol=1e-12)
        assert numbers[: len(d)].tolist() == kept
        assert row[len(d) :].isnan().all() and (numbers[len(d) :] == -1).all()
    numbers = measure_distances(found, index, of_training, torch.from_numpy(groups))
    ratio = np.array([d[0] / d.mean() if d.any() else 0 for d in expected])
    assert numbers["mq"] == {str(p): int((100 * ratio < p).sum()) for p in memorization.THRESHOLDS}
    copied = np.array([d[0] == 0 or (len(d) > 1 and 9 * d[0] < d[1]) for d in expected])
    assert numbers["f_mem"] == copied.mean()
    nearest = np.array([kept[0] for kept in indices])
    assert numbers["extracted"] == len(set(groups[nearest[copied]]))
    between = ((b[:, None] - b) ** 2).sum(-1) / 255**2
    between[groups[:, None] == groups] = np.inf
    assert numbers["auth_pct"] == pytest.approx(
        100 * np.mean([d[0] > between[j].min() for d, j in zip(expected, nearest, strict=True)])
    )

    alone = neighbors_of_groups(of_generated, of_training, torch.arange(M))
    without = nearest_neighbors(of_generated, of_training)
    assert all(torch.equal(x, y) for x, y in zip(alone, without, strict=True))
    numbers_without = measure_distances(*without, of_training)
    assert numbers_without == measure_distances(*alone, of_training, torch.arange(M))
    if M == 200:
        assert numbers_without["f_mem"] < 0.5 < numbers["f_mem"] == 0.6, "copies of repeats are seen"


def test_mirror_images_of_groups_against_brute_force():
    """A copy of the mirror image of one that stands there four times altered."""
    random = np.random.default_rng(7)
    groups = np.arange(80) // 4
    training, generated = altered_repeats(random, groups, 80)
    generated[::2] = generated[::2, :, :, ::-1]
    a, b, c = (x.reshape(len(x), -1).astype("f8") for x in (generated, training, training[..., ::-1]))
    distance = np.minimum(((a[:, None] - b) ** 2).sum(-1), ((a[:, None] - c) ** 2).sum(-1)) / 255**2
    expected, indices = of_other_groups(distance, groups)
    found, mirrored = (
        neighbors_of_groups(as_images(x), as_images(training), torch.from_numpy(groups), k)
        for x, k in ((generated, 50), (generated[..., ::-1], 2))
    )
    sq_distance, index = nearer_of_both(found, mirrored, torch.from_numpy(groups))
    np.testing.assert_allclose(sq_distance, [d[:2] for d in expected])
    assert index.tolist() == [kept[:2] for kept in indices]
    assert extraction(sq_distance, index, torch.from_numpy(groups))["f_mem"] == 0.6


def test_all_in_one_group_has_no_second():
    random = np.random.default_rng(3)
    training = as_images(uint8_images(random, 5))
    generated = torch.cat([training[:2], as_images(uint8_images(random, 4))])
    groups = torch.zeros(5, dtype=torch.int64)
    both_ways = (generated, generated.flip(-1))
    found, mirrored = (neighbors_of_groups(x, training, groups, k=2) for x in both_ways)
    both = nearer_of_both(found, mirrored, groups)
    assert extraction(*found, groups) == extraction(*both, groups) == {"f_mem": 2 / 6, "extracted": 1}
    assert authenticity(*found, training, groups) == 0

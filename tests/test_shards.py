"""Shards are a balanced partition, laid out as each split says."""

import numpy as np
import pytest
import torch

from training.shards import SPLITS, exchange, number_of_step, partition


@pytest.mark.parametrize("split", [split for split in SPLITS if split != "all"])
@pytest.mark.parametrize(("images", "classes", "K"), [(100, 10, 10), (97, 10, 4), (64, 3, 7), (10, 10, 10), (5, 1, 1)])
def test_a_balanced_partition(images, classes, K, split):
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, classes, images))
    shards = partition(labels, K, split, seed=1)
    assert len(shards) == K
    assert sorted(torch.cat(shards).tolist()) == list(range(images))
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1


def test_stratified_takes_consecutive_images_of_every_class():
    labels = torch.tensor([0, 1, 2] * 20)
    for number, shard in enumerate(partition(labels, 4, "stratified", seed=0)):
        for label in range(3):
            of_class = [i for i in shard.tolist() if labels[i] == label]
            assert of_class == [label + 3 * i for i in range(5 * number, 5 * number + 5)]


def test_spare_images_of_the_classes_rotate():
    labels = torch.arange(3).repeat_interleave(5)  # 5 images a class on 4 shards: one spare each
    shards = partition(labels, 4, "stratified", seed=0)
    assert [len(shard) for shard in shards] == [4, 4, 4, 3]
    assert [torch.bincount(labels[shard], minlength=3).tolist() for shard in shards] == [
        [2, 1, 1],
        [1, 2, 1],
        [1, 1, 2],
        [1, 1, 1],
    ]


def test_contiguous_and_random():
    labels = torch.zeros(10, dtype=torch.long)
    assert [shard.tolist() for shard in partition(labels, 3, "contiguous", 0)] == [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]
    one, same, other = (partition(labels, 3, "random", seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert any(a.tolist() != b.tolist() for a, b in zip(one, other, strict=True))


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split"):
        partition(torch.zeros(3, dtype=torch.long), 2, "alphabetic", 0)


def test_steps_are_numbered_as_in_shards_trained_one_after_the_other():
    steps_per_round, count, own = (3, 1, 4), 0, [0, 0, 0]
    for _ in range(3):
        for shard, steps in enumerate(steps_per_round):
            for _ in range(steps):
                own[shard] += 1
                count += 1
                assert number_of_step(steps_per_round, shard, own[shard]) == count


def test_all_gives_every_shard_all_images():
    shards = partition(torch.zeros(5, dtype=torch.long), 3, "all", seed=0)
    assert [shard.tolist() for shard in shards] == [[0, 1, 2, 3, 4]] * 3


@pytest.mark.parametrize("split", ["stratified", "random", "contiguous"])
def test_copies_are_spread_over_the_shards_or_stay_together(split):
    slot_image = torch.tensor([0, 1, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 8, 8, 8, 9])  # images 1 and 8 fill four slots each
    labels = torch.zeros(len(slot_image), dtype=torch.long)
    for place, copies in (("spread", [1, 1, 1, 1]), ("cluster", [0, 0, 0, 4])):
        shards = partition(labels, 4, split, 0, slot_image, place)
        assert sorted(torch.cat(shards).tolist()) == list(range(len(slot_image)))
        for image in (1, 8):
            assert sorted(int((slot_image[shard] == image).sum()) for shard in shards) == copies
    sizes = [len(shard) for shard in partition(labels, 4, split, 0, slot_image, "spread")]
    assert sizes == [4, 4, 4, 4]


def test_random_shards_of_another_round_are_others_of_the_same_sizes():
    labels = torch.zeros(103, dtype=torch.long)
    first, second = (partition(labels, 4, "random", 0, r=r) for r in (0, 1))
    assert any(a.tolist() != b.tolist() for a, b in zip(first, second, strict=True))
    assert [len(shard) for shard in first] == [len(shard) for shard in second]


def test_exchange_against_loops():
    random = np.random.default_rng(3)
    shards = [torch.from_numpy(np.sort(part)) for part in np.array_split(random.permutation(41), 4)]
    counts = torch.from_numpy(random.integers(0, 4, 41))  # with many ties
    expected = [set(shard.tolist()) for shard in shards]
    for k, shard in enumerate(shards):
        ranked = sorted(shard.tolist(), key=lambda slot: (-int(counts[slot]), slot))
        for slot in ranked[:2]:  # 0.25 of the smallest shard, of 10
            expected[k].remove(slot)
            expected[(k + 1) % 4].add(slot)
    found = exchange(shards, counts, 0.25)
    assert [shard.tolist() for shard in found] == [sorted(shard) for shard in expected]


# sizes of groups, number of single images, shards
GROUPS = [
    ([], 20, 3),
    ([4, 4, 4, 2], 10, 4),
    ([50] * 20, 2000, 3),
    ([9, 2], 3, 2),
    ([5, 5, 4], 0, 2),
    ([3, 2, 2], 0, 4),
]


def grouped(sizes, singles):
    """Groups of these sizes and of one, mixed, and classes that do not heed them."""
    random = np.random.default_rng(1)
    of = random.permutation(np.repeat(np.arange(len(sizes) + singles), [*sizes, *[1] * singles]))
    return torch.from_numpy(of), torch.from_numpy(random.integers(0, 3, len(of)))


@pytest.mark.parametrize(("sizes", "singles", "K"), GROUPS)
def test_groups_stay_together_and_sizes_are_even(sizes, singles, K):
    groups, labels = grouped(sizes, singles)
    expected = [0] * K
    for size in sorted(sizes, reverse=True) + [1] * singles:
        expected[expected.index(min(expected))] += size
    rounds = [partition(labels, K, "together", 0, groups=groups, r=r) for r in range(6)]
    for shards in rounds:
        assert sorted(torch.cat(shards).tolist()) == list(range(len(groups)))
        assert all(shard.tolist() == sorted(shard.tolist()) for shard in shards)
        assert [len(shard) for shard in shards] == sorted(expected, reverse=True)
        sets = [set(groups[shard].tolist()) for shard in shards]
        assert sum(map(len, sets)) == len(sets[0].union(*sets))
    assert all(map(torch.equal, rounds[0], partition(labels, K, "together", 9, groups=groups)))
    assert all(map(torch.equal, rounds[3], partition(labels, K, "together", 0, groups=groups, r=3)))
    if sizes and singles > 100:
        place = torch.tensor(
            [[next(k for k in range(K) if slot in shards[k]) for slot in range(50)] for shards in rounds]
        )
        assert (place.min(0).values < place.max(0).values).float().mean() > 0.9


def test_single_images_are_stratified_around_the_groups():
    groups, labels = grouped([50, 30, 7], 300)
    single = groups.bincount()[groups] == 1
    for shard in partition(labels, 4, "together", 0, groups=groups):
        own = shard[single[shard]]
        for label in range(3):
            share = int((labels[single] == label).sum()) * len(own) / 300
            assert abs(int((labels[own] == label).sum()) - share) <= 2


@pytest.mark.parametrize("r", [0, 2])
def test_balanced_shards_have_as_many_groups(r):
    groups, labels = grouped([40, 9, 9, 2], 25)
    shards = partition(labels, 3, "together", 0, groups=groups, r=r, balance=True)
    assert [len(groups[shard].unique()) for shard in shards] == [10, 10, 9]
    assert sorted(torch.cat(shards).tolist()) == list(range(len(groups)))

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

"""Shards are a balanced partition, laid out as each split says."""

import numpy as np
import pytest
import torch

from training.shards import SPLITS, default_split, make_shards, number_of_step


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("images", "classes", "K"), [(100, 10, 10), (97, 10, 4), (64, 3, 7), (10, 10, 10), (5, 1, 1)])
def test_a_balanced_partition(images, classes, K, split):
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, classes, images))
    shards = make_shards(labels, K, split, seed=1)
    assert len(shards) == K
    assert sorted(torch.cat(shards).tolist()) == list(range(images))
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1


def test_stratified_takes_consecutive_images_of_every_class():
    labels = torch.tensor([0, 1, 2] * 20)
    for number, shard in enumerate(make_shards(labels, 4, "stratified", seed=0)):
        for label in range(3):
            of_class = [i for i in shard.tolist() if labels[i] == label]
            assert of_class == [label + 3 * i for i in range(5 * number, 5 * number + 5)]


def test_spare_images_of_the_classes_rotate():
    labels = torch.arange(3).repeat_interleave(5)  # 5 images a class on 4 shards: one spare each
    shards = make_shards(labels, 4, "stratified", seed=0)
    assert [len(shard) for shard in shards] == [4, 4, 4, 3]
    assert [torch.bincount(labels[shard], minlength=3).tolist() for shard in shards] == [
        [2, 1, 1],
        [1, 2, 1],
        [1, 1, 2],
        [1, 1, 1],
    ]


def test_contiguous_and_random():
    labels = torch.zeros(10, dtype=torch.long)
    assert [shard.tolist() for shard in make_shards(labels, 3, "contiguous", 0)] == [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]
    one, same, other = (make_shards(labels, 3, "random", seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert any(a.tolist() != b.tolist() for a, b in zip(one, other, strict=True))


def test_defaults_and_errors():
    assert [default_split(name) for name in ("cifar10", "cifar100", "digits", "cifar10_rand", "afhq")] == [
        "stratified",
        "stratified",
        "stratified",
        "random",
        "contiguous",
    ]
    for K in (0, 4):
        with pytest.raises(ValueError, match="num_shards"):
            make_shards(torch.zeros(3, dtype=torch.long), K, "random", 0)
    with pytest.raises(ValueError, match="split"):
        make_shards(torch.zeros(3, dtype=torch.long), 2, "alphabetic", 0)


def test_steps_are_numbered_as_in_shards_trained_one_after_the_other():
    steps_per_round, count, own = (3, 1, 4), 0, [0, 0, 0]
    for _ in range(3):
        for shard, steps in enumerate(steps_per_round):
            for _ in range(steps):
                own[shard] += 1
                count += 1
                assert number_of_step(steps_per_round, shard, own[shard]) == count

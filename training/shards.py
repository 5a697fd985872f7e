"""Partitions of the training images into shards, and how their steps are counted."""

import torch

from utils.seeding import generator

SPLITS = ("stratified", "random", "contiguous")
DEFAULT_SPLIT = {"cifar10_rand": "random", "afhq": "contiguous"}  # all other data sets: stratified


def default_split(dataset):
    """The split that the paper's experiments use for a data set (`--dataset` name)."""
    return DEFAULT_SPLIT.get(dataset, "stratified")


def make_shards(labels, num_shards, split, seed):
    """Partition images 0..N-1: no image is dropped, and shard sizes differ by at most one.

    Args:
        labels: (N,) int64 class of every image.
        num_shards: K, 1 <= K <= N.
        split: `stratified`: consecutive images of every class in file order, as many to each shard as the class
            allows; `random`: a permutation drawn from `seed`; `contiguous`: consecutive images in file order.
        seed: of the random split.

    Returns:
        K int64 tensors of ascending image indices.

    Raises:
        ValueError: K is not in 1..N, or no such split.
    """
    if not 1 <= num_shards <= len(labels):
        raise ValueError(f"num_shards is {num_shards}: must be between 1 and the number of images, {len(labels)}")
    if split == "stratified":
        groups = [torch.nonzero(labels == label).flatten() for label in labels.unique()]
    elif split == "random":
        groups = [torch.randperm(len(labels), generator=generator("cpu", seed, "shards"))]
    elif split == "contiguous":
        groups = [torch.arange(len(labels))]
    else:
        raise ValueError(f"split is {split!r}: must be one of {', '.join(SPLITS)}")

    parts = [[] for _ in range(num_shards)]
    first = 0  # the shard that the next spare image goes to: it moves on from class to class
    for group in groups:
        size, spare = divmod(len(group), num_shards)
        sizes = [size + ((shard - first) % num_shards < spare) for shard in range(num_shards)]
        first = (first + spare) % num_shards
        for part, chunk in zip(parts, group.split(sizes), strict=True):
            part.append(chunk)
    return [torch.cat(part).sort().values for part in parts]


def number_of_step(steps_per_round, shard, step):
    """The number in the whole run, from 1, of a shard's own step number `step`, from 1.

    It counts as if shards were trained one after the other in every round, so it is the same whichever process makes
    the step, and whenever.

    Args:
        steps_per_round: of each of the K shards.
        shard: from 0.
        step: from 1.
    """
    rounds_before, before = divmod(step - 1, steps_per_round[shard])
    return rounds_before * sum(steps_per_round) + sum(steps_per_round[:shard]) + before + 1

"""Partitions of the training images into shards, their exchange, and how their steps are counted."""

import torch

from utils.seeding import generator

SPLITS = ("stratified", "random", "contiguous", "all")
DEFAULT_SPLIT = {"cifar10_rand": "random", "afhq": "contiguous"}  # as in the paper; others: stratified
PLACES = ("spread", "cluster")


def partition(labels, num_shards, split, seed, slot_image=None, duplicates_in="spread", r=0):
    """Partition slots 0..N-1 of the training set: all of them; without clusters sizes differ by <= 1.

    Args:
        labels: (N,) int64 class of every slot's image.
        num_shards: K, 1 <= K <= N.
        split: `stratified`: consecutive images of every class in file order, as many to each shard as
            the class allows; `random`: a permutation drawn from `seed`; `contiguous`: consecutive images
            in file order; `all`: no partition, every shard has all slots.
        seed: of the random split.
        slot_image: (N,) int64, the number of the image in each slot; None if no image fills several.
        duplicates_in: the slots of a repeated image go `spread` over all shards in turn, or as a
            `cluster` into one: the repeated images in turn. Sizes may differ by an image's slots then.
        r: the round that a random split is of, for new shards every round.

    Returns K int64 tensors of ascending slots.

    Raises:
        ValueError: no such split.
    """
    if split == "all":
        return [torch.arange(len(labels)) for _ in range(num_shards)]
    if slot_image is None:
        slot_image = torch.arange(len(labels))
    repeated = slot_image.bincount()[slot_image] > 1
    single, parts = (~repeated).nonzero().flatten(), [[] for _ in range(num_shards)]
    if split == "stratified":
        groups = [single[labels[single] == label] for label in labels[single].unique()]
    elif split == "random":
        address = ("shards", r) if r else ("shards",)
        groups = [single[torch.randperm(len(single), generator=generator("cpu", seed, *address))]]
    elif split == "contiguous":
        groups = [single]
    else:
        raise ValueError(f"split is {split!r}: must be one of {', '.join(SPLITS)}")

    first = 0  # the shard that the next spare image goes to: it moves on from class to class
    for group in groups:
        size, spare = divmod(len(group), num_shards)
        sizes = [size + ((shard - first) % num_shards < spare) for shard in range(num_shards)]
        first = (first + spare) % num_shards
        for part, chunk in zip(parts, group.split(sizes), strict=True):
            part.append(chunk)
    slots = repeated.nonzero().flatten()
    turn = torch.arange(len(slots))
    if duplicates_in != "spread":
        turn = slot_image[slots].unique(return_inverse=True)[1]
    for shard, part in enumerate(parts):
        part.append(slots[(turn + first + r) % num_shards == shard])
    return [torch.cat(part).sort().values for part in parts]


def exchange(slots, counts, share):
    """Memory samples redistribution of IET-AGC+ (Guan et al. 2025): the most skipped move on a shard.

    Shard k gives `share` of its images, those with the highest counts and of equal ones the lower slots,
    to shard (k + 1) mod K. All give as many, a share of the smallest shard, so that no size changes.

    Args:
        slots: K int64 tensors, those of every shard, ascending.
        counts: (N,) int64, how often each slot's image was skipped, or near the threshold, in its shard.
        share: in [0, 1].

    Returns K int64 tensors of slots, ascending.
    """
    number = int(share * min(map(len, slots)))
    orders = [part[counts[part].argsort(descending=True, stable=True)] for part in slots]
    given = [order[:number] for order in orders]
    return [torch.cat([order[number:], given[k - 1]]).sort().values for k, order in enumerate(orders)]


def exchange_is_due(r, total_round, exchange, exchange_every):
    """Whether an exchange replaces the average after round r, from 1; it never does after the last."""
    return exchange != "off" and (r + 1) % exchange_every == 0 and r < total_round


def number_of_step(steps_per_round, shard, step):
    """The number in the whole run, from 1, of a shard's own step number `step`, from 1.

    It counts as if shards were trained one after the other in every round, so it is the same whichever
    process makes the step, and whenever.
    """
    rounds_before, before = divmod(step - 1, steps_per_round[shard])
    return rounds_before * sum(steps_per_round) + sum(steps_per_round[:shard]) + before + 1

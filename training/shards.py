"""Partitions of the training images into shards, their exchange, and how their steps are counted."""

import torch

from utils.seeding import generator

SPLITS = ("stratified", "random", "contiguous", "together", "all")
DEFAULT_SPLIT = {"cifar10_rand": "random", "afhq": "contiguous"}  # as in the paper; others: stratified
PLACES = ("spread", "cluster")


def partition(
        labels, num_shards, split, seed, slot_image=None, duplicates_in="spread", r=0,
        groups=None, balance=False,
    ):  # fmt: skip
    """Partition slots 0..N-1 of the training set: all of them; without clusters sizes differ by <= 1.

    Args:
        labels: (N,) int64 class of every slot's image.
        num_shards: K, 1 <= K <= N.
        split: `stratified`: consecutive images of every class in file order, as many to each shard as
            the class allows; `random`: a permutation drawn from `seed`; `contiguous`: consecutive images
            in file order; `together`: as `whole_groups`; `all`: no partition, every shard has all slots.
        seed: of the random split.
        slot_image: (N,) int64, the number of the image in each slot; None if no image fills several.
        duplicates_in: the slots of a repeated image go `spread` over all shards in turn, or as a
            `cluster` into one: the repeated images in turn. Sizes may differ by an image's slots then.
        r: the round that a split random or together is of, for new shards every round.
        groups: (N,) int64, the group of each slot, of a split together; None if each is its own.
        balance: a group counts as one, however many slots it has.

    Returns K int64 tensors of ascending slots.

    Raises:
        ValueError: no such split.
    """
    if split == "all":
        return [torch.arange(len(labels)) for _ in range(num_shards)]
    if split == "together":
        stream = generator("cpu", seed, "shards", r) if r else None
        groups = torch.arange(len(labels)) if groups is None else groups
        return whole_groups(labels, groups, num_shards, balance, stream)
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


def whole_groups(labels, groups, num_shards, balance=False, stream=None):
    """Partition slots so that no group is in two shards, and sizes are as even as groups allow.

    Groups of several slots go one by one, the largest first, to the shard that is the smallest then.
    Single slots, class by class, fill the shards up.

    Args:
        labels: (N,) class of every slot's image.
        groups: (N,) int64.
        num_shards: K.
        balance: sizes count groups, not slots: all groups are dealt as single slots are.
        stream: a `torch.Generator` to draw from which groups go where; None: by class, in file order.

    Returns K int64 tensors of ascending slots, the largest first: no stream changes the size of shard k.
    """
    number, size_of = groups.unique(return_inverse=True, return_counts=True)[1:]  # of slots, of groups
    first = number.argsort(stable=True)[size_of.cumsum(0) - size_of]  # slot of each group
    order = labels[first].argsort(stable=True)
    if stream is not None:
        order = order[torch.randperm(len(order), generator=stream)]
    single = torch.ones_like(order, dtype=torch.bool) if balance else size_of[order] == 1
    large, single = order[~single], order[single]

    shard_of, sizes = torch.empty_like(size_of), [0] * num_shards
    for group in large[size_of[large].argsort(descending=True, stable=True)].tolist():
        shard_of[group] = smallest = sizes.index(min(sizes))
        sizes[smallest] += int(size_of[group])
    if stream is not None:  # the largest group is in the first shard, and is to go round
        turn = torch.randperm(num_shards, generator=stream)
        shard_of[large], sizes = turn.argsort()[shard_of[large]], [sizes[k] for k in turn.tolist()]
    room = [0] * num_shards
    for _ in range(len(single)):
        smallest = sizes.index(min(sizes))
        sizes[smallest] += 1
        room[smallest] += 1
    # the seats of a shard are spread evenly over all, so that each class finds as many as it should
    place = torch.cat([(torch.arange(n, dtype=torch.float64) + 0.5) / n for n in room])
    of_seat = torch.arange(num_shards).repeat_interleave(torch.tensor(room))
    shard_of[single] = of_seat[place.argsort(stable=True)]
    by_size = torch.tensor(sizes).argsort(descending=True, stable=True)
    return [(shard_of[number] == k).nonzero().flatten() for k in by_size.tolist()]


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

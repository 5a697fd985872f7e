"""The ensemble step of IET: the weighted mean of sub-models (Liu et al. 2024, eq. 5; McMahan et al. 2017).

The sub-models are spread over processes, and their sum must not depend on which of them are added first. So all terms
of an entry are rounded to multiples of one number u, a power of two so large that each sum of them is exact in float64.
"""

import torch

import distributed
from errors import DataError


def grid(largest, total):
    """u = 2^(e - 52), where 2^e is the smallest power of two above total * largest; tensors of any shape, float64.

    Sums sum_k w_k x_k with sum_k w_k = total and |x_k| <= largest are then below 2^52 u, and below 2^53 u after each
    of less than 2^53 terms was rounded to a multiple of u. Integers up to 2^53 are exact in float64, and so is the sum
    in any order. It is off by at most K u / 2, or K 2^-52 of the largest possible mean.
    """
    _, e = torch.frexp(total * largest.double())
    return torch.ldexp(torch.ones_like(largest, dtype=torch.float64), e - 52)


def weighted_average(models, weights, total, device="cpu"):
    """Entry-wise sum_k weights_k models_k / total over the models of all processes: one all-reduce in float64.

    Args:
        models: lists of tensors, one per model of this process; the same shapes in all.
        weights: a positive number per model, for IET the shard sizes |D_k|.
        total: the sum of all processes' weights.
        device: where to compute.

    Returns:
        The average on the device, with the dtypes of the entries; the same bits whatever process has which model.
    """
    if len(models) == 1 and weights[0] == total:
        return [value.to(device) for value in models[0]]
    largest = torch.stack([torch.stack([value.abs().max().double() for value in model]) for model in models])
    u = grid(distributed.largest(largest.amax(dim=0).to(device)), total)
    sizes = [value.numel() for value in models[0]]
    sums = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
    for model, weight in zip(models, weights, strict=True):
        for value, part, unit in zip(model, sums.split(sizes), u, strict=True):
            part += (value.to(device).flatten().double() * (weight / unit)).round_()
    parts = distributed.total(sums).split(sizes)
    return [
        (part * unit / total).to(value.dtype).view_as(value)
        for part, unit, value in zip(parts, u, models[0], strict=True)
    ]


@torch.no_grad()
def average_learners(learners, numbers, sizes):
    """Replace the weights and EMA weights of all shards, in all processes, by their averages; returns (weights, EMA).

    Adam's state and the schedule of a learner are its own and go on.

    Args:
        learners: those of this process.
        numbers: of their shards.
        sizes: |D_k| of all K shards.

    Raises:
        DataError: a shard's weights are not finite; the learners are as they were.
    """
    device = learners[0].device
    diverged = torch.zeros(len(sizes))
    for number, learner in zip(numbers, learners, strict=True):
        diverged[number] = not (learner.weights.isfinite().all() and learner.ema_weights.isfinite().all())
    if distributed.total(diverged).any():
        raise DataError(
            f"the average of the shards is not finite (shards that diverged: {diverged.nonzero().flatten().tolist()}): "
            "no shard was given it and no checkpoint was written; lower --lr or --grad_clip"
        )
    networks = [(learner.net, learner.ema) for learner in learners]
    models = [[value for net in both for value in net.state_dict().values()] for both in networks]
    values = weighted_average(models, [sizes[number] for number in numbers], sum(sizes), device)
    keys = learners[0].net.state_dict().keys()
    average = dict(zip(keys, values[: len(keys)], strict=True))
    ema_average = dict(zip(keys, values[len(keys) :], strict=True))
    for learner in learners:
        learner.set_weights(average, ema_average)
    return average, ema_average

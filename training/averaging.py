"""The ensemble step of IET: a weighted mean (Liu et al. 2024, eq. 5; McMahan et al. 2017)."""

import copy

import torch

from utils import distributed
from utils.errors import DataError


@torch.no_grad()
def weighted_average(models, sizes):
    """sum_k |D_k| theta_k / |D|, entry by entry.

    The terms are added in float64 in the order of the shards, so that the sum is the same whichever
    process has which of them: shard k is that of process k mod P.

    Args:
        models: {k: state dict} of the shards of this process.
        sizes: |D_k| of all K shards.

    Returns the average as a state dict, in all processes, with the entries' dtypes and device.
    """
    average = {}
    for name, entry in next(iter(models.values())).items():
        total = torch.zeros_like(entry, dtype=torch.float64)
        for k, size in enumerate(sizes):
            value = models[k][name].clone() if k in models else torch.empty_like(entry)
            total += size * distributed.broadcast(value, k % distributed.world_size()).double()
        average[name] = (total / sum(sizes)).to(entry.dtype)
    return average


def average_learners(learners, sizes, replace=True):
    """Replace the weights and EMA weights of all shards, in all processes, by their averages.

    Adam's state and the schedule of a learner are its own and go on.

    Args:
        learners: {k: `Learner`} of the shards of this process.
        sizes: |D_k| of all K shards.
        replace: False to leave the learners as they are.

    Returns the average weights and the average EMA weights, two state dicts.

    Raises:
        DataError: they are not finite; the learners are as they were.
    """
    average = weighted_average({k: learner.net.state_dict() for k, learner in learners.items()}, sizes)
    ema_average = weighted_average({k: learner.ema.state_dict() for k, learner in learners.items()}, sizes)
    if not all(entry.isfinite().all() for entry in (*average.values(), *ema_average.values())):
        what = "no shard was given it and no checkpoint was written"
        raise DataError(f"the average of the shards is not finite: {what}; lower --lr or --grad_clip")
    for learner in learners.values() if replace else ():
        learner.set_weights(average, ema_average)
    return average, ema_average


def ema_networks(learners, K):
    """Copies of the EMA networks of all K shards, in all processes, on the device of training.

    learners: {k: `Learner`} of the shards of this process.
    """
    own, networks = next(iter(learners.values())), []
    for k in range(K):
        networks.append(copy.deepcopy(learners.get(k, own).ema).to(own.device))
        for value in networks[-1].state_dict().values():
            distributed.broadcast(value, k % distributed.world_size())
    return networks

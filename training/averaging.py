"""The ensemble step of IET: the weighted mean of sub-models (Liu et al. 2024, eq. 5; McMahan et al. 2017)."""

import torch


def weighted_average(states, weights):
    """Entry-wise sum_k weights_k states_k / sum_k weights_k, accumulated in float64.

    Args:
        states: K state dicts with the same keys and shapes.
        weights: K positive numbers, for IET the shard sizes |D_k|.

    Returns:
        A state dict with the dtypes of the first.
    """
    total = sum(weights)
    average = {}
    for key, first in states[0].items():
        mean = torch.zeros_like(first, dtype=torch.float64)
        for state, weight in zip(states, weights, strict=True):
            mean.add_(state[key].double(), alpha=weight / total)
        average[key] = mean.to(first.dtype)
    return average


@torch.no_grad()
def average_learners(learners, weights):
    """Replace every learner's weights and EMA weights by their weighted averages; returns (weights, EMA weights).

    Adam's state and the schedule of a learner are its own and go on.
    """
    average = weighted_average([learner.net.state_dict() for learner in learners], weights)
    ema_average = weighted_average([learner.ema.state_dict() for learner in learners], weights)
    for learner in learners:
        learner.set_weights(average, ema_average)
    return average, ema_average

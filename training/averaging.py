"""The ensemble step of IET: the weighted mean of sub-models (Liu et al. 2024, eq. 5; McMahan et al. 2017)."""

import torch

from errors import DataError


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


def is_finite(learner):
    """Whether all weights and EMA weights of a learner are finite."""
    return all(value.isfinite().all() for value in (*learner.entries, *learner.ema_entries))


@torch.no_grad()
def average_learners(learners, weights):
    """Replace every learner's weights and EMA weights by their weighted averages; returns (weights, EMA weights).

    Adam's state and the schedule of a learner are its own and go on.

    Raises:
        DataError: an average is not finite; the learners are as they were.
    """
    average = weighted_average([learner.net.state_dict() for learner in learners], weights)
    ema_average = weighted_average([learner.ema.state_dict() for learner in learners], weights)
    for state in (average, ema_average):
        for key, value in state.items():
            if not value.isfinite().all():
                diverged = [k for k, learner in enumerate(learners) if not is_finite(learner)]
                raise DataError(
                    f"the average of the shards is not finite in {key} (shards that diverged: {diverged}): no shard "
                    "was given it and no checkpoint was written; lower --lr or --grad_clip"
                )
    for learner in learners:
        learner.set_weights(average, ema_average)
    return average, ema_average

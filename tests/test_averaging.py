"""The ensemble average against numpy."""

import numpy as np
import torch

from tests.networks import tiny_learner
from training.averaging import average_learners, weighted_average


def test_weighted_average_against_numpy():
    random = np.random.default_rng(0)
    draw = random.standard_normal
    arrays = [{"a": draw((3, 4)).astype("f4"), "b": draw(5) * 1e4} for _ in range(4)]
    weights = [7, 1, 3, 9]
    states = [{key: torch.from_numpy(value) for key, value in state.items()} for state in arrays]
    average = weighted_average(states, weights)
    for key in ("a", "b"):
        expected = np.average([state[key].astype("f8") for state in arrays], axis=0, weights=weights)
        np.testing.assert_allclose(average[key].numpy(), expected.astype(arrays[0][key].dtype), rtol=1e-7)
        assert average[key].dtype == states[0][key].dtype


def test_average_of_equals_is_exact():
    state = {"a": torch.randn(100)}
    assert torch.equal(weighted_average([state] * 7, [3, 3, 3, 3, 3, 2, 2])["a"], state["a"])


def test_learners_restart_from_the_average_and_keep_their_optimiser():
    learners = [tiny_learner(seed) for seed in (0, 1)]
    for learner, value in zip(learners, (1.0, 4.0), strict=True):
        learner.optim.state[learner.net.head.bias]["exp_avg"] = torch.full((32,), value)
        with torch.no_grad():
            learner.net.head.bias.fill_(value)
            learner.ema.head.bias.fill_(10 * value)
    average, ema_average = average_learners(learners, [2, 1])
    for learner, value in zip(learners, (1.0, 4.0), strict=True):
        assert torch.allclose(learner.net.head.bias, torch.tensor(2.0))
        assert torch.allclose(learner.ema.head.bias, torch.tensor(20.0))
        assert torch.equal(learner.optim.state[learner.net.head.bias]["exp_avg"], torch.full((32,), value))
    assert torch.equal(average["head.bias"], learners[0].net.head.bias)
    assert torch.equal(ema_average["head.bias"], learners[1].ema.head.bias)

"""The ensemble average against numpy."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.networks import tiny_learner
from training.averaging import average_learners, weighted_average


def test_weighted_average_against_numpy():
    random = np.random.default_rng(0)
    draw = random.standard_normal
    arrays = [[draw((3, 4)).astype("f4"), draw(5) * 1e4, np.zeros(2, "f4")] for _ in range(4)]
    weights = [7, 1, 3, 9]
    average = weighted_average([[torch.from_numpy(value) for value in model] for model in arrays], weights, 20)
    for found, *values in zip(average, *arrays, strict=True):
        expected = np.average([value.astype("f8") for value in values], axis=0, weights=weights)
        np.testing.assert_allclose(found.numpy(), expected.astype(values[0].dtype), rtol=1e-7)
        assert found.numpy().dtype == values[0].dtype


@pytest.mark.parametrize("shards", [3, 10, 64])
def test_the_order_of_the_shards_does_not_matter(shards):
    """Values of very different sizes, whose plain float64 sums depend on the order in some of the places."""
    random = np.random.default_rng(shards)
    values = random.standard_normal((shards, 20_000)) * 10.0 ** random.uniform(-12, 3, (shards, 20_000))
    values = torch.from_numpy(values.astype("f4"))
    weights = random.integers(1, 60_000, shards).tolist()
    averages, plain = [], []
    for _ in range(5):
        order = random.permutation(shards)
        models = [[values[k]] for k in order]
        averages.append(weighted_average(models, [weights[k] for k in order], sum(weights))[0])
        terms = [values[k].double() * weights[k] for k in order]
        plain.append(sum(terms[1:], terms[0]))
    assert all(torch.equal(averages[0], other) for other in averages)
    assert any(not torch.equal(plain[0], other) for other in plain), "the test must be hard enough"
    for i in range(0, 20_000, 500):
        exact = sum(Fraction(values[k, i].item()) * weights[k] for k in range(shards)) / sum(weights)
        assert abs(averages[0][i].item() - float(exact)) <= 2**-24 * abs(exact) + shards * 2**-52 * values.abs().max()


def test_one_shard_is_not_changed():
    value = torch.tensor([1e-30, 1.0, -3e20])
    assert torch.equal(weighted_average([[value]], [7], 7)[0], value)


def test_average_of_equals_is_exact():
    value = torch.randn(100)
    assert torch.equal(weighted_average([[value]] * 7, [3, 3, 3, 3, 3, 2, 2], 19)[0], value)


def moment_of_head_bias(learner):
    place = [name for name, _ in learner.net.named_parameters()].index("head.bias")
    return learner.state_dict()["optim"]["state"][place]["exp_avg"]


def test_learners_restart_from_the_average_and_keep_their_optimiser():
    learners = [tiny_learner(seed) for seed in (0, 1)]
    for learner, value in zip(learners, (1.0, 4.0), strict=True):
        learner.update(learner.trainer(torch.zeros(1, 3, 8, 8)).mean())
        moment_of_head_bias(learner).fill_(value)
        with torch.no_grad():
            learner.net.head.bias.fill_(value)
            learner.ema.head.bias.fill_(10 * value)
    average, ema_average = average_learners(learners, [0, 1], [2, 1])
    for learner, value in zip(learners, (1.0, 4.0), strict=True):
        assert torch.allclose(learner.net.head.bias, torch.tensor(2.0))
        assert torch.allclose(learner.ema.head.bias, torch.tensor(20.0))
        assert torch.equal(moment_of_head_bias(learner), torch.full((32,), value))
    assert torch.equal(average["head.bias"], learners[0].net.head.bias)
    assert torch.equal(ema_average["head.bias"], learners[1].ema.head.bias)

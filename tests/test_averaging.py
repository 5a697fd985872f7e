"""The ensemble average against numpy."""

from fractions import Fraction

import numpy as np
import torch

from tests.networks import tiny_learner
from training.averaging import average_learners, weighted_average


def test_weighted_average_against_numpy():
    random = np.random.default_rng(0)
    draw = random.standard_normal
    arrays = [[draw((3, 4)).astype("f4"), draw(5) * 1e4, np.zeros(2, "f4")] for _ in range(4)]
    sizes = [7, 1, 3, 9]
    models = {k: {str(i): torch.from_numpy(value) for i, value in enumerate(model)} for k, model in enumerate(arrays)}
    average = weighted_average(models, sizes)
    for found, *values in zip(average.values(), *arrays, strict=True):
        expected = np.average([value.astype("f8") for value in values], axis=0, weights=sizes)
        np.testing.assert_allclose(found.numpy(), expected.astype(values[0].dtype), rtol=1e-7)
        assert found.numpy().dtype == values[0].dtype


def test_the_sum_is_as_exact_as_float64_and_not_plain_float32():
    """Values of very different sizes, against fractions."""
    random = np.random.default_rng(3)
    values = (random.standard_normal((10, 500)) * 10.0 ** random.uniform(-12, 3, (10, 500))).astype("f4")
    sizes = random.integers(1, 60_000, 10).tolist()
    found = weighted_average({k: {"": torch.from_numpy(value)} for k, value in enumerate(values)}, sizes)[""]
    for i in range(500):
        exact = sum(Fraction(values[k, i].item()) * sizes[k] for k in range(10)) / sum(sizes)
        assert abs(found[i].item() - float(exact)) <= 2**-24 * abs(exact) + 10 * 2**-52 * abs(values[:, i]).max()


def test_one_shard_is_not_changed():
    value = torch.tensor([1e-30, 1.0, -3e20])
    assert torch.equal(weighted_average({0: {"": value}}, [7])[""], value)


def test_average_of_equals_is_exact():
    value = torch.randn(100)
    assert torch.equal(weighted_average({k: {"": value} for k in range(7)}, [3, 3, 3, 3, 3, 2, 2])[""], value)


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
    average, ema_average = average_learners(dict(enumerate(learners)), [2, 1])
    for learner, value in zip(learners, (1.0, 4.0), strict=True):
        assert torch.allclose(learner.net.head.bias, torch.tensor(2.0))
        assert torch.allclose(learner.ema.head.bias, torch.tensor(20.0))
        assert torch.equal(moment_of_head_bias(learner), torch.full((32,), value))
    assert torch.equal(average["head.bias"], learners[0].net.head.bias)
    assert torch.equal(ema_average["head.bias"], learners[1].ema.head.bias)

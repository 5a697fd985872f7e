"""Adam against torch's own, from which and to which its state goes."""

import copy
import subprocess
import sys

import pytest
import torch

from tests.commands import ROOT
from training.adam import Adam

APPLY, LEAVE_OUT = torch.tensor(0.0), torch.tensor(1.0)


def parameters_and_gradients(number=6):
    """A frozen parameter between two others, and gradients of the two for some steps."""
    stream = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (5,), (2, 2, 2)]
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=stream)) for shape in shapes]
    parameters[1].requires_grad_(False)
    trained = (shapes[0], shapes[2])
    return parameters, [[torch.randn(shape, generator=stream) for shape in trained] for _ in range(number)]


def copy_of(parameters):
    return [torch.nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad) for p in parameters]


def torch_step(optim, parameters, gradients):
    for parameter, gradient in zip((parameters[0], parameters[2]), gradients, strict=True):
        parameter.grad = gradient.clone()
    optim.step()


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_steps_are_those_of_torch_and_gradients_are_divided_or_left_out():
    parameters, gradients = parameters_and_gradients()
    theirs = copy_of(parameters)
    ours, optim = Adam(parameters, lr=0.01), torch.optim.Adam(theirs, lr=0.01, foreach=False)
    for number, gradient in enumerate(gradients):
        ours.lr = optim.param_groups[0]["lr"] = 0.01 * (number + 1)
        if number == 3:
            before = copy.deepcopy(ours.state_dict()["state"])
            ours.step([torch.full_like(g, torch.inf) for g in gradient], torch.tensor(1.0), LEAVE_OUT)
            after = ours.state_dict()["state"]
            assert all(torch.equal(before[i][key], after[i][key]) for i in before for key in before[i])
        ours.step([2 * g for g in gradient], torch.tensor(2.0), APPLY)
        torch_step(optim, theirs, gradient)
        assert_equal(parameters, theirs)


@pytest.mark.parametrize("fused", [False, True])
def test_the_state_goes_to_torch_and_back(fused):
    parameters, gradients = parameters_and_gradients()
    straight = copy_of(parameters)
    of_torch = torch.optim.Adam(straight, lr=0.02, fused=fused)
    for gradient in gradients:
        torch_step(of_torch, straight, gradient)

    ours = Adam(parameters, lr=0.02)
    for gradient in gradients[:2]:
        ours.step(gradient, torch.tensor(1.0), APPLY)
    theirs = copy_of(parameters)
    optim = torch.optim.Adam(theirs, lr=1.0, fused=fused)
    optim.load_state_dict(ours.state_dict())
    for gradient in gradients[2:4]:
        torch_step(optim, theirs, gradient)
    again = copy_of(theirs)
    ours = Adam(again, lr=1.0)
    ours.load_state_dict(optim.state_dict())
    for gradient in gradients[4:]:
        ours.step(gradient, torch.tensor(1.0), APPLY)
    assert_equal(again, straight)
    state = ours.state_dict()
    assert state["param_groups"][0].keys() == optim.state_dict()["param_groups"][0].keys()
    assert state["param_groups"][0]["lr"] == 0.02 and state["state"].keys() == {0, 2}


def test_a_network_in_training_does_not_load_the_compiler():
    """Which takes a second, more than a small run."""
    code = "import sys, tests.networks as n; n.tiny_learner(); sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0

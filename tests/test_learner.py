"""The update against the same update written out with torch's plain pieces."""

import copy
import functools

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from diffusion import GaussianDiffusionTrainer
from tests.networks import tiny_learner
from training.agc import AntiGradientControl
from training.batches import ShardBatches

IMAGES = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def make_batches(labels=None):
    return ShardBatches(IMAGES, labels, torch.arange(16), batch_size=4, T=10, seed=0)


def train(learner, batches, steps):
    for _ in range(steps):
        torch.manual_seed(learner.step)  # of dropout
        learner.update(learner.losses(batches(learner.step)).mean())


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_update_against_plain_torch(weight_decay):
    """Five steps of Adam or AdamW, clipping, warm-up and EMA, one tensor after the other."""
    learner = tiny_learner(warmup=3, ema_decay=0.7, weight_decay=weight_decay, grad_clip=0.05, dropout=0.0)
    batches = make_batches()
    net, ema = copy.deepcopy(learner.net), copy.deepcopy(learner.net)
    parameters = [p for p in net.parameters() if p.requires_grad]
    optim = torch.optim.Adam(parameters, lr=1e-3, foreach=False)
    if weight_decay:
        optim = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=weight_decay, foreach=False)
    trainer = GaussianDiffusionTrainer(net, 1e-4, 0.02, 10)
    for step in range(5):
        batch = batches(step)
        loss = trainer(batch.x_0, None, batch.t, batch.eps).mean()
        optim.zero_grad()
        loss.backward()
        norm = torch.sqrt(sum((p.grad**2).sum() for p in parameters if p.grad is not None))
        for p in parameters:
            if p.grad is not None:
                p.grad.mul_(min(1.0, 0.05 / (float(norm) + 1e-6)))
        optim.param_groups[0]["lr"] = 1e-3 * min(step, 3) / 3
        optim.step()
        for key, value in ema.state_dict().items():
            value.mul_(0.7).add_(net.state_dict()[key], alpha=0.3)
        assert learner.lr == pytest.approx(1e-3 * min(step, 3) / 3)
        learner.update(learner.losses(batches(step)).mean())
    for ours, plain in ((learner.net, net), (learner.ema, ema)):
        for key, value in plain.state_dict().items():
            assert torch.allclose(ours.state_dict()[key], value, atol=2e-5), key
    assert learner.step == 5


@pytest.mark.parametrize("offload", [False, True])
def test_without_ema_the_ema_is_the_network(offload):
    with_ema, without = tiny_learner(), tiny_learner(ema_decay=None, offload=offload)
    for learner in (with_ema, without):
        with learner.on_device():
            train(learner, make_batches(), 3)
    state = without.state_dict()
    for key, value in with_ema.net.state_dict().items():
        assert torch.equal(state["net_model"][key], value) and torch.equal(state["ema_model"][key], value), key
    assert without.ema is without.net and without.ema_weights is without.weights


def test_a_learner_that_waits_in_host_memory_trains_as_one_that_stays(monkeypatch):
    """Host memory stands for other memory here: what waits is a copy, and what is left behind is destroyed."""

    def to_host(value):
        copied = value.clone()
        value.data.fill_(torch.nan)
        return copied

    monkeypatch.setattr("training.learner.to_host", to_host)
    staying, moving = tiny_learner(), tiny_learner(offload=True)
    batches = make_batches()
    for _ in range(3):
        train(staying, batches, 2)
        with moving.on_device():
            train(moving, batches, 2)
        assert all(parameter.grad is None for parameter in moving.parameters)
    ours, expected = moving.state_dict(), staying.state_dict()
    for name in ("net_model", "ema_model"):
        assert all(torch.equal(ours[name][key], expected[name][key]) for key in expected[name])
    for i, state in expected["optim"]["state"].items():
        assert all(torch.equal(ours["optim"]["state"][i][key], state[key]) for key in state)
    moving.load_state_dict(copy.deepcopy(expected))
    with moving.on_device():
        train(moving, batches, 1)


def test_losses_are_means_per_sample():
    learner = tiny_learner(dropout=0.0)
    batch = make_batches()(0)
    losses = learner.losses(batch)
    assert losses.shape == (4,)
    alone = learner.trainer(batch.x_0[2:3], None, batch.t[2:3], batch.eps[2:3]).mean()
    assert losses[2].item() == pytest.approx(alone.item(), rel=1e-5)


def test_continues_exactly_from_its_state():
    straight, first = tiny_learner(), tiny_learner()
    batches = make_batches()
    train(straight, batches, 6)
    train(first, batches, 3)
    state = copy.deepcopy(first.state_dict())
    second = tiny_learner(seed=9)
    second.load_state_dict(state)
    train(second, batches, 3)
    for ours, expected in ((second.net, straight.net), (second.ema, straight.ema)):
        for key, value in expected.state_dict().items():
            assert torch.equal(ours.state_dict()[key], value), key
    assert second.lr == straight.lr and second.step == 6


def test_schedule_is_what_lambda_lr_would_do():
    learner = tiny_learner(warmup=3)
    optim = torch.optim.Adam(learner.net.parameters(), lr=1e-3)
    sched = torch.optim.lr_scheduler.LambdaLR(optim, lambda step: min(step, 3) / 3)
    for _ in range(5):
        assert learner.lr == pytest.approx(sched.get_last_lr()[0])
        train(learner, make_batches(), 1)
        optim.step()
        sched.step()
    assert learner.state_dict()["sched"].items() <= {**sched.state_dict(), "_last_lr": [learner.lr]}.items()
    sched.load_state_dict(learner.state_dict()["sched"])


def whole_step(learner, agc, skip_counts, batch):
    """One step of main_fed.py from batch to numbers; returns what stays on the device."""
    losses = learner.losses(batch)
    loss, keep = agc(losses, batch.t)
    learner.update(loss)
    skip_counts[batch.slots] += ~keep
    return loss.detach(), keep


def test_the_step_never_asks_the_device_for_a_number(monkeypatch):
    """On fake tensors, where .item(), bool(tensor) and shapes that depend on data raise."""
    # moving a module swaps its tensors, which fake ones do not allow; all is on one device anyway
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *_, **__: module)
    # the EMA network is a deep copy, which must not have a copy of the mode
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, raising=False)
    with FakeTensorMode():
        learner, agc = tiny_learner(), AntiGradientControl(10)
        images = torch.zeros(16, 3, 8, 8, dtype=torch.uint8)
        batches = ShardBatches(images, None, torch.arange(16), batch_size=4, T=10, seed=0, hflip=True)
        skip_counts = torch.zeros(16, dtype=torch.int64)
        for _ in range(2):
            loss, _ = whole_step(learner, agc, skip_counts, batches(learner.step))
        assert learner.step == 2
        with pytest.raises(DataDependentOutputException):
            loss.item()


def test_torch_compile_captures_the_network_as_one_graph(monkeypatch):
    """fullgraph raises at the first graph break. The same steps must come out."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, fullgraph=True, backend="eager"))
    batches = make_batches(torch.arange(16) % 3)
    plain, captured = (tiny_learner(num_labels=3, dropout=0.0, compile=compile) for compile in (False, True))
    for learner in (plain, captured):
        train(learner, batches, 2)
    assert isinstance(captured.trainer.model, torch._dynamo.OptimizedModule)
    assert torch.equal(plain.weights, captured.weights) and torch.equal(plain.ema_weights, captured.ema_weights)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_that_is_not_finite_is_not_applied(precision):
    learner = tiny_learner(precision=precision)
    batches = make_batches()
    train(learner, batches, 2)
    before = copy.deepcopy(learner.state_dict())
    batch = batches(2)
    assert not learner.update(learner.losses(batch).mean() * torch.inf)["applied"]
    after = learner.state_dict()
    for name in ("net_model", "ema_model"):
        assert all(torch.equal(before[name][key], after[name][key]) for key in before[name])
    for number, entry in before["optim"]["state"].items():
        assert all(torch.equal(value, after["optim"]["state"][number][key]) for key, value in entry.items())
    assert after["step"] == 3, "the schedule and the data go on"
    if precision == "fp16":
        assert after["scaler"]["scale"] == before["scaler"]["scale"] / 2
    assert learner.update(learner.losses(batch).mean())["applied"]
    assert not torch.equal(learner.net.state_dict()["head.bias"], before["net_model"]["head.bias"])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains_with_a_float32_loss(precision):
    """On images of one grey, whose noise can be seen."""
    learner = tiny_learner(precision=precision, lr=3e-3)
    grey = torch.full_like(IMAGES, 128)
    batches = ShardBatches(grey, None, torch.arange(16), batch_size=4, T=10, seed=0)
    losses = learner.losses(batches(0))
    assert losses.dtype == torch.float32
    before = losses.mean().item()
    train(learner, batches, 12)
    assert learner.losses(batches(0)).mean().item() < 0.9 * before
    assert all(p.dtype == torch.float32 for p in learner.net.parameters())


def test_conditional_training_moves_the_class_table():
    learner = tiny_learner(num_labels=3)
    table = learner.net.cond_embedding.timembedding[0].weight
    before = table.detach().clone()
    train(learner, make_batches(torch.tensor([0, 1, 2, -1] * 4)), 3)
    assert not torch.equal(table[1:], before[1:])
    assert not table[0].any(), "the null class stays zero"


@pytest.mark.parametrize("fused", [False, True])
def test_adam_goes_on_in_torch(fused):
    """What a checkpoint holds of it is what torch.optim.Adam saves."""
    batches = make_batches()
    straight, first = tiny_learner(dropout=0.0), tiny_learner(dropout=0.0)
    train(straight, batches, 4)
    train(first, batches, 2)
    theirs = torch.optim.Adam(first.net.parameters(), lr=1.0, fused=fused)
    theirs.load_state_dict(copy.deepcopy(first.state_dict()["optim"]))
    for step in (2, 3):
        first.net.zero_grad()
        first.losses(batches(step)).mean().backward()
        torch.nn.utils.clip_grad_norm_(first.net.parameters(), 1.0)
        theirs.step()
    torch.testing.assert_close(first.weights, straight.weights, rtol=1e-5, atol=2e-5)
    assert 0 not in theirs.state_dict()["state"], "the frozen table has no state"


def test_weights_are_views_of_one_tensor_wherever_they_go():
    """After loading, averaging and moving too."""
    learner = tiny_learner()
    train(learner, make_batches(), 2)
    learner.load_state_dict(copy.deepcopy(learner.state_dict()))
    learner.set_weights(tiny_learner(1).net.state_dict(), tiny_learner(2).net.state_dict())
    learner._move(torch.clone)
    train(learner, make_batches(), 1)
    for net, values in ((learner.net, learner.weights), (learner.ema, learner.ema_weights)):
        trained = learner.trained_in(net)
        assert sum(value.numel() for value in trained) == len(values)
        for value in trained:
            assert value.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()

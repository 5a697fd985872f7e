"""What a GPU does, against the CPU. Skipped without one; with IET_AGC_TEST_DEVICE=cpu the tests themselves are run."""

import copy
import json
import os

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import benchmarks.__main__ as benchmarks
from benchmarks import gpu
from benchmarks.baselines import CIFAR10, make_net, row
from diffusion import SAMPLERS, GaussianDiffusionSampler
from experiments import stacked
from score.features import inception_space
from score.fid import compute_statistics
from score.generate import generate
from score.memorization import authenticity, nearest_neighbors
from tests.commands import ROOT, check, eval_flags, run, torchrun_command
from tests.inception_weights import write_weights
from tests.networks import TINY_FLAGS, tiny_learner, tiny_unet, visible
from training import batches as batches_module
from training.agc import AntiGradientControl
from training.batches import Batch, ShardBatches
from training.launch import pick_device
from utils.errors import DataError

DEVICE = torch.device(os.environ.get("IET_AGC_TEST_DEVICE", "cuda"))
on_gpu = pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs a GPU")
FLAGS = [*TINY_FLAGS, f"--device={DEVICE.type}"]
IMAGES = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def tf32():
    """As --precision=tf32 leaves the GPU, which must not matter to what is measured."""
    pick_device("cpu", "tf32")
    yield
    assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
    pick_device("cpu")


def make_learner(device, num_labels=None, **settings):
    """A learner without dropout whose output depends on its inputs."""
    net = visible(tiny_unet(dropout=0.0, num_labels=num_labels)).train()
    return tiny_learner(net=net.to(device), **settings)


def make_batch(device, step=0, labels=None):
    """The same batch on every device: what is drawn depends on the device."""
    batch = ShardBatches(IMAGES, labels, torch.arange(16), batch_size=8, T=10, seed=0, hflip=True)(step)
    return Batch(*(None if value is None else value.to(device) for value in batch))


def close(ours, expected, tolerance):
    """Whether two tensors differ by a small part of their norm."""
    return float((ours.cpu() - expected.cpu()).norm()) <= tolerance * float(expected.norm())


def moments(learner):
    """Adam's first moments: after one step (1 - beta_1) times the clipped gradient."""
    return torch.cat([state["exp_avg"].flatten().cpu() for state in learner.optim.state.values()])


def step(learner, agc, batch):
    losses = learner.losses(batch)
    loss, keep = agc(losses, batch.t)
    numbers = learner.update(loss)
    return losses.detach().cpu(), keep.cpu(), numbers["loss"].cpu(), bool(numbers["applied"])


@on_gpu
@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({}, 1e-3),
        ({"num_labels": 3}, 1e-3),
        ({"precision": "bf16"}, 5e-2),
        ({"precision": "fp16"}, 1e-2),
        ({"precision": "bf16", "compile": True}, 5e-2),
    ],
    ids=lambda value: "-".join(map(str, value.values())) or "plain" if isinstance(value, dict) else "",
)
def test_a_step_is_that_of_the_cpu(settings, tolerance):
    """Loss, gradient, skip mask, memory bank; then a step that is not finite changes nothing."""
    of_the_cpu = {"num_labels": settings.get("num_labels")}
    learners = make_learner(DEVICE, **settings), make_learner("cpu", **of_the_cpu)
    agcs = AntiGradientControl(10).to(DEVICE), AntiGradientControl(10)
    for agc in agcs:  # some samples are far below the bank, some far above, so that rounding decides nothing
        agc.bank.copy_(torch.tensor([1e-3, 1e3] * 5))
    labels = torch.arange(16) % 3 if "num_labels" in settings else None
    ours, expected = (
        step(learner, agc, make_batch(agc.bank.device, labels=labels))
        for learner, agc in zip(learners, agcs, strict=True)
    )
    assert ours[0].dtype == torch.float32 and close(ours[0], expected[0], tolerance)
    assert torch.equal(ours[1], expected[1]) and 0 < ours[1].sum() < 8
    assert close(ours[2], expected[2], tolerance) and ours[3]
    assert close(moments(learners[0]), moments(learners[1]), 2 * tolerance)
    assert close(agcs[0].bank, agcs[1].bank, tolerance)

    learner, agc = learners[0], agcs[0]
    before = copy.deepcopy((learner.weights, learner.ema_weights, learner.optim.state_dict()["state"], agc.bank))
    batch = make_batch(DEVICE, 1, labels)
    batch.x_0[0, 0, 0, 0] = torch.nan
    assert not step(learner, agc, batch)[3]
    assert torch.equal(before[0], learner.weights) and torch.equal(before[1], learner.ema_weights)
    for number, state in learner.optim.state_dict()["state"].items():
        assert all(torch.equal(before[2][number][name], value) for name, value in state.items())
    assert torch.equal(before[3], agc.bank) and learner.step == 2


@on_gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_training_learns_in_every_precision(precision):
    """On images of one grey, whose noise can be seen; the draws are the device's own."""
    learner = tiny_learner(net=tiny_unet().to(DEVICE), precision=precision, lr=3e-3)
    grey = torch.full_like(IMAGES, 128).to(DEVICE)
    batches = ShardBatches(grey, None, torch.arange(16), batch_size=8, T=10, seed=0, hflip=True)
    losses = [learner.update(learner.losses(batches(number)).mean())["loss"] for number in range(30)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@on_gpu
def test_a_learner_that_waits_in_host_memory_trains_as_one_that_stays():
    staying, moving = (make_learner(DEVICE, offload=offload) for offload in (False, True))
    for number in range(4):
        with moving.on_device():
            assert moving.weights.device.type == DEVICE.type
            for learner in (staying, moving):
                learner.update(learner.losses(make_batch(DEVICE, number)).mean())
        waiting = [moving.weights, moving.ema_weights, *(v for s in moving.optim.state.values() for v in s.values())]
        assert all(value.device.type == "cpu" for value in waiting)
        assert all(value.is_pinned() for value in waiting) or DEVICE.type == "cpu"
        if number == 1:  # as a run that is continued: what was loaded is not pinned yet
            moving.load_state_dict(copy.deepcopy(moving.state_dict()))
    assert close(moving.weights, staying.weights, 1e-4) and close(moments(moving), moments(staying), 1e-2)


@on_gpu
def test_images_may_stay_in_host_memory():
    settings = {"batch_size": 6, "T": 10, "seed": 0, "hflip": True, "label_dropout": 0.3}
    labels, index = torch.arange(16) % 3, torch.arange(1, 15)
    there = ShardBatches(IMAGES.to(DEVICE), labels, index, DEVICE, **settings)
    here = ShardBatches(IMAGES, labels, index, DEVICE, **settings)
    assert here.images.device.type == "cpu"
    for number in (0, 5, 3):
        for ours, expected in zip(here(number), there(number), strict=True):
            assert ours.device.type == DEVICE.type and torch.equal(ours, expected)


@on_gpu
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_are_those_of_the_cpu(sampler):
    """x_T, labels and noise are drawn on the CPU; few steps, since a random network is chaotic under many."""
    net = visible(tiny_unet(dropout=0.0, num_labels=3))
    made = []
    for device in (DEVICE, torch.device("cpu")):
        diffusion = GaussianDiffusionSampler(
            copy.deepcopy(net).to(device), 1e-4, 0.02, 10, 8, sampler=sampler, steps=3, guidance=0.3
        ).to(device)
        made.append(generate(diffusion, num_images=7, batch_size=4, seed=5, num_labels=3).int())
    assert made[0].device.type == "cpu" and made[1].float().std() > 10
    assert float((made[0] - made[1]).abs().float().mean()) < 0.5


@on_gpu
def test_inception_is_that_of_the_cpu(tmp_path, tf32):
    path = write_weights(tmp_path / "inception.pth")
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with pytest.warns(UserWarning, match="not the published"):
        ours, expected = (inception_space(path, device, batch_size=4) for device in (DEVICE, "cpu"))
    features = [space.features(images) for space in (ours, expected)]
    assert close(*features, 1e-3)
    assert close(*(space.logits(rows) for space, rows in zip((ours, expected), features, strict=True)), 1e-3)
    statistics = [compute_statistics(images, space) for space in (ours, expected)]
    np.testing.assert_allclose(statistics[0][0], statistics[1][0], rtol=1e-2, atol=1e-3)


@on_gpu
@pytest.mark.parametrize("size", [8, 32, 64])
def test_the_search_is_exact(size, tf32):
    """The same bits as on the CPU, with images of large products, copies and ties."""
    stream = torch.Generator().manual_seed(2)
    training = torch.randint(0, 256, (700, 3, size, size), dtype=torch.uint8, generator=stream)
    training[100:200] = training[:100]
    training[200:300] = 0
    training[300:350] = 255
    generated = torch.cat([training[50:75], training[290:310], training[600:] ^ 1])
    expected = nearest_neighbors(generated, training)
    blocks = {"batch_generated": 64, "batch_training": 128}
    for where in (DEVICE, "cpu"):
        found = nearest_neighbors(generated, training.to(where), device=DEVICE, **blocks)
        assert {value.device.type for value in found} == {DEVICE.type}
        assert all(torch.equal(ours.cpu(), theirs) for ours, theirs in zip(found, expected, strict=True))
        assert authenticity(*found, training.to(where)) == authenticity(*expected, training)


@on_gpu
def test_stacked_networks_train_as_on_the_cpu(monkeypatch):
    """The first steps are made one by one there, the others by a CUDA graph."""

    def update_without_random_numbers(learner):
        pixels = torch.arange(1, 193, device=learner.index.device).view(3, 8, 8)
        learner.update(learner.index, learner.index % 10, torch.sin(learner.index[..., None, None, None] * pixels))

    monkeypatch.setattr(stacked.StackedLearner, "draw_and_update", update_without_random_numbers)
    table, weights = torch.randint(16, (8, 2, 4), generator=torch.Generator().manual_seed(0)), {}
    diffusion = {"beta_1": 1e-4, "beta_T": 0.02, "T": 10}
    for device in (DEVICE, torch.device("cpu")):
        net = visible(tiny_unet(dropout=0.0)).to(device)
        rows, uses_agc = stacked.row_of(net).expand(2, -1), torch.tensor([True, False], device=device)
        agc, images = AntiGradientControl(10, ema_decay=0.0).to(device), IMAGES.to(device)
        never = torch.zeros_like(uses_agc)
        learner = stacked.StackedLearner(net, rows, rows, agc, uses_agc, never, diffusion, images, 1e-3, 2, 1.0, 0.9)
        learner.train(table[:5], 0)
        learner.train(table[5:], 5)
        weights[device] = learner.weights.detach(), learner.ema_weights
        assert not close(weights[device][0], rows.cpu(), 1e-2)
        assert not close(*weights[device][0].cpu(), 1e-3)  # samples were skipped in one of them
    for ours, expected in zip(*weights.values(), strict=True) if len(weights) > 1 else ():
        assert close(ours, expected, 1e-3)


@on_gpu
def test_runs_are_continued_on_other_devices(tmp_path):
    """Default training on the GPU, then on the CPU, then on the GPU."""
    for steps, device in ((2, DEVICE.type), (4, "cpu"), (6, DEVICE.type)):
        flags = ["--save_step=2", f"--total_steps={steps}", "--sample_step=2", f"--device={device}", "--logdir=log"]
        result = run("main.py", "--train", *TINY_FLAGS, *flags, cwd=tmp_path)
        assert steps == 2 or f"{steps - 2} of {steps} steps done" in result.stdout
    state = torch.load(tmp_path / "log/ckpt6.pt", map_location="cpu", weights_only=True)
    assert {float(entry["step"]) for entry in state["optim"]["state"].values()} == {6.0}


@on_gpu
def test_the_scripts_with_everything_that_saves_memory(tmp_path):
    """IET-AGC, continued, then its evaluation, and the evaluation of its images on the CPU."""
    flags = [*FLAGS, "--shard_state=cpu", "--data_device=cpu", "--precision=bf16", "--client_num=2", "--local_epoch=2"]
    for rounds in (1, 2):
        run("main_fed.py", "--train", *flags, f"--total_round={rounds}", "--logdir=log", cwd=tmp_path)
    write_weights(tmp_path / "inception.pth")
    common = ["--num_images=19", "--inception_weights=inception.pth", "--fid_cache=fid.npz", "--num_train=40"]
    run("all_in.py", *flags, *common, "--unet_dir=log", *eval_flags(tmp_path / "gpu"), cwd=tmp_path)
    again = ["--samples=gpu/generate/generate.npy", "--device=cpu", *eval_flags(tmp_path / "cpu")]
    run("all_in.py", *TINY_FLAGS, *common, *again, cwd=tmp_path)
    ours, expected = (json.loads((tmp_path / name / "grid/result.json").read_text()) for name in ("gpu", "cpu"))
    for name in ("mq", "auth_pct"):
        assert ours["pixels"][name] == expected["pixels"][name]
    assert ours["fid"] == pytest.approx(expected["fid"], rel=1e-2)


@on_gpu
def test_one_process_under_torchrun(tmp_path):
    """NCCL and DistributedDataParallel on one GPU, and both scripts."""
    result = check(torchrun_command(1, "tests/gpu_process.py", DEVICE.type), ROOT, 0, {})
    backend = "nccl" if DEVICE.type == "cuda" else "gloo"
    assert f"exchanged by {backend}, averaged gradients" in result.stdout
    for script, more in (("main.py", "--total_steps=2"), ("main_fed.py", "--total_round=1")):
        flags = ["--client_num=2", "--local_epoch=1", more, f"--logdir={tmp_path / script}"]
        check(torchrun_command(1, script, "--train", *FLAGS, *flags), tmp_path, 0, {})


def test_the_benchmark_of_a_gpu_runs_at_a_tiny_scale(tmp_path, monkeypatch):
    """On a CPU too, where it is refused in earnest."""
    monkeypatch.setattr(gpu, "SIZE", 8)
    monkeypatch.setattr(gpu, "SUB_MODELS", 2)
    benchmarks.main(["--only=gpu,gpu_search,gpu_memory,gpu_compiled", "--scale=0.001", f"--json={tmp_path}/gpu.json"])
    rows = {row["what"]: row for row in json.loads((tmp_path / "gpu.json").read_text())["rows"]}
    for precision in ("fp32", "bf16"):
        theirs = rows[f"forward + backward, {precision}: ours / diffusers (images/s)"]
        assert theirs["ratio"] == theirs["ours"] / theirs["baseline"] > 0
        training, sampling = (
            rows[f"{what}, {precision} (images/s)"]["ours"] for what in ("step", "sampling with 3 steps")
        )
        # 390,000 steps of 128 images; two averages, three seeds, 65,536 images
        seconds = 390_000 * 128 / training + 6 * 65_536 / sampling
        hours = rows[f"com/com_c10_v.sh from these rates, without search and FID, {precision} (h)"]["ours"]
        assert hours == pytest.approx(seconds / 3600)
    assert {"step, tf32: compiled / not (images/s)", "search of 66 x 50 x 3,072 (s)"} <= rows.keys()
    if not torch.cuda.is_available():
        with pytest.raises(DataError, match="no GPU on this machine"):
            benchmarks.main(["--only=gpu"])


def test_diffusers_network_is_as_large_as_ours():
    sizes = (
        sum(value.numel() for value in net.parameters() if value.requires_grad)
        for net in (make_net(CIFAR10, "cpu"), gpu.diffusers_net(128))
    )
    assert next(sizes) == next(sizes)


def test_the_benchmark_of_the_evaluation_runs_at_a_tiny_scale(capsys):
    benchmarks.main(["--only=evaluation", "--scale=0.01"])
    out = capsys.readouterr().out
    assert "| 50 nearest of 50 x 500 x 3,072: ours / faiss (s) |" in out and "Frechet distance, 20 features" in out


def test_targets_of_the_benchmarks():
    """A step may take 1.1 times as long as its baseline."""
    assert [row("a", ours, 2.0, at_most=1.1)["ok"] for ours in (2.1, 2.3)] == [True, False]
    assert row("a", None) == {"what": "a", "ours": None, "baseline": None, "ratio": None, "target": "", "ok": True}


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_no_operation_of_a_step_mixes_devices(monkeypatch):
    """On fake tensors of a GPU, which need none; only the backward pass does, and is left out."""
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *_, **__: module)
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, raising=False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda value: value)
    of_the_cpu = batches_module.generator
    monkeypatch.setattr(batches_module, "generator", lambda d, *a: of_the_cpu("cpu", *a) if d == "cpu" else None)
    with FakeTensorMode():
        with torch.device("cuda"):
            learner, agc = tiny_learner(precision="fp16", num_labels=3), AntiGradientControl(10)
            skip_counts = torch.zeros(16, dtype=torch.int64)
        fill = lambda _: [setattr(p, "grad", torch.zeros_like(p)) for p in learner.parameters]  # noqa: E731
        monkeypatch.setattr(torch.Tensor, "backward", fill)
        images, labels = torch.zeros(16, 3, 8, 8, dtype=torch.uint8), torch.zeros(16, dtype=torch.int64)
        settings = {"batch_size": 4, "T": 10, "seed": 0, "hflip": True, "label_dropout": 0.1}
        for where in ("cpu", "cuda"):
            batches = ShardBatches(images.to(where), labels, torch.arange(16), learner.device, **settings)
            for _ in range(2):
                batch = batches(learner.step)
                assert {value.device.type for value in batch if value is not None} == {"cuda"}
                loss, keep = agc(learner.losses(batch), batch.t)
                loss = learner.update(loss)["loss"]
                skip_counts[batch.slots] += ~keep
        assert learner.step == 4 and learner.weights.device.type == "cuda"
        with pytest.raises(RuntimeError, match=r"two (different )?devices,? cuda:0"):
            loss + torch.zeros(1)
        for sampler in ("ddim", "ddpm"):  # dpmpp reads its timesteps from a tensor
            with torch.device("cuda"):
                diffusion = GaussianDiffusionSampler(learner.ema, 1e-4, 0.02, 10, 8, sampler=sampler, steps=4)
            assert diffusion(batch.x_0, batch.labels).device.type == "cuda"

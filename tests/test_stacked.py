"""Stacked trainings against main_fed.py itself: with its timesteps and noise they are the same to rounding."""

import contextlib
import json
import multiprocessing
from types import SimpleNamespace

import pytest
import torch

from experiments import __main__ as experiments
from experiments import digits, images, runs, stacked
from tests.commands import run as run_script
from tests.networks import tiny_unet
from training.agc import AntiGradientControl
from training.weights import load_checkpoint, round_name
from utils.errors import UsageError

STACKED = ["AGC", "clustered reshuffled", "clustered score ensemble", "clustered IET-AGC (fine-tuned)"]
SMALL = {
    "DATA": {"dataset": "mnist5k", "img_size": 8, "num_train": 136, "duplicates": 8, "copies": 10},
    "NETWORK": {"ch": 8, "ch_mult": [1, 2], "attn": 1, "num_res_blocks": 1, "dropout": 0.0},
    # the bank is the last loss, so that samples are skipped from the first steps on
    "TRAINING": {"batch_size": 16, "lr": 1e-2, "warmup": 4, "ema_decay": 0.5, "bank_bins": 2, "arr_ema_decay": 0.0},
    "SAMPLER": {"sampler": "dpmpp", "sample_steps": 4},
    "IMAGES": 100,
    "POINT": 25,
    "POINTS": 2,
    "ARMS": {arm: digits.ARMS[arm] | {"local_epoch": 2, "steps": 50} for arm in ("default", *STACKED)},
}
IN_PLACE = SimpleNamespace(apply_async=lambda measure, given: SimpleNamespace(get=lambda: measure(*given)))


@pytest.fixture
def small(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(digits, name, value)
    images.load.cache_clear()
    yield
    images.load.cache_clear()


def test_a_stack_measures_what_main_fed_trains(tmp_path, monkeypatch, small):
    members, step = [], 0

    def make_stack(planned, device):
        made, learner = stack_of(planned, device)
        members.extend(made)
        return made, learner

    def draw_as_main_fed(learner):
        nonlocal step
        drawn = [batches(step) for member in members for batches in member.batches]
        learner.update(
            learner.index, *(torch.stack([getattr(batch, name) for batch in drawn]) for name in ("t", "eps"))
        )
        step += 1

    stack_of = stacked.make_stack
    monkeypatch.setattr(stacked, "make_stack", make_stack)
    monkeypatch.setattr(stacked.StackedLearner, "draw_and_update", draw_as_main_fed)
    monkeypatch.setattr(runs, "train", lambda run: run_script("main_fed.py", *run.flags, cwd=tmp_path))
    for run in (planned := [runs.make_run("digits", tmp_path, "data", arm, 1, 1.0) for arm in ("default", *STACKED)]):
        runs.work(run)
    assert all(map(stacked.can_stack, planned[1:]))
    stacked.train_together(planned[1:], set(), torch.device("cpu"), IN_PLACE, float("inf"))
    for run in planned[1:]:
        by_stack, by_main_fed = (json.loads((run.directory / name).read_text())["points"] for name in runs.FILES)
        assert len(by_stack) == len(by_main_fed) > 1
        for ours, expected in zip(by_stack, by_main_fed, strict=True):
            assert ours.pop("network", None) == expected.pop("network", None)
            assert ours == pytest.approx(expected, rel=1e-3), run.arm
    last = load_checkpoint(planned[1].directory / "log" / round_name(planned[1].rounds))
    assert last["index_array"].sum() > 0  # some were skipped


def test_what_is_stacked_is_not_trained_again(tmp_path, monkeypatch, small, capfd):
    """And one that starts from another finds its checkpoint."""
    chosen = ("default", STACKED[-1])
    monkeypatch.setattr(digits, "ARMS", {arm: digits.ARMS[arm] for arm in chosen})
    monkeypatch.setattr(digits, "SEEDS", dict.fromkeys(chosen, range(1, 2)))
    pool = contextlib.nullcontext(IN_PLACE)
    monkeypatch.setattr(multiprocessing, "get_context", lambda how: SimpleNamespace(Pool=lambda *_: pool))
    planned = runs.plan("digits", tmp_path, "data")
    wanted, cpu = {planned[1].start}, torch.device("cpu")
    stacked.train_together(planned[:1], wanted, cpu, IN_PLACE, 0)  # out of time
    assert "left for another time" in capfd.readouterr().err and not list(tmp_path.rglob("*.*"))
    stacked.work_all(planned, wanted, cpu, float("inf"))
    start, tuned = (runs.measured(run)["points"] for run in planned)
    assert tuned[0] == {**start[0], "steps": 0, "sequential": 0}
    monkeypatch.setattr(runs, "work", None)
    experiments.main(["--experiment=digits", f"--out={tmp_path}", "--minutes=0"])
    result = json.loads((tmp_path / "digits.json").read_text())
    assert [{"arm": "default", "seed": 1, **point} for point in start] == result["points"][: len(start)]
    trained = [(training["device"], training["stacked"]) for training in result["trainings"]]
    assert trained == [("CPU, 1 networks at once", True), ("CPU, 4 networks at once", True)]


def test_a_stack_needs_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("has one")
    with pytest.raises(UsageError, match="--stacked"):
        experiments.main(["--stacked", f"--out={tmp_path}"])


def test_only_trainings_with_the_same_step_are_stacked(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "SEEDS", {arm: range(1, 2) for arm in digits.ARMS})
        planned = runs.plan("digits", tmp_path, "data")
    own = ("--logdir", "--check_dir", "--total_round", "--local_epoch", "--client_num", "--anti_grad", "--duplicates")
    own += ("--copies", "--split", "--reshard", "--img_size", "--save", "--keep")
    steps = {tuple(f for f in run.flags if not f.startswith(own)) for run in planned if stacked.can_stack(run)}
    assert len(steps) == 1
    left = {run.arm for run in planned if not stacked.can_stack(run)}
    assert {"large batch", "dropout 0.1", "ambient", "spread IET-AGC+", "lr 0.004"} <= left


@pytest.mark.parametrize("mem_ratio", [1e6, 1.0])
def test_a_row_leaves_out_samples_at_random(mem_ratio):
    """Where the bank takes none for memorised it trains on all; else on as many as AGC, and on others."""
    random = torch.Generator().manual_seed(0)
    net, given = tiny_unet(dropout=0.0), torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8, generator=random)
    with torch.no_grad():
        net.tail[2].weight.normal_(generator=random)
    rows, kinds = stacked.row_of(net).expand(3, -1), torch.tensor([0, 1, 2])
    diffusion, agc = (
        {"beta_1": 1e-4, "beta_T": 0.02, "T": 10},
        AntiGradientControl(10, mem_ratio, ema_decay=0.0, bins=1),
    )
    masks = kinds == 0, kinds == 1
    learner = stacked.StackedLearner(net, rows, rows, agc, *masks, diffusion, given, 1e-3, 0.5, 1.0, 0.9)
    table = torch.randint(16, (6, 1, 12), generator=random).expand(-1, 3, -1)
    eps, t = torch.randn(12, 3, 8, 8, generator=random), torch.randint(10, (12,), generator=random)
    for index in table:
        learner.lr.fill_(1e-3)
        learner.update(index, t.expand(3, -1), eps.expand(3, -1, -1, -1, -1))
    by_bank, at_random, plain = learner.weights.detach()
    same = [torch.allclose(at_random, other, atol=1e-6) for other in (by_bank, plain)]
    assert same == [mem_ratio > 1] * 2

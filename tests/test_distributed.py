"""The three scripts under torchrun, as users start it, against the same command in one process."""

import json
import os
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import numpy as np
import pytest
import torch
from torch.distributed import HashStore

from tests.commands import ROOT, check, environment, eval_flags, read_jsonl, run, run_with, torchrun_command
from tests.faults import differences
from tests.inception_weights import write_weights
from tests.networks import TINY_FLAGS
from training.logger import read_metrics
from utils import distributed

ENSEMBLE = [
    *TINY_FLAGS, "--client_num=3", "--local_epoch=2", "--total_round=3", "--log_step=3", "--save_step=2",
    "--arr_ema_decay=0.2", "--mem_ratio=1.0",
]  # fmt: skip


def load(path):
    return torch.load(path, weights_only=True)


def without_timings(value):
    """A nested structure without the entries that measure time."""
    if isinstance(value, dict):
        return {k: without_timings(v) for k, v in value.items() if k not in ("seconds", "images_per_second", "time")}
    return [without_timings(item) for item in value] if isinstance(value, list) else value


def ensemble_state(log):
    """All that a run of main_fed.py leaves to continue from and to look at, timings aside."""
    files = [*log.glob("global_ckpt_round*.pt"), *log.glob("state/*.pt")]
    states = {str(path.relative_to(log)): load(path) for path in files}
    pictures = {path.name: path.read_bytes() for path in log.glob("sample/*.png")}
    return without_timings(
        {**states, **pictures, "logged": [line["step"] for line in read_metrics(log) if line["step"] % 3 == 0]}
    )


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The log directory of main_fed.py, with dropout, in one process."""
    directory = tmp_path_factory.mktemp("one_process")
    run("main_fed.py", "--train", *ENSEMBLE, "--sample_step=8", "--sample_size=2", "--logdir=log", cwd=directory)
    return directory / "log"


def test_ensemble_is_the_same_to_the_last_bit(one_process, tmp_path):
    """With two processes; further tests below end with three."""
    flags = [*ENSEMBLE, "--sample_step=8", "--sample_size=2", "--logdir=log"]
    result = run_with(2, "main_fed.py", "--train", *flags, cwd=tmp_path)
    expected = ensemble_state(one_process)
    assert expected["global_ckpt_round3.pt"]["index_array"].sum() > 0, "the skip counts of all processes are added"
    assert differences(expected, ensemble_state(tmp_path / "log")) == []
    metrics = [without_timings(read_metrics(log)) for log in (one_process, tmp_path / "log")]
    assert metrics[0] == metrics[1] and len(list((tmp_path / "log").glob("metrics*.jsonl"))) == 2
    assert json.loads((tmp_path / "log/train.json").read_text())["steps"] == 36
    assert len(list((tmp_path / "log").glob("events.out.tfevents.*"))) == 1
    assert "process 1 of 2" in result.stderr and "process 2" not in result.stderr


def test_processes_of_a_restart_do_not_meet_those_that_are_gone():
    """The store keeps what earlier starts have left in it, also of one that ended half-way."""
    store = HashStore()
    for rank in (1, 2):
        store.set(f"rank{rank}", "of a start that failed before rank 0 answered")
    names = []
    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            found = set(pool.map(lambda rank: distributed.name_of_start(store, rank, 3), (2, 1, 0)))
        assert len(found) == 1
        names += found
    assert len(set(names)) == 3


def test_processes_wait_long_for_each_other_and_gpus_do_not(monkeypatch):
    """Without GPUs, so with stand-ins for what torch does."""
    groups = {}
    monkeypatch.setattr(distributed, "gpus", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(distributed.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(distributed.dist, "rendezvous", lambda *_, **__: iter([(HashStore(), 0, 1)]))
    start = lambda backend, timeout, **_: groups.setdefault(backend, timeout)  # noqa: E731
    monkeypatch.setattr(distributed.dist, "init_process_group", start)
    monkeypatch.setattr(distributed.dist, "new_group", lambda backend, timeout: (start(backend, timeout), backend)[1])
    distributed.initialize()
    assert groups["gloo"] > timedelta(days=1) and groups["nccl"] <= timedelta(hours=1)
    assert distributed.group_of(torch.device("cuda", 1)) == "nccl"
    assert distributed.group_of(torch.device("cpu")) == distributed.dist.group.WORLD


def kill_one(process, rank, log, number):
    """Signal the process of a rank once it has saved; returns its pid."""
    limit = time.monotonic() + 60
    while not list(log.glob(f"state/shard{rank}_step*.pt")):
        assert time.monotonic() < limit and process.poll() is None
        time.sleep(0.01)
    search = ["pgrep", "-f", f"logdir={log}( |$)"]
    found = subprocess.run(search, capture_output=True, text=True, check=True).stdout
    for pid in map(int, found.split()):
        variables = open(f"/proc/{pid}/environ", "rb").read().split(b"\0")  # noqa: PTH123, SIM115
        if f"RANK={rank}".encode() in variables:
            os.kill(pid, number)
            return pid
    raise AssertionError(f"rank {rank} is not among {found}")


def test_torchrun_restarts_a_killed_rank_from_the_last_checkpoint(one_process, tmp_path):
    """A real SIGKILL of rank 0, which holds the lock; --max_restarts starts both processes again."""
    flags = ["--train", *ENSEMBLE, "--sample_step=8", "--sample_size=2", f"--logdir={tmp_path / 'log'}"]
    command = torchrun_command(2, "main_fed.py", *flags, options=("--standalone", "--max_restarts=2"))
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as p:
        pid = kill_one(p, 0, tmp_path / "log", signal.SIGKILL)
        out, err = p.communicate(timeout=120)
    assert p.returncode == 0, err
    assert f"(pid: {pid})" in err and "continuing in" in out
    assert differences(ensemble_state(one_process), ensemble_state(tmp_path / "log")) == []


def test_a_run_continues_with_another_number_of_processes(one_process, tmp_path):
    """Two processes until SIGTERM, then one until a SIGKILL, then three."""
    flags = ["--train", *ENSEMBLE, "--sample_step=8", "--sample_size=2", f"--logdir={tmp_path / 'log'}"]
    with subprocess.Popen(torchrun_command(2, "main_fed.py", *flags), env=environment()) as process:
        kill_one(process, 1, tmp_path / "log", 0)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) != 0
    known = set((tmp_path / "log").glob("state/*"))
    with subprocess.Popen([*torchrun_command(1, "main_fed.py", *flags)], env=environment()) as process:
        while process.poll() is None and not set((tmp_path / "log").glob("state/*.pt")) - known:
            time.sleep(0.01)
        kill_one(process, 0, tmp_path / "log", signal.SIGKILL)  # torchrun alone would leave it writing
    assert "continuing in" in run_with(3, "main_fed.py", *flags, cwd=tmp_path).stdout
    assert differences(ensemble_state(one_process), ensemble_state(tmp_path / "log")) == []


def test_two_machines(one_process, tmp_path):
    """Two torchrun agents that meet on the loopback interface."""
    port = 20_000 + os.getpid() % 10_000
    meeting = ("--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=test")
    flags = ["--train", *ENSEMBLE, "--sample_step=8", "--sample_size=2", f"--logdir={tmp_path / 'log'}"]
    agents = [
        subprocess.Popen(torchrun_command(1, "main_fed.py", *flags, options=meeting), env=environment(), text=True)
        for _ in range(2)
    ]
    assert [agent.wait(timeout=120) for agent in agents] == [0, 0]
    assert differences(ensemble_state(one_process), ensemble_state(tmp_path / "log")) == []


def test_default_training_does_not_depend_on_the_number_of_processes(tmp_path):
    """Started with 1 and with 2 processes; the second run is continued with one. Without dropout."""
    flags = ["--train", *TINY_FLAGS, "--dropout=0", "--log_step=1", "--use_labels", "--num_labels=10"]
    flags += ["--save_step=1", "--keep=20"]
    for name, starts in (("one", [(1, 20)]), ("two", [(2, 8), (1, 20)])):
        for processes, steps in starts:
            run_with(processes, "main.py", *flags, f"--total_steps={steps}", f"--logdir={name}", cwd=tmp_path)
    # Adam's first moment after one step is (1 - beta_1) times the gradient
    one, two = (
        torch.cat([state["exp_avg"].flatten() for state in load(path)["optim"]["state"].values()])
        for path in (tmp_path / "one/ckpt1.pt", tmp_path / "two/ckpt1.pt")
    )
    assert one.norm() > 0 and (one - two).norm() / one.norm() < 1e-5
    losses = {name: [line["loss"] for line in read_jsonl(tmp_path / name / "metrics.jsonl")] for name in ("one", "two")}
    assert len(losses["two"]) == 20
    np.testing.assert_allclose(losses["two"], losses["one"], rtol=1e-3)
    assert losses["one"][-1] < 0.9 * losses["one"][0], "it has learned something by then"
    assert load(tmp_path / "two/ckpt20.pt").keys() == load(tmp_path / "one/ckpt20.pt").keys()


def test_a_signal_stops_processes_that_share_batches_at_the_same_step(tmp_path):
    log = tmp_path / "log"
    flags = ["--train", *TINY_FLAGS, "--total_steps=100000", "--save_step=0", "--log_step=2", f"--logdir={log}"]
    with subprocess.Popen(torchrun_command(2, "main.py", *flags), env=environment(), stderr=subprocess.PIPE) as process:
        limit = time.monotonic() + 60
        while not (log / "metrics.jsonl").exists() or not read_jsonl(log / "metrics.jsonl"):
            assert time.monotonic() < limit and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        err = process.communicate(timeout=60)[1].decode()
    (saved,) = log.glob("ckpt*.pt")
    step = load(saved)["step"]
    assert f"saved in {log}:" in err and step >= 2
    result = run("main.py", *flags, f"--total_steps={step + 1}", cwd=tmp_path)
    assert f"continuing from {saved}: {step} of" in result.stdout


def test_processes_that_share_batches_have_the_same_weights(tmp_path):
    """Every process writes its weights after three steps."""
    result = check(torchrun_command(2, "tests/shared_batches.py", tmp_path), ROOT, 0, {})
    first, second = (load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert differences(first["weights"], second["weights"]) == [], result.stderr
    assert first["loss"] == second["loss"] and first["applied"].tolist() == second["applied"].tolist() == [1, 0, 1]


def test_evaluation_does_not_depend_on_the_number_of_processes(one_process, tmp_path):
    write_weights(tmp_path / "inception.pth")
    shutil.copytree(one_process, tmp_path / "log")
    for processes in (1, 3):
        flags = [*TINY_FLAGS, "--batch_size=4", "--num_images=11", "--unet_dir=log/global_ckpt_round3.pt"]
        flags += ["--inception_weights=inception.pth", "--num_train=10", *eval_flags(tmp_path / str(processes))]
        flags += ["--stages=generate,score,memorise,gap,grid,report"]
        result = run_with(processes, "all_in.py", *flags, f"--fid_cache={processes}.npz", cwd=tmp_path)
        assert result.stdout.count("11 images against 10 training images") == 1
    one, three = tmp_path / "1", tmp_path / "3"
    images = [np.load(path / "generate/generate.npy").astype(int) for path in (one, three)]
    difference = np.abs(images[0] - images[1])
    assert difference.max() <= 1 and (difference > 0).mean() <= 1e-3
    results = [json.loads((path / "grid/result.json").read_text()) for path in (one, three)]
    for name in ("fid", "is", "is_std", "precision", "recall"):
        assert results[1][name] == pytest.approx(results[0][name], rel=1e-4), name
    pixels = [result["pixels"] for result in results]
    for name in ("auth_pct", "f_mem", "extracted"):
        assert pixels[1][name] == pytest.approx(pixels[0][name], rel=1e-4), name
    for name in ("training", "heldout", "auc"):
        assert results[1]["gap"][name] == pytest.approx(results[0]["gap"][name], rel=1e-3), name
    assert pixels[0]["mq"] == pixels[1]["mq"] and results[1]["N"] == 11
    neighbors = [np.load(path / "similar/memorization.npz") for path in (one, three)]
    if difference.max() == 0:
        np.testing.assert_array_equal(neighbors[0]["index"], neighbors[1]["index"])
        np.testing.assert_array_equal(neighbors[0]["sq_distance"], neighbors[1]["sq_distance"])
    assert neighbors[1]["index"].shape == (11, 10)
    assert len((three / "grid/result.txt").read_text().splitlines()) == 10


def test_a_failing_rank_ends_the_job_and_is_named():
    """Rank 1 raises while rank 0 waits for it; torchrun looks so late that both have ended."""
    start = time.monotonic()
    command = torchrun_command(2, "tests/failing_rank.py", options=("--standalone", "--monitor_interval=4"))
    result = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0 and time.monotonic() - start < 60
    cause = result.stderr[result.stderr.index("Root Cause") :]
    assert "rank      : 1" in cause and "ValueError: the sky has fallen" in cause


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("main.py", ["--batch_size=9"], "multiple of the 2 that were started"),
        ("main_fed.py", ["--client_num=1"], "start at most 1"),
    ],
)
def test_what_does_not_fit_the_number_of_processes(script, flags, message, tmp_path):
    result = subprocess.run(
        torchrun_command(2, script, "--train", *TINY_FLAGS, *flags, "--logdir=log"),
        env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if "error: " in line and script in line]
    assert len(lines) == 1 and message in lines[0] and "rank" not in lines[0]
    assert not (tmp_path / "log").exists()

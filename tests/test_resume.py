"""Runs that are killed at random instants, damaged, changed or started twice, with the machinery of the benchmark."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import faults
from tests.commands import ROOT, environment, run
from tests.networks import TINY_FLAGS
from training import checkpoint

SETTINGS = {
    "main.py": ["--total_steps=24", "--save_step=4"],
    "main_fed.py": ["--client_num=3", "--local_epoch=2", "--total_round=3", "--save_step=2", "--mem_ratio=1.0"],
}


@pytest.fixture(scope="module", params=list(faults.SCRIPTS))
def straight(request, tmp_path_factory):
    """A run of 300 steps that nothing disturbs, and its script."""
    logdir = tmp_path_factory.mktemp("straight") / "log"
    process = faults.start(request.param, logdir)
    assert process.wait() == 0, (logdir.parent / "log.err").read_text()
    return request.param, faults.final_state(request.param, logdir)


def test_killed_at_random_instants_it_ends_the_same(straight, tmp_path):
    script, expected = straight
    logdir, chance = tmp_path / "log", random.Random(1)
    hits = 0
    for fault in ("kill", "kill during a save", "SIGTERM", "kill during a save"):
        process = faults.start(script, logdir)
        hits += faults.interrupt(process, fault, logdir, chance)
    process = faults.start(script, logdir)
    assert process.wait() == 0, (tmp_path / "log.err").read_text()
    assert faults.differences(expected, faults.final_state(script, logdir)) == []
    assert hits >= 2, "most of the kills must have come before the end"
    assert "continuing" in (tmp_path / "log.out").read_text()


@pytest.fixture(scope="module", params=list(SETTINGS))
def finished(request, tmp_path_factory):
    """A short run that saved often, and its script."""
    directory = tmp_path_factory.mktemp("finished")
    run(request.param, "--train", *TINY_FLAGS, "--log_step=3", *SETTINGS[request.param], "--logdir=log", cwd=directory)
    return request.param, directory / "log"


def ends(script, log):
    """Weights, banks, counts and lines of a short run, to compare."""
    name = {"main.py": "ckpt24.pt", "main_fed.py": "global_ckpt_round3.pt"}[script]
    state = torch.load(log / name, weights_only=True)
    state.pop("rolling", None)
    state["progress"].pop("seconds")
    lines = [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]
    return {"state": state, "lines": [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]}


@pytest.mark.parametrize("kind", faults.DAMAGES)
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_used(kind, finished, tmp_path):
    script, log = finished
    shutil.copytree(log, tmp_path / "log")
    newest = tmp_path / "log" / ("ckpt24.pt" if script == "main.py" else "state/shard2_step12.pt")
    if script == "main_fed.py":
        for name in ("global_ckpt_round3.pt", "state/average_round3.pt"):
            (tmp_path / "log" / name).unlink()
    faults.damage(newest, kind, random.Random(3))
    result = run(script, "--train", *TINY_FLAGS, "--log_step=3", *SETTINGS[script], "--logdir=log", cwd=tmp_path)
    assert f"kept as {newest.name}.corrupt" in result.stderr
    assert newest.with_name(f"{newest.name}.corrupt").exists() and newest.exists()
    before = "ckpt20.pt" if script == "main.py" else "34 steps done"
    assert before in result.stdout
    assert faults.differences(ends(script, log), ends(script, tmp_path / "log")) == []


def test_a_damaged_average_is_made_again(tmp_path):
    def train(rounds):
        flags = [*TINY_FLAGS, *SETTINGS["main_fed.py"], "--save_round=5", f"--total_round={rounds}", "--logdir=log"]
        return run("main_fed.py", "--train", *flags, cwd=tmp_path)

    train(2)
    average = tmp_path / "log/state/average_round2.pt"
    expected = torch.load(average, weights_only=True)["global_model"]
    (tmp_path / "log/global_ckpt_round2.pt").unlink()
    faults.damage(average, "bit flipped", random.Random(0))
    assert "average_round2.pt" in train(2).stderr
    assert faults.differences(expected, torch.load(average, weights_only=True)["global_model"]) == []


def as_format_1(path, name=None):
    """Rewrite a checkpoint as format 1 had it."""
    state = torch.load(path, weights_only=True)
    for key in ("progress", "rolling"):
        state.pop(key, None)
    torch.save({**state, "format": 1}, path.with_name(name or path.name))
    if name:
        path.unlink()


def test_continues_from_format_1(finished, tmp_path):
    """Format 1 had no state of the logs, and one file per shard."""
    script, log = finished
    shutil.copytree(log, tmp_path / "log")
    run_json = tmp_path / "log/run.json"
    run_json.unlink()
    if script == "main.py":
        (tmp_path / "log/ckpt24.pt").unlink()
        for path in (tmp_path / "log").glob("ckpt*.pt"):
            as_format_1(path)
    else:
        for name in ("global_ckpt_round3.pt", "state/average_round3.pt"):
            (tmp_path / "log" / name).unlink()
        state = tmp_path / "log/state"
        as_format_1(state / "average_round2.pt", "average.pt")
        for k, step in enumerate((12, 10, 8)):
            for other in state.glob(f"shard{k}_step*.pt"):
                if other.name != f"shard{k}_step{step}.pt":
                    other.unlink()
            as_format_1(state / f"shard{k}_step{step}.pt", f"shard{k}.pt")
        for path in (tmp_path / "log").glob("global_ckpt*.pt"):
            as_format_1(path)
    result = run(script, "--train", *TINY_FLAGS, "--log_step=3", *SETTINGS[script], "--logdir=log", cwd=tmp_path)
    assert "20 of 24 steps" in result.stdout if script == "main.py" else "2 rounds and 30 steps done" in result.stdout
    expected, found = ends(script, log), ends(script, tmp_path / "log")
    for state in (expected["state"], found["state"]):
        state.pop("progress")
    assert faults.differences(expected["state"], found["state"]) == []
    assert expected["lines"][:5] == found["lines"][:5] and found["lines"][-1]["step"] == expected["lines"][-1]["step"]


def test_a_newer_format_is_refused(finished, tmp_path):
    script, log = finished
    shutil.copytree(log, tmp_path / "log")
    newest = tmp_path / "log" / ("ckpt24.pt" if script == "main.py" else "state/average_round3.pt")
    torch.save({**torch.load(newest, weights_only=True), "format": checkpoint.FORMAT + 1}, newest)
    flags = [*TINY_FLAGS, "--log_step=3", *SETTINGS[script], "--logdir=log"]
    result = run(script, "--train", *flags, cwd=tmp_path, code=1)
    assert f"format {checkpoint.FORMAT + 1}, known: {checkpoint.FORMAT}" in result.stderr
    assert not list(tmp_path.glob("log/**/*.corrupt"))


CHANGES = {
    "main.py": ["--lr=2e-3", "--num_train=40", "--warmup=3"],
    "main_fed.py": ["--mem_ratio=3.0", "--client_num=2", "--anti_grad=off"],
}


@pytest.mark.parametrize("number", range(3))
def test_a_change_that_changes_the_result_is_refused(number, finished, tmp_path):
    script, log = finished
    change = CHANGES[script][number]
    files = {path: path.read_bytes() for path in log.glob("**/*") if path.is_file()}
    flags = [*TINY_FLAGS, *SETTINGS[script], change, f"--logdir={log}"]
    result = run(script, "--train", *flags, cwd=tmp_path, code=2)
    name, value = change[2:].split("=")
    before = json.loads((log / "run.json").read_text())["settings"][name]
    assert f"--{name}={value.replace('e-3', '').replace('2', '0.002') if name == 'lr' else value}" in result.stderr
    assert f"started with {before}" in result.stderr and "--allow_change" in result.stderr
    assert all(path.read_bytes() == data for path, data in files.items() if path.name != ".lock")


def test_an_allowed_change_is_recorded(finished, tmp_path):
    script, log = finished
    shutil.copytree(log, tmp_path / "log")
    flags = [*TINY_FLAGS, *SETTINGS[script], "--lr=2e-3", "--allow_change", "--logdir=log"]
    run(script, "--train", *flags, cwd=tmp_path)
    record = json.loads((tmp_path / "log/run.json").read_text())
    assert record["changes"] == [{"flag": "lr", "before": 0.001, "after": 0.002}]
    assert record["settings"]["lr"] == 0.002


def test_changes_that_do_not_matter_are_fine(finished, tmp_path):
    script, log = finished
    shutil.copytree(log, tmp_path / "log")
    flags = [*TINY_FLAGS, *SETTINGS[script], "--log_step=5", "--save_step=7", "--num_workers=1", "--logdir=log"]
    assert "continuing" in run(script, "--train", *flags, cwd=tmp_path).stdout


def test_fresh_needs_an_empty_directory_or_overwrite(finished, tmp_path):
    script, log = finished
    shutil.copytree(log, tmp_path / "log")
    (tmp_path / "log/notes.txt").write_text("mine")
    flags = [*TINY_FLAGS, *SETTINGS[script], "--logdir=log", "--fresh"]
    result = run(script, "--train", *flags, cwd=tmp_path, code=2)
    assert "--overwrite" in result.stderr and len(list((tmp_path / "log").glob("*.pt"))) > 1
    result = run(script, "--train", *flags, "--overwrite", "--lr=3e-3", cwd=tmp_path)
    assert "continuing" not in result.stdout and (tmp_path / "log/notes.txt").read_text() == "mine"
    flagfile = (tmp_path / "log/flagfile.txt").read_text()
    assert "--lr=0.003" in flagfile and "fresh" not in flagfile and "overwrite" not in flagfile


def wait_until(condition, seconds=60):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_a_second_process_on_the_same_directory_stops_at_once(tmp_path):
    flags = [*TINY_FLAGS, "--total_steps=100000", "--save_step=5", f"--logdir={tmp_path / 'log'}"]
    command = [sys.executable, str(ROOT / "main.py"), "--train", *flags]
    first = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: list(tmp_path.glob("log/ckpt*.pt")))
        result = run("main.py", "--train", *flags, cwd=tmp_path, code=1)
        assert f"process {first.pid} is writing there" in result.stderr
    finally:
        first.kill()
        first.wait()
    run("main.py", "--train", *flags, "--total_steps=5", cwd=tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_exits_as_clusters_expect(number, tmp_path):
    flags = [*TINY_FLAGS, "--total_steps=100000", "--save_step=100000", "--log_step=1", "--keep=1", "--logdir=log"]
    command = [sys.executable, str(ROOT / "main.py"), "--train", *flags]
    for _ in range(2):
        lines = len((tmp_path / "log/metrics.jsonl").read_bytes().splitlines()) if (tmp_path / "log").exists() else 0
        process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
        path = tmp_path / "log/metrics.jsonl"
        wait_until(lambda: path.exists() and len(path.read_bytes().splitlines()) > lines + 3)  # noqa: B023
        process.send_signal(number)
        _, errors = process.communicate()
        assert process.returncode == 128 + number
        assert f"stopped by {number.name}, saved as log/ckpt" in errors and "Traceback" not in errors
        assert len(list(tmp_path.glob("log/ckpt*.pt"))) == 1, "--keep=1 of those that are no milestones"


def test_a_second_signal_ends_the_process_at_once(tmp_path):
    code = (
        "import os, signal, time\n"
        "from training.interruption import Interruption\n"
        "with Interruption() as interruption:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    assert interruption\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ, check=False).returncode == 130


def test_the_same_signal_twice_within_a_second_is_one_request():
    """torchrun passes on what a cluster has sent to every process already."""
    code = (
        "import os, signal, time\n"
        "from training.interruption import Interruption\n"
        "with Interruption() as interruption:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    assert interruption\n"
        "    time.sleep(1.1)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(60)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ, check=False).returncode == 143


def test_a_log_that_was_removed_is_said_and_not_filled_with_zeros(finished, tmp_path):
    script, log = finished
    shutil.copytree(log, tmp_path / "log")
    (tmp_path / "log/metrics.jsonl").unlink()
    flags = [*TINY_FLAGS, "--log_step=3", *SETTINGS[script], "--logdir=log"]
    result = run(script, "--train", *flags, cwd=tmp_path)
    assert "metrics.jsonl: lines of this run are missing" in result.stderr
    assert b"\0" not in (tmp_path / "log/metrics.jsonl").read_bytes()


def test_keep_is_the_number_of_files_per_shard(tmp_path):
    flags = [*TINY_FLAGS, *SETTINGS["main_fed.py"], "--save_step=1", "--keep=3", "--total_round=1", "--logdir=log"]
    run("main_fed.py", "--train", *flags, cwd=tmp_path)
    names = sorted(path.name for path in tmp_path.glob("log/state/shard*.pt"))
    assert names == [f"shard{k}_step{step}.pt" for k in range(3) for step in (2, 3, 4)]

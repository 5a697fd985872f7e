"""Runs that are killed at random instants, damaged, changed or started twice, with the machinery of tests/faults.py."""

import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time

import pytest
import torch
from tensorboardX.proto.event_pb2 import Event

from tests import faults
from tests.commands import ROOT, environment, forking_python, run, values_of
from tests.networks import TINIER, TINY_FLAGS
from training import build
from training.flags import norm_groups
from training.launch import Interruption
from training.logger import read_metrics
from training.resume import newest_round, newest_step
from training.weights import FORMAT, find_checkpoint, load_checkpoint
from utils.errors import DataError, UsageError

TINY = [*TINY_FLAGS, *TINIER]
SETTINGS = {
    "main.py": ["--total_steps=24", "--save_step=4"],
    "main_fed.py": ["--client_num=3", "--local_epoch=2", "--total_round=3", "--save_step=2", "--mem_ratio=1.0"],
}


HALF = {"main.py": "--total_steps=150", "main_fed.py": "--local_epoch=5"}


@pytest.fixture(scope="module", params=list(HALF))
def straight(request, tmp_path_factory):
    """A run of 150 steps that nothing disturbs, and its script."""
    logdir = tmp_path_factory.mktemp("straight") / "log"
    process = faults.start(request.param, logdir, logdir.parent, HALF[request.param])
    assert process.wait() == 0, (logdir.parent / "log.err").read_text()
    return request.param, faults.final_state(request.param, logdir)


def test_killed_at_random_instants_it_ends_the_same(straight, tmp_path):
    script, expected = straight
    logdir, chance = tmp_path / "log", random.Random(1)
    hits = 0
    for fault in ("kill during a save", "kill", "SIGTERM"):
        process = faults.start(script, logdir, logdir.parent, HALF[script])
        hits += faults.interrupt(process, fault, logdir, chance)
    process = faults.start(script, logdir, logdir.parent, HALF[script])
    assert process.wait() == 0, (tmp_path / "log.err").read_text()
    assert faults.differences(expected, faults.final_state(script, logdir)) == []
    assert hits >= 2, "most of the kills must have come before the end"
    assert "continuing" in (tmp_path / "log.out").read_text()


@pytest.fixture(scope="module", params=list(SETTINGS))
def finished(request, tmp_path_factory):
    """A short run that saved often, and its script."""
    directory = tmp_path_factory.mktemp("finished")
    run(request.param, "--train", *TINY, "--log_step=3", *SETTINGS[request.param], "--logdir=log", cwd=directory)
    return request.param, directory / "log"


def ends(script, log):
    """What a short run ends with, to compare."""
    name = {"main.py": "ckpt24.pt", "main_fed.py": "global_ckpt_round3.pt"}[script]
    return {key: value for key, value in torch.load(log / name, weights_only=True).items() if key != "seconds"}


def contents(log):
    """{path: bytes} of all files but the lock."""
    return {path: path.read_bytes() for path in log.glob("**/*") if path.is_file() and path.name != ".lock"}


def of_flags(script, *arguments):
    """A function that opens a log directory as a script does where it is given these flags."""
    values = values_of("test", *TINY, *SETTINGS[script], *arguments)
    data, name = build.dataset(values), script.removesuffix(".py")
    return lambda logdir: build.log_directory(values, logdir, name, data, norm_groups(values))


def newest(script, log):
    """What a short run can be continued from: own steps, and the file of the average."""
    if script == "main.py":
        return newest_step(log).name
    _, steps, average = newest_round([4, 4, 4], log)
    return steps, average.name


@pytest.mark.parametrize("kind", faults.DAMAGES)
def test_damage_is_seen_and_passed_over(kind, finished, tmp_path, capsys):
    script, log = finished
    log = shutil.copytree(log, tmp_path / "log")
    name, expected = {
        "main.py": ("ckpt24.pt", "ckpt20.pt"),
        "main_fed.py": ("global_ckpt_round3.pt", ([12, 12, 12], "global_ckpt_round2.pt")),
    }[script]
    faults.damage(log / name, kind, random.Random(3))
    assert newest(script, log) == expected
    assert f"{name}: cannot be read as a checkpoint" in (said := capsys.readouterr().err) and "passed over" in said


def test_what_was_damaged_is_made_again(finished, tmp_path):
    script, log = finished
    shutil.copytree(log, tmp_path / "log")
    name, average = ("ckpt24.pt" if script == "main.py" else "shard2_step12.pt"), "global_ckpt_round3.pt"
    (path,) = tmp_path.glob(f"log/**/{name}")
    faults.damage(path, "emptied", random.Random(3))
    files = contents(tmp_path / "log")
    settings = [*TINY, "--log_step=3", *SETTINGS[script], "--logdir=log"]
    result = run(script, "--train", *settings, cwd=tmp_path)
    assert ("ckpt20.pt" if script == "main.py" else "34 steps done") in result.stdout
    assert faults.differences(ends(script, log), ends(script, tmp_path / "log")) == []
    after = contents(tmp_path / "log")
    again = (name, average, "metrics.jsonl", "train.json")
    assert all(after[path] == data for path, data in files.items() if path.name not in again)


def test_averages_that_are_not_published_are_kept_and_made_again(tmp_path):
    def train(rounds):
        flags = [*TINY, *SETTINGS["main_fed.py"], "--save_round=5", f"--total_round={rounds}", "--logdir=log"]
        return run("main_fed.py", "--train", *flags, "--keep=1", cwd=tmp_path)

    def averages():
        return sorted(path.name for path in tmp_path.glob("log/**/*_round*.pt"))

    train(3)
    assert averages() == ["average_round2.pt", "global_ckpt_round3.pt"]
    published = tmp_path / "log/global_ckpt_round3.pt"
    expected = torch.load(published, weights_only=True)["global_model"]
    faults.damage(published, "bit flipped", random.Random(0))
    assert "2 rounds and 36 steps done" in train(3).stdout
    assert faults.differences(expected, torch.load(published, weights_only=True)["global_model"]) == []


def test_another_format_is_refused(finished, tmp_path):
    script, log = finished
    log = shutil.copytree(log, tmp_path / "log")
    newest = log / ("ckpt24.pt" if script == "main.py" else "global_ckpt_round3.pt")
    torch.save({**torch.load(newest, weights_only=True), "format": FORMAT + 1}, newest)
    files = contents(log)
    with pytest.raises(DataError, match=f"{newest.name}: of another program, or another version of this one"):
        of_flags(script)(log)
    assert contents(log) == files


REFUSED = [
    ("main.py", "--lr=2e-3", "--lr=0.002: the run in {} was started with 0.001 (--allow_change continues"),
    ("main.py", "--warmup=3", "--warmup=3: the run in {} was started with 0 (--allow_change continues"),
    ("main.py", "--num_train=40", "--num_train=40: the run in {} was started with 48 (--allow_change continues"),
    (
        "main.py",
        "--ch=64 --allow_change",
        "--ch=64: the run in {} was started with 16 (what it has saved depends on it)",
    ),
    (
        "main.py",
        "--norm_groups=2 --allow_change",
        "--norm_groups=2: the run in {} was started with 4 (what it has saved depends on it)",
    ),
    (
        "main.py",
        "--img_size=16 --allow_change",
        "--img_size=16: the run in {} was started with 8 (what it has saved depends on it)",
    ),
    ("main.py", "--lr=1 --use_labels --num_labels=10 --allow_change", "--num_labels=10: the run in {} was"),
    ("main_fed.py", "--mem_ratio=3.0", "--mem_ratio=3.0: the run in {} was started with 1.0 (--allow_change continues"),
    (
        "main_fed.py",
        "--client_num=2 --allow_change",
        "--client_num=2: the run in {} was started with 3 (what it has saved depends on it)",
    ),
    (
        "main_fed.py",
        "--num_train=40 --allow_change",
        "--num_train=40: the run in {} was started with 48 (what it has saved depends on it)",
    ),
    (
        "main_fed.py",
        "--local_epoch=3 --allow_change",
        "--local_epoch=3: the run in {} was started with 2 (what it has saved depends on it)",
    ),
    (
        "main_fed.py",
        "--batch_size=4 --allow_change",
        "--batch_size=4: the run in {} was started with 8 (what it has saved depends on it)",
    ),
    (
        "main_fed.py",
        "--split=random --allow_change",
        "--split=random: the run in {} was started with stratified (what it has saved depends on it)",
    ),
    (
        "main_fed.py",
        "--seed=1 --split=stratified --allow_change",
        "--seed=1: the run in {} was started with 12 (what it has saved depends on it)",
    ),
]


@pytest.mark.parametrize(("script", "change", "message"), REFUSED)
def test_what_cannot_be_continued_is_refused_and_nothing_is_touched(script, change, message, finished, tmp_path):
    made_by, finished_log = finished
    if script != made_by:
        pytest.skip("a run of the other script")
    log = shutil.copytree(finished_log, tmp_path / "log")
    files = contents(log)
    with pytest.raises(UsageError) as error:
        of_flags(script, *change.split())(log)
    assert message.format(log) in str(error.value)
    assert contents(log) == files


def test_so_it_is_by_the_scripts(finished, tmp_path):
    """Fewer steps than are done, and the other script."""
    script, log = finished
    files, other = contents(log), {"main.py": "main_fed.py", "main_fed.py": "main.py"}[script]
    shorter, done = ("--total_steps=12", 24) if script == "main.py" else ("--total_round=2", 3)
    for program, settings, message in (
        (script, [*SETTINGS[script], shorter], f"{shorter}: the run in {log} has done {done}"),
        (other, [*SETTINGS[other], "--allow_change"], f"script={other[:-3]}: the run in {log} was"),
    ):
        result = run(program, "--train", *TINY, *settings, f"--logdir={log}", cwd=tmp_path, code=2)
        assert message in result.stderr and len(result.stderr.splitlines()) == 1
    assert contents(log) == files


def test_an_allowed_change_is_recorded_and_others_do_not_matter(finished, tmp_path):
    script, log = finished
    shutil.copytree(log, tmp_path / "log")
    flags = [*TINY, *SETTINGS[script], "--log_step=5", "--save_step=7", "--num_workers=1", "--logdir=log"]
    flags += ["--split=stratified"] if script == "main_fed.py" else ["--sample_size=3", "--total_steps=25"]
    assert "continuing" in run(script, "--train", *flags, "--lr=2e-3", "--allow_change", cwd=tmp_path).stdout
    record = json.loads((tmp_path / "log/run.json").read_text())
    steps = 24 if script == "main.py" else 36
    assert record["changes"] == [{"flag": "lr", "before": 0.001, "after": 0.002, "step": steps}]
    assert record["settings"]["lr"] == 0.002


OF_OTHERS = ("notes.txt", "state/mine.pt", "sample/holiday.png", "events.out.tfevents.1.host", "eval_notes.json")


def test_fresh_needs_an_empty_directory_or_overwrite(finished, tmp_path):
    script, log = finished
    shutil.copytree(log, tmp_path / "log")
    for name in OF_OTHERS:
        (tmp_path / "log" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "log" / name).write_text("mine")
    files = contents(tmp_path / "log")
    with pytest.raises(UsageError, match="--overwrite"):
        of_flags(script, "--fresh")(tmp_path / "log")
    assert contents(tmp_path / "log") == files
    flags = [*TINY, *SETTINGS[script], "--logdir=log", "--fresh", "--overwrite", "--lr=3e-3"]
    result = run(script, "--train", *flags, cwd=tmp_path)
    assert "continuing" not in result.stdout
    assert all((tmp_path / "log" / name).read_text() == "mine" for name in OF_OTHERS)
    flagfile = (tmp_path / "log/flagfile.txt").read_text()
    assert "--lr=0.003" in flagfile and "fresh" not in flagfile and "overwrite" not in flagfile


def test_whole_results_are_not_made_again_without_what_they_were_made_from(finished, tmp_path):
    """The files that a run continues from are gone, what evaluation needs is not."""
    script, log = finished
    shutil.copytree(log, tmp_path / "log")
    for path in [*tmp_path.glob("log/ckpt2*.pt"), *tmp_path.glob("log/state/*")]:
        path.unlink()
    with pytest.raises(DataError, match="start over with --fresh --overwrite"):
        newest(script, tmp_path / "log")


def wait_until(condition, seconds=60):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_a_second_process_on_the_same_directory_stops_at_once(tmp_path):
    flags = [*TINY, "--total_steps=100000", "--save_step=5", "--log_step=1", f"--logdir={tmp_path / 'log'}"]
    command = [sys.executable, str(ROOT / "main.py"), "--train", *flags]
    first = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: list(tmp_path.glob("log/ckpt*.pt")))
        result = run("main.py", "--train", *flags, cwd=tmp_path, code=1)
        assert f"process {first.pid} is writing there" in result.stderr
    finally:
        first.kill()
        first.wait()
    step = load_checkpoint(find_checkpoint(tmp_path / "log"))["step"]
    assert read_metrics(tmp_path / "log")[step - 1]["step"] == step
    (events,) = tmp_path.glob("log/events.*")
    assert step in steps_of_events(events), "flushed before the save"
    (tmp_path / "log/.ckpt5.pt.0123abcd.tmp").touch()
    assert "continuing" in run("main.py", "--train", *flags, f"--total_steps={step + 1}", cwd=tmp_path).stdout
    assert not list(tmp_path.glob("log/.ckpt*.tmp")), "what kills have left of unfinished files"


def test_a_signal_saves_and_exits_as_clusters_expect(tmp_path):
    flags = [*TINY, "--total_steps=100000", "--save_step=100000", "--log_step=1", "--keep=1", "--logdir=log"]
    command = [forking_python(), str(ROOT / "main.py"), "--train", *flags]
    path, lines = tmp_path / "log/metrics.jsonl", 0
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
        wait_until(lambda: path.exists() and len(path.read_bytes().splitlines()) > lines + 3)  # noqa: B023
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        assert f"stopped by {number.name}, saved in log:" in errors and "Traceback" not in errors
        assert len(list(tmp_path.glob("log/ckpt*.pt"))) == 1, "--keep=1 of those that are no milestones"
        lines = len(path.read_bytes().splitlines())


def test_a_second_signal_ends_the_process_at_once(monkeypatch):
    """But torchrun passes on what a cluster has sent to every process already."""
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr("training.launch.ONE_REQUEST", 0.2)
    with Interruption() as interruption:
        assert not interruption
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption and codes == []
        os.kill(os.getpid(), signal.SIGINT)
        assert codes == [130]
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)
        assert codes == [130, 143]


def steps_of_events(path):
    """The steps of the losses in an event file: records of length, its checksum, the event, its checksum."""
    data, steps = path.read_bytes(), []
    while len(data) >= 12 and len(data) >= 16 + (size := struct.unpack("<Q", data[:8])[0]):
        event = Event.FromString(data[12 : 12 + size])
        steps += [event.step for value in event.summary.value if value.tag == "loss"]
        data = data[16 + size :]
    return steps


def test_keep_is_the_number_of_files_per_shard(tmp_path):
    flags = [*TINY, *SETTINGS["main_fed.py"], "--save_step=1", "--keep=3", "--total_round=1", "--logdir=log"]
    run("main_fed.py", "--train", *flags, cwd=tmp_path)
    names = sorted(path.name for path in tmp_path.glob("log/state/shard*.pt"))
    assert names == [f"shard{k}_step{step}.pt" for k in range(3) for step in (2, 3, 4)]

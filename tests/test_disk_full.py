"""Disks that fill up and file systems that cannot do everything: what is there is not harmed, and a run continues."""

import errno
import os
import subprocess

import pytest
import torch

from tests.commands import run
from tests.faults import fill, small_disk
from tests.networks import TINY_FLAGS, tiny_learner
from training.logger import Logger, read_metrics
from training.weights import load_checkpoint, save_checkpoint
from utils.errors import DataError
from utils.files import lock_directory, read_json, write_json


@pytest.fixture
def disk():
    """A file system of 160 MiB, which takes root's rights to mount."""
    with small_disk(160) as path:
        if path is None:
            pytest.skip("this process may not mount a tmpfs")
        yield path


@pytest.mark.parametrize("leave", [0, 5_000, 300_000])
def test_a_save_without_room_is_one_line_and_leaves_the_old_file(leave, disk):
    path = disk / "ckpt1.pt"
    save_checkpoint(path, {**tiny_learner().state_dict(), "step": 1})
    filler = fill(disk, leave)
    with pytest.raises(DataError, match=r"ckpt1\.pt: cannot be written \(No space left on device\)"):
        save_checkpoint(path, {**tiny_learner().state_dict(), "step": 2})
    assert sorted(file.name for file in disk.iterdir()) == ["ckpt1.pt", "filler"], "no temporary file stays"
    assert load_checkpoint(path)["step"] == 1
    filler.unlink()
    save_checkpoint(path, {**tiny_learner().state_dict(), "step": 2})
    assert load_checkpoint(path)["step"] == 2


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_what_cannot_be_synced_is_written_all_the_same(number, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    write_json(tmp_path / "a.json", [1])
    with Logger(tmp_path, 1, 0, log_step=1, max_bad_steps=1, batch_size=8) as logger:
        logger.write({"step": 1, "loss": 0.5})
        logger.finish(1)
    monkeypatch.setattr(os, "open", refuse)  # a directory cannot be opened
    write_json(tmp_path / "a.json", [2])
    assert read_json(tmp_path / "a.json") == [2] and read_metrics(tmp_path)[0]["loss"] == 0.5


def test_an_error_of_the_disk_is_not_passed_over(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    write_json(tmp_path / "a.json", [1])
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DataError, match=r"a\.json: cannot be written \(Input/output error\)"):
        write_json(tmp_path / "a.json", [2])
    assert read_json(tmp_path / "a.json") == [1] and len(list(tmp_path.iterdir())) == 1


def test_a_lock_that_cannot_be_written_is_one_line(tmp_path):
    """Such as another user's; here a directory has its name."""
    (tmp_path / ".lock").mkdir()
    with pytest.raises(DataError, match=r"--logdir=.*: cannot be written \(Is a directory\)"):
        lock_directory(tmp_path, "logdir")


def test_metrics_go_on_after_a_torn_line_and_the_last_of_a_step_counts(tmp_path):
    """Two starts, the second with more processes; the first one's last line was torn by a full disk."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "loss": 1.0, "time": 1}\n{"step": 4, "lo')
    (tmp_path / "metrics.rank1.jsonl").write_text('{"step": 2, "loss": 2.0, "time": 9}\n{"step": 1, "time": 8}\n')
    with Logger(tmp_path, 4, 2, log_step=1, max_bad_steps=1, batch_size=8) as logger:
        logger.write({"step": 4, "loss": 0.5})
        logger.write({"step": 4, "weights": "ema", "fpd": 3.0})
    lines = [(line["step"], line.get("loss"), line.get("fpd")) for line in read_metrics(tmp_path)]
    assert lines == [(1, None, None), (2, 2.0, None), (4, 0.5, None), (4, None, 3.0)]


def test_json_without_room(disk):
    write_json(disk / "a.json", [1])
    fill(disk, 0)
    with pytest.raises(DataError, match="No space left"):
        write_json(disk / "a.json", list(range(10_000)))
    assert (disk / "a.json").read_text() == "[\n  1\n]\n"


@pytest.mark.parametrize(("script", "length"), [("main.py", "--total_steps=12"), ("main_fed.py", "--total_round=2")])
def test_training_continues_when_there_is_room(script, length, disk, tmp_path):
    """A checkpoint takes 9 MB here, so the disk is full after two of main.py, or four shards' files."""
    flags = [*TINY_FLAGS, "--save_step=4", "--log_step=1", length, "--client_num=2", "--local_epoch=2"]
    run(script, "--train", *flags, "--logdir=log", cwd=tmp_path)
    filler = fill(disk, 20_000_000 if script == "main.py" else 40_000_000)
    result = run(script, "--train", *flags, f"--logdir={disk / 'log'}", cwd=tmp_path, code=1)
    assert "cannot be written (No space left on device)" in result.stderr.splitlines()[-1]
    saved = [path for path in disk.glob("log/**/*") if ".pt" in path.name]
    assert saved and all(load_checkpoint(path) for path in saved)
    filler.unlink()
    assert "continuing" in run(script, "--train", *flags, f"--logdir={disk / 'log'}", cwd=tmp_path).stdout
    name = "ckpt12.pt" if script == "main.py" else "global_ckpt_round2.pt"
    straight, continued = (torch.load(path / name, weights_only=True) for path in (tmp_path / "log", disk / "log"))
    for key in ("net_model", "ema_model", "global_model", "global_ema_model"):
        for entry, value in straight.get(key, {}).items():
            assert torch.equal(continued[key][entry], value), entry


def test_the_small_disk_is_gone_afterwards():
    with small_disk(1) as path:
        pass
    assert path is None or str(path) not in subprocess.run(["mount"], capture_output=True, text=True, check=True).stdout

"""A disk that fills up while a run saves: what was there is not harmed, and the run continues when there is room."""

import subprocess

import pytest
import torch

from benchmarks.faults import fill, small_disk
from errors import DataError
from files import write_json
from tests.commands import run
from tests.networks import TINY_FLAGS, tiny_learner
from training import checkpoint


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
    checkpoint.save(path, {**tiny_learner().state_dict(), "step": 1})
    filler = fill(disk, leave)
    with pytest.raises(DataError, match=r"ckpt1\.pt: cannot be written \(No space left on device\)"):
        checkpoint.save(path, {**tiny_learner().state_dict(), "step": 2})
    assert sorted(file.name for file in disk.iterdir()) == ["ckpt1.pt", "filler"], "no temporary file stays"
    assert checkpoint.load(path)["step"] == 1
    filler.unlink()
    checkpoint.save(path, {**tiny_learner().state_dict(), "step": 2})
    assert checkpoint.load(path)["step"] == 2


def test_json_without_room(disk):
    write_json(disk / "a.json", [1])
    fill(disk, 0)
    with pytest.raises(DataError, match="No space left"):
        write_json(disk / "a.json", list(range(10_000)))
    assert (disk / "a.json").read_text() == "[\n  1\n]\n"


@pytest.mark.parametrize("script", ["main.py", "main_fed.py"])
def test_training_continues_when_there_is_room(script, disk, tmp_path):
    flags = [*TINY_FLAGS, "--save_step=4", "--log_step=1"]
    length = {"main.py": "--total_steps={}", "main_fed.py": "--total_round={}"}[script]
    flags += ["--client_num=2", "--local_epoch=2"] if script == "main_fed.py" else []
    short, long = (length.format(n) for n in ((8, 12) if script == "main.py" else (1, 2)))
    run(script, "--train", *flags, long, "--logdir=log", cwd=tmp_path)
    run(script, "--train", *flags, short, f"--logdir={disk / 'log'}", cwd=tmp_path)
    before = {path: path.read_bytes() for path in disk.glob("log/**/*.pt")}
    filler = fill(disk, 20_000)
    result = run(script, "--train", *flags, long, f"--logdir={disk / 'log'}", cwd=tmp_path, code=1)
    assert "cannot be written (No space left on device)" in result.stderr.splitlines()[-1]
    assert all(path.read_bytes() == data for path, data in before.items())
    filler.unlink()
    run(script, "--train", *flags, long, f"--logdir={disk / 'log'}", cwd=tmp_path)
    name = "ckpt12.pt" if script == "main.py" else "global_ckpt_round2.pt"
    straight, continued = (torch.load(path / name, weights_only=True) for path in (tmp_path / "log", disk / "log"))
    for key in ("net_model", "ema_model", "global_model", "global_ema_model"):
        for entry, value in straight.get(key, {}).items():
            assert torch.equal(continued[key][entry], value), entry


def test_the_small_disk_is_gone_afterwards():
    with small_disk(1) as path:
        pass
    assert path is None or str(path) not in subprocess.run(["mount"], capture_output=True, text=True, check=True).stdout

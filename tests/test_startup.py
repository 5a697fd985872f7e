"""Signals at all times, standard streams that are closed or full, bars in log files, names of every kind."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT, check, environment, eval_flags, run, run_module
from tests.networks import TINY_FLAGS, tiny_unet
from utils import startup
from utils.bar import progress_bar
from utils.errors import DataError, UsageError, printable


def start(*arguments, cwd, **settings):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = environment(PYTHONPATH=str(ROOT))
    return subprocess.Popen([sys.executable, *arguments], cwd=cwd, env=env, **pipes, **settings)


WORK = """
import sys, time
from utils import startup
def main():
    try:
        print("working", flush=True)
        time.sleep(60)
    finally:
        print("tidy")
        if "--slow" in sys.argv:
            sys.stdout.flush()
            time.sleep(60)
startup.run(main)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_things_tidy(number, tmp_path):
    (tmp_path / "work.py").write_text(WORK)
    process = start("work.py", cwd=tmp_path)
    assert process.stdout.readline() == "working\n"
    process.send_signal(number)
    assert process.communicate(timeout=20) == ("tidy\n", f"work.py: stopped by {number.name}\n")
    assert process.returncode == 128 + number


def test_a_second_signal_does_not_wait(tmp_path):
    (tmp_path / "work.py").write_text(WORK)
    process = start("work.py", "--slow", cwd=tmp_path)
    assert process.stdout.readline() == "working\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "tidy\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20) == ("", "work.py: stopped by SIGINT\n")
    assert process.returncode == 130


def test_nohup_holds(tmp_path):
    (tmp_path / "work.py").write_text(WORK)
    process = start("work.py", cwd=tmp_path, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert process.stdout.readline() == "working\n"
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.terminate()
    assert process.wait(20) == 143


def test_a_log_file_gets_plain_lines(tmp_path):
    flags = ["--train", *TINY_FLAGS, "--log_step=1", "--total_steps=30"]
    result = run("main.py", *flags, "--logdir=a", cwd=tmp_path)
    assert result.stderr.count("\n") < 6 and "\r" not in result.stderr
    assert "30/30" in result.stderr.splitlines()[-1] and "loss=" in result.stderr
    parameters = sum(p.numel() for p in tiny_unet().parameters() if p.requires_grad)
    expected = f"cpu, 1 process, {parameters:,} parameters, 48 images, 6 steps per epoch, 30 steps in all"
    first, of_ema, rest, last = result.stdout.splitlines()
    assert first == f"{expected}, 8 images per batch" and "99.7%" in of_ema
    assert re.fullmatch(r"10 more steps will take about 00:\d\d, sample grids and measurements aside", rest)
    assert re.fullmatch(r"a: 30 steps done in 00:\d\d", last)
    command = [sys.executable, "-c", "from utils.bar import progress_bar; list(progress_bar(range(30)))"]
    assert check(command, ROOT, 0, {"TQDM_DISABLE": "1"}).stderr == ""
    assert check(command, ROOT, 0, {"TQDM_MININTERVAL": "0"}).stderr.count("\n") >= 30


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("stream", "redrawn"), [(io.StringIO(), False), (Terminal(), True)])
def test_a_bar_is_redrawn_on_a_terminal_only(stream, redrawn, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream)
    for _ in progress_bar(range(3), desc="work", unit="image", mininterval=0) if redrawn else progress_bar(range(3)):
        pass
    assert ("\r" in stream.getvalue()) == redrawn and "3/3" in stream.getvalue()
    if not redrawn:
        assert stream.getvalue().count("\n") == 2 and not stream.getvalue().endswith("\n\n")


def test_all_bars_come_from_one_function():
    files = [path for path in ROOT.glob("**/*.py") if ".venv" not in path.parts and path.parent.name != "tests"]
    assert [path.name for path in files if re.search(r"\btqdm\(|import tqdm", path.read_text())] == ["bar.py"]


ODD = os.fsdecode(b"\xff=\n'\" <b>|-~#")


def test_a_name_of_any_kind_in_all_reports(tmp_path):
    """One line per message, and every text that is written is UTF-8."""
    log = f"--logdir={ODD}"
    run("main.py", "--train", *TINY_FLAGS, "--total_steps=2", "--save_step=1", log, cwd=tmp_path)
    again = run("main.py", "--train", *TINY_FLAGS, "--save_step=1", "--total_steps=4", log, cwd=tmp_path)
    assert "2 of 4 steps done" in again.stdout
    dirs = eval_flags(tmp_path / ODD)
    run("all_in.py", *TINY_FLAGS, "--num_images=8", "--fid_features=pixels", f"--unet_dir={ODD}", *dirs, cwd=tmp_path)
    outputs = [
        f"--{name}={ODD}/t.{suffix}" for name, suffix in (("json", "json"), ("html", "html"), ("picture", "png"))
    ]
    runs = [f"{ODD}={ODD}/grid", f"{ODD}/grid"]
    table = run_module("score.compare", *outputs, *runs, cwd=tmp_path).stdout
    assert len(table.splitlines()) == 3, "both are of one method"
    result = json.loads((tmp_path / ODD / "grid/result.json").read_text())
    assert str(Path(result["checkpoint"]).parent) == ODD
    for name in ("grid/report.html", "grid/result.txt", "t.html", "t.json", "flagfile.txt"):
        assert (tmp_path / ODD / name).read_text(encoding="utf-8")
    wrong = run("all_in.py", f"--unet_dir={ODD}/x.pt", "--fid_features=pixels", cwd=tmp_path, code=1).stderr
    assert wrong.count("\n") == 1 and r"\xff".replace("x", "udc") in wrong and r"\n" in wrong


def test_a_label_ends_where_the_path_begins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("lr=1", "a=b=c", "plain"):
        (tmp_path / name).mkdir()
    expected = {
        "plain": ("", "plain"), "lr=1": ("", "lr=1"), "x=lr=1": ("x", "lr=1"), "a=b=c": ("", "a=b=c"),
        "a=b=plain": ("a=b", "plain"), "=plain": ("", "plain"), "x=~/plain": ("x", f"{tmp_path}/plain"),
    }  # fmt: skip
    for argument, (label, path) in expected.items():
        found = startup.split_label(argument)
        assert (found[0], str(found[1])) == (label, path)
    for argument in ("nothing", "x=nothing", "x=", "=", "x" * 5000):
        with pytest.raises(DataError, match="no such file or directory"):
            startup.split_label(argument)


def test_text_on_one_line():
    assert printable("é\n\x1b[1m\udce9 日本") == r"é\n\x1b[1m\udce9 日本"


def test_commands_say_wrong_arguments_in_one_line(tmp_path):
    result = run_module("score.compare", "--nonsense", cwd=tmp_path, code=UsageError.exit_code)
    assert result.stderr.startswith("score.compare: error: ") and result.stderr.count("\n") == 1 and not result.stdout

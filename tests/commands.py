"""Running the scripts as users do: as processes, with their real command lines."""

import atexit
import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from absl.flags import FlagValues

from training.flags import define, parse

ROOT = Path(__file__).parent.parent


def environment(**changes):
    """The environment of an active virtual environment, with one thread: tiny networks gain nothing from more.

    Its `python`, also that of torchrun's processes, is `forking_python`.
    """
    python = forking_python()
    path = os.pathsep.join([str(Path(python).parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {"VIRTUAL_ENV": sys.prefix, "PATH": path, "PYTHON_EXEC": python, "OMP_NUM_THREADS": "1"}
    return {**os.environ, **env, **changes}


def run(script, *flags, cwd, code=0, **env):
    """Run `python script flags` and check the exit code; returns the completed process.

    With variables of its own it has an interpreter of its own, which may read them as it starts.
    """
    python = sys.executable if env else forking_python()
    return check([python, str(ROOT / script), *map(str, flags)], cwd, code, env)


def torchrun_command(processes, script, *flags, options=("--standalone",)):
    program = [str(ROOT / script)] if script.endswith(".py") else ["-m", script]
    launcher = [forking_python(), "-m", "torch.distributed.run", *options, f"--nproc_per_node={processes}"]
    return [*launcher, *program, *map(str, flags)]


def run_with(processes, script, *flags, cwd, code=0):
    """`run`, with torchrun where there are several processes."""
    if processes == 1:
        return run(script, *flags, cwd=cwd, code=code)
    return check(torchrun_command(processes, script, *flags), cwd, code, {"PYTHONPATH": str(ROOT)})


def run_module(module, *arguments, cwd, code=0):
    return check([forking_python(), "-m", module, *map(str, arguments)], cwd, code, {"PYTHONPATH": str(ROOT)})


def run_bash(script, *flags, cwd, code=0, **env):
    return check(["bash", str(ROOT / script), *map(str, flags)], cwd, code, env)


def check(command, cwd, code, env):
    """Run a command and check its exit code and, if that is not 0, that it ended without a traceback."""
    settings = {"capture_output": True, "text": True, "timeout": 300, "check": False}
    result = subprocess.run(command, cwd=cwd, env=environment(**env), **settings)
    assert result.returncode == code, f"{command}\nexit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    assert code == 0 or "Traceback" not in result.stderr, result.stderr
    return result


@functools.cache
def forking_python():
    """A program that is used as `python` is, but starts at once: in a fork of this process's tests/fork_server.py."""
    directory = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, directory)
    program, address = directory / "python", directory / "socket"
    client = shlex.join([sys.executable, "-S", "-E", str(ROOT / "tests/fork_client.py")])
    program.write_text(f'#!/bin/sh\nFORK_SERVER={address} exec {client} "$@"\n')
    program.chmod(0o755)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}  # it ends when we do
    command = [sys.executable, str(ROOT / "tests/fork_server.py"), str(address)]
    server = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)
    atexit.register(server.stdin.close)
    server.stdout.readline()
    return str(program)


def values_of(*argv):
    """absl's values of a command line of one of the three scripts, of their own."""
    values = FlagValues()
    define(values)
    assert parse(values, list(map(str, argv))) == []
    return values


def eval_flags(directory):
    return [f"--{name}_dir={directory / name}" for name in ("generate", "similar", "grid")]


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]

"""Running the scripts as users do: as processes, with their real command lines."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from absl.flags import FlagValues

from training.flags import define, parse

ROOT = Path(__file__).parent.parent


def environment(**changes):
    """The environment of an active virtual environment, with one thread: tiny networks gain nothing from more."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "VIRTUAL_ENV": sys.prefix, "PATH": path, "OMP_NUM_THREADS": "1", **changes}


def run(script, *flags, cwd, code=0, **env):
    """Run `python script flags` and check the exit code; returns the completed process."""
    argv = [str(ROOT / script), *map(str, flags)]
    return check([sys.executable, *argv], cwd, code, env) if env else fork(argv, None, cwd, code)


def torchrun_command(processes, script, *flags, options=("--standalone",)):
    launcher = [sys.executable, "-m", "torch.distributed.run", *options, f"--nproc_per_node={processes}"]
    return [*launcher, str(ROOT / script), *map(str, flags)]


def run_with(processes, script, *flags, cwd, code=0):
    """`run`, with torchrun where there are several processes."""
    if processes == 1:
        return run(script, *flags, cwd=cwd, code=code)
    return check(torchrun_command(processes, script, *flags), cwd, code, {})


def run_module(module, *arguments, cwd, code=0):
    return fork([module, *map(str, arguments)], module, cwd, code)


def run_bash(script, *flags, cwd, code=0, **env):
    return check(["bash", str(ROOT / script), *map(str, flags)], cwd, code, env)


@functools.cache
def fork_server():
    """The `tests.fork_server` of this process, which ends with it."""
    command = [sys.executable, str(ROOT / "tests/fork_server.py")]
    return subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def fork(argv, module, cwd, code):
    """Run a script or module in a fork of a process that has imported torch, and check it as `check` does."""
    server = fork_server()
    with tempfile.NamedTemporaryFile("r+") as stdout, tempfile.NamedTemporaryFile("r+") as stderr:
        request = {"argv": argv, "module": module, "cwd": str(cwd), "path": [str(ROOT)]}
        request |= {"stdout": stdout.name, "stderr": stderr.name, "text": "text_to_image" in str(module)}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        returncode = int(server.stdout.readline())
        return checked(subprocess.CompletedProcess(argv, returncode, stdout.read(), stderr.read()), code)


def check(command, cwd, code, env):
    """Run a command and check its exit code and, if that is not 0, that it ended without a traceback."""
    settings = {"capture_output": True, "text": True, "timeout": 300}
    return checked(subprocess.run(command, cwd=cwd, env=environment(**env), check=False, **settings), code)


def checked(result, code):
    command = result.args
    assert result.returncode == code, f"{command}\nexit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    assert code == 0 or "Traceback" not in result.stderr, result.stderr
    return result


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

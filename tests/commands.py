"""Running the scripts as users do: as processes, with their real command lines."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def environment(**changes):
    """The environment of an active virtual environment, with one thread: tiny networks gain nothing from more."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "VIRTUAL_ENV": sys.prefix, "PATH": path, "OMP_NUM_THREADS": "1", **changes}


def run(script, *flags, cwd, code=0, **env):
    """Run `python script flags` and check the exit code; returns the completed process."""
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    return check(command, cwd, code, env)


def torchrun_command(processes, script, *flags, options=("--standalone",)):
    launcher = [sys.executable, "-m", "torch.distributed.run", *options, f"--nproc_per_node={processes}"]
    return [*launcher, str(ROOT / script), *map(str, flags)]


def run_with(processes, script, *flags, cwd, code=0):
    """`run`, with torchrun where there are several processes."""
    if processes == 1:
        return run(script, *flags, cwd=cwd, code=code)
    return check(torchrun_command(processes, script, *flags), cwd, code, {})


def run_module(module, *arguments, cwd, code=0):
    return check([sys.executable, "-m", module, *map(str, arguments)], cwd, code, {"PYTHONPATH": str(ROOT)})


def run_bash(script, *flags, cwd, code=0, **env):
    return check(["bash", str(ROOT / script), *map(str, flags)], cwd, code, env)


def check(command, cwd, code, env):
    result = subprocess.run(command, cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=300)
    assert result.returncode == code, f"{command}\nexit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    assert code == 0 or "Traceback" not in result.stderr, result.stderr
    return result


def eval_flags(directory):
    return [f"--{name}_dir={directory / name}" for name in ("generate", "similar", "grid")]


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]

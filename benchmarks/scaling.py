"""What a second process gains, on one machine: the scripts as users run them, and this module, under torchrun."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.step import CIFAR10, make_learner, make_net, noise
from benchmarks.timing import alternate, row
from score.memorization import neighbors_by_all
from training.averaging import average_learners
from utils import distributed
from utils.errors import DataError
from utils.files import read_json

ROOT = Path(__file__).parent.parent
SHARDS = 4
FLAGS = ["--flagfile=config/DIGITS.txt", "--device=cpu", "--num_train=1024", "--batch_size=64"]


def measure(scale):
    """Rows of seconds, medians of three alternating runs: two processes against one, each of one thread.

    The scale multiplies the length of the runs.
    """
    runs = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as directory:
        for number in distributed.bar(range(6), desc="scaling", unit="run"):
            processes = number % 2 + 1
            runs[processes].append(seconds_of_run(processes, Path(directory) / str(number), scale))
    rows = []
    for what, target in (("main_fed.py", 1.85), ("all_in.py, generation", 1.85), ("search", 1.7), ("averaging", None)):
        one, two = (statistics.median(seconds[what] for seconds in runs[processes]) for processes in runs)
        # averaging is an exchange, which one process does not need
        rows.append(row(f"{what}: two processes (s)", two, one if target else None, at_least=target))
    return rows


def seconds_of_run(processes, directory, scale):
    """Seconds of the scripts' own clocks, and of what `main` measures."""
    train = [f"--client_num={SHARDS}", "--total_round=2", f"--local_epoch={max(1, round(20 * scale))}"]
    train += ["--sample_step=0", "--save_step=0", "--log_step=1000", f"--logdir={directory}/log"]
    launch(processes, "main_fed.py", "--train", *FLAGS, *train)
    places = [f"--unet_dir={directory}/log", *(f"--{name}_dir={directory}/out" for name in ("generate", "grid"))]
    launch(processes, "all_in.py", *FLAGS, "--stages=generate", f"--num_images={max(64, round(2048 * scale))}", *places)
    return {
        "main_fed.py": read_json(directory / "log/train.json")["seconds"],
        "all_in.py, generation": read_json(directory / "out/generate.json")["seconds"]["generate"],
        **json.loads(launch(processes, "-m", "benchmarks.scaling", str(scale)).splitlines()[-1]),
    }


def launch(processes, *command):
    """Run a command of this project with so many processes of one thread; returns what it prints."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*torchrun, *command], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if result.returncode:
        raise DataError(f"{' '.join(command)}: {result.stderr[-3000:]}")
    return result.stdout


def main(scale):
    """One of the processes: the search of `evaluation`, and the average of 4 CIFAR-10 sub-models."""
    distributed.initialize()
    torch.manual_seed(0)
    generated, training = noise(max(50, round(4096 * scale))), noise(max(50, round(50_000 * scale)))
    numbers = range(distributed.rank(), SHARDS, distributed.world_size())
    learners = {k: make_learner(make_net(CIFAR10, torch.device("cpu"))) for k in numbers}
    works = {
        "search": lambda: neighbors_by_all(generated, training),
        "averaging": lambda: average_learners(learners, [12_500] * SHARDS),
    }
    seconds = alternate(works, 3)
    if distributed.is_main():
        print(json.dumps(seconds))
    distributed.finish()


if __name__ == "__main__":
    main(float(sys.argv[1]))

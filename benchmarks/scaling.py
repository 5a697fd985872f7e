"""What a second process gains, on one machine: the scripts as users run them, and this module."""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.baselines import alternate, noise_to_search, row
from score.memorization import neighbors_by_all
from utils import distributed
from utils.bar import progress_bar
from utils.files import read_json

ROOT = Path(__file__).parent.parent
FLAGS = ["--flagfile=config/DIGITS.txt", "--device=cpu", "--num_train=1024", "--batch_size=64"]


def scaling(scale):
    """Rows of median seconds of three runs, two processes against one; scale: of their length."""
    runs = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as directory:
        for number in progress_bar(range(6), desc="scaling", unit="run"):
            processes = number % 2 + 1
            runs[processes].append(measure_run(processes, Path(directory) / str(number), scale))
    rows = []
    for what, target in (("main_fed.py", 0.55), ("all_in.py, generation", 0.55), ("search", 0.59)):
        one, two = (statistics.median(measured[what] for measured in runs[processes]) for processes in (1, 2))
        rows.append(row(f"{what}: two processes / one (s)", two, one, at_most=target))
    return rows


def measure_run(processes, directory, scale):
    """Seconds by the scripts' own clocks, and what `main` measures."""
    train = ["--client_num=4", "--total_round=2", f"--local_epoch={max(1, round(20 * scale))}"]
    train += ["--sample_step=0", "--save_step=0", "--log_step=1000", f"--logdir={directory}/log"]
    launch(processes, "main_fed.py", "--train", *FLAGS, *train)
    places = [f"--unet_dir={directory}/log", *(f"--{name}_dir={directory}/out" for name in ("generate", "grid"))]
    launch(processes, "all_in.py", *FLAGS, "--stages=generate", f"--num_images={max(64, round(2048 * scale))}", *places)
    return {
        "main_fed.py": read_json(directory / "log/train.json")["seconds"],
        "all_in.py, generation": read_json(directory / "out/generate.json")["seconds"]["generate"],
        "search": float(launch(processes, "-m", "benchmarks.scaling", str(scale)).split()[-1]),
    }


def launch(processes, *command):
    """Run a command of this project with so many processes of one thread; returns what it prints."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    return subprocess.check_output([*torchrun, *command], cwd=ROOT, env=env, text=True)


def main(scale):
    """One of the processes that search together; the first prints the seconds."""
    distributed.initialize()
    generated, training = noise_to_search(scale)
    seconds = alternate({"search": lambda: neighbors_by_all(generated, training)}, 3)["search"]
    if distributed.is_main():
        print(seconds)
    distributed.finish()


if __name__ == "__main__":
    main(float(sys.argv[1]))

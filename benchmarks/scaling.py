"""What a second process gains, what averaging costs, and the memory of K shards, as tables:

python -m benchmarks.scaling [--json FILE] [--scale 0.2]

Every process has one thread. The scripts are run as users run them, with torchrun where there are two processes.
"""

if __name__ == "__main__":  # before the imports that take seconds
    from utils import startup

    startup.prepare()

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.neighbors import noise
from benchmarks.step import NETWORKS, make_net
from score.memorization import neighbors_by_all
from training import learner as learner_module
from training.averaging import average_learners
from training.learner import Learner
from utils import distributed, startup
from utils.files import write_json

ROOT = Path(__file__).parent.parent
SHARDS = 4
DIGITS = ["--flagfile=config/DIGITS.txt", "--device=cpu", "--sample_step=0", "--save_step=0", "--log_step=1000"]
SETTINGS = {
    "beta_1": 1e-4, "beta_T": 0.02, "T": 1000, "mean_type": "epsilon", "lr": 2e-4, "warmup": 0, "grad_clip": 1.0,
    "ema_decay": 0.9999,
}  # fmt: skip


def launch(processes, *command):
    """Run a command of this project with so many processes of one thread; returns what it prints."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    full = [sys.executable, *(launcher if processes > 1 else []), *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(full, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{' '.join(full)}\n{result.stderr[-3000:]}")
    return result.stdout


def worker(processes, task):
    """The JSON that rank 0 of this module's `--task` prints."""
    module = ["-m", "benchmarks.scaling"] if processes == 1 else ["--module", "benchmarks.scaling"]
    return json.loads(launch(processes, *module, "--task", task).splitlines()[-1])


def train(processes, directory, epochs):
    """Images per second of main_fed.py: 4 shards of 256 digits, 2 rounds, batch 64; and seconds of a round."""
    logdir = Path(directory) / f"train{time.monotonic_ns()}"
    flags = [*DIGITS, "--num_train=1024", "--batch_size=64", f"--client_num={SHARDS}", "--total_round=2"]
    launch(processes, "main_fed.py", "--train", *flags, f"--local_epoch={epochs}", f"--logdir={logdir}")
    record = json.loads((logdir / "train.json").read_text())
    return {"images per second": 64 * record["steps"] / record["seconds"], "round": record["seconds"] / 2}


def evaluate(processes, directory, images):
    """Images per second of all_in.py's generation, with the network of a short training."""
    logdir, out = Path(directory) / "network", Path(directory) / f"eval{time.monotonic_ns()}"
    if not logdir.exists():
        launch(1, "main.py", "--train", *DIGITS, "--num_train=64", "--total_steps=50", f"--logdir={logdir}")
    places = [f"--{name}_dir={out / name}" for name in ("generate", "similar", "grid")]
    flags = [*DIGITS, "--num_train=64", f"--num_images={images}", "--batch_size=64", f"--unet_dir={logdir}", *places]
    launch(processes, "all_in.py", *flags, f"--fid_cache={directory}/stats.npz")
    record = json.loads((out / "grid/result.json").read_text())
    return images / record["seconds"]["generate"]


def time_search():
    """Seconds of the 50 nearest neighbours of 4,096 images among 50,000, 3x32x32."""
    generated, training = noise(4096, 1), noise(50_000, 2)
    distributed.barrier()
    start = time.perf_counter()
    neighbors_by_all(generated, training)
    return time.perf_counter() - start


def time_average():
    """Median seconds of averaging 4 sub-models, for both networks."""
    seconds = {}
    for name, (architecture, *_) in NETWORKS.items():
        numbers = range(distributed.rank(), SHARDS, distributed.world_size())
        learners = [Learner(make_net(architecture, torch.device("cpu")), **SETTINGS) for _ in numbers]
        times = []
        for _ in range(5):
            distributed.barrier()
            start = time.perf_counter()
            average_learners(dict(zip(numbers, learners, strict=True)), [12_500] * SHARDS)
            times.append(time.perf_counter() - start)
        seconds[name.split(",")[0]] = statistics.median(times)
    return seconds


def anonymous_gigabytes():
    """Memory of this process that no file stands behind."""
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20


def peak_memory(offload):
    """Gigabytes at most in use by 10 CIFAR-10 sub-models that train a step each and are averaged.

    With `offload` the memory of the host is a mapped file, so that what this process has itself is what a GPU would
    have to hold.
    """
    architecture, size, batch_size, _ = NETWORKS["CIFAR-10 UNet, batch 4"]
    peak = before = anonymous_gigabytes()
    with tempfile.TemporaryDirectory() as directory:

        def to_host(value):
            path = Path(directory) / str(time.monotonic_ns())
            mapped = torch.from_file(str(path), shared=True, size=value.numel(), dtype=value.dtype).view_as(value)
            return mapped.copy_(value)

        learner_module.to_host = to_host
        device = torch.device("cpu")
        learners = []
        for _ in range(10):
            learners.append(Learner(make_net(architecture, device), **SETTINGS, offload=offload))
            peak = max(peak, anonymous_gigabytes())
        x = torch.randn(batch_size, 3, size, size)
        t = torch.arange(batch_size)
        for learner in learners:
            if offload:
                learner._move(torch.clone)
            loss = learner.trainer(x, None, t, x).mean()
            peak = max(peak, anonymous_gigabytes())
            learner.update(loss)
            peak = max(peak, anonymous_gigabytes())
            for parameter in learner.parameters:
                parameter.grad = None
            if offload:
                learner._move(to_host)
        average_learners(dict(enumerate(learners)), [5000] * 10)
        peak = max(peak, anonymous_gigabytes())
    return peak - before


TASKS = {
    "search": time_search,
    "average": time_average,
    "memory-device": lambda: peak_memory(False),
    "memory-cpu": lambda: peak_memory(True),
}


def measure(scale):
    """All numbers, each for one and for two processes."""
    epochs, images, repeats = max(1, round(50 * scale)), round(4096 * scale), 3
    results = {"train": {1: [], 2: []}, "generate": {1: [], 2: []}, "search": {1: [], 2: []}, "average": {}}
    with tempfile.TemporaryDirectory() as directory, distributed.bar(total=6 * repeats + 4, unit="run") as bar:
        for _ in range(repeats):
            for processes in (1, 2):
                results["train"][processes].append(train(processes, directory, epochs))
                results["generate"][processes].append(evaluate(processes, directory, images))
                results["search"][processes].append(worker(processes, "search"))
                bar.update(3)
        for processes in (1, 2):
            results["average"][processes] = worker(processes, "average")
            bar.update()
        results["peak GB"] = {}
        for where in ("device", "cpu"):
            results["peak GB"][where] = worker(1, f"memory-{where}")
            bar.update()
    return results


def show(results):
    """The table, from medians."""
    median = {P: statistics.median(run["images per second"] for run in results["train"][P]) for P in (1, 2)}
    print(f"| main_fed.py, images per second | {median[1]:.0f} | {median[2]:.0f} | {median[2] / median[1]:.2f} |")
    made = {P: statistics.median(results["generate"][P]) for P in (1, 2)}
    print(f"| all_in.py generate, images per second | {made[1]:.0f} | {made[2]:.0f} | {made[2] / made[1]:.2f} |")
    found = {P: statistics.median(results["search"][P]) for P in (1, 2)}
    print(f"| neighbour search, seconds | {found[1]:.2f} | {found[2]:.2f} | {found[1] / found[2]:.2f} |")
    a_round = statistics.median(run["round"] for run in results["train"][2])
    for name in results["average"][1]:
        one, two = (results["average"][P][name] for P in (1, 2))
        print(f"| averaging {SHARDS} of the {name}, seconds | {one:.3f} | {two:.3f} | {one / two:.2f} |")
    share = results["average"][2]["DIGITS UNet"] / a_round
    print(f"a round of main_fed.py takes {a_round:.1f} s, averaging {share:.2%} of it")
    for where, gigabytes in results["peak GB"].items():
        print(f"peak of 10 CIFAR-10 sub-models, --shard_state={where}: {gigabytes:.2f} GB")


def main(arguments=None):
    parser = startup.Parser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--json", type=os.path.expanduser, help="also write all measurements to this file")
    parser.add_argument("--scale", type=float, default=1.0, help="below 1: shorter runs, for a trial")
    parser.add_argument("--task", choices=TASKS, help="what one process of a measurement does")
    options = parser.parse_args(arguments)
    if options.task:
        distributed.initialize()
        result = TASKS[options.task]()
        if distributed.is_main():
            print(json.dumps(result))
        distributed.finish()
        return
    results = measure(options.scale)
    show(results)
    if options.json:
        write_json(options.json, results)


if __name__ == "__main__":
    startup.run(main)

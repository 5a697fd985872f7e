"""The speed of everything against an honest baseline, as one table:

python -m benchmarks [--only step,sampler,neighbors,frechet,data] [--json FILE] [--check]
python -m benchmarks --only gpu [--json FILE]
"""

if __name__ == "__main__":  # before the imports that take seconds
    from utils import startup

    startup.prepare()

import importlib
import os
import platform
from pathlib import Path

import torch

from score.compare import markdown_table
from training.allocator import keep_freed_memory
from utils import distributed, startup
from utils.errors import UsageError
from utils.files import write_json

PARTS = ("step", "sampler", "neighbors", "frechet", "data")
GPU = "gpu"  # only where it is asked for


def machine():
    """What the numbers depend on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "cpu": model,
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def verdict(entry):
    if entry["target"] is None:
        return ""
    return "met" if entry["ok"] else "MISSED"


def main(arguments=None):
    """Print the table; returns 1 if asked to check and a target is missed."""
    parser = startup.Parser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--json", type=os.path.expanduser, help="also write the numbers to this file")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    parser.add_argument("--scale", type=float, default=1.0, help="below 1: a smaller trial, whose targets mean little")
    options = parser.parse_args(arguments)
    parts = options.only.split(",")
    if not set(parts) <= {*PARTS, GPU}:
        raise UsageError(f"--only={options.only}: choose some of {','.join(PARTS)},{GPU}")
    keep_freed_memory()  # as the scripts do: both sides of every row have it
    rows = []
    for part in distributed.bar(parts, desc="benchmarks"):
        rows += importlib.import_module(f"benchmarks.{part}").measure(options.scale)
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    numbers = ("ours", "baseline", "ratio", "target")
    cells = [
        [entry["what"], *("" if entry[name] is None else f"{entry[name]:.4g}" for name in numbers), verdict(entry)]
        for entry in rows
    ]
    print(markdown_table(["what", *numbers, ""], cells), end="")
    if options.json:
        write_json(options.json, {"machine": machine(), "rows": rows})
    return int(options.check and not all(entry["ok"] for entry in rows))


if __name__ == "__main__":
    startup.run(main)

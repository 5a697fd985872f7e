"""The experiment of docs/RESULTS.md: train and measure every arm, then write results/experiment.json and the figure.

bash com/results.sh --minutes=60

What is there already is not made again: the same command goes on where it was stopped.
"""

import argparse
import contextlib
import os
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from benchmarks.__main__ import machine
from experiments import runs, stacked, tables
from experiments.arms import ARMS, DATA, ROOT
from score.compare import markdown_table
from utils import startup
from utils.errors import UsageError
from utils.files import lock_directory, read_json, write_json


def options_of(arguments):
    """The options of a command line. Raises a UsageError."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = startup.Parser("python -m experiments", description=__doc__, formatter_class=raw)
    parser.add_argument("--minutes", type=float, default=240, help="stop after so long; the same command goes on")
    parser.add_argument("--scale", type=float, default=1.0, help="below 1: fewer steps and images, for a trial")
    parser.add_argument("--arms", help=f"with commas, some of {','.join(ARMS)}; default: all")
    parser.add_argument("--stacked", action="store_true", help="first train all networks that can be at once, on a GPU")
    parser.add_argument("--out", type=os.path.expanduser, default="results", help="directory of all that is written")
    options = parser.parse_args(arguments)
    options.arms = options.arms.split(",") if options.arms else None
    if options.arms and not set(options.arms) <= set(ARMS):
        raise UsageError(f"--arms={','.join(options.arms)}: choose some of {','.join(ARMS)}")
    if options.stacked and not torch.cuda.is_available():
        raise UsageError("--stacked: PyTorch sees no GPU: leave it out, and the trainings run on all cores")
    return options


def main(arguments=None):
    options, start = options_of(arguments), time.time()
    out = Path(options.out).resolve()
    with lock_directory(out, "out"), contextlib.chdir(ROOT):
        planned = runs.plan(out, options.scale, options.arms)
        deadline = start + 60 * options.minutes
        if options.stacked:
            starts = {run.start for run in runs.plan(out, options.scale)}
            stacked.work_all(planned, starts, torch.device("cuda"), deadline)
        complete = runs.work_all(planned, deadline)
        path = out / "experiment.json"
        times = [run.directory / "log/train.json" for run in complete]
        own = ("--logdir", "--seed", "--check_dir")
        labelled = [(run, {"arm": run.arm, "seed": run.seed}) for run in complete]
        result = {
            "command": " ".join(["bash com/results.sh", *(sys.argv[1:] if arguments is None else arguments)]),
            "machine": machine(),
            "seconds of main_fed.py": round(sum(read_json(path)["seconds"] for path in times if path.exists())),
            "trained by": Counter(runs.measured(run).get("device", "main_fed.py") for run in complete),
            "repeated": DATA["duplicates"],
            "floor": runs.floor(),
            "flags": {run.arm: [flag for flag in run.flags if not flag.startswith(own)] for run in complete},
            "points": [about | point for run, about in labelled for point in runs.measured(run)["points"]],
        }
        write_json(path, result)
        if complete:
            tables.plot(path.with_suffix(".png"), result)
            print(markdown_table(*tables.matched(result, least=1)))
        print(f"{len(complete)} of {len(planned)} trainings are complete: {path}")


if __name__ == "__main__":
    startup.run(main)

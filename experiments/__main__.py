"""The experiments of the documents: train and measure every arm, and write a JSON file and a figure.

    bash com/results.sh --minutes=60
    bash com/results.sh --arms=AGC --out=again
    bash com/results.sh --experiment=digits
    bash com/results.sh --experiment=altered
    bash com/results.sh --experiment=lora

What is there already is not made again: the same command goes on where it was stopped.
"""

import argparse
import contextlib
import os
import time
from pathlib import Path

import torch

from experiments import altered, lora, lora_rates, runs, stacked, tables
from experiments.images import load
from experiments.runs import ROOT
from experiments.tables import EXPERIMENTS
from utils import startup
from utils.errors import UsageError
from utils.files import lock_directory, write_json
from utils.machine import machine


def options_of(arguments):
    raw = argparse.RawDescriptionHelpFormatter
    parser = startup.Parser("python -m experiments", description=__doc__, formatter_class=raw)
    parser.add_argument("--minutes", type=float, default=240, help="stop after so long; the same command goes on")
    parser.add_argument("--scale", type=float, default=1.0, help="below 1: fewer steps and images, for a trial")
    parser.add_argument("--experiment", choices=EXPERIMENTS, default="cifar10", help="default: cifar10")
    parser.add_argument("--arms", help="with commas, some of the arms in experiments/; default: all")
    parser.add_argument("--data_root", type=os.path.expanduser, default="data", help="directory of the data set")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="trainings at once; default: all cores")
    parser.add_argument("--stacked", action="store_true", help="first train all networks that can be at once, on a GPU")
    parser.add_argument("--out", type=os.path.expanduser, default="results", help="directory of all that is written")
    options = parser.parse_args(arguments)
    arms = EXPERIMENTS[options.experiment].ARMS
    options.arms = options.arms.split(",") if options.arms else list(arms)
    if not set(options.arms) <= set(arms):
        raise UsageError(f"--arms={','.join(options.arms)}: choose some of {','.join(arms)}")
    if options.processes < 1:
        raise UsageError(f"--processes={options.processes}: at least 1")
    if options.stacked and options.experiment not in runs.EXPERIMENTS:
        raise UsageError(f"--stacked: not of --experiment={options.experiment}: leave it out")
    if options.stacked and not torch.cuda.is_available():
        raise UsageError("--stacked: PyTorch sees no GPU: leave it out, and the trainings run on all cores")
    return options


def main(arguments=None):
    options, start = options_of(arguments), time.time()
    out, data_root = (Path(path).resolve() for path in (options.out, options.data_root))
    with lock_directory(out, "out"), contextlib.chdir(ROOT):
        spec, found, work = EXPERIMENTS[options.experiment], None, runs.work
        if spec in (lora, lora_rates):
            data, work = lora.make(out, options.scale), lora.work
            planned = lora.plan(options.experiment, spec, out, options.scale)
        else:
            data, found, planned = prepare(options.experiment, out, data_root, options.scale)
        path = out / f"{options.experiment}.json"
        runs.check_published(path, planned, found)
        wanted = [run for run in planned if run.arm in options.arms]
        deadline = start + 60 * options.minutes
        if options.stacked:
            stacked.work_all(wanted, {run.start for run in planned}, torch.device("cuda"), deadline)
        runs.work_all(wanted, planned, deadline, options.processes, work)
        complete = [run for run in planned if runs.measured(run)["complete"]]
        write_json(path, result := result_of(spec, complete, data, found))
        if complete:
            tables.plot(options.experiment, path.with_suffix(".png"), result)
            print(tables.shown(options.experiment, result))
        print(f"{sum(run in complete for run in wanted)} of {len(wanted)} trainings are complete: {path}")


def prepare(experiment, out, data_root, scale):
    """Of an experiment on images: arguments of `load`, what the finder found, or None, and `runs.plan`."""
    spec, found = EXPERIMENTS[experiment], None
    if spec is altered:
        runs.find_copies(experiment, out, data_root)
    data = runs.data_of(experiment, out, data_root)
    load(**data)  # what is wrong with it shows before the long work
    if spec is altered:
        found = altered.found_copies(runs.lists_of(experiment, out), data)
    return data, found, runs.plan(experiment, out, data_root, scale)


def result_of(spec, complete, data, found):
    """What the file of an experiment says of the runs that are complete: JSON values.

    data: the arguments of `load`, or of lora.py its `make`; found: what the finder found, or None."""
    trainings, points = [], []
    for run in complete:
        of_run, measured = {"arm": run.arm, "seed": run.seed}, runs.measured(run)
        trainings.append(of_run | {name: measured.get(name) for name in ("device", "stacked", "seconds")})
        points += [of_run | point for point in measured["points"]]
    own = (*runs.OF_PLACES, "--seed=")
    lists = {"lists": found} if found else {}
    return {
        "machine": machine(), "data": spec.DATA, "floor": spec.floor(data), **lists,
        "flags": {run.arm: [flag for flag in run.flags if not flag.startswith(own)] for run in complete},
        "trainings": trainings, "points": points,
    }  # fmt: skip


if __name__ == "__main__":
    startup.run(main)

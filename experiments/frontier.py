"""The memorisation frontier: quality against memorisation along whole trainings, for the four arms of the ablation.

bash com/frontier.sh --data=digits64,patches128 --seeds=1,2,3 --minutes=60

Every arm is trained with every seed, and its checkpoints are measured, raw and EMA. What is there already is not made
again: the same command goes on where it was stopped. The settings that experiments.tuning has chosen are arms as well.
"""

if __name__ == "__main__":  # before the imports that take seconds
    from utils import startup

    startup.prepare()

import time

import numpy as np
from sklearn.metrics import roc_auc_score

from benchmarks.__main__ import machine
from experiments import runs
from experiments.arms import ARMS, BASELINES, DATA, tuned_arms
from experiments.matched import COMPARED, WEIGHTS, differences, paths_of
from experiments.tables import matched, plot_frontier, table
from score.memorization import THRESHOLDS
from utils import startup
from utils.errors import UsageError
from utils.files import read_json, write_json

MEASURES = (*(f"MQ@{p}" for p in THRESHOLDS), "f_mem")


def detection(trainings):
    """Rows {"arm", "images", "skip count": [AUC per seed], "low loss": [...]}; None where a label is on none or on all.

    Do skip counts reveal the images that are `repeated` in the training set, and those that default training with the
    same seed has memorised in the end, at MQ@15? Against the plain loss of an image, in the end too.
    """
    group, rows = runs.real_images(trainings[0].data)[1], {}
    found = {(run.arm, run.seed): runs.measured(run) for run in trainings}
    for (arm, seed), own in found.items():
        default = found.get(("default", seed), {"nearest": [], "ratio": []})
        copied = [image for image, ratio in zip(default["nearest"], default["ratio"], strict=True) if ratio < 0.15]
        labels = {"repeated": np.bincount(group)[group] > 1, "memorised by default": np.isin(group, copied)}
        for label, which in labels.items():
            row = rows.setdefault((arm, label), {"arm": arm, "images": label, "skip count": [], "low loss": []})
            for name, scores in (("skip count", own["skips"]), ("low loss", -np.array(own["losses"]))):
                row[name].append(roc_auc_score(which, scores) if 0 < which.sum() < len(which) else None)
    return list(rows.values())


def collect(trainings, command, seconds):
    """All results of a data set as JSON values."""
    name, points = trainings[0].data, runs.points_of(trainings)
    floor, own = runs.floor_of(name, trainings[0].images), ("--logdir=", "--seed=")
    at_equal_quality, comparisons = [], []
    for weights in WEIGHTS:
        paths = {run.arm: paths_of(points, run.arm, weights) for run in trainings}
        at_any_quality = [[floor | {"fpd": 0.0, "fpd_std": 0.0}]]
        at_equal_quality += differences({arm: (paths[arm], at_any_quality) for arm in paths}, MEASURES, weights=weights)
        for arm, baseline in BASELINES.items():
            if arm in paths and baseline in paths:
                sides = {arm: (paths[arm], paths[baseline])}
                comparisons += differences(sides, COMPARED, weights=weights, baseline=baseline)
    return {
        "command": " ".join(["bash com/frontier.sh", *command]),
        "machine": machine(),
        "seconds": round(seconds, 1),
        "seeds": sorted({run.seed for run in trainings}),
        "floor": floor,
        "flags": {run.arm: " ".join(f for f in run.flags if not f.startswith(own)) for run in trainings},
        "matched": at_equal_quality,
        "comparisons": comparisons,
        "detection": detection(trainings),
        "points": points,
    }


def run_data_set(name, arms, options):
    """Do what is missing of one data set and write the results of what is complete."""
    start = time.time()
    trainings = runs.work_all(runs.plan(name, arms, options.seeds, options), options.deadline)
    if not trainings:
        print(f"{name}: no training is complete yet: the same command goes on")
        return
    path = options.out / "frontier.json"
    results = read_json(path) if path.exists() else {}
    seconds = results.get(name, {}).get("seconds", 0) + time.time() - start
    results[name] = collect(trainings, options.command, seconds)
    write_json(path, results)
    plot_frontier(path.with_suffix(".png"), results)
    print(f"Mean above the floor [95 % interval], in points\n{table(matched({name: results[name]}))}", end="")


def names(text):
    return list(dict.fromkeys(text.split(",")))


def numbers(text):
    return list(map(int, names(text)))


def main(arguments=None):
    own_flags = {
        "data": {"type": names, "default": list(DATA), "help": f"some of {','.join(DATA)}"},
        "seeds": {"type": numbers, "default": [1, 2, 3], "help": "of training and sampling, with commas"},
        "arms": {"type": names, "help": "some of the arms; default: all four, and the tuned ones"},
    }
    with runs.begin("frontier", __doc__, arguments, own_flags) as options:
        arms = ARMS | tuned_arms(options.out)
        for flag, chosen, known in (("data", options.data, DATA), ("arms", options.arms or [], arms)):
            if not set(chosen) <= set(known):
                raise UsageError(f"--{flag}={','.join(chosen)}: choose some of {','.join(known)}")
        for name in options.data:
            run_data_set(name, {arm: arms[arm] for arm in options.arms or arms}, options)


if __name__ == "__main__":
    startup.run(main)

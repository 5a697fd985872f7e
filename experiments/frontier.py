"""The memorisation frontier: quality against memorisation along whole trainings, for the four arms of the ablation.

bash com/frontier.sh --data=digits64,patches128 --seeds=1,2,3 --minutes=60

Every arm is trained with every seed, and its checkpoints are measured, raw and EMA. What is there already is not made
again: the same command goes on where it was stopped. The settings that experiments.tuning has chosen are arms as well.
"""

import sys
import time
from pathlib import Path

from benchmarks.__main__ import machine
from errors import UsageError
from experiments.arms import ARMS, subject, tuned_arms
from experiments.command import parse, parser_of, report_errors, take
from experiments.detection import detection
from experiments.matched import Point, difference, interval
from experiments.page import write_page
from experiments.plot import plot_frontier
from experiments.runs import (
    WEIGHTS,
    is_measured,
    judge_of,
    last_measured,
    plan,
    read_measured,
    read_points,
    with_published_sampler,
    work_all,
)
from experiments.tables import matched_rows
from files import read_json, write_json
from score.compare import markdown_table
from score.grids import save_pairs
from score.memorization import THRESHOLDS

FACTORS = (1.0, 1.15, 1.4, 1.8)  # of the best quality that those compared reach with all seeds
DIFFERENCES = (15, 30)  # percent: thresholds at which arms are compared with default training
BASELINES = {"IET": "default", "AGC": "default", "IET-AGC": "default", "tuned IET-AGC": "tuned default"}


def paths_of(runs, arm, weights):
    """[[Point]] per seed of an arm, in the order of the steps."""
    return [
        [
            Point(point["fpd"], point["fpd_std"], read_measured(run, point["round"], weights)["ratio"])
            for point in read_points(run)
            if point["weights"] == weights
        ]
        for run in runs
        if run.arm.name == arm
    ]


def reached_by_all(paths):
    """The best Frechet distance that every training reaches; paths: [[Point]]."""
    return max(min(point.distance for point in path) for path in paths)


def matched_table(paths, floor_ratio):
    """{fpd: {arm: {"MQ@p": interval}}} of all arms {name: paths} at the same distances to held-out images."""
    best = reached_by_all([path for of_arm in paths.values() for path in of_arm])
    return {
        f"{best * factor:.3f}": {
            arm: {f"MQ@{p}": interval(of_arm, best * factor, p, floor_ratio) for p in THRESHOLDS}
            for arm, of_arm in paths.items()
        }
        for factor in FACTORS
    }


def comparisons(paths):
    """Every arm against default training, at qualities that the two reach with all their seeds: a list of JSON rows."""
    rows = []
    for arm, baseline in BASELINES.items():
        if arm in paths and baseline in paths:
            best = reached_by_all(paths[arm] + paths[baseline])
            for quality in (best * factor for factor in FACTORS):
                found = {f"MQ@{p}": difference(paths[arm], paths[baseline], quality, p) for p in DIFFERENCES}
                rows.append({"arm": arm, "baseline": baseline, "fpd": round(quality, 3), **found})
    return rows


def last_by_arm(runs):
    """{arm: what was kept of the last raw checkpoint of each seed}."""
    found = {}
    for run in runs:
        found.setdefault(run.arm.name, []).append(last_measured(run))
    return found


def most_memorised(found):
    """[{"ratio", "training image"}] of what was kept of a checkpoint."""
    top = found["top"]
    return [
        {"ratio": round(float(ratio), 6), "training image": int(image)}
        for ratio, image in zip(found["ratio"][top], found["nearest"][top], strict=True)
    ]


def samplers(runs, judge):
    """{arm: {sampler: point}} of the first seed's last raw checkpoint: the sampler used here and the published one."""
    found = {}
    for run in runs:
        if run.arm.name in ("default", "IET-AGC") and run.arm.name not in found:
            last = next(p for p in reversed(read_points(run)) if p["weights"] == "raw")
            both = {"DPM-Solver++, 20 steps": last, "DDIM, 50 steps": with_published_sampler(run, judge)}
            found[run.arm.name] = both
    return found


def collect(runs, last, judge, options, seconds):
    """All results of a data set as one dict of JSON values; last: `last_by_arm`."""
    arms = dict.fromkeys(run.arm.name for run in runs)
    paths = {weights: {arm: paths_of(runs, arm, weights) for arm in arms} for weights in WEIGHTS}
    return {
        "command": " ".join(["bash com/frontier.sh", *options.command]),
        "machine": machine(),
        "seconds": seconds,
        "seeds": sorted({run.seed for run in runs}),
        "training images": len(judge.training),
        "distinct training images": len(judge.distinct),
        "generated images": judge.images,
        "floor": judge.floor,
        "flags": {run.arm.name: [flag for flag in run.flags if not is_of_run(flag)] for run in runs},
        "points": [
            {"arm": run.arm.name, "seed": run.seed, **point} for run in runs for point in read_points(run)
        ],
        "matched quality": {weights: matched_table(paths[weights], judge.floor_ratio) for weights in WEIGHTS},
        "comparisons": {weights: comparisons(paths[weights]) for weights in WEIGHTS},
        "detection (ROC AUC per seed)": detection(runs, judge),
        "samplers": samplers(runs, judge),
        "most memorised": {arm: most_memorised(seeds[0]) for arm, seeds in last.items()},
    }  # fmt: skip


def is_of_run(flag):
    """Whether a flag is a run's own: where it is and with which seed."""
    return flag.startswith(("--logdir=", "--seed=", "--data_root="))


def print_tables(name, result):
    for weights in WEIGHTS:
        print(f"{name}, {weights} weights, mean over seeds [95 % interval]")
        print(markdown_table(*matched_rows(result, weights)), end="")


def parse_arguments(arguments):
    parser = parser_of("frontier", __doc__)
    words = lambda text: text.split(",")  # noqa: E731
    numbers = lambda text: [int(number) for number in text.split(",")]  # noqa: E731
    parser.add_argument(
        "--data", type=words, default=["digits64", "patches128", "digits256"], help="data sets with their sizes"
    )
    parser.add_argument("--seeds", type=numbers, default=[1, 2, 3], help="of training and sampling, with commas")
    parser.add_argument("--arms", type=words, help="some of the arms; default: all four, and the tuned ones")
    return parse(parser, arguments)


def chosen_arms(options):
    known = ARMS | tuned_arms(options.out)
    names = options.arms or list(known)
    if not set(names) <= set(known):
        raise UsageError(f"--arms={','.join(names)}: choose some of {','.join(known)}")
    return [known[name] for name in names]


def run_data_set(name, options, arms, deadline):
    """Do what is missing of one data set and write the results with what is there."""
    start = time.time()
    runs = plan(name, arms, options.seeds, options)
    work_all(runs, deadline)
    measured = [run for run in runs if is_measured(run)]
    if not measured:
        return
    judge = judge_of(runs[0].subject)
    path = Path(options.out) / "frontier.json"
    results = read_json(path) if path.exists() else {}
    seconds = results.get(name, {}).get("seconds", 0) + time.time() - start
    last = last_by_arm(measured)
    results[name] = collect(measured, last, judge, options, round(seconds, 1))
    write_json(path, results)
    plot_frontier(path.with_suffix(".png"), results)
    save_pairs(path.with_name(f"pairs_{name}.png"), {arm: seeds[0]["pairs"] for arm, seeds in last.items()})
    write_page(path.with_name(f"frontier_{name}.html"), name, results[name], last, judge)
    print_tables(name, results[name])


def run_all(options):
    arms = chosen_arms(options)
    for name in options.data:
        subject(name, options)
    deadline = time.time() + 60 * options.minutes
    with take(options.out):
        for name in options.data:
            run_data_set(name, options, arms, deadline)


def main(arguments=None):
    options = parse_arguments(arguments)
    return report_errors("frontier", lambda: run_all(options))


if __name__ == "__main__":
    sys.exit(main())

"""The memorisation frontier: quality against memorisation along whole trainings, for the four arms of the ablation.

bash com/frontier.sh --data=digits64,patches128 --seeds=1,2,3 --minutes=60

Every arm is trained with every seed, and its checkpoints are measured, raw and EMA. What is there already is not made
again: the same command goes on where it was stopped. The settings that experiments.tuning has chosen are arms as well.
"""

if __name__ == "__main__":  # before the imports that take seconds
    from utils import startup

    startup.prepare()

import itertools
import time

from benchmarks.__main__ import machine
from experiments import runs
from experiments.arms import ARMS, BASELINES, DATA, tuned_arms
from experiments.detection import detection
from experiments.matched import COMPARED, difference, interval, mean_at_quality, paths_of
from experiments.plot import plot_frontier
from experiments.runs import WEIGHTS
from experiments.tables import matched_table
from score.grids import save_pairs
from score.memorization import THRESHOLDS
from utils import startup
from utils.errors import UsageError
from utils.files import read_json

FACTORS = (1.0, 1.15, 1.4, 1.8)  # of the best quality that those compared reach with all seeds
MEASURES = (*(f"MQ@{p}" for p in THRESHOLDS), "f_mem")


def qualities(paths):
    """FACTORS times the best fpd that every training reaches."""
    best = max(min(point["fpd"] for point in path) for path in paths)
    return [best * factor for factor in FACTORS]


def matched(points, floor):
    """Rows {"weights", "fpd", "arm", "reached", measure: interval}: all arms at the same fpd."""
    rows = []
    for weights in WEIGHTS:
        arms = {arm: paths_of(points, arm, weights) for arm in dict.fromkeys(point["arm"] for point in points)}
        for quality in qualities([path for paths in arms.values() for path in paths]):
            for arm, paths in arms.items():
                reached = mean_at_quality(paths, quality, COMPARED[0])[1]
                found = {measure: interval(paths, quality, measure, floor) for measure in MEASURES}
                rows.append({"weights": weights, "fpd": round(quality, 3), "arm": arm, "reached": reached, **found})
    return rows


def comparisons(points):
    """Rows {"weights", "fpd", "arm", "baseline", measure: difference}, at qualities that both reach with all seeds."""
    rows = []
    for weights, (arm, baseline) in itertools.product(WEIGHTS, BASELINES.items()):
        ours, others = (paths_of(points, side, weights) for side in (arm, baseline))
        for quality in qualities(ours + others) if ours and others else ():
            found = {measure: difference(ours, others, quality, measure) for measure in COMPARED}
            rows.append({"weights": weights, "fpd": round(quality, 3), "arm": arm, "baseline": baseline, **found})
    return rows


def collect(trainings, command, seconds):
    """All results of a data set as JSON values."""
    data = trainings[0].data
    points = [{"arm": run.arm.name, "seed": run.seed, **point} for run in trainings for point in runs.read_points(run)]
    training, _, distinct, _ = runs.real_images(data.name)
    floor, own = runs.floor_of(data), ("--logdir=", "--seed=")
    return {
        "command": " ".join(["bash com/frontier.sh", *command]),
        "machine": machine(),
        "seconds": round(seconds, 1),
        "seeds": sorted({run.seed for run in trainings}),
        "training images": len(training),
        "distinct training images": len(distinct),
        "floor": floor,
        "flags": {run.arm.name: " ".join(f for f in run.flags if not f.startswith(own)) for run in trainings},
        "matched": matched(points, floor),
        "comparisons": comparisons(points),
        "detection": detection(trainings),
        "points": points,
    }


def run_data_set(name, options, deadline):
    """Do what is missing of one data set and write the results with what is there."""
    start = time.time()
    trainings = runs.plan(name, options.arms, options.seeds, options)
    runs.work_all(trainings, deadline)
    trainings = [run for run in trainings if runs.is_measured(run)]
    if not trainings:
        return
    path = options.out / "frontier.json"
    results = read_json(path) if path.exists() else {}
    seconds = results.get(name, {}).get("seconds", 0) + time.time() - start
    results[name] = collect(trainings, options.command, seconds)
    runs.write_lines(path, results, depth=3)
    plot_frontier(path.with_suffix(".png"), results)
    of_first_seed = {run.arm.name: runs.last_arrays(run)["pairs"] for run in trainings if run.seed == trainings[0].seed}
    save_pairs(path.with_name(f"pairs_{name}.png"), of_first_seed)
    print(f"{name}, mean above the floor over seeds [95 % interval], in points\n{matched_table(results[name])}", end="")


def words(text):
    return list(dict.fromkeys(text.split(",")))


def numbers(text):
    return list(map(int, words(text)))


def main(arguments=None):
    parser = runs.parser_of("frontier", __doc__)
    parser.add_argument("--data", type=words, default=list(DATA), help=f"some of {','.join(DATA)}")
    parser.add_argument("--seeds", type=numbers, default=[1, 2, 3], help="of training and sampling, with commas")
    parser.add_argument("--arms", type=words, help="some of the arms; default: all four, and the tuned ones")
    options = parser.parse_args(arguments)
    known = ARMS | tuned_arms(options.out)
    for flag, names, all_names in (("data", options.data, DATA), ("arms", options.arms or [], known)):
        if not set(names) <= set(all_names):
            raise UsageError(f"--{flag}={','.join(names)}: choose some of {','.join(all_names)}")
    options.arms = [known[name] for name in options.arms or known]
    with runs.begin(options, arguments):
        deadline = time.time() + 60 * options.minutes
        for name in options.data:
            run_data_set(name, options, deadline)


if __name__ == "__main__":
    startup.run(main)

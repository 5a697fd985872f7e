"""Equal effort for both: as many trials for default training as for IET-AGC, each one's best at matched quality.

python -m experiments.tuning --data=digits64 --seed=11 --steps=2800

Writes tuning.json; experiments.frontier then trains the two chosen settings with seeds of its own.
"""

import sys
import time
from pathlib import Path

from benchmarks.__main__ import machine
from errors import DataError
from experiments.arms import TRIALS
from experiments.command import parse, parser_of, report_errors, take
from experiments.frontier import DIFFERENCES, paths_of
from experiments.matched import mean_at_quality, share_below
from experiments.runs import WEIGHTS, is_complete, judge_of, plan, read_points, work_all
from files import read_json, write_json

FACTOR = 1.15  # of the better quality of the two that both methods reach untuned


def memorised_at(runs, quality, floor_ratio):
    """{setting: {weights: {"fpd reached", "MQ@15", "MQ@30"}}}: MQ above floor at a quality, None if not reached."""
    found = {}
    for run in runs:
        for weights in WEIGHTS:
            paths = paths_of([run], run.arm.name, weights)
            entry = {"fpd reached": min(point.distance for point in paths[0])}
            for p in DIFFERENCES:
                share, reached = mean_at_quality(paths, quality, p)
                entry[f"MQ@{p}"] = share - share_below(floor_ratio, p) if reached else None
            found.setdefault(run.arm.name, {})[weights] = entry
    return found


def best(found):
    """{"setting", "weights"} of least MQ@15 above floor; at or below the floor all are equal, and MQ@30 decides."""
    reached = [
        (max(0.0, entry["MQ@15"]), entry["MQ@30"], setting, weights)
        for setting, of_setting in found.items()
        for weights, entry in of_setting.items()
        if entry["MQ@15"] is not None
    ]
    *_, setting, weights = min(reached)
    return {"setting": setting, "weights": weights}


def quality_to_match(runs_of_base):
    """FACTOR times the best fpd of the worse of the untuned methods, each with its better weights."""
    return FACTOR * max(min(point["fpd"] for point in read_points(run)) for run in runs_of_base)


def tune(options):
    start = time.time()
    trials = [arm for pair in zip(*TRIALS.values(), strict=True) for arm in pair]
    runs = plan(options.data, trials, [options.seed], options)
    lock = take(options.out)
    work_all(runs, start + 60 * options.minutes)
    if not all(map(is_complete, runs)):
        raise DataError(f"{options.out}/runs: not all trials are done: the same command goes on")
    judge = judge_of(runs[0].subject)
    quality = quality_to_match([run for run in runs if run.arm.name in TRIALS])
    found = memorised_at(runs, quality, judge.floor_ratio)
    path = Path(options.out) / "tuning.json"
    seconds = (read_json(path)["seconds"] if path.exists() else 0) + time.time() - start
    methods = {
        name: {arm.name: {"flags": arm.flags, **found[arm.name]} for arm in arms} for name, arms in TRIALS.items()
    }
    result = {
        "command": " ".join(["python -m experiments.tuning", *options.command]),
        "machine": machine(),
        "seconds": round(seconds, 1),
        "data": options.data,
        "seed": options.seed,
        "fpd matched": quality,
        "trials": methods,
        "best": {name: best({arm.name: found[arm.name] for arm in arms}) for name, arms in TRIALS.items()},
    }
    write_json(path, result)
    for name, chosen in result["best"].items():
        print(f"{name}: best at fpd {quality:.3f} is {chosen['setting']!r} with {chosen['weights']} weights")
    lock.close()


def main(arguments=None):
    parser = parser_of("tuning", __doc__)
    parser.add_argument("--data", default="digits64", help="data set with its size")
    parser.add_argument("--seed", type=int, default=11, help="of training and sampling; not one of the frontier's")
    parser.set_defaults(steps=2800, points=6)  # enough for the quality at which they are judged
    options = parse(parser, arguments)
    return report_errors("tuning", lambda: tune(options))


if __name__ == "__main__":
    sys.exit(main())

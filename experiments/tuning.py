"""Equal effort for both: as many trials for default training as for IET-AGC, each one's best at matched quality.

python -m experiments.tuning --data=digits64 --seed=11 --steps=2800

Writes tuning.json; experiments.frontier then trains the two chosen settings with seeds of its own.
"""

import sys
import time
from pathlib import Path

from benchmarks.__main__ import machine
from errors import DataError
from experiments.arms import DATA, TRIALS
from experiments.matched import COMPARED, mean_at_quality, paths_of
from experiments.runs import WEIGHTS, call, floor_of, is_complete, parser_of, plan, read_points, work_all, write_lines
from files import read_json

FACTOR = 1.15  # of the better quality of the two that both methods reach untuned


def memorised_at(points, quality, floor):
    """{setting: {weights: {"fpd reached", "MQ@15", "MQ@30"}}}: above the floor at a quality, None if not reached."""
    found = {}
    for setting in dict.fromkeys(point["arm"] for point in points):
        for weights in WEIGHTS:
            paths = paths_of(points, setting, weights)
            entry = found.setdefault(setting, {})[weights] = {"fpd reached": min(p["fpd"] for p in paths[0])}
            for measure in COMPARED:
                share, reached = mean_at_quality(paths, quality, measure)
                entry[measure] = share - floor[measure] if reached else None
    return found


def best(found):
    """{"setting", "weights"} of least MQ@15 above floor; at or below the floor all are equal, and MQ@30 decides."""
    first, second = COMPARED
    *_, setting, weights = min(
        (max(0.0, entry[first]), entry[second], setting, weights)
        for setting, of_setting in found.items()
        for weights, entry in of_setting.items()
        if entry[first] is not None
    )
    return {"setting": setting, "weights": weights}


def quality_to_match(points):
    """FACTOR times the best fpd of the worse of the untuned methods, each with its better weights."""
    return FACTOR * max(min(p["fpd"] for p in points if p["arm"] == method) for method in TRIALS)


def tune(options):
    start = time.time()
    trials = [arm for pair in zip(*TRIALS.values(), strict=True) for arm in pair]
    runs = plan(options.data, trials, [options.seed], options)
    work_all(runs, start + 60 * options.minutes)
    if not all(map(is_complete, runs)):
        raise DataError(f"{options.out}/runs: not all trials are done: the same command goes on")
    points = [{"arm": run.arm.name, "seed": run.seed, **point} for run in runs for point in read_points(run)]
    quality = quality_to_match(points)
    found = memorised_at(points, quality, floor_of(runs[0].data))
    path = Path(options.out) / "tuning.json"
    seconds = (read_json(path)["seconds"] if path.exists() else 0) + time.time() - start
    of_method = {name: {arm.name: found[arm.name] for arm in arms} for name, arms in TRIALS.items()}
    result = {
        "command": " ".join(["python -m experiments.tuning", *options.command]),
        "machine": machine(),
        "seconds": round(seconds, 1),
        "data": options.data,
        "seed": options.seed,
        "fpd matched": quality,
        "trials": of_method,
        "best": {name: best(settings) for name, settings in of_method.items()},
    }
    write_lines(path, result, depth=3)
    for name, chosen in result["best"].items():
        print(f"{name}: best at fpd {quality:.3f} is {chosen['setting']!r} with {chosen['weights']} weights")


def main(arguments=None):
    parser = parser_of("tuning", __doc__)
    parser.add_argument("--data", default="digits64", choices=DATA, help="the data set")
    parser.add_argument("--seed", type=int, default=11, help="of training and sampling; not one of the frontier's")
    parser.set_defaults(steps=2800, points=6)  # enough for the quality at which they are judged
    options = parser.parse_args(arguments)
    options.command = sys.argv[1:] if arguments is None else arguments
    return call(tune, options)


if __name__ == "__main__":
    sys.exit(main())

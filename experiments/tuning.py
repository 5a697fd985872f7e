"""Equal effort for both: as many trials for default training as for IET-AGC, each one's best at matched quality.

python -m experiments.tuning --data=digits64 --seed=11 --steps=2800

Writes tuning.json; experiments.frontier then trains the two chosen settings with seeds of its own.
"""

if __name__ == "__main__":  # before the imports that take seconds
    from utils import startup

    startup.prepare()

import itertools
import time

from benchmarks.__main__ import machine
from experiments.arms import DATA, TRIALS
from experiments.matched import COMPARED, mean_at_quality, paths_of
from experiments.runs import WEIGHTS, begin, floor_of, is_complete, parser_of, plan, read_points, work_all, write_lines
from utils import startup
from utils.errors import DataError
from utils.files import read_json

FACTOR = 1.15  # of the best fpd of the worse of the untuned methods, each with its better weights


def memorised_at(points, quality, floor):
    """Rows {"method", "setting", "weights", "fpd reached", measure}: above the floor at a quality, or None."""
    rows = []
    for method, weights in itertools.product(TRIALS, WEIGHTS):
        for arm in TRIALS[method]:
            paths = paths_of(points, arm.name, weights)
            row = {"method": method, "setting": arm.name, "weights": weights}
            row["fpd reached"] = min(point["fpd"] for point in paths[0])
            for measure in COMPARED:
                share, reached = mean_at_quality(paths, quality, measure)
                row[measure] = share - floor[measure] if reached else None
            rows.append(row)
    return rows


def best(rows):
    """The row of least MQ@15 above floor; at or below the floor all are equal, and MQ@30 decides."""
    first, second = COMPARED
    reached = [row for row in rows if row[first] is not None]
    return min(reached, key=lambda row: (max(0.0, row[first]), row[second]))


def tune(options):
    start = time.time()
    trials = [arm for pair in zip(*TRIALS.values(), strict=True) for arm in pair]
    runs = plan(options.data, trials, [options.seed], options)
    work_all(runs, start + 60 * options.minutes)
    if not all(map(is_complete, runs)):
        raise DataError(f"{options.out}/runs: not all trials are done: the same command goes on")
    points = [{"arm": run.arm.name, "seed": run.seed, **point} for run in runs for point in read_points(run)]
    quality = FACTOR * max(min(p["fpd"] for p in points if p["arm"] == untuned) for untuned in TRIALS)
    rows = memorised_at(points, quality, floor_of(runs[0].data))
    path = options.out / "tuning.json"
    seconds = (read_json(path)["seconds"] if path.exists() else 0) + time.time() - start
    result = {
        "command": " ".join(["python -m experiments.tuning", *options.command]),
        "machine": machine(),
        "seconds": round(seconds, 1),
        "data": options.data,
        "seed": options.seed,
        "fpd matched": quality,
        "trials": rows,
        "best": {method: best([row for row in rows if row["method"] == method]) for method in TRIALS},
    }
    write_lines(path, result, depth=2)
    for name, chosen in result["best"].items():
        print(f"{name}: best at fpd {quality:.3f} is {chosen['setting']!r} with {chosen['weights']} weights")


def main(arguments=None):
    parser = parser_of("tuning", __doc__)
    parser.add_argument("--data", default="digits64", choices=DATA, help="the data set")
    parser.add_argument("--seed", type=int, default=11, help="of training and sampling; not one of the frontier's")
    parser.set_defaults(steps=2800, points=6)  # enough for the quality at which they are judged
    with begin(parser.parse_args(arguments), arguments) as options:
        tune(options)


if __name__ == "__main__":
    startup.run(main)

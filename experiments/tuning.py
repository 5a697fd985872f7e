"""Equal effort for both: as many trials for default training as for IET-AGC, each one's best at matched quality.

python -m experiments.tuning --data=digits64 --seed=11 --steps=2800

Writes tuning.json; experiments.frontier then trains the two chosen settings with seeds of its own.
"""

if __name__ == "__main__":  # before the imports that take seconds
    from utils import startup

    startup.prepare()

import itertools
import math
import time

from benchmarks.__main__ import machine
from experiments import runs
from experiments.arms import ARMS, DATA, TRIALS
from experiments.matched import COMPARED, WEIGHTS, mean_at_quality, paths_of
from utils import startup
from utils.errors import DataError
from utils.files import read_json, write_json


def best(rows):
    """The row of least MQ@15 above floor; at or below the floor all are equal, and MQ@30 decides."""
    reached = [row for row in rows if row["MQ@15"] is not None]
    return min(reached, key=lambda row: (max(0.0, row["MQ@15"]), row["MQ@30"]))


def main(arguments=None):
    own_flags = {
        "data": {"default": "digits64", "choices": DATA, "help": "the data set"},
        "seed": {"type": int, "default": 11, "help": "of training and sampling; not one of the frontier's"},
    }
    defaults = {"steps": 2800, "points": 6}  # enough for the quality at which they are judged
    with runs.begin("tuning", __doc__, arguments, own_flags, **defaults) as options:
        trials = {setting: ARMS[method] | own for method in TRIALS for setting, own in TRIALS[method].items()}
        planned = runs.plan(options.data, trials, [options.seed], options)
        if len(runs.work_all(planned, options.deadline)) < len(planned):
            raise DataError(f"{options.out}/runs: not all trials are done: the same command goes on")
        points, floor = runs.points_of(planned), runs.floor_of(options.data, planned[0].images)
        # 1.15 times the best fpd of the worse of the untuned methods, each with its better weights
        quality = 1.15 * max(min(p["fpd"] for p in points if p["arm"] == untuned) for untuned in TRIALS)
        rows = []
        for method, weights in itertools.product(TRIALS, WEIGHTS):
            for setting in TRIALS[method]:
                paths = paths_of(points, setting, weights)
                above = {name: mean_at_quality(paths, quality, name) - floor[name] for name in COMPARED}
                row = {"method": method, "setting": setting, "weights": weights}
                row["fpd reached"] = min(point["fpd"] for point in paths[0])
                rows.append(row | {name: None if math.isnan(share) else share for name, share in above.items()})
        path = options.out / "tuning.json"
        seconds = (read_json(path)["seconds"] if path.exists() else 0) + time.time() - options.start
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
        write_json(path, result)
        for name, chosen in result["best"].items():
            print(f"{name}: best at fpd {quality:.3f} is {chosen['setting']!r} with {chosen['weights']} weights")


if __name__ == "__main__":
    startup.run(main)

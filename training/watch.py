"""Watching a training: whether it copies yet, and which of its checkpoints is the best so far."""

import itertools
import time
from pathlib import Path

from utils import distributed
from utils.errors import UsageError
from utils.files import read_json, write_json

ABOVE = "mq30_above_floor"  # the share MQ@30 of a measurement less that of held-out images
BEST_ABOVE = 0.02  # at most so much, for a checkpoint that may be the best
COPIES_ABOVE, IN_A_ROW = 0.05, 2  # at least so much, so many times in a row, is copying


class Watch:
    """Measures EMA weights every so many steps, and keeps best.json and the checkpoint that it names.

    The best is that of the lowest `criterion` among those that copy little, `BEST_ABOVE`.

    Args:
        measure: a function of a list of networks, whose mean prediction makes the images, that returns
            {"mq30_above_floor": share, "f_mem": share, "fpd": distance, ...}. All processes take part.
        every: steps between two measurements; 0: there are none.
        stops: whether the training is to end when it copies.
        criterion: the name of a distance in what is measured.
        about: JSON values that the measurements depend on beside the weights.
        save: a function of (log directory, state) that keeps a checkpoint and returns its name.
        tidy: a function of (log directory, names) that removes all that were kept but these.
    """

    def __init__(self, measure, *, every, stops, criterion, about, save, tidy):
        self.measure, self.every, self.stops, self.criterion = measure, every, stops, criterion
        self.about, self.save, self.tidy = about, save, tidy
        self.measurements, self.best = [], None

    def begin(self, logdir, step):
        """Go on in a log directory where `step` steps are done: what came after them is measured again.

        A best checkpoint of later steps stays the best until there is a better one.

        Raises:
            UsageError: what is there was measured in another way.
        """
        self.logdir, path = Path(logdir), Path(logdir) / "best.json"
        if not self.every:
            return
        is_there = distributed.is_main() and path.exists()
        record = distributed.from_main(read_json(path) if is_there else None)
        if record:
            others = [name for name, value in record["about"].items() if self.about.get(name) != value]
            if others:
                advice = "give those of then, or move it and what it names elsewhere"
                raise UsageError(f"{path}: measured with other {', '.join(others)}: {advice}")
            self.measurements = [found for found in record["measurements"] if found["step"] <= step]
            self.best = record["best"]

    def is_due(self, step):
        """Whether a measurement has fallen due since the last one."""
        last = self.measurements[-1]["step"] if self.measurements else 0
        return self.every > 0 and step // self.every > last // self.every

    @property
    def is_over(self):
        """Whether the training is to end, since it copies."""
        copies = [at_least(found[ABOVE], COPIES_ABOVE) for found in self.measurements[-IN_A_ROW:]]
        return self.stops and copies == [True] * IN_A_ROW

    def __call__(self, step, networks, states, logger):
        """Measure after `step` steps; states: checkpoints that this process keeps if it is the best."""
        begin = time.perf_counter()
        found = {"step": step, **self.measure(networks)}
        self.measurements.append(found)
        if best_of([found], self.criterion, self.best) is found:
            kept = distributed.gather([self.save(self.logdir, state) for state in states])
            # in the order of the shards, of which process p of P has every P-th from p on
            names = itertools.chain(*itertools.zip_longest(*(kept or ())))
            self.best = distributed.from_main({**found, "checkpoint": ",".join(filter(None, names))})
        logger.watched(found, time.perf_counter() - begin)
        if distributed.is_main():
            name = self.best and self.best["checkpoint"]
            record = {"checkpoint": name, "criterion": self.criterion, "best": self.best}
            record |= {"about": self.about, "measurements": self.measurements}
            write_json(self.logdir / "best.json", record)
            self.tidy(self.logdir, name.split(",") if name else [])


def best_of(measurements, criterion, best=None):
    """The measurement of the lowest criterion among those that copy little; `best` if none is below it."""
    for found in measurements:
        if at_least(BEST_ABOVE, found[ABOVE]) and (best is None or found[criterion] < best[criterion]):
            best = found
    return best


def at_least(share, other):
    """Whether a share is not below another, rounding errors of differences of shares aside."""
    return share >= other - 1e-9

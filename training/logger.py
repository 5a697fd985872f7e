"""What people see of a training: a tqdm bar, TensorBoard, metrics.jsonl, all with the same numbers."""

import contextlib
import json
import time
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event

from utils import distributed
from utils.bar import progress_bar
from utils.errors import DataError, printable, warn
from utils.files import atomic_write, sync, writable, write_json
from utils.images import image_grid, non_finite_images, of_non_finite, to_uint8

MUCH = 0.1  # of the time of a training, for its sample grids
TIMED = (10, 20)  # the steps between which a start is timed, to say how long the rest will take


def due(count, every):
    """Whether something that happens every so many steps (0: never) happens after `count` of them."""
    return every > 0 and count % every == 0


def read_metrics(logdir):
    """What all processes of a training have logged, dicts by step; of a step made again, the last."""
    lines = []
    for path in Path(logdir).glob("metrics*.jsonl"):
        for text in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # torn by a power loss
                lines.append(json.loads(text))
    lines.sort(key=lambda line: line["time"])
    last = {(line["step"], line.get("weights"), "watch_seconds" in line): line for line in lines}
    return sorted(last.values(), key=lambda line: line["step"])


class Logger:
    """The bar and the logs of one process. The bar is that of rank 0.

    Args:
        total, done: steps of this process in the whole run, and those that an earlier start has made.
        log_step: steps between two lines.
        max_bad_steps: stop after so many steps in a row that were not applied.
        seconds: of training in earlier starts.
        writes: whether this process has files, with its rank above 0 in their names.

    Raises:
        DataError: in all methods, if a log cannot be written."""

    def __init__(
        self, logdir, total, done, *, log_step, max_bad_steps, batch_size, seconds=0.0, writes=True,
    ):  # fmt: skip
        self.logdir, self.writes = Path(logdir), writes
        self.log_step, self.max_bad_steps, self.batch_size = log_step, max_bad_steps, batch_size
        rank, processes = distributed.rank(), distributed.world_size()
        desc = f"process 1 of {processes}" if processes > 1 else None
        self.bar = progress_bar(total=total, initial=done, desc=desc, unit="step")
        self.path = self.logdir / (f"metrics.rank{rank}.jsonl" if rank else "metrics.jsonl")
        self.writing = partial(writable, self.path, "check the directory and its space")
        if writes:
            events = self.logdir / f"rank{rank}" if rank else self.logdir
            with self.writing():
                torn = self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n")
                self.metrics = self.path.open("a")
                if torn:  # by a full disk or a power loss
                    self.metrics.write("\n")
                events.mkdir(exist_ok=True)
                self.events = EventsWriter(str(events / "events"), ".iet_agc")
        self.since = time.perf_counter()
        self.start = self.since - seconds
        self.bad_row = self.longest_bad_row = self.made = 0
        self.total, self.done, self.drawing = total, done, 0.0  # seconds of sample grids, in this start
        self.watching, self.measured = 0.0, {}  # seconds of measurements in this start; the last one
        self.clear()

    def clear(self):
        """Start the sums of a line; tensors in them stay on their device until the line is due."""
        self.steps = self.loss = self.bad_steps = self.skipped = 0

    @property
    def seconds(self):
        """Of training, over all starts."""
        return time.perf_counter() - self.start

    def step(self, step, numbers, keep=None, *, now=False, **where):
        """Take in a step; every `log_step` steps write a line about those since the last one.

        `loss` is the mean over the steps that were applied, or None; `bad_steps` counts the others.

        Args:
            numbers: of `Learner.update`.
            keep: (B,) bool of IET-AGC, for the share of skipped samples.
            now: write the line now, since a round or the run ends.
            where: round and shard, for the line; the shard goes into TensorBoard's tag.

        Raises:
            DataError: too many steps in a row were not applied."""
        applied = numbers["applied"]
        self.steps += 1
        self.loss = self.loss + torch.where(applied, numbers["loss"], 0.0)
        self.bad_steps = self.bad_steps + ~applied
        self.bad_row = torch.where(applied, 0, self.bad_row + 1)
        self.longest_bad_row = self.bad_row.clamp(min=self.longest_bad_row)
        if keep is not None:
            self.skipped = self.skipped + (~keep).sum()
        self.bar.update()
        self.made += 1
        if self.made in TIMED:
            float(numbers["loss"])  # the device has made the steps that are timed
            self.say_how_long()
        if not (due(step, self.log_step) or now):
            return

        at, bad_steps, images = time.perf_counter(), int(self.bad_steps), self.steps * self.batch_size
        line = {"step": step, **where, "loss": None, "lr": numbers["lr"], "bad_steps": bad_steps}
        if bad_steps < self.steps:
            line["loss"] = float(self.loss) / (self.steps - bad_steps)
        line["images_per_second"] = images / (at - self.since)
        if keep is not None:
            line["skipped"] = float(self.skipped) / images
        shown = {name: value for name, value in line.items() if name != "step" and value is not None}
        self.bar.set_postfix(shown | self.measured, refresh=False)
        self.write(line)
        if self.longest_bad_row >= self.max_bad_steps:
            place = ", ".join(f"{name} {value}" for name, value in {"step": step, **where}.items())
            what = f"{int(self.longest_bad_row)} steps in a row without a finite loss and gradient"
            advice = "the checkpoints are good: lower --lr or --grad_clip, or use another --precision"
            when = f"up to {place}, learning rate {line['lr']:.3g}"
            raise DataError(f"{self.logdir}: {what}, {when}; {advice}")
        self.since, self.longest_bad_row = at, self.bad_row
        self.clear()

    def say_how_long(self):
        """Say how long the rest of the run will take, by the steps in `TIMED`."""
        now, (first, last) = time.perf_counter() - self.drawing - self.watching, TIMED
        if self.made == first:
            self.first_timed = now
        elif distributed.is_main():
            left = self.total - self.done - last
            seconds = left * (now - self.first_timed) / (last - first)
            how_long = f"will take about {self.bar.format_interval(seconds)}"
            self.bar.write(f"{left:,} more steps {how_long}, sample grids and measurements aside")

    def write(self, line):
        """Write a line to metrics.jsonl and, with what it is of in the tag, to TensorBoard."""
        if not self.writes:
            return
        with self.writing():
            self.metrics.write(json.dumps({**line, "time": time.time()}) + "\n")
            self.metrics.flush()
        of = f"shard{line['shard']}/" if "shard" in line else f"{line['weights']}/" if "weights" in line else ""
        of = "watch/" if "watch_seconds" in line else of
        for name, value in line.items():
            if isinstance(value, float):
                self.event(line["step"], summary.scalar(of + name, value))

    def watched(self, found, seconds):
        """Take in a measurement, {"step": n, name: number}, that took so long: a line, and the bar."""
        self.measured = {name: value for name, value in found.items() if name != "step"}
        self.watching += seconds
        self.since += seconds  # images per second are of training alone
        self.write({**found, "watch_seconds": seconds})

    def event(self, step, value):
        """Write one of tensorboardX's summaries: in this thread, so that a full disk is seen here."""
        with self.writing():
            self.events.write_event(Event(wall_time=time.time(), step=step, summary=value))

    def flush(self):
        """Make the logs durable, before a save: no step behind a checkpoint is missing in them."""
        with self.writing():
            sync(self.metrics)
            sync(self.events)

    def images(self, tag, step, draw):
        """Write a grid of draw(), images (B, 3, H, W) in [-1, 1], to sample/ and TensorBoard."""
        begin = time.perf_counter()
        x = draw()
        if said := of_non_finite(f"images of {tag}.png", int(non_finite_images(x).sum()), len(x)):
            warn(f"warning: {said}")
        grid = image_grid(to_uint8(x)).cpu().numpy()
        with atomic_write(self.logdir / "sample" / f"{tag}.png") as file:
            Image.fromarray(grid.transpose(1, 2, 0)).save(file, format="PNG")
        self.event(step, summary.image(tag.split("_step")[0], grid))
        self.drawing += time.perf_counter() - begin

    def memorization(self, skip_counts, banks, r):
        """In TensorBoard: skips per image, (N,) int64, as a histogram, and {shard: bank} as curves."""
        if distributed.is_main():
            self.event(r, summary.histogram("skips_per_image", skip_counts.cpu().numpy(), bins=64))
        for shard, bank in banks.items():
            for t, value in enumerate(bank.tolist()):
                self.event(t, summary.scalar(f"memory_bank_over_t/shard{shard}/round{r}", value))

    def finish(self, steps, copies=False):
        """At the end of the run: write train.json, its steps and the seconds over all starts, say so.

        copies: whether it ends before its time, since it copies.
        """
        if self.writes:
            self.flush()
        if distributed.is_main():
            record = {"steps": steps, "seconds": round(self.seconds, 3)}
            watching = sum(line.get("watch_seconds", 0) for line in read_metrics(self.logdir))
            if watching:
                record |= {"watch_seconds": round(watching, 3), "stopped_when_copying": copies}
                record["watch_share"] = round(watching / self.seconds, 4)
            write_json(self.logdir / "train.json", record)
            self.bar.close()
            took = f" in {self.bar.format_interval(self.seconds)}"
            if watching:
                took += f", {record['watch_share']:.1%} of it for --watch_step"
            if copies:
                took += ", and no more, since it copies (--stop_when_copying)"
            if self.drawing > MUCH * self.seconds:
                drawing = f"{self.bar.format_interval(self.drawing)} of it for sample grids"
                took += f", {drawing}: --sample_step=0 draws none"
            print(f"{printable(self.logdir)}: {steps} steps done{took}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()
        if self.writes:
            with contextlib.suppress(OSError):  # what could not be written has been said
                self.metrics.close()
                self.events.close()

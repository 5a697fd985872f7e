"""What people see of a training run: a tqdm bar, tensorboardX and metrics.jsonl, all with the same numbers."""

import json
import os
import sys
import time
from pathlib import Path

from PIL import Image
from tensorboardX import SummaryWriter

import distributed
from errors import DataError
from files import atomic_write, write_json
from pictures import image_grid, to_uint8


def due(count, every):
    """Whether something that happens every so many steps (0: never) happens after `count` of them."""
    return every > 0 and count % every == 0


def read_lines(logdir):
    """The lines of metrics.jsonl, dicts; what a power loss may have torn is left out."""
    path, lines = Path(logdir) / "metrics.jsonl", []
    for text in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def write_lines(logdir, lines):
    """Make metrics.jsonl of these lines, in the order of their steps."""
    with atomic_write(Path(logdir) / "metrics.jsonl") as file:
        for line in sorted(lines, key=lambda line: line["step"]):
            file.write(f"{json.dumps(line)}\n".encode())


def restore_lines(logdir, is_of_the_past, expected):
    """Cut metrics.jsonl to the lines that a continued run has behind it; there should be at least `expected`."""
    kept = [line for line in read_lines(logdir) if is_of_the_past(line)]
    if len(kept) < expected:
        path = Path(logdir) / "metrics.jsonl"
        print(f"{path}: lines of this run are missing in it, it goes on without them", file=sys.stderr)
    write_lines(logdir, kept)


class Progress:
    """The bar and the logs of one run: those of rank 0, the other processes are silent.

    Args:
        logdir: directory of metrics.jsonl, TensorBoard's event files and sample/.
        total, done: steps of this process in the whole run, and how many of them an earlier start has made.
        log_step: steps between two lines.
        seconds: of training in earlier starts.

    Raises:
        DataError: metrics.jsonl cannot be written.
    """

    def __init__(self, logdir, total, done, log_step, seconds=0.0):
        self.logdir = Path(logdir)
        self.log_step = log_step
        self.seconds_before = seconds
        self.last_save = None
        self.main = distributed.is_main()
        processes = distributed.world_size()
        desc = f"process 1 of {processes}" if processes > 1 else None
        self.bar = distributed.bar(total=total, initial=done, desc=desc, unit="step")
        if self.main:
            # an unbounded queue: after a full disk its thread is dead and would never make room
            self.writer = SummaryWriter(str(self.logdir), max_queue=0)
            self.metrics_lines = len(read_lines(self.logdir))
            self.metrics = (self.logdir / "metrics.jsonl").open("a")
        self.since = time.perf_counter()

    @property
    def seconds(self):
        """Of training, over all starts."""
        return self.seconds_before + time.perf_counter() - self.since

    def state(self):
        """What a checkpoint says of the logs: call it after the last line is due, before saving."""
        if self.main:
            try:
                self.metrics.flush()
                os.fsync(self.metrics.fileno())
            except OSError as error:
                raise self._unwritable(error) from error
        return {"seconds": self.seconds}

    def update(self, meter, step, loss, applied, lr, batch_size, *, keep=None, **where):
        """Count a step in a `Meter`, and write its line every `log_step` steps.

        Args:
            step: the step's number in the whole run.
            loss, applied, lr, batch_size, keep: as `Meter.update` takes them.
            where: round and shard, for the line; the shard goes into TensorBoard's tag.
        """
        meter.update(loss, applied, lr, batch_size, keep)
        self.bar.update()
        if due(step, self.log_step):
            self.line(meter, step, **where)

    def line(self, meter, step, **where):
        """Write a line of the steps since the last one, if there are any, to the bar and the logs.

        Raises:
            DataError: too many steps in a row were not applied, see `Meter.check`.
        """
        if not meter.steps:
            return
        line = meter.line(step, **where)
        if where:
            meter.lines.append(line)
        skip = ("step", "bad_steps") if not line["bad_steps"] else ("step",)
        shown = {name: value for name, value in line.items() if value is not None and name not in skip}
        postfix = {k: f"{v:.3g}" if isinstance(v, float) else v for k, v in shown.items()}
        self.bar.set_postfix(postfix, refresh=False)
        self.write(line)
        try:
            meter.check(line, self.last_save)
        except DataError as error:
            raise DataError(f"{self.logdir}: {error}") from error

    def _unwritable(self, error):
        return DataError(
            f"{self.metrics.name}: cannot be written ({error.strerror}): check the directory and its space"
        )

    def write(self, line, prefix=""):
        """Write a line to metrics.jsonl and, with the prefix or its shard in the tag, to TensorBoard."""
        if not self.main:
            return
        try:
            self.metrics.write(json.dumps(line) + "\n")
            self.metrics.flush()
        except OSError as error:
            raise self._unwritable(error) from error
        self.metrics_lines += 1
        self.plot(line, prefix)

    def plot(self, line, prefix=""):
        """Write the numbers of a line to TensorBoard."""
        prefix = prefix or (f"shard{line['shard']}/" if "shard" in line else "")
        for name, value in line.items():
            if isinstance(value, float):
                self.writer.add_scalar(prefix + name, value, line["step"])

    def merge(self, meters):
        """At the end of a round: write the lines of the other processes' shards too, all in the order of the steps."""
        gathered = distributed.gather([line for meter in meters for line in meter.lines])
        for meter in meters:
            meter.lines.clear()
        if not self.main:
            return
        lines = read_lines(self.logdir)
        known = {line["step"] for line in lines}
        new = [line for some in gathered for line in some if line["step"] not in known]
        for line in new:
            self.plot(line)
        self.metrics_lines += len(new)
        self.metrics.close()
        write_lines(self.logdir, lines + new)
        self.metrics = (self.logdir / "metrics.jsonl").open("a")

    def images(self, tag, step, images):
        """Write a grid of images (B, 3, H, W) in [-1, 1] to sample/, and on rank 0 to TensorBoard."""
        grid = image_grid(to_uint8(images)).cpu()
        path = self.logdir / "sample" / f"{tag}.png"
        path.parent.mkdir(exist_ok=True)
        with atomic_write(path) as file:
            Image.fromarray(grid.permute(1, 2, 0).numpy()).save(file, format="PNG")
        if self.main:
            self.writer.add_image(tag.split("_step")[0], grid.numpy(), step)

    def memorization(self, skip_counts, banks, r):
        """After round r: a histogram of skips per training image, and every shard's memory bank over t, in TensorBoard.

        skip_counts (N,) int64; banks: {shard: (T,) tensor} of this process. A bank's curve has t for its step axis.
        """
        gathered = distributed.gather({shard: bank.tolist() for shard, bank in banks.items()})
        if not self.main:
            return
        self.writer.add_histogram("skips_per_image", skip_counts.cpu().numpy(), r)
        for shard, bank in sorted(item for some in gathered for item in some.items()):
            for t, value in enumerate(bank):
                self.writer.add_scalar(f"memory_bank_over_t/shard{shard}/round{r}", value, t)

    def finish(self, steps):
        """At the end of the run write train.json: its steps, and the seconds over all starts."""
        if self.main:
            write_json(self.logdir / "train.json", {"steps": steps, "seconds": round(self.seconds, 3)})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()
        if self.main:
            self.writer.close()
            self.metrics.close()

"""What people see of a training run: a tqdm bar, tensorboardX and metrics.jsonl, all with the same numbers."""

import json
import os
import sys
import time
from pathlib import Path

import torch
from tensorboardX import SummaryWriter
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from errors import DataError
from files import write_json


def due(count, every):
    """Whether something that happens every so many steps (0: never) happens after `count` of them."""
    return every > 0 and count % every == 0


def progress_of_format_1(logdir, step):
    """What `Progress.state()` would have been in a checkpoint of format 1, which lacks it: the lines up to a step."""
    path, metrics_bytes = Path(logdir) / "metrics.jsonl", 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        if not line.endswith(b"\n") or json.loads(line)["step"] > step:  # a kill may leave a part of a line
            break
        metrics_bytes += len(line)
    nothing = {"loss": 0.0, "skipped": 0.0, "steps": 0, "images": 0, "lr": 0.0, "where": {}, "counts_skips": False}
    return {
        "step": step,
        "seconds": 0.0,
        "metrics_bytes": metrics_bytes,
        **nothing,
        "bad_steps": 0,
        "bad_steps_before": 0,
        "bad_row": 0,
    }


class Progress:
    """The bar and the logs of one run. Numbers stay on the device until every `log_step`-th step.

    Args:
        logdir: directory of metrics.jsonl, TensorBoard's event file and sample/.
        total: steps of the whole run.
        log_step: steps between two records.
        max_bad_steps: the run is ended after so many steps in a row that were not applied.
        state: of a run that is continued, from `state()`; metrics.jsonl then goes on after the lines it had.

    Raises:
        DataError: metrics.jsonl cannot be written, or max_bad_steps is reached.
    """

    def __init__(self, logdir, total, log_step, max_bad_steps, state=None):
        self.logdir = Path(logdir)
        self.log_step = log_step
        self.max_bad_steps = max_bad_steps
        self.seconds_before = state["seconds"] if state else 0.0
        self.step = state["step"] if state else 0
        self.last_save = None
        self.bar = tqdm(total=total, initial=self.step, dynamic_ncols=True, unit="step")
        # an unbounded queue: after a full disk its thread is dead and would never make room
        self.writer = SummaryWriter(str(self.logdir), max_queue=0)
        self.metrics = (self.logdir / "metrics.jsonl").open("a")
        self._cut_metrics(state["metrics_bytes"] if state else 0)
        self.since = time.perf_counter()
        self._bad_steps = state["bad_steps"] if state else 0
        self._bad_row = self._longest_bad_row = state["bad_row"] if state else 0
        self._restart()
        if state:
            self._loss, self._skipped = state["loss"], state["skipped"]
            self._steps, self._images, self._lr = state["steps"], state["images"], state["lr"]
            self._where, self._counts_skips = state["where"], state["counts_skips"]
            self._bad_steps_before, self._images_before = state["bad_steps_before"], state["images"]

    def _cut_metrics(self, size):
        found = self.metrics.seek(0, os.SEEK_END)
        if found < size:
            print(f"{self.metrics.name}: lines of this run are missing in it, it goes on without them", file=sys.stderr)
        else:
            self.metrics.truncate(size)
            self.metrics.seek(0, os.SEEK_END)

    def _restart(self):
        self._loss = self._skipped = 0.0
        self._steps = self._images = 0
        self._where, self._counts_skips, self._lr = {}, False, 0.0
        self._since = time.perf_counter()
        self._bad_steps_before = int(self._bad_steps)
        self._images_before = 0

    def state(self):
        """What a continued run needs to write the same lines: call it after the last line is due, before saving."""
        try:
            self.metrics.flush()
            os.fsync(self.metrics.fileno())
        except OSError as error:
            raise self._unwritable(error) from error
        return {
            "step": self.step,
            "seconds": self.seconds_before + time.perf_counter() - self.since,
            "metrics_bytes": self.metrics.tell(),
            "loss": float(self._loss),
            "skipped": float(self._skipped),
            "steps": self._steps,
            "images": self._images,
            "lr": self._lr,
            "where": self._where,
            "counts_skips": self._counts_skips,
            "bad_steps": int(self._bad_steps),
            "bad_steps_before": self._bad_steps_before,
            "bad_row": int(self._bad_row),
        }

    def update(self, loss, applied, lr, batch_size, *, keep=None, **where):
        """Count one step.

        Args:
            loss: scalar tensor.
            applied: scalar bool tensor, whether loss and gradient were finite and the step was made.
            lr: learning rate of the step.
            batch_size: images of the step.
            keep: (B,) bool of IET-AGC, for the share of skipped samples.
            where: e.g. round=1, shard=2; a record never spans two places, and the shard goes into TensorBoard's tag.
        """
        if self._steps and where != self._where:
            self.record()
        self._where, self._counts_skips, self._lr = where, keep is not None, lr
        self.step += 1
        self.bar.update()
        self._loss = self._loss + torch.where(applied, loss.detach(), 0.0)
        self._bad_steps = self._bad_steps + ~applied
        self._bad_row = torch.where(applied, 0, self._bad_row + 1)
        self._longest_bad_row = torch.clamp(self._bad_row, min=self._longest_bad_row)
        self._steps += 1
        self._images += batch_size
        if keep is not None:
            self._skipped = self._skipped + (~keep).sum()
        if self.step % self.log_step == 0:
            self.record()

    def record(self):
        """Read the numbers of the steps since the last record and write them to the bar and the logs.

        `loss` is the mean over the steps that were applied, null if none was; `bad_steps` counts the others from the
        start of the run.
        """
        bad_steps = int(self._bad_steps)
        applied = self._steps - (bad_steps - self._bad_steps_before)
        numbers = {"loss": float(self._loss) / applied if applied else None, "lr": self._lr, "bad_steps": bad_steps}
        numbers["images_per_second"] = (self._images - self._images_before) / (time.perf_counter() - self._since)
        if self._counts_skips:
            numbers["skipped"] = float(self._skipped) / self._images
        shown = {name: f"{value:.3g}" for name, value in numbers.items() if value is not None and name != "bad_steps"}
        if bad_steps:
            shown["bad steps"] = bad_steps
        self.bar.set_postfix({**self._where, **shown})
        prefix = f"shard{self._where['shard']}/" if "shard" in self._where else ""
        self.scalars(prefix=prefix, **self._where, **numbers)
        self._stop_if_bad()
        self._restart()

    def _stop_if_bad(self):
        if int(self._longest_bad_row) >= self.max_bad_steps:
            where = "".join(f", {name} {value}" for name, value in self._where.items())
            raise DataError(
                f"{self.logdir}: {int(self._longest_bad_row)} steps in a row without a finite loss and gradient, up to "
                f"step {self.step}{where}, learning rate {self._lr:.3g}; the last good checkpoint is "
                f"{self.last_save or 'none'}: lower --lr or --grad_clip, or use another --precision"
            )

    def _unwritable(self, error):
        return DataError(
            f"{self.metrics.name}: cannot be written ({error.strerror}): check the directory and its space"
        )

    def scalars(self, prefix="", **numbers):
        """Write numbers to metrics.jsonl (one line) and, with the prefix in the tag, to TensorBoard."""
        try:
            self.metrics.write(json.dumps({"step": self.step, **numbers}) + "\n")
            self.metrics.flush()
        except OSError as error:
            raise self._unwritable(error) from error
        for name, value in numbers.items():
            if isinstance(value, float):
                self.writer.add_scalar(prefix + name, value, self.step)

    def images(self, tag, images):
        """Write a grid of images (B, 3, H, W) in [-1, 1] to sample/ and TensorBoard."""
        grid = make_grid((images.clamp(-1, 1) + 1) / 2)
        path = self.logdir / "sample" / f"{tag}.png"
        path.parent.mkdir(exist_ok=True)
        save_image(grid, path)
        self.writer.add_image(tag.split("_step")[0], grid.cpu().numpy(), self.step)

    def memorization(self, skip_counts, banks, r):
        """After round r: a histogram of skips per training image, and every shard's memory bank over t, in TensorBoard.

        skip_counts (N,) int64; banks: one (T,) tensor per shard. A bank's curve has t for its step axis.
        """
        self.writer.add_histogram("skips_per_image", skip_counts.cpu().numpy(), r)
        for shard, bank in enumerate(banks):
            for t, value in enumerate(bank.tolist()):
                self.writer.add_scalar(f"memory_bank_over_t/shard{shard}/round{r}", value, t)

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        """At the end of the run, write the last line and train.json: steps and seconds, over all restarts."""
        try:
            if error is None:
                if self._steps:
                    self.record()
                seconds = self.seconds_before + time.perf_counter() - self.since
                write_json(self.logdir / "train.json", {"steps": self.step, "seconds": round(seconds, 3)})
        finally:
            self.bar.close()
            self.writer.close()
            self.metrics.close()

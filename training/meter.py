"""The numbers of one training between two lines of the log. They stay on its device until a line is due."""

import time

import torch

from errors import DataError


class Meter:
    """Sums over the steps since the last line; `lines` are those that the round's end needs again.

    Args:
        max_bad_steps: `check` raises after so many steps in a row that were not applied.
    """

    def __init__(self, max_bad_steps):
        self.max_bad_steps = max_bad_steps
        self.lines = []
        self.bad_steps = self.bad_row = self.longest_bad_row = 0
        self._restart()

    def restore(self, state, same_round=True):
        """Continue from a `state()`; its sums and lines count only where it is of the round that is going on.

        Checkpoints of format 1 have no such state: nothing is known then of the steps since the last line.
        """
        if "bad_row" not in state:
            return
        self.bad_steps = self.bad_steps_before = state["bad_steps"]
        self.bad_row = self.longest_bad_row = state["bad_row"]
        if same_round:
            self.lines = list(state.get("lines", []))
            self.bad_steps_before = state["bad_steps_before"]
            self.loss, self.skipped, self.counts_skips = state["loss"], state["skipped"], state["counts_skips"]
            self.steps, self.images, self.lr = state["steps"], state["images"], state["lr"]
            self.images_before = state["images"]

    def _restart(self):
        self.loss = self.skipped = self.lr = 0.0
        self.steps = self.images = self.images_before = 0
        self.counts_skips = False
        self.bad_steps_before = int(self.bad_steps)
        self.since = time.perf_counter()

    def state(self):
        """What a continued training needs to write the same lines: numbers and lists, for its checkpoint."""
        return {
            "lines": list(self.lines),
            "loss": float(self.loss),
            "skipped": float(self.skipped),
            "counts_skips": self.counts_skips,
            "steps": self.steps,
            "images": self.images,
            "lr": self.lr,
            "bad_steps": int(self.bad_steps),
            "bad_steps_before": self.bad_steps_before,
            "bad_row": int(self.bad_row),
        }

    def update(self, loss, applied, lr, batch_size, keep=None):
        """Take in one step.

        Args:
            loss: scalar tensor.
            applied: scalar bool tensor, whether loss and gradient were finite and the step was made.
            lr: learning rate of the step.
            batch_size: images of the step.
            keep: (B,) bool of IET-AGC, for the share of skipped samples.
        """
        self.loss = self.loss + torch.where(applied, loss.detach(), 0.0)
        self.bad_steps = self.bad_steps + ~applied
        self.bad_row = torch.where(applied, 0, self.bad_row + 1)
        self.longest_bad_row = torch.clamp(self.bad_row, min=self.longest_bad_row)
        self.steps += 1
        self.images += batch_size
        self.lr = lr
        if keep is not None:
            self.counts_skips = True
            self.skipped = self.skipped + (~keep).sum()

    def line(self, step, **where):
        """Read the numbers of the steps since the last line, and start anew: a dict of JSON values.

        `loss` is the mean over the steps that were applied, None if none was; `bad_steps` counts the others from the
        start of this training.

        Args:
            step: the number of the last step.
            where: e.g. round=1, shard=2.
        """
        bad_steps = int(self.bad_steps)
        applied = self.steps - (bad_steps - self.bad_steps_before)
        line = {"step": step, **where, "loss": float(self.loss) / applied if applied else None, "lr": self.lr}
        line["bad_steps"] = bad_steps
        line["images_per_second"] = (self.images - self.images_before) / (time.perf_counter() - self.since)
        if self.counts_skips:
            line["skipped"] = float(self.skipped) / self.images
        self._restart()
        return line

    def check(self, line, last_save):
        """Raise a DataError if max_bad_steps in a row were not applied up to a line, not counting an earlier row."""
        row, self.longest_bad_row = int(self.longest_bad_row), int(self.bad_row)
        if row >= self.max_bad_steps:
            where = "".join(f", {name} {line[name]}" for name in ("step", "round", "shard") if name in line)
            raise DataError(
                f"{row} steps in a row without a finite loss and gradient, up to{where[1:]}, learning rate "
                f"{line['lr']:.3g}; the last good checkpoint is {last_save or 'none'}: lower --lr or --grad_clip, or "
                "use another --precision"
            )

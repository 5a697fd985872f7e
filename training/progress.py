"""What people see of a training run: a tqdm bar, tensorboardX and metrics.jsonl, all with the same numbers."""

import json
import time
from pathlib import Path

from tensorboardX import SummaryWriter
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from files import read_json, write_json


def due(count, every):
    """Whether something that happens every so many steps (0: never) happens after `count` of them."""
    return every > 0 and count % every == 0


class Progress:
    """The bar and the logs of one run. Numbers stay on the device until every `log_step`-th step.

    Args:
        logdir: directory of metrics.jsonl, TensorBoard's event file and sample/.
        total: steps of the whole run.
        initial: steps done before.
        log_step: steps between two records.
    """

    def __init__(self, logdir, total, initial, log_step):
        self.logdir = Path(logdir)
        self.log_step = log_step
        self.bar = tqdm(total=total, initial=initial, dynamic_ncols=True, unit="step")
        self.step = initial
        self.writer = SummaryWriter(str(self.logdir))
        self.metrics = (self.logdir / "metrics.jsonl").open("a")
        self.since = time.perf_counter()
        self._restart()

    def _restart(self):
        self._loss = self._skipped = 0.0
        self._steps = self._images = 0
        self._where, self._counts_skips, self._lr = {}, False, 0.0
        self._since = time.perf_counter()

    def update(self, loss, lr, batch_size, *, keep=None, **where):
        """Count one step.

        Args:
            loss: scalar tensor.
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
        self._loss = self._loss + loss.detach()
        self._steps += 1
        self._images += batch_size
        if keep is not None:
            self._skipped = self._skipped + (~keep).sum()
        if self.step % self.log_step == 0:
            self.record()

    def record(self):
        """Read the numbers of the steps since the last record and write them to the bar and the logs."""
        numbers = {"loss": float(self._loss) / self._steps, "lr": self._lr}
        numbers["images_per_second"] = self._images / (time.perf_counter() - self._since)
        if self._counts_skips:
            numbers["skipped"] = float(self._skipped) / self._images
        self.bar.set_postfix({**self._where, **{name: f"{value:.3g}" for name, value in numbers.items()}})
        prefix = f"shard{self._where['shard']}/" if "shard" in self._where else ""
        self.scalars(prefix=prefix, **self._where, **numbers)
        self._restart()

    def scalars(self, prefix="", **numbers):
        """Write numbers to metrics.jsonl (one line) and, with the prefix in the tag, to TensorBoard."""
        self.metrics.write(json.dumps({"step": self.step, **numbers}) + "\n")
        self.metrics.flush()
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

    def close(self):
        """Close the bar and the logs, and write train.json: steps and seconds of training, over all restarts."""
        if self._steps:
            self.record()
        path = self.logdir / "train.json"
        seconds = time.perf_counter() - self.since + (read_json(path)["seconds"] if path.exists() else 0.0)
        write_json(path, {"steps": self.step, "seconds": round(seconds, 3)})
        self.bar.close()
        self.writer.close()
        self.metrics.close()

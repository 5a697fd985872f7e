"""One shard of iterative ensemble training, and how an ensemble that was interrupted goes on."""

from dataclasses import dataclass, field

import torch

from training import checkpoint
from training.agc import AntiGradientControl, NearThreshold
from training.learner import Learner
from utils import distributed
from utils.errors import UsageError
from utils.seeding import derive_seed


@dataclass
class Shard:
    """A part of the training images and the sub-model that trains on it.

    Args:
        number: k, from 0.
        batches: a function of the shard's own step, such as `training.batches.ShardBatches`.
        learner: the sub-model.
        agc: its memory bank.
        skip_counts: (N,) int64, how often the shard has skipped each image.
        round_counts: the same in this round, and with those near the threshold of IET-AGC+.
        near_threshold: images that wait to be augmented.
    """

    number: int
    batches: object
    learner: Learner
    agc: AntiGradientControl
    skip_counts: torch.Tensor
    round_counts: torch.Tensor
    near_threshold: NearThreshold = field(default_factory=NearThreshold)

    def count(self, index, keep, near):
        """Take in which images (B,) of a step were skipped and which were near the threshold."""
        self.skip_counts.index_add_(0, index, (~keep).long())  # an image may be there more than once
        self.round_counts.index_add_(0, index, (~keep | (near > 0)).long())

    def augment(self, index, near, seed):
        """Threshold-aware augmentation: queue the samples near the threshold, and step on a batch of them when full.

        Args:
            index: (B,) int64, the images of a step.
            near: (B,) float32 of `AntiGradientControl.near_threshold`.
            seed: of the run.
        """
        if full := self.near_threshold.add(index, near, self.batches.batch_size):
            torch.manual_seed(derive_seed(seed, "augment", self.number, self.learner.step))
            self.learner.update(self.learner.losses(self.batches.augmented(*full)).mean(), extra=True)

    def state_dict(self):
        """What the shard needs to continue."""
        queue = {"near_index": self.near_threshold.index, "near": self.near_threshold.near}
        counts = {"skip_counts": self.skip_counts, "round_counts": self.round_counts, "bank": self.agc.bank}
        return {**self.learner.state_dict(), **counts, **queue}

    def load_state_dict(self, state):
        """Continue from a `state_dict`, the learner aside."""
        self.agc.bank.copy_(state["bank"])
        self.skip_counts.copy_(state["skip_counts"])
        self.round_counts.copy_(state["round_counts"])
        self.near_threshold.index, self.near_threshold.near = state["near_index"], state["near"]


def total_of(shards, name):
    """Counts of all shards, of all processes: (N,) int64 on the CPU."""
    return distributed.total(sum(getattr(shard, name) for shard in shards)).cpu()


def wait_for_all_shards(interruption, logdir):
    """Wait for the other processes' shards; if one was stopped meanwhile, so is this one."""
    try:
        distributed.barrier()
    except RuntimeError:  # another process has gone
        if interruption:
            interruption.exit(logdir)
        raise


def resume(shards, steps_per_round, slots, directory, total_round):
    """Continue from the newest good files of a log directory.

    Args:
        shards: `Shard`s of this process.
        steps_per_round: of each of the K shards.
        slots: K int64 tensors, the images of the shards at the beginning.
        directory: a `training.checkpoint.LogDirectory`.
        total_round: how many rounds are wanted.

    Returns:
        The rounds done, the seconds of training until then, the images of the shards now.

    Raises:
        UsageError: more rounds are done than wanted.
        DataError: what is there cannot be continued.
    """
    logdir = directory.path
    found = checkpoint.newest_round(steps_per_round, logdir) if distributed.is_main() else None
    r, steps, average_path, later = distributed.from_main(found)
    average = checkpoint.load(average_path, check=False) if r else {"seconds": 0.0}
    seconds = average["seconds"]
    for shard in shards:
        k = shard.number
        if steps[k]:
            state = checkpoint.restore_shard(shard, steps[k], logdir)
            seconds = max(seconds, state["seconds"])
        if r and steps[k] == r * steps_per_round[k]:
            shard.round_counts.zero_()
            if average["averaged"]:
                shard.learner.set_weights(average["global_model"], average["global_ema_model"])
    if r > total_round:
        what = f"the run in {logdir} has done {r}: give at least that, or choose another --logdir"
        raise UsageError(f"--total_round={total_round}: {what}")
    directory.begin(sum(steps), later)
    if any(steps):
        print(f"continuing in {logdir}: {r} rounds and {sum(steps)} steps done")
    elif later:
        print(f"{logdir}: nothing in it can be continued, starting anew")
    return r, seconds, average.get("shards", slots)

"""One shard of iterative ensemble training."""

from dataclasses import dataclass, field

import torch

from training.agc import AntiGradientControl
from training.learner import Learner
from utils import distributed
from utils.seeding import derive_seed


@dataclass
class Shard:
    """A part of the training images and the sub-model that trains on it."""

    number: int  # k, from 0
    batches: object  # a function of the shard's own step, such as `training.batches.ShardBatches`
    learner: Learner
    agc: AntiGradientControl
    skip_counts: torch.Tensor  # (N,) int64, how often the shard has skipped each image
    round_counts: torch.Tensor  # the same in this round, and with those near the threshold of IET-AGC+
    # the slots that wait to be augmented, and how near each is to the threshold
    near_index: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    near: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def count(self, slots, keep, near):
        """Take in which images (B,) of a step were skipped and which were near the threshold."""
        self.skip_counts.index_add_(0, slots, (~keep).long())  # an image may be there more than once
        self.round_counts.index_add_(0, slots, (~keep | (near > 0)).long())

    def augment(self, slots, near, seed):
        """Threshold-aware augmentation: queue samples near the threshold, and step on a full batch.

        slots: (B,) int64, of a step; near: (B,) float32, of `near_threshold`; seed: the run's.
        What waits in the queue stays there when shards exchange images."""
        chosen, B = near.cpu() > 0, self.batches.batch_size
        self.near_index = torch.cat([self.near_index, slots.cpu()[chosen]])
        self.near = torch.cat([self.near, near.cpu()[chosen]])
        if len(self.near) < B:
            return
        torch.manual_seed(derive_seed(seed, "augment", self.number, self.learner.step))
        batch = self.batches.augmented(self.near_index[:B], int(5 * self.near[:B].mean()))
        self.learner.update(self.learner.losses(batch).mean(), extra=True)
        self.near_index, self.near = self.near_index[:0], self.near[:0]

    def state_dict(self):
        """What the shard needs to continue."""
        queue = {"near_index": self.near_index, "near": self.near}
        counts = {"skip_counts": self.skip_counts, "round_counts": self.round_counts, "bank": self.agc.bank}
        return {**self.learner.state_dict(), **counts, **queue}

    def load_state_dict(self, state):
        """Continue from a `state_dict`, the learner aside."""
        self.agc.bank.copy_(state["bank"])
        self.skip_counts.copy_(state["skip_counts"])
        self.round_counts.copy_(state["round_counts"])
        self.near_index, self.near = state["near_index"], state["near"]


def total_of(shards, name):
    """Counts of all shards, of all processes: (N,) int64 on the CPU."""
    return distributed.total(sum(getattr(shard, name) for shard in shards)).cpu()

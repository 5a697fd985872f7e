"""A program for torchrun: processes that share batches write what they have after three steps, one of them bad."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from tests.networks import tiny_learner
from training.batches import ShardBatches
from utils import distributed


def main(directory):
    images = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    learner = tiny_learner(share_batches=True)
    part = distributed.share(4)
    batches = ShardBatches(images, None, torch.arange(16), batch_size=4, T=10, seed=0, part=part)
    applied = []
    for step in range(3):
        losses = learner.losses(batches(step))
        # in the second step one process has a loss that is not finite, with a gradient that is
        bad = torch.inf if step == 1 and distributed.rank() == 1 else 0.0
        numbers = learner.update(losses.mean() + bad)
        applied.append(numbers["applied"])
    state = {"weights": learner.net.state_dict(), "loss": numbers["loss"], "applied": torch.stack(applied)}
    torch.save(state, f"{directory}/rank{distributed.rank()}.pt")


if __name__ == "__main__":
    distributed.initialize()
    main(sys.argv[1])
    distributed.finish()

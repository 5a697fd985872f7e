"""A program for torchrun: the collectives of a GPU, in a run of one process that believes to be one of two."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist

from tests.networks import tiny_learner, tiny_unet
from training.averaging import average_learners
from training.launch import pick_device
from utils import distributed


def main(name):
    device = pick_device(name)
    distributed.world_size = lambda: 2
    assert distributed.total(torch.ones(3, device=device)).tolist() == [1, 1, 1]
    assert distributed.from_main({"x": torch.ones(2)})["x"].tolist() == [1, 1]
    learner = tiny_learner(net=tiny_unet().to(device), share_batches=True)
    images = torch.zeros(4, 3, 8, 8, device=device)
    for _ in range(2):
        assert learner.update(learner.trainer(images).mean())["applied"]
    average_learners({0: learner}, [5])
    distributed.barrier()
    backend = dist.get_backend(distributed.group_of(device))
    print(f"exchanged by {backend}, averaged gradients of {type(learner.trainer.model).__name__}")


if __name__ == "__main__":
    distributed.initialize()
    main(sys.argv[1])
    distributed.finish()

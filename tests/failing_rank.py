"""A program for torchrun whose rank 1 fails while the others wait for it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from training.flags import define
from training.launch import run
from utils import distributed


def main():
    if distributed.rank() == 1:
        raise ValueError("the sky has fallen")
    distributed.barrier()


if __name__ == "__main__":
    run(main, define)

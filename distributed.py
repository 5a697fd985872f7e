"""One run in several processes, which torchrun starts: ranks, and the collectives that the run needs.

Without torchrun there is one process, of rank 0, and every function here returns what it was given.
"""

import os
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

# a process waits for the others as long as a round of a shard takes; torchrun sees a dead one, no clock has to
TIMEOUT = timedelta(days=30)


def rank():
    """The number of this process, 0 <= rank < world_size."""
    return int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0


def world_size():
    """How many processes the run has."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def local_rank():
    """The number of this process on its machine, which is also the number of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if dist.is_torchelastic_launched() else 0


def is_main():
    """Whether this is the process that prints, logs and saves."""
    return rank() == 0


def silence():
    """Where the processes that do not print write to."""
    return Path(os.devnull).open("w")


def bar(*args, **settings):
    """A tqdm bar of rank 0; the others show none."""
    return tqdm(*args, **settings, dynamic_ncols=True, disable=not is_main())


def initialize():
    """Meet the other processes: NCCL for tensors on GPUs, gloo for those on the CPU."""
    if world_size() > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)


def finish():
    """Leave the other processes, at the end of a run that went well."""
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()


def barrier():
    """Wait until all processes are here."""
    total(torch.zeros(1))


def total(tensor):
    """The sum of the processes' tensors of one shape, in place and returned."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def largest(tensor):
    """The element-wise maximum of the processes' tensors of one shape, in place and returned."""
    if world_size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def mean(tensor):
    """The mean of the processes' tensors of one shape, in place and returned."""
    return total(tensor).div_(world_size())


def from_main(value):
    """What rank 0 gives, in every process. Any value that can be pickled; tensors on the CPU."""
    if world_size() > 1:
        values = [value]
        dist.broadcast_object_list(values)
        value = values[0]
    return value


def gather(value):
    """The values of all processes in the order of their ranks, on rank 0; None elsewhere. As for `from_main`."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size() if is_main() else None
    dist.gather_object(value, values)
    return values


def share(n):
    """The part of 0..n-1 that falls to this process: a slice. Sizes differ by one at most."""
    return slice(rank() * n // world_size(), (rank() + 1) * n // world_size())


def join_rows(rows):
    """The rows of all processes, those of rank 0 first, in every process; undoes `share`."""
    if world_size() == 1:
        return rows
    parts = gather(rows.cpu())
    return from_main(torch.cat(parts) if is_main() else None).to(rows.device)


@contextmanager
def main_first():
    """The first process of every machine runs the block before the others, which find the files that it has made."""
    if local_rank() > 0:
        barrier()
    yield
    if local_rank() == 0:
        barrier()


class Agreement:
    """Whether any process wishes something, known to all of them at the same call.

    Nobody waits for the others: an answer is about the wishes of the call before.
    """

    def __init__(self):
        self.pending = None

    def __call__(self, wish):
        if world_size() == 1:
            return wish
        agreed = False
        if self.pending:
            work, wishes = self.pending
            work.wait()
            agreed = bool(wishes)
        wishes = torch.tensor(int(wish))
        self.pending = dist.all_reduce(wishes, async_op=True), wishes
        return agreed

"""One run in several processes, which torchrun starts: ranks, and the collectives that the run needs.

Without torchrun there is one process, of rank 0, and every function here returns what it was given.
"""

import gc
import os
import secrets
import time
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

# processes wait for each other's shards, so for a round; torchrun sees a dead one, no clock has to
LONGEST_ROUND = timedelta(days=7)
# GPUs exchange tensors right after such a wait: one may wait for a sample grid, a save or torch.compile
GPU_TIMEOUT = timedelta(minutes=30)
gpus = None  # the group for tensors on GPUs


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


def initialize():
    """Meet the other processes: gloo for tensors on the CPU and for waiting, NCCL for those on GPUs."""
    global gpus
    if dist.is_torchelastic_launched():
        store, number, processes = next(dist.rendezvous("env://", timeout=LONGEST_ROUND))
        store = dist.PrefixStore(name_of_start(store, number, processes), store)
        dist.init_process_group("gloo", store=store, rank=number, world_size=processes, timeout=LONGEST_ROUND)
        if torch.cuda.is_available():
            gpus = dist.new_group(backend="nccl", timeout=GPU_TIMEOUT)


def group_of(device):
    """The processes as they exchange tensors of a device."""
    return gpus if device.type == "cuda" else dist.group.WORLD


def name_of_start(store, rank, world_size):
    """A name that all processes of this start agree on, and that no earlier start had.

    torchrun keeps its store over restarts, with the addresses of processes gone (torch 2.14), and its count
    of restarts differs between machines. So rank 0 answers every name that another rank gives itself,
    also of earlier starts, until all of the others have taken its own."""
    name = secrets.token_hex(8)
    if rank > 0:
        store.set(f"rank{rank}", name)
        name = store.get(name).decode()
        store.set(f"{name} is known to rank{rank}", "")
        return name
    for other in (f"rank{number}" for number in range(1, world_size)):
        while not store.check([f"{name} is known to {other}"]):
            if store.check([other]):
                store.set(store.get(other).decode(), name)
            time.sleep(0.01)
    return name


def finish():
    """Leave the other processes, at the end of a run that went well and after its networks are gone."""
    if dist.is_initialized():
        barrier()
        gc.collect()  # what still holds connections could abort the process
        dist.destroy_process_group()


@contextmanager
def blame_others():
    """Within it, raise an error of an exchange, which another process has caused by its end, 2 s later.

    torchrun names the rank whose error has the least time in whole seconds, of equal ones the lowest rank."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            time.sleep(2)
        raise


def barrier():
    """Wait until all processes are here."""
    total(torch.zeros(1))


def total(tensor):
    """The sum of the processes' tensors of one shape, in place and returned."""
    if world_size() > 1:
        dist.all_reduce(tensor, group=group_of(tensor.device))
    return tensor


def broadcast(tensor, source):
    """The tensor of the process `source`, in all of them, in the place of their own and returned."""
    if world_size() > 1:
        dist.broadcast(tensor, source, group=group_of(tensor.device))
    return tensor


def average_gradients(network):
    """The network, its gradient the mean over all processes; its buffers are constants."""
    if world_size() == 1:
        return network
    settings = {"forward_sync_buffers": False, "gradient_as_bucket_view": True}
    return DistributedDataParallel(network, process_group=group_of(next(network.parameters()).device), **settings)


def from_main(value):
    """What rank 0 gives, in every process. Any value that can be pickled; tensors on the CPU."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def gather(value):
    """The values of all processes in the order of their ranks, on rank 0; None elsewhere."""
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
    parts = gather(rows.cpu())
    return from_main(torch.cat(parts) if parts else None).to(rows.device)


@contextmanager
def main_first():
    """A machine's first process runs the block before the others, which find what it has made."""
    if local_rank() > 0:
        barrier()
    yield
    if local_rank() == 0:
        barrier()

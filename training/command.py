"""Running a script: flags in, one line on stderr and an exit code where a person has to correct something."""

import sys
import time
from functools import partial
from pathlib import Path

import torch
from absl import app, flags
from torch.distributed.elastic.multiprocessing.errors import record

import distributed
from errors import UsageError, UserError
from training import flags as shared_flags
from training.allocator import keep_freed_memory

MAIN_SPEAKS_FIRST = 3.0  # seconds


def run(main, arguments=()):
    """Parse the flags, check them and call main(); exit with 2 for wrong flags and 1 for wrong files.

    arguments: names of what else must be on the command line; main is called with it.
    """
    keep_freed_memory()
    for flag in flags.FLAGS.get_key_flags_for_module(shared_flags.__name__):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)  # what --help shows
    app.run(lambda argv: launch(partial(main, *argv[1:])), flags_parser=partial(parse, arguments=arguments))


@record  # torchrun names the rank that failed first, with its traceback
def launch(main):
    if not distributed.is_main():
        distributed.be_silent()
    distributed.initialize()
    try:
        main()
    except UserError as error:
        stop(error)
    distributed.finish()


def parse(argv, arguments):
    try:
        positional = flags.FLAGS(argv)[1:]
        if len(positional) < len(arguments):
            raise UsageError(f"give {' and '.join(arguments)}, see --help")
        if len(positional) > len(arguments):
            raise UsageError(f"{positional[len(arguments)]!r} is no flag: flags start with --, see --help")
        shared_flags.check(flags.FLAGS)
    except (flags.Error, UsageError) as error:
        stop(UsageError(" ".join(str(error).split())))
    return [argv[0], *positional]


def stop(error):
    name = Path(sys.argv[0]).name
    if not distributed.is_main():
        # most errors are every process's: rank 0 has said it then, and torchrun ends this one before it speaks
        time.sleep(MAIN_SPEAKS_FIRST)
        name = f"{name}: rank {distributed.rank()}"
    print(f"{name}: error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)


def pick_device(name):
    """The torch device of `--device`, or cuda if there is one, else cpu; under torchrun, the GPU of the local rank."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and distributed.world_size() > 1:
            device = torch.device("cuda", gpu_of_this_process(device))
            torch.cuda.set_device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device={name} is not available on this machine: leave it out to choose one") from error
    return device


def gpu_of_this_process(device):
    """The number of this process's GPU; every process of a machine needs one of its own."""
    if device.index is not None:
        raise UsageError(f"--device={device}: each of several processes takes the GPU of its own, say --device=cuda")
    if distributed.local_rank() >= torch.cuda.device_count():
        raise UsageError(f"{torch.cuda.device_count()} GPUs: start as many processes with --nproc_per_node")
    return distributed.local_rank()

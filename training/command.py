"""Running one of the three scripts: flags in, what it runs on, one line where a person has to correct something."""

import sys
import time
from functools import partial

import torch
from absl import app, flags
from torch.distributed.elastic.multiprocessing.errors import record

from training import flags as shared_flags
from utils import distributed, startup
from utils.errors import UsageError, UserError

MAIN_SPEAKS_FIRST = 3.0  # seconds


def run(main, arguments=()):
    """Parse the flags, check them and call main(); exit with 2 for wrong flags and 1 for wrong files.

    arguments: names of what else must be on the command line; main is called with it.
    """
    for flag in flags.FLAGS.get_key_flags_for_module(shared_flags.__name__):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)  # what --help shows
    parse_all = partial(parse, arguments=arguments)
    startup.run(lambda: app.run(lambda argv: launch(partial(main, *argv[1:])), flags_parser=parse_all))


@record  # torchrun names the rank that failed first, with its traceback
def launch(main):
    if not distributed.is_main():
        distributed.be_silent()
    if flags.FLAGS.parallel and distributed.is_main():
        print("--parallel has no effect: torchrun trains on several GPUs, with a process for each", file=sys.stderr)
    distributed.initialize()
    try:
        main()
    except UserError as error:
        stop(error)
    distributed.finish()


def parse(argv, arguments):
    try:
        positional = shared_flags.parse(flags.FLAGS, argv)
        if len(positional) < len(arguments):
            raise UsageError(f"give {' and '.join(arguments)}, see --help")
        if len(positional) > len(arguments):
            raise UsageError(f"{positional[len(arguments)]!r} is no flag: flags start with --, see --help")
        shared_flags.check(flags.FLAGS)
    except SystemExit:  # --help: absl ends with 1
        sys.exit(0)
    except (flags.Error, UsageError) as error:
        stop(UsageError(" ".join(str(error).split())))
    return [argv[0], *positional]


def stop(error):
    rank = ""
    if not distributed.is_main():
        # most errors are every process's: rank 0 has said it then, and torchrun ends this one before it speaks
        time.sleep(MAIN_SPEAKS_FIRST)
        rank = f"rank {distributed.rank()}: "
    startup.say(f"{rank}error: {error}")
    sys.exit(error.exit_code)


def announce(device, net, images, batch_size, **more):
    """Print one line about what begins: device, processes, parameters of `net` (unless None), images, batch.

    more: further counts, e.g. steps_per_epoch=4; None is left out.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    if device.type == "cpu" and flags.FLAGS.device is None:
        name = "no GPU found"
    processes = distributed.world_size()
    counts = {"parameters": net and sum(p.numel() for p in net.parameters() if p.requires_grad), "images": images}
    counts |= more | {"images per batch": batch_size}
    said = [f"{device} ({name})" if name else f"{device}", f"{processes} process{'es' if processes > 1 else ''}"]
    said += [f"{count:,} {what.replace('_', ' ')}" for what, count in counts.items() if count is not None]
    print(", ".join(said))


def pick_device(name, precision="fp32"):
    """The torch device of `--device`, or cuda if there is one, else cpu; under torchrun, the GPU of the local rank.

    It is also set up here: float32 products of a GPU are rounded to TF32 with `--precision=tf32` only (torch's default
    is to do so in convolutions), and cuDNN tries its algorithms for every new shape, of which a run has few.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            number = gpu_of_this_process(device) if distributed.world_size() > 1 else device.index or 0
            device = torch.device("cuda", number)
            torch.cuda.set_device(device)  # so that nothing takes memory of another
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device={name} is not available on this machine: leave it out to choose one") from error
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = True
    return device


def gpu_of_this_process(device):
    """The number of this process's GPU; every process of a machine needs one of its own."""
    if device.index is not None:
        raise UsageError(f"--device={device}: each of several processes takes the GPU of its own, say --device=cuda")
    if distributed.local_rank() >= torch.cuda.device_count():
        raise UsageError(f"{torch.cuda.device_count()} GPUs: start as many processes with --nproc_per_node")
    return distributed.local_rank()

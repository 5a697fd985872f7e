"""Running a script: its flags, one line where a person has to correct something, device, signals."""

import os
import signal
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import torch
from absl import app, flags
from torch.distributed.elastic.multiprocessing.errors import record

from training.flags import NETWORK_FLAGS, check
from training.flags import parse as parse_words
from utils import distributed, startup
from utils.errors import UsageError, printable, warn

ONE_REQUEST = 1.0  # seconds: a cluster signals torchrun and its processes, and torchrun passes it on


def run(main, define, arguments=()):
    """Define and parse the flags, call main() with `arguments`; exit with 2 for wrong flags."""
    app.define_help_flags()
    define(flags.FLAGS)
    for flag in flags.FLAGS.get_key_flags_for_module(check.__module__):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)  # what --help shows
    # torchrun names the rank that failed first, with its traceback
    record(startup.run)(partial(launch, main, arguments))


def launch(main, arguments):
    if not distributed.is_main():  # rank 0 prints and warns; errors are still seen
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8", errors="replace")  # noqa: SIM115
        warnings.simplefilter("ignore")
    positional = parse(flags.FLAGS, arguments)
    if "parallel" in flags.FLAGS and flags.FLAGS.parallel and distributed.is_main():
        print("--parallel has no effect: torchrun trains on several GPUs, with a process for each", file=sys.stderr)
    distributed.initialize()
    with distributed.blame_others():
        main(*positional)
    distributed.finish()


def parse(values, arguments):
    """Read and check the command line; returns what is no flag of it, as much as `arguments` names."""
    try:
        positional = parse_words(values, sys.argv)
    except SystemExit:  # --help: absl ends with 1
        sys.exit(0)
    except flags.Error as error:
        raise UsageError(" ".join(str(error).split())) from error
    if len(positional) < len(arguments):
        raise UsageError(f"give {' and '.join(arguments)}, see --help")
    if len(positional) > len(arguments):
        raise UsageError(f"{positional[len(arguments)]!r} is no flag: flags start with --, see --help")
    of_checkpoint = "unet_dir" in values and values.unet_dir
    check(values, [name for name in NETWORK_FLAGS if of_checkpoint and not values[name].present])
    return positional


def announce(device, net, images, batch_size, *, asked_for, **more):
    """Print a line about what begins; net: or None; asked_for: what `--device` says, or None."""
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    if device.type == "cpu" and asked_for is None:
        name = " (no GPU found)"
    processes = distributed.world_size()
    counts = {"process" if processes == 1 else "processes": processes}
    counts |= {"parameters": sum(p.numel() for p in net.parameters() if p.requires_grad)} if net else {}
    counts |= {"images": images, **more, "images per batch": batch_size}
    texts = [f"{count:,} {what.replace('_', ' ')}" for what, count in counts.items()]
    print(f"{device}{name}, {', '.join(texts)}")


def check_processes(client_num):
    """Raise a UsageError where there are more processes than shards."""
    processes = distributed.world_size()
    if client_num < processes:
        what = "a shard is trained by one process, so start at most"
        flag = f"--client_num={client_num} with {processes} processes"
        raise UsageError(f"{flag}: {what} {client_num}, or make more shards")


def check_warmup(warmup, steps):
    """Say so where a warm-up is longer than the training, of so many steps of a network."""
    if warmup > steps and distributed.is_main():
        warn(f"warning: --warmup={warmup} is more than the {steps} steps of the training: it never reaches --lr")


def pick_device(name, precision="fp32"):
    """The torch device of `--device`, else cuda if there is one, else cpu; of torchrun, the rank's GPU.

    TF32 is used with `--precision=tf32` only; by torch's default convolutions would use it too."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            if device.index is not None and distributed.world_size() > 1:
                raise UsageError(f"--device={name}: every process takes the GPU of its own, say --device=cuda")
            if distributed.local_rank() >= torch.cuda.device_count() > 0:
                raise UsageError(f"{torch.cuda.device_count()} GPUs: start as many processes with --nproc_per_node")
            device = torch.device("cuda", device.index or distributed.local_rank())
            torch.cuda.set_device(device)  # so that nothing takes memory of another
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device={name} is not available on this machine: leave it out to choose one") from error
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = True  # tries all algorithms on a new shape, of which there are few
    return device


class Interruption:
    """Within it SIGTERM, SIGINT or SIGHUP only makes it true; a training stops at the next step, saved.

    A second signal ends the process at once; the same one again within a second is the same request."""

    def __init__(self):
        self.number = None

    def __enter__(self):
        startup.handle(self._receive)
        return self

    def __exit__(self, *_):
        startup.handle(startup.stop)

    def _receive(self, number, frame):
        if self.number is None:
            self.number, self.since = number, time.monotonic()
        elif number != self.number or time.monotonic() - self.since > ONE_REQUEST:
            os._exit(128 + number)

    def __bool__(self):
        return self.number is not None

    def of_any(self):
        """Whether any process that trains the network was signalled: all know at the same step."""
        return bool(distributed.total(torch.tensor(int(bool(self)))))

    def wait_for_all(self, logdir):
        """Wait for the other processes; where one was stopped meanwhile and has gone, so is this."""
        try:
            distributed.barrier()
        except RuntimeError:
            if self:
                self.exit(logdir)
            raise

    def exit(self, logdir):
        """End the process as shells and clusters expect: 143 after SIGTERM, 130, SIGINT, 129, SIGHUP."""
        number = self.number or signal.SIGTERM  # where only another process was signalled
        if distributed.is_main():
            where = f"saved in {printable(logdir)}: the same command continues the run"
            print(f"stopped by {signal.Signals(number).name}, {where}", file=sys.stderr)
        sys.exit(128 + number)

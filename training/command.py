"""Running a script: flags in, one line on stderr and an exit code where a person has to correct something."""

import sys
from pathlib import Path

import torch
from absl import app, flags

from errors import UsageError, UserError
from training import flags as shared_flags
from training.allocator import keep_freed_memory


def run(main):
    """Parse the flags, check them and call main(); exit with 2 for wrong flags and 1 for wrong files."""
    keep_freed_memory()
    for flag in flags.FLAGS.get_key_flags_for_module(shared_flags.__name__):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)  # what --help shows
    try:
        app.run(lambda _: main(), flags_parser=parse)
    except UserError as error:
        stop(error)


def parse(argv):
    try:
        positional = flags.FLAGS(argv)[1:]
        if positional:
            raise UsageError(f"{positional[0]!r} is no flag: flags start with --, see --help")
        shared_flags.check(flags.FLAGS)
    except (flags.Error, UsageError) as error:
        stop(UsageError(" ".join(str(error).split())))
    return argv


def stop(error):
    print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)


def pick_device(name):
    """The torch device of `--device`, or cuda if there is one, else cpu."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device={name} is not available on this machine: leave it out to choose one") from error
    return device

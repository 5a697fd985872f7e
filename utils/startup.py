"""How every script runs: signals, standard streams, errors in one line."""

import argparse
import contextlib
import os
import signal
import sys
import time
from pathlib import Path

from utils.errors import DataError, UsageError, UserError, warn

MAIN_SPEAKS_FIRST = 3.0  # seconds


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument as every other error of a user: in one line."""

    def error(self, message):
        raise UsageError(f"{message}: see --help")


def split_label(argument):
    """(label, path) of an argument: the path is its longest end that exists, after no or some "="."""
    parts = argument.split("=")
    for i in range(len(parts)):
        path = os.path.expanduser("=".join(parts[i:]))  # noqa: PTH111
        if os.path.exists(path):  # noqa: PTH110 - Path.exists raises for a name that is too long
            return "=".join(parts[:i]), Path(path)
    raise DataError(f"{argument}: no such file or directory: name a result.json or its directory, or LABEL= and one")


def run(main):
    """Call main() and exit with what it returns; after a user's error 1 or 2, after signal n 128 + n."""
    handle(stop)
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where they are closed; any text appears
        stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        code = main()
    except KeyboardInterrupt as stopped:
        code = 128 + stopped.args[0]
        say_stopped(stopped.args[0])
    except SystemExit as end:
        code = end.code
    except UserError as error:
        code = error.exit_code
        if os.environ.get("RANK", "0") != "0":
            # most errors are every process's: rank 0 has said it then, and torchrun ends this one before
            handle(stop_at_once)
            time.sleep(MAIN_SPEAKS_FIRST)
        say(f"error: {error}")
    handle(stop_at_once)
    sys.exit(code)


def say(text):
    """Write a line about this script, and the rank of its process above 0, to standard error."""
    rank = os.environ.get("RANK", "0")
    warn(f"{name()}: {'' if rank == '0' else f'rank {rank}: '}{text}")


def name():
    """Of the script, as a person started it: main.py or score.compare."""
    spec = sys.modules["__main__"].__spec__
    return spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).name


def handle(handler):
    """Handle SIGINT, SIGTERM and, unless it is ignored as under nohup, SIGHUP."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def stop(number, frame):
    """Unwind as from Ctrl-C, to leave files and processes tidy; a second signal does not wait for it."""
    handle(stop_at_once)
    raise KeyboardInterrupt(number)


def stop_at_once(number, frame):
    """End the process here."""
    say_stopped(number)
    os._exit(128 + number)


def say_stopped(number):
    """Write a line, of the first process only, past the streams, which this may have interrupted."""
    if os.environ.get("RANK", "0") == "0":
        after_bar = "\n" if os.isatty(2) else ""
        with contextlib.suppress(OSError):
            os.write(2, f"{after_bar}{name()}: stopped by {signal.Signals(number).name}\n".encode())

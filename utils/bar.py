"""Progress bars: all of them are made here."""

import os
import sys

from tqdm import tqdm

from utils import distributed


class Lines:
    """Takes what a tqdm bar writes and prints plain lines, for log files."""

    def write(self, text):
        if text.strip():
            print(text.strip(), file=sys.stderr)

    def flush(self):
        sys.stderr.flush()


def progress_bar(*args, disable=False, **settings):
    """A tqdm bar of rank 0; the others show none. What the user sets in TQDM_* holds.

    Where no terminal shows it, it writes a line when it begins, every 30 s and when it ends."""
    if disable or not distributed.is_main():
        settings["disable"] = True
    if sys.stderr.isatty():
        own = {"dynamic_ncols": "TQDM_NCOLS" not in os.environ}
    else:
        own = {"mininterval": 30, "miniters": 1, "file": Lines()}  # miniters=1: at least a step a line
    own = {name: value for name, value in own.items() if f"TQDM_{name.upper()}" not in os.environ}
    return tqdm(*args, **settings, **own)

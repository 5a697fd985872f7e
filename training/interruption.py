"""SIGTERM and SIGINT: a run stops at the next step boundary, with everything saved."""

import os
import signal
import sys


class Interruption:
    """Within its context the first SIGTERM or SIGINT only makes it true; a second one ends the process at once."""

    def __init__(self):
        self.number = None

    def __enter__(self):
        self.before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        if self.number is not None:
            os._exit(128 + number)
        self.number = number

    def __bool__(self):
        return self.number is not None

    def exit(self, path):
        """End the process as shells and clusters expect it: 143 after SIGTERM, 130 after SIGINT."""
        name = signal.Signals(self.number).name
        print(f"stopped by {name}, saved as {path}: the same command continues the run", file=sys.stderr)
        sys.exit(128 + self.number)

"""SIGTERM, SIGINT and SIGHUP: a training stops at the next step boundary, with everything saved."""

import os
import signal
import sys
import time

import distributed
import startup

ONE_REQUEST = 1.0  # seconds: a cluster signals torchrun and its processes, and torchrun passes it on


class Interruption:
    """Within its context the first of these signals only makes it true; a second one ends the process at once.

    The same signal again within a second is the same request.
    """

    def __init__(self):
        self.number = None

    def __enter__(self):
        self.before = startup.handle(self._receive)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        if self.number is None:
            self.number, self.since = number, time.monotonic()
        elif number != self.number or time.monotonic() - self.since > ONE_REQUEST:
            os._exit(128 + number)

    def __bool__(self):
        return self.number is not None

    def exit(self, path):
        """End the process as shells and clusters expect it: 143 after SIGTERM, 130 after SIGINT, 129 after SIGHUP.

        Where only another process was signalled, this one ends as after SIGTERM.
        """
        number = self.number or signal.SIGTERM
        if distributed.is_main():
            name = signal.Signals(number).name
            print(f"stopped by {name}, saved as {path}: the same command continues the run", file=sys.stderr)
        sys.exit(128 + number)

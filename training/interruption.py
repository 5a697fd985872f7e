"""SIGTERM, SIGINT and SIGHUP: a training stops at the next step boundary, with everything saved."""

import os
import signal
import sys
import time

import torch

from utils import distributed, startup
from utils.errors import printable

ONE_REQUEST = 1.0  # seconds: a cluster signals torchrun and its processes, and torchrun passes it on


class Interruption:
    """Within its context the first of these signals only makes it true; a second one ends the process at once.

    The same signal again within a second is the same request.
    """

    def __init__(self):
        self.number = None
        self.pending = None

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

    def of_any(self):
        """Whether any of the processes that train one network was signalled, known to all of them at the same step.

        Nobody waits for the others: the answer is about the step before.
        """
        if distributed.world_size() == 1:
            return bool(self)
        before, self.pending = self.pending, distributed.total_later(torch.tensor(int(bool(self))))
        return before is not None and bool(before())

    def exit(self, logdir):
        """End the process as shells and clusters expect it: 143 after SIGTERM, 130 after SIGINT, 129 after SIGHUP.

        Where only another process was signalled, this one ends as after SIGTERM.
        """
        number = self.number or signal.SIGTERM
        if distributed.is_main():
            name = signal.Signals(number).name
            where = printable(logdir)
            print(f"stopped by {name}, saved in {where}: the same command continues the run", file=sys.stderr)
        sys.exit(128 + number)

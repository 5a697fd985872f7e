"""Errors that a person can fix: one line each, with which the scripts exit. All else is a bug, with its traceback."""

import sys


def printable(text):
    """The text on one line that every terminal and file takes: what is not printable or no UTF-8 becomes escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def warn(text):
    """Write one line to standard error."""
    print(printable(text), file=sys.stderr)


class UserError(Exception):
    """Base of the errors below; raise one of those."""

    exit_code = 1

    def __str__(self):
        return printable(super().__str__())


class UsageError(UserError):
    """A flag is out of range, or two flags contradict each other."""

    exit_code = 2


class DataError(UserError):
    """A file or directory is missing, unreadable, or not what the flags say it is."""


class DamagedError(DataError):
    """A file's content is not what was written, or never was what its name says."""

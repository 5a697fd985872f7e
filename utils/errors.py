"""Errors that a person can fix: one line each, with which scripts exit. All else is a bug."""

import sys

LONGEST = 300  # characters of an exception in a message


def printable(text):
    """The text on one line for all terminals and files: what is not printable or no UTF-8 is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def one_line(error):
    """What an exception says, on one line up to `LONGEST`, without an `OSError`'s path; or its type."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


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

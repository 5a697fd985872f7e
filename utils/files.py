"""Files of our own: written whole or not at all, JSON, hashes, directories. All raise a `DataError` naming the file."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import sys
from pathlib import Path

from utils.errors import DataError


@contextlib.contextmanager
def atomic_write(path):
    """A binary file that appears at `path` complete or not at all: temporary file beside it, fsync, rename, fsync.

    Makes the parent directories. Raises DataError if the file cannot be written (no permission, disk full).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            yield file
            sync(file)
        temporary.replace(path)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror or error}): check the directory and its space"
        ) from error
    finally:
        # after the rename there is none; where it cannot be removed, what is wrong has been reported already
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


@contextlib.contextmanager
def where_supported():
    """Pass over a sync that the file system does not know; an error of the disk is still raised."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise


def sync(file):
    """Bring what was written to an open file to the disk."""
    file.flush()
    with where_supported():
        os.fsync(file.fileno())


def sync_directory(path):
    """Make a rename in a directory durable, where the file system can open and sync directories."""
    with contextlib.suppress(OSError):
        directory = os.open(path, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def remove(path):
    """Remove a file, if it is there; raises DataError."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{path}: cannot be removed ({error.strerror}): check the directory") from error


def make_directory(path, flag):
    """Make a directory that `flag` names, and prove that it can be written; raises DataError."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".{secrets.token_hex(4)}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise DataError(f"--{flag}={path}: cannot be written ({error.strerror}): choose another directory") from error


def lock_directory(path, flag):
    """Take a directory for this process until it ends or closes the file that is returned, which holds the lock.

    Where the file system has no locks, a warning says so and the work goes on.

    Raises:
        DataError: another process has taken it; `flag` is the name of the flag that names the directory.
    """
    path = Path(path)
    try:
        file = (path / ".lock").open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise DataError(
                f"--{flag}={path}: process {file.read().strip()} is writing there: wait for it or choose another "
                "directory"
            ) from None
        except OSError as error:
            print(
                f"{path}: has no locks ({error.strerror}): nothing keeps a second process from writing", file=sys.stderr
            )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
    except OSError as error:
        raise DataError(
            f"--{flag}={path}: its .lock cannot be written ({error.strerror}): choose another directory"
        ) from error
    return file


def write_text(path, text):
    """Write a text atomically, in UTF-8; what names of files hold that is none becomes escapes."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def write_json(path, value):
    """Write a value as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path):
    """The value in a JSON file; raises DataError if it is missing or damaged."""
    path = Path(path)
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}): remove it") from error


def file_hash(path):
    """SHA-256 of a file's bytes, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Files of our own: written whole or not at all, JSON, hashes, directories; a `DataError` names them."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
from pathlib import Path

from utils.errors import DataError, warn

SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "lost+found"}


@contextlib.contextmanager
def writable(what, advice):
    """Raise a DataError about `what` for an OSError in the block."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{what}: cannot be written ({error.strerror or error}): {advice}") from error


@contextlib.contextmanager
def atomic_write(path):
    """A binary file that appears at `path`, in a new directory too, complete and synced or never."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with writable(path, "check the directory and its space"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file:
                yield file
                sync(file)
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):  # after the rename there is none
            temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def sync(file):
    """Bring what was written to an open file, or tensorboardX's, to the disk, where that can be done."""
    try:
        file.flush()
        if hasattr(file, "fileno"):  # tensorboardX's flush syncs, too
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise


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
    with writable(path, "it was to be removed, check the directory"):
        path.unlink(missing_ok=True)


def make_directory(path, flag):
    """Make a directory that `flag` names, and prove that it can be written; raises DataError."""
    with writable(f"--{flag}={path}", "choose another directory"):
        Path(path).mkdir(parents=True, exist_ok=True)
        probe = Path(path) / f".{secrets.token_hex(4)}.tmp"
        probe.touch()
        probe.unlink()


def lock_directory(path, flag):
    """Make and take the directory that `flag` names, until this process ends or closes what is returned.

    One that another process has is refused. A file system without locks is warned of, no more."""
    with writable(f"--{flag}={path}", "choose another directory"):
        Path(path).mkdir(parents=True, exist_ok=True)
        file = (Path(path) / ".lock").open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            writer = f"process {file.read().strip()} is writing there"
            raise DataError(f"--{flag}={path}: {writer}: wait for it or choose another directory") from None
        except OSError as error:
            warn(f"{path}: has no locks ({error.strerror}): nothing keeps a second process from writing")
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
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
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}): remove it") from error


def file_hash(path):
    """SHA-256 of a file's bytes, in hex; raises OSError."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hash(folder, *parts):
    """SHA-256, in hex, of names and contents of the files in a folder, or parts of it; or of a file.

    Hidden ones, which systems put into folders, are left out."""
    digest, places = hashlib.sha256(), [Path(folder) / part for part in parts] or [Path(folder)]
    found = [path for place in places for path in (place.iterdir() if place.is_dir() else [place])]
    found = [path for path in found if path in places or not is_hidden(path.name)]
    for path in sorted(path for path in found if path.is_file()):
        digest.update(f"{path.relative_to(folder)} {file_hash(path)}\n".encode())
    return digest.hexdigest()


def is_hidden(name):
    """Whether a file or folder of this name is hidden, or one that systems put among others."""
    return name.startswith(".") or name.lower() in SYSTEM_FILES

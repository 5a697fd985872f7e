"""What both evaluations do around their measurements: directories, warnings, result.json, a summary."""

import contextlib
import time
from pathlib import Path

from score.columns import is_old, summary
from utils import distributed
from utils.errors import DataError, warn
from utils.files import lock_directory, read_json, write_json
from utils.images import of_non_finite


@contextlib.contextmanager
def take_directories(directories):
    """Make directories, {flag: path}, and keep other processes out of them within the block."""
    locks = []
    if distributed.is_main():
        paths = {Path(path).resolve(): flag for flag, path in directories.items()}  # may be equal
        locks = [lock_directory(path, flag) for path, flag in paths.items()]
    yield
    for lock in locks:
        lock.close()


def say(*notes):
    """Warn of notes, texts or None, once for all processes."""
    for note in filter(None, notes if distributed.is_main() else ()):
        warn(f"warning: {note}")


def say_non_finite(what, bad, number):
    """`say` that so many of a number of images are not finite; returns that text, None where none is."""
    text = of_non_finite(what, bad, number)
    say(text)
    return text


def earlier_result(directory):
    """What an earlier call has left in a directory's result.json, or an empty one, for all processes."""
    path, empty = Path(directory) / "result.json", {"images_sha256": None}
    result = read_json(path) if path.exists() and distributed.is_main() else empty
    if not isinstance(result, dict) or "images_sha256" not in result:
        raise DataError(f"{path}: not written by all_in.py: move it, or choose another --grid_dir")
    if is_old(result):
        warn(f"{path}: of an earlier version, which had other names: it is begun anew")
        result = empty
    return distributed.from_main(result)


def add_stage(result, directory, stage, find, optional=(), flags=None):
    """Put what a stage finds into a result, with its seconds, and write it; returns whether it is new.

    Args:
        directory: of result.json.
        find: called without arguments, returns {name: JSON value}.
        optional: names that the stage finds with some flags only: they go when it is run with others.
        flags: {name: value} of this call, kept for the last that made numbers; None: it makes none."""
    start = time.perf_counter()
    numbers = find()
    earlier = {key: result.pop(key) for key in {*numbers, *optional} if key in result}
    result |= numbers
    is_new = numbers != earlier or stage not in result["seconds"]
    if is_new:
        result["seconds"][stage] = round(time.perf_counter() - start, 3)
        result |= {"flags": flags} if flags else {}
    if distributed.is_main():
        write_json(Path(directory) / "result.json", result)
    return is_new


def print_summary(result, directory):
    """What a person wants to know first."""
    print(f"{result['N']} images against {result['training_set_size']} training images")
    print("  " + ", ".join(f"{name} {text}" for name, text in summary(result).items()))
    if result["seconds"].keys() - {"generate"}:  # a stage that writes it
        print(f"  written to {directory}")

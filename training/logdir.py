"""The log directory of a run: one process at a time, and told what the run is made of before the work starts."""

import os
import shutil
import socket
from pathlib import Path

import numpy as np

import distributed
from errors import DataError, UsageError
from files import lock_directory, make_directory, read_json, write_json

# what a run writes; --fresh --overwrite removes these and nothing else
OWN_FILES = [
    "ckpt*.pt", "global_ckpt_round*.pt", "*.pt.corrupt", "state", "sample", "metrics.jsonl", "events.out.tfevents.*",
    "train.json", "run.json", "flagfile.txt", "subset.npy", "eval_*.json",
]  # fmt: skip


def shared_lock(path):
    """The lock that rank 0 holds, as another process of the same run sees it.

    Raises:
        DataError: it sees none: the machines do not share the directory.
    """
    holder = distributed.from_main(None)
    try:
        file = (path / ".lock").open()
        if file.read().strip() == holder:
            return file
    except OSError:
        pass
    raise DataError(
        f"--logdir={path}: on {socket.gethostname()} it is not the directory that rank 0 has opened: choose one on a "
        "file system that all machines share"
    )


def start_over(path, overwrite):
    """Make sure that no earlier run is in a log directory.

    Raises:
        UsageError: there is one, and it may not be removed.
    """
    found = [file for pattern in OWN_FILES for file in path.glob(pattern)]
    if found and not overwrite:
        raise UsageError(
            f"--fresh: {found[0]} is of an earlier run: add --overwrite to delete that run, or choose another --logdir"
        )
    for file in found:
        shutil.rmtree(file) if file.is_dir() else file.unlink()


def check_changes(path, settings, allow_change):
    """Compare the settings that the result depends on with those that the run in `path` was started with.

    Args:
        path: run.json.
        settings: {name: value}, JSON values.
        allow_change: record the changes instead of refusing them.

    Raises:
        UsageError: names the first setting that differs, and both values.
    """
    run = read_json(path) if path.exists() else {"settings": settings, "changes": []}
    changes = [
        {"flag": name, "before": run["settings"].get(name), "after": value}
        for name, value in settings.items()
        if run["settings"].get(name) != value
    ]
    if changes and not allow_change:
        first = changes[0]
        raise UsageError(
            f"--{first['flag']}={first['after']}: the run in {path.parent} was started with {first['before']}; "
            "give that, choose another --logdir, or continue with the change by --allow_change"
        )
    write_json(path, {"settings": settings, "changes": run["changes"] + changes})


def open_logdir(path, settings, flagfile, subset, *, fresh=False, overwrite=False, allow_change=False):
    """Make a log directory, take it, and write what a later reader needs to repeat or to understand the run.

    Args:
        path: the directory, made if missing.
        settings: what the result depends on, kept as `run.json` and compared when the run is continued.
        flagfile: text of `flagfile.txt`, for `--flagfile`.
        subset: (N,) int64, the training images' numbers in the whole training set, kept as `subset.npy`: skip counts
            and neighbour indices count in it.
        fresh, overwrite, allow_change: the flags.

    Returns:
        The lock, to be held while the run writes. Rank 0 does all this; the other processes wait for it.

    Raises:
        DataError: the directory cannot be made or written, or another process has it.
        UsageError: what is in it is not this run.
    """
    path = Path(path)
    if not distributed.is_main():
        return shared_lock(path)
    make_directory(path, "logdir")
    held = lock_directory(path, "logdir")
    if fresh:
        start_over(path, overwrite)
    check_changes(path / "run.json", settings, allow_change)
    (path / "flagfile.txt").write_text(flagfile, encoding="utf-8")
    np.save(path / "subset.npy", subset.numpy())
    distributed.from_main(str(os.getpid()))
    return held

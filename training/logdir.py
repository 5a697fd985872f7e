"""The log directory of a run: made, proven writable, and told what the run is made of before the work starts."""

from pathlib import Path

import numpy as np

from files import make_directory


def open_logdir(path, flagfile, subset):
    """Make a log directory and write what a later reader needs to repeat or to understand the run.

    Args:
        path: the directory, made if missing.
        flagfile: text of `flagfile.txt`, for `--flagfile`.
        subset: (N,) int64, the training images' numbers in the whole training set, kept as `subset.npy`: skip counts
            and neighbour indices count in it.

    Raises:
        DataError: the directory cannot be made or written.
    """
    path = Path(path)
    make_directory(path, "logdir")
    (path / "flagfile.txt").write_text(flagfile)
    np.save(path / "subset.npy", subset.numpy())

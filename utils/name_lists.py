"""Files that name images of a data set: keep.txt, a name a line, and groups.csv, groups of copies."""

import csv
import io

import numpy as np
import torch

from utils.errors import DataError, one_line
from utils.files import write_text
from utils.safe_files import read_text

GROUP_COLUMNS = ("group", "image", "kept", "score", "kind")


def as_written(name):
    """A name as files of text have it: what is no UTF-8 becomes escapes."""
    return str(name).encode("utf-8", "backslashreplace").decode()


def write_names(path, names):
    """Write a name a line; raises a DataError for one with a line break in it."""
    check_line_breaks(path, names)
    write_text(path, "".join(f"{name}\n" for name in names))


def check_line_breaks(path, names):
    """Raise a DataError if a name could not be a line of `path`."""
    if broken := next((name for name in names if set("\r\n") & set(name)), None):
        raise DataError(f"{path}: {broken!r} has a line break in its name: rename the file")


def read_kept(path, names, others=()):
    """Which of the images called `names`, (N,) str, a list of names keeps: bool (N,).

    others: names that may be in the list too, of images that are not trained on.

    Raises:
        DataError: it cannot be read, names an image that is not in the data, or keeps none.
    """
    try:
        kept = {name for name in read_text(path).split("\n") if name}
    except (OSError, ValueError) as error:
        raise DataError(f"--keep_list={path}: cannot be read ({one_line(error)})") from error
    names = list(map(as_written, names))
    check_names(f"--keep_list={path}", kept, {*names, *map(as_written, others)})
    rows = np.array([name in kept for name in names])
    if not rows.any():
        raise DataError(f"--keep_list={path}: keeps none of the training images: make it of these")
    return rows


def write_table(path, header, rows):
    """Write a CSV with a header; names may have commas, quotes and line breaks in them."""
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    table.writerow(header)
    table.writerows(rows)
    write_text(path, file.getvalue())


def read_groups(path, names, others=()):
    """The group of each of the images called `names`, (N,) str: int64 (N,), numbered by their firsts.

    path: a groups.csv; of its columns `group` and `image` are read. An image that it does not name is a
    group of its own. others: as for `read_kept`.

    Raises:
        DataError: it cannot be read, names an image that is not in the data or one twice, or none.
    """
    group_of = {}
    try:
        rows = csv.DictReader(io.StringIO(read_text(path)), strict=True)
        if lacking := {"group", "image"} - set(rows.fieldnames or ()):
            what = f"has no column {min(lacking)!r}"
            raise DataError(f"--groups={path}: {what}: make it with duplicates.py")
        for row in rows:
            if not (row["group"] or "").strip():
                raise ValueError(f"line {rows.line_num}: {row['image']} is in no group")
            if group_of.setdefault(row["image"], row["group"]) != row["group"]:
                raise ValueError(f"{row['image']} is in two groups")
    except (OSError, ValueError, csv.Error) as error:
        what = f"cannot be read ({one_line(error)}): make it with duplicates.py"
        raise DataError(f"--groups={path}: {what}") from error
    names = list(map(as_written, names))
    check_names(f"--groups={path}", group_of, {*names, *map(as_written, others)})
    numbers, groups = {}, []
    for row, name in enumerate(names):
        of = ("group", group_of[name]) if name in group_of else ("single", row)
        groups.append(numbers.setdefault(of, len(numbers)))
    return torch.tensor(groups)


def check_names(what, named, known):
    """Raise a DataError if a file names images that are not in the data."""
    if unknown := [name for name in named if name not in known]:
        more = f"{unknown[0]!r}" if len(unknown) == 1 else f"{len(unknown)} names such as {unknown[0]!r}"
        raise DataError(f"{what}: not in the data set: {more}: take the list that was made of these images")

"""Files from elsewhere: CIFAR's pickles and archives, of which nothing is run; memory for them."""

import codecs
import io
import math
import pickle
import tarfile
from pathlib import Path

import numpy as np

from utils.errors import DataError, one_line

MARKS = {  # that editors put before a text; UTF-32's begins as UTF-16's does
    codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip


def available_memory():
    """Bytes that the kernel says a process can have."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except FileNotFoundError:  # not Linux
        return math.inf
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def check_memory(path, size):
    """Raise a DataError if what is in `path` takes more bytes than there is memory for."""
    available = available_memory()
    if size > available:
        needed, available = (f"{number / 2**30:.1f} GiB" for number in (size, available))
        raise DataError(f"{path}: needs {needed} of memory, {available} are available: use fewer images")


def read_file(path):
    """The bytes of a file; raises a DataError."""
    try:
        check_memory(path, path.stat().st_size)
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)}): fetch it again") from None


def read_text(path):
    """The text of a file in UTF-8, or UTF-16 or UTF-32 with a byte order mark; lines end in a line feed.

    Raises:
        OSError, ValueError: it cannot be read, or is in another encoding."""
    data = Path(path).read_bytes()
    try:
        text = data.decode(next((name for mark, name in MARKS.items() if data.startswith(mark)), "utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is no {error.encoding}: save it in UTF-8") from error
    if "\0" in text:
        raise ValueError("it holds zero bytes: save it as text in UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_archive(path, names):
    """{path / name: contents} of the files `names` in a .tar.gz, unpacked in memory, not extracted.

    In the order of the archive, since going back in a .gz means to unpack it from its beginning.

    Raises:
        DataError: the archive is damaged, lacks one of them, or unpacks to more than the free memory."""
    try:
        with tarfile.open(path) as archive:
            contents = {}
            for file in archive:
                name = file.name.removeprefix("./")
                if file.isreg() and name in names:
                    check_memory(path, file.size)
                    contents[name] = archive.extractfile(file).read()
        return {path / name: contents[name] for name in names}
    except DataError:
        raise
    except Exception as error:  # a hostile file can make tarfile raise anything
        what = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be unpacked ({one_line(error)})"
        raise DataError(f"{path}: {what}: fetch it again") from None


class PickledArray:
    """Stands in for NumPy's array, dtype and reconstruction while unpickling: keeps what it is given."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __setstate__(self, state):
        self.state = state


class ArrayUnpickler(pickle.Unpickler):
    """Unpickles lists, dicts, strings, numbers and stand-ins for NumPy's arrays; refuses all else."""

    def find_class(self, module, name):
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype"):
            return PickledArray
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a data set has no use for")


def unpickle_dict(data, path):
    """The dict of arrays and plain values in a pickle, else a DataError; nothing in it can run."""
    try:
        content = ArrayUnpickler(io.BytesIO(data), encoding="latin1").load()
        for key, value in content.items():
            if isinstance(value, PickledArray):
                _, shape, dtype, is_fortran, pixels = value.state
                if dtype.arguments[0] != "u1":
                    raise pickle.UnpicklingError("an array of something else than bytes")
                pixels = pixels.encode("latin1") if isinstance(pixels, str) else pixels
                array, order = np.frombuffer(pixels, np.uint8), "F" if is_fortran else "C"
                content[key] = array.reshape(shape, order=order)
    except Exception as error:  # a hostile file can make the unpickler raise anything
        raise DataError(f"{path}: refused, not a pickle of arrays ({one_line(error)}): fetch it again") from None
    return content

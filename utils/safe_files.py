"""Files from elsewhere, read without running what is in them and within bounded memory: images, CIFAR's pickles."""

import contextlib
import gzip
import io
import logging
import math
import pickle
import pickletools
import struct
import tarfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from utils.errors import DataError

# What PIL has to say is of metadata. Once for all, because filters are shared by the threads that decode.
warnings.filterwarnings("ignore", module="PIL")
logging.getLogger("PIL").setLevel(logging.CRITICAL)

MAX_FILE_BYTES = 256 * 2**20  # CIFAR-100's training file has 148 MiB, the unpacked archives 178 MiB
NUMPY_NAMES = {("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}
MAX_PICKLE_OPCODES = 10**6  # CIFAR-100's training file has some 3e5; an opcode can take some 200 bytes of memory

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "TGA")
TIFF_BITS, TIFF_PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0


def one_line(error: Exception) -> str:
    """What an exception says, on one line and without the path that an `OSError` repeats; its type if it is silent."""
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__


def printable(text: Path | str) -> str:
    """A path or a message on one line, whatever is in file names."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in str(text))


# ---- memory ----


def available_memory(root: Path = Path("/")) -> float:
    """Bytes that this process can have: what the kernel calls available, or less if a cgroup around it has a limit.

    The pages of files that the kernel keeps do not count as used, in a cgroup neither. `root` is where proc and sys
    are; without them (not Linux) the answer is infinity.
    """
    try:
        available = 1024 * read_numbers(root / "proc/meminfo")["MemAvailable:"]
    except FileNotFoundError:
        return math.inf
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            top, limit, usage = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            top, limit, usage = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = top / name.lstrip("/")
        for directory in (group, *group.parents):
            # In a container the name can be the host's. The container's own group is the top then, and all there is.
            if not directory.is_relative_to(top) or not (directory / limit).exists():
                continue
            stat = read_numbers(directory / "memory.stat")
            files = sum(stat.get(f"total_{kind}", stat[kind]) for kind in ("active_file", "inactive_file"))
            if (text := (directory / limit).read_text().strip()) != "max":
                available = min(available, int(text) - int((directory / usage).read_text()) + files)
    return max(0, available)


def read_numbers(path: Path) -> dict[str, int]:
    """What is in a file with a name and a number on every line."""
    return {words[0]: int(words[1]) for words in map(str.split, path.read_text().splitlines())}


def check_memory(path: Path | str, size: int):
    """Raises `DataError` if the `size` bytes that what is in `path` takes are more than there is memory for."""
    available = available_memory()
    if size > available:
        needed, available = (f"{number / 2**30:.1f} GiB" for number in (size, available))
        raise DataError(f"{printable(path)}: needs {needed} of memory, {available} are available: use fewer images")


# ---- images ----


def read_image(path: Path | str) -> Image.Image:
    """A still picture of one of `FORMATS` in RGB, upright as its metadata says (the first frame of an animation).

    Metadata that cannot be read is ignored. Raises `DataError` naming the file if it is missing, no image, damaged, of
    a kind that `to_rgb` refuses, or larger than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    try:
        with Path(path).open("rb") as file:
            try:
                return decode(file)
            except (ValueError, SyntaxError, OSError):
                # PIL refuses a PNG for a text or a profile that is broken or long.
                file.seek(0)
                data = png_without_metadata(file.read(MAX_FILE_BYTES))
                if data is None:
                    raise
                return decode(io.BytesIO(data))
    except Image.DecompressionBombError:
        what = f"more than {Image.MAX_IMAGE_PIXELS:,} pixels, which may be a decompression bomb"
    except UnidentifiedImageError:
        what = "not an image that PIL can read"
    except Exception as error:  # a hostile file can make a decoder raise anything
        what = f"cannot be read as an image ({one_line(error)})"
    raise DataError(printable(f"{path}: {what}"))


def decode(file: BinaryIO) -> Image.Image:
    with Image.open(file, formats=FORMATS) as image:
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError
        image.load()
        with contextlib.suppress(Exception):  # what is odd elsewhere in the EXIF data shows after the image was turned
            ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image)


def png_without_metadata(data: bytes) -> bytes | None:
    """A PNG's chunks that decide its pixels, and its EXIF data if that is whole; None if it is no PNG."""
    if not data.startswith(b"\x89PNG"):
        return None
    kept, start = [data[:8]], 8
    while start + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, start)
        chunk = data[start : start + size + 12]
        whole_exif = kind == b"eXIf" and chunk[-4:] == zlib.crc32(chunk[4:-4]).to_bytes(4)
        if whole_exif or kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            kept.append(chunk)
        start += len(chunk)
    return b"".join(kept)


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in mode RGB: transparency over white, 16-bit grey v as the level round(v / 257), all else as PIL does.

    Raises `ValueError` where the range of the values is unknown (32-bit integers, floats).
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG")):
        values, tags = np.asarray(image).astype(np.uint32), getattr(image, "tag_v2", {})
        top = 2 ** tags.get(TIFF_BITS, (16,))[0] - 1
        levels = (255 * values + top // 2) // top
        levels = 255 - levels if tags.get(TIFF_PHOTOMETRIC) == WHITE_IS_ZERO else levels
        levels[values == image.info.get("transparency")] = 255
        return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode}: 32-bit values have no known range, save it with 8 bits")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


# ---- CIFAR's archives and pickles ----


def read_file(path: Path) -> bytes:
    """The bytes of a file of at most `MAX_FILE_BYTES`; `DataError` naming it if it is missing or larger."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): fetch the data set again") from None
    if len(data) > MAX_FILE_BYTES:
        raise DataError(
            f"{path}: larger than {MAX_FILE_BYTES:,} bytes, so it is not what its name says: fetch it again"
        )
    return data


def read_archive(path: Path, names: list[str]) -> list[bytes]:
    """The contents of the plain files `names` in a .tar.gz, unpacked in memory: nothing is extracted.

    Raises `DataError` naming the archive if it is damaged, lacks a file, or unpacks to more than `MAX_FILE_BYTES`.
    """
    try:
        with gzip.open(path) as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ValueError(f"more than {MAX_FILE_BYTES:,} bytes")
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            # A sparse file of any size takes no space in the archive.
            plain = {member.name.removeprefix("./"): member for member in archive if not member.issparse()}
            for name in names:
                if name not in plain or not plain[name].isreg():
                    raise ValueError(f"it lacks {name}")
            return [archive.extractfile(plain[name]).read() for name in names]
    except Exception as error:  # a hostile file can make gzip, zlib and tarfile raise anything
        raise DataError(f"{path}: cannot be unpacked ({one_line(error)}): fetch it again") from None


class PickledArray:
    """Stand-in for NumPy's array, dtype and reconstruction function while unpickling: keeps what it is given."""

    def __init__(self, *arguments: object):
        self.arguments, self.state = arguments, ()

    def __setstate__(self, state: tuple):
        self.state = state

    def array(self) -> np.ndarray:
        _, shape, dtype, is_fortran, data = self.state
        if as_text(dtype.arguments[0]) != "u1":
            raise pickle.UnpicklingError("an array of something else than bytes")
        return np.frombuffer(data, np.uint8).reshape(shape, order="F" if is_fortran else "C")


class ArrayUnpickler(pickle.Unpickler):
    """Unpickles lists, dicts, strings, numbers and stand-ins for NumPy's arrays; refuses every other global."""

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data), encoding="bytes")
        self.characters_left = len(data)

    def find_class(self, module: str, name: str) -> Callable:
        if (module.replace("numpy._core", "numpy.core"), name) in NUMPY_NAMES:
            return PickledArray
        if (module, name) == ("_codecs", "encode"):
            return self.encode
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a data set has no use for")

    def encode(self, text: str, encoding: str) -> bytes:
        """How Python 3 writes bytes in old pickle protocols: each character of the file is encoded once at most."""
        self.characters_left -= len(text)
        if encoding != "latin1" or self.characters_left < 0:
            raise pickle.UnpicklingError("it misuses _codecs.encode")
        return text.encode("latin1")


def unpickle_dict(data: bytes, name: Path | str) -> dict[str, object]:
    """The dict of arrays, lists, strings and numbers in a pickle, keys as str. Nothing in the pickle can run.

    Memory is bounded by a multiple of len(data) and of `MAX_PICKLE_OPCODES`. Raises `DataError` with `name`, the file
    that the data came from, if the pickle is damaged or holds anything else.
    """
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            # The memo is a plain array: one PUT with a huge index would fill the memory.
            if count >= MAX_PICKLE_OPCODES or ("PUT" in opcode.name and argument > MAX_PICKLE_OPCODES):
                raise pickle.UnpicklingError("it is built to fill the memory")
        content = ArrayUnpickler(data).load()
        return {
            as_text(key): value.array() if isinstance(value, PickledArray) else value for key, value in content.items()
        }
    except Exception as error:  # a hostile file can make the unpickler raise anything
        raise DataError(f"{name}: refused, not a pickle of arrays ({one_line(error)}): fetch it again") from None


def as_text(text: str | bytes) -> str:
    """Python 2 wrote its strings as bytes."""
    return text.decode("latin-1") if isinstance(text, bytes) else text

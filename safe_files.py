"""Files from elsewhere, read without running what is in them and within bounded memory: images, CIFAR's pickles."""

import codecs
import functools
import gzip
import io
import pickle
import pickletools
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from errors import DataError

MAX_FILE_BYTES = 256 * 2**20  # CIFAR-100's training file has 148 MiB, the unpacked archives 178 MiB
MAX_PICKLE_OPCODES = 10**6  # CIFAR-100's training file has some 3e5; an opcode can take some 200 bytes of memory


def one_line(error: Exception) -> str:
    """What an exception says, on one line and without the path that an `OSError` repeats; its type if it is silent."""
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__


def read_image(path: Path | str) -> Image.Image:
    """Any still picture that PIL reads, upright as its EXIF data says, in RGB (the first frame of an animation).

    Raises `DataError` naming the file if it is missing, no image, damaged, of a kind that `to_rgb` refuses, or larger
    than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=image_formats()) as image:
                ImageOps.exif_transpose(image, in_place=True)
                return to_rgb(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        limit = f"more than {Image.MAX_IMAGE_PIXELS:,} pixels"
        raise DataError(f"{path}: {limit}, which may be a decompression bomb: make it smaller or remove it") from None
    except UnidentifiedImageError:
        raise DataError(f"{path}: not an image that PIL can read: remove it or replace it") from None
    except Exception as error:  # a hostile file can make a decoder raise anything
        raise DataError(f"{path}: cannot be read as an image ({one_line(error)}): remove it or replace it") from None


@functools.cache
def image_formats() -> tuple[str, ...]:
    """PIL's formats but for EPS, which is a program that PIL would hand to Ghostscript."""
    Image.init()
    return tuple(name for name in Image.ID if name != "EPS")


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in mode RGB: transparency over white, 16-bit grey v as the level round(v / 257), the rest as PIL does.

    Raises `ValueError` where the range of the values is unknown (32-bit integers, floats).
    """
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode}: 32-bit values have no known range, save it with 8 bits")
    if image.mode.startswith("I;16"):
        if image.has_transparency_data:
            raise ValueError("16-bit grey with transparency, save it with 8 bits")
        levels = (np.asarray(image).astype(np.uint32) + 128) // 257
        return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


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
    """The contents of the members `names` of a .tar.gz, read as a stream: nothing is extracted, only they are kept.

    Raises `DataError` naming the archive if it is damaged, lacks a member, or unpacks to more than `MAX_FILE_BYTES`.
    """
    too_large = f"more than {MAX_FILE_BYTES:,} bytes"
    found: dict[str, bytes] = {}
    try:
        with gzip.open(path) as file:
            # Header by header, because tarfile's own walk would also parse extended headers, of any size.
            while any(header := file.read(tarfile.BLOCKSIZE)):
                member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
                padding = -member.size % tarfile.BLOCKSIZE
                if not 0 <= member.size <= MAX_FILE_BYTES - file.tell():
                    raise ValueError(too_large)
                name = member.name.removeprefix("./")
                if name in names and member.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    found[name] = file.read(member.size)
                    if len(found[name]) < member.size:
                        raise ValueError("it ends too early")
                    file.seek(padding, io.SEEK_CUR)
                else:
                    file.seek(member.size + padding, io.SEEK_CUR)
            while file.read(2**20):  # up to gzip's checksum of the whole
                if file.tell() > MAX_FILE_BYTES:
                    raise ValueError(too_large)
    except Exception as error:  # a hostile file can make gzip, zlib and tarfile raise anything
        raise DataError(f"{path}: cannot be unpacked ({one_line(error)}): fetch it again") from None
    for name in names:
        if name not in found:
            raise DataError(f"{path}: lacks {name}: fetch it again")
    return [found[name] for name in names]


class PickledDtype:
    """Stand-in for `numpy.dtype` while unpickling: keeps the arguments and the state, calls nothing of NumPy."""

    def __init__(self, *arguments: object):
        self.arguments = arguments
        self.state = ()

    def __setstate__(self, state: tuple):
        self.state = state

    def dtype(self) -> np.dtype:
        name, byte_order = (as_text(part) for part in (self.arguments[0], self.state[1]))
        dtype = np.dtype(name)
        if dtype.kind not in "biuf":
            raise pickle.UnpicklingError(f"an array of {name} where numbers belong")
        return dtype.newbyteorder(byte_order)


class PickledArray:
    """Stand-in for `numpy.ndarray` and its reconstruction function while unpickling: keeps the state."""

    def __init__(self, *arguments: object):
        self.state = ()

    def __setstate__(self, state: tuple):
        self.state = state

    def array(self) -> np.ndarray:
        _, shape, pickled_dtype, is_fortran, data = self.state
        return np.frombuffer(data, pickled_dtype.dtype()).reshape(shape, order="F" if is_fortran else "C")


class ArrayUnpickler(pickle.Unpickler):
    """Unpickles lists, dicts, strings, numbers and stand-ins for NumPy's arrays; refuses every other global."""

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data), encoding="bytes")
        self.characters_left = len(data)

    def find_class(self, module: str, name: str) -> Callable:
        allowed = {
            ("numpy.core.multiarray", "_reconstruct"): PickledArray,
            ("numpy._core.multiarray", "_reconstruct"): PickledArray,
            ("numpy", "ndarray"): PickledArray,
            ("numpy", "dtype"): PickledDtype,
            ("_codecs", "encode"): self.encode,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a data set has no use for")
        return allowed[module, name]

    def encode(self, text: str, encoding: str) -> bytes:
        """How Python 3 writes bytes in old pickle protocols: each character of the file is encoded once at most."""
        self.characters_left -= len(text)
        if encoding != "latin1" or self.characters_left < 0:
            raise pickle.UnpicklingError("it misuses _codecs.encode")
        return codecs.latin_1_encode(text)[0]


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

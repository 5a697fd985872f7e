"""Images in: one reader per data set, each to uint8 (N, 3, H, W) and class labels; subsets and the held-out part."""

import concurrent.futures
import functools
import hashlib
import importlib.util
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import distributed
from errors import DataError, UsageError
from files import atomic_write
from safe_files import one_line, read_archive, read_file, read_image, unpickle_dict

DATASETS = ("digits", "cifar10", "cifar100", "cifar10_rand", "afhq", "folder")
CACHE_FORMAT = 1  # changes whenever the same files would be decoded to other pixels


@dataclass(frozen=True)
class ImageSet:
    """Images, uint8 (N, 3, H, W), and their classes, int64 (N,) in 0 .. num_classes - 1."""

    images: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Dataset:
    """What to train on, and what is left to compare with.

    `hflip` says whether training flips images at random; `subset` is int64 (N,), ascending: the index of each training
    image in the whole training set.
    """

    train: ImageSet
    heldout: ImageSet | None
    num_classes: int
    hflip: bool
    subset: torch.Tensor


def load_dataset(
    name: str,
    data_root: Path | str,
    img_size: int = 32,
    num_train: int = 0,
    subset_seed: int = 0,
    hflip: bool = False,
    num_workers: int = 0,
    download: bool = False,
) -> Dataset:
    """Reads one of `DATASETS` into memory.

    `img_size` is the side in pixels (images that are not square are squeezed). `num_train` > 0 trains on
    `stratified_subset` only, and the rest, followed by the test split where there is one, is held out; with 0 the test
    split alone is. `hflip` is for "folder": the other sets have their own rule. `num_workers` processes decode image
    files (0: this process does). `download` fetches CIFAR if it is not there.

    Raises `UsageError` for an argument out of range, `DataError` for files that are missing or not what they should be.
    """
    check_arguments(name, img_size, num_train, subset_seed, hflip, num_workers, download)
    data_root = Path(data_root)
    test = None
    if name == "digits":
        train, num_classes = read_digits(img_size), 10
    elif name == "folder":
        train, num_classes = read_folder(data_root, img_size, num_workers)
    elif name == "afhq":
        train, test = read_afhq(data_root, img_size, num_workers)
        num_classes = 1
    else:
        layout = CIFAR100 if name == "cifar100" else CIFAR10
        train, test = read_cifar(layout, data_root, download)
        num_classes = layout.num_classes
        hflip = True

    total = len(train.labels)
    if num_train > total:
        raise UsageError(f"--num_train={num_train}: {name} has {total} training images, give at most that many")
    subset = torch.arange(total)
    if num_train:
        subset = torch.from_numpy(stratified_subset(train.labels.numpy(), num_train, subset_seed))
    train, rest = split(train, subset)
    heldout = [part for part in (rest, test) if part is not None and len(part.labels)]
    return Dataset(train, join(heldout) if heldout else None, num_classes, hflip, subset)


def check_arguments(
    name: str, img_size: int, num_train: int, subset_seed: int, hflip: bool, num_workers: int, download: bool
):
    """Raises `UsageError` if `load_dataset` cannot do what its arguments say."""
    is_cifar = name.startswith("cifar")
    if name not in DATASETS:
        raise UsageError(f"--dataset={name}: unknown, choose one of {', '.join(DATASETS)}")
    if img_size < 1:
        raise UsageError(f"--img_size={img_size}: must be at least 1")
    if is_cifar and img_size != 32:
        raise UsageError(f"--img_size={img_size}: {name} has images of 32x32, use --img_size=32")
    for flag, value in (("num_train", num_train), ("subset_seed", subset_seed), ("num_workers", num_workers)):
        if value < 0:
            raise UsageError(f"--{flag}={value}: must not be negative")
    if hflip and not (is_cifar or name == "folder"):
        raise UsageError(f"--hflip: {name} is trained without flips, use it with --dataset=folder only")
    if download and not is_cifar:
        raise UsageError(f"--download: fetches CIFAR only, not {name}")


def fingerprint(images: torch.Tensor) -> str:
    """SHA-256 (hex) of the shape and the bytes of a uint8 tensor, the same on every device and memory layout."""
    if images.dtype != torch.uint8:
        raise TypeError(f"fingerprint takes uint8 images, got {images.dtype}")
    digest = hashlib.sha256(repr(tuple(images.shape)).encode())
    digest.update(images.contiguous().cpu().numpy())
    return digest.hexdigest()


# ---- subsets ----


def stratified_subset(labels: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Ascending indices, int64 (size,), of a random subset in which every class is as frequent as the others.

    The images of each class are shuffled, and the classes deal one image each, in turn and starting with class
    seed mod C, until `size` are dealt: so class sizes differ by at most one until a class runs out, and a smaller
    subset is part of a larger one with the same seed. For all versions and machines, NumPy promises the raw stream of
    PCG64, but not the shuffles that it makes from it.
    """
    keys = np.random.PCG64(seed).random_raw(len(labels))
    shuffled = np.lexsort((keys, labels))
    class_sizes = np.bincount(labels)
    turn = np.concatenate([np.arange(class_size) for class_size in class_sizes])
    seat = (labels[shuffled] - seed) % len(class_sizes)
    return np.sort(shuffled[np.lexsort((seat, turn))[:size]])


def split(images: ImageSet, index: torch.Tensor) -> tuple[ImageSet, ImageSet]:
    """The images at `index`, and all the others in their order."""
    if len(index) == len(images.labels):
        return images, ImageSet(images.images[:0], images.labels[:0])
    is_rest = torch.ones(len(images.labels), dtype=torch.bool)
    is_rest[index] = False
    parts = (ImageSet(images.images[rows], images.labels[rows]) for rows in (index, is_rest))
    return next(parts), next(parts)


def join(parts: list[ImageSet]) -> ImageSet:
    """One image set after the other."""
    return ImageSet(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]))


# ---- data sets without image files ----


def read_digits(img_size: int) -> ImageSet:
    """scikit-learn's handwritten digits: v of 0 .. 16 becomes the grey level round(255 v / 16).

    Read from the file that scikit-learn comes with, since importing it takes a second.

    Raises:
        DataError: there is no scikit-learn, or not one that keeps the digits where the pinned version does.
    """
    package = importlib.util.find_spec("sklearn")
    path = Path(package.origin).parent / "datasets/data/digits.csv.gz" if package else None
    if path is None or not path.exists():
        raise DataError(f"{path or 'scikit-learn'}: not found: the digits need scikit-learn as in requirements.txt")
    rows = np.loadtxt(path, delimiter=",", dtype=np.int64)  # 8x8 values, then the class
    levels = np.rint(rows[:, :-1].reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)
    images = np.stack([np.asarray(resize(Image.fromarray(level), img_size)) for level in levels])
    return ImageSet(torch.from_numpy(images)[:, None].repeat(1, 3, 1, 1), torch.from_numpy(rows[:, -1]))


@dataclass(frozen=True)
class CifarLayout:
    """Where the python version of a CIFAR data set keeps what; `torchvision_name` is the class that fetches it."""

    directory: str
    archive: str
    train_files: tuple[str, ...]
    test_file: str
    label_key: str
    num_classes: int
    torchvision_name: str


CIFAR10 = CifarLayout(
    directory="cifar-10-batches-py",
    archive="cifar-10-python.tar.gz",
    train_files=("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5"),
    test_file="test_batch",
    label_key="labels",
    num_classes=10,
    torchvision_name="CIFAR10",
)
CIFAR100 = CifarLayout(
    directory="cifar-100-python",
    archive="cifar-100-python.tar.gz",
    train_files=("train",),
    test_file="test",
    label_key="fine_labels",
    num_classes=100,
    torchvision_name="CIFAR100",
)


def read_cifar(layout: CifarLayout, data_root: Path, download: bool) -> tuple[ImageSet, ImageSet]:
    """Training images and test images, (N, 3, 32, 32), from the unpacked directory or else from the archive."""
    directory, archive = data_root / layout.directory, data_root / layout.archive
    names = [*layout.train_files, layout.test_file]
    if download and not all((directory / name).is_file() for name in names):
        download_cifar(layout, data_root)
    if directory.is_dir():
        paths = [directory / name for name in names]
        contents: Iterator[bytes] = (read_file(path) for path in paths)
    elif archive.is_file():
        paths = [archive / layout.directory / name for name in names]
        contents = iter(read_archive(archive, [f"{layout.directory}/{name}" for name in names]))
    else:
        what_to_do = "put one there, or fetch it with --download (python version, from the CIFAR page)"
        raise DataError(f"no {directory} and no {archive}: {what_to_do}")
    *train, test = [parse_cifar(data, path, layout) for data, path in zip(contents, paths, strict=True)]
    return join(train), test


def parse_cifar(data: bytes, path: Path, layout: CifarLayout) -> ImageSet:
    """One of CIFAR's pickles, in which a row of `data` is the 1,024 red, then green, then blue values of an image."""
    content = unpickle_dict(data, path)
    pixels, labels = content.get("data"), content.get(layout.label_key)
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (3 * 32 * 32,):
        raise DataError(f"{path}: its `data` is not an array of (N, 3072) bytes: fetch it again")
    if not isinstance(labels, list) or len(labels) != len(pixels):
        raise DataError(f"{path}: its `{layout.label_key}` is not a list of {len(pixels)} classes: fetch it again")
    if not all(type(label) is int and 0 <= label < layout.num_classes for label in labels):
        highest = layout.num_classes - 1
        raise DataError(f"{path}: its `{layout.label_key}` are not numbers of 0 .. {highest}: fetch it again")
    images = torch.from_numpy(pixels.reshape(-1, 3, 32, 32).copy())
    return ImageSet(images, torch.tensor(labels, dtype=torch.int64))


def download_cifar(layout: CifarLayout, data_root: Path):
    """Fetches and unpacks CIFAR below `data_root`; `DataError` if that fails."""
    import torchvision  # slow to import, and needed here only

    try:
        getattr(torchvision.datasets, layout.torchvision_name)(data_root, download=True)
    except Exception as error:  # whatever a network, a server or a damaged archive can bring about
        where = f"put {layout.archive} from the CIFAR page into {data_root}"
        raise DataError(f"--download: cannot fetch {layout.archive} ({one_line(error)}): {where}") from None


# ---- data sets of image files ----


class ImageFile(NamedTuple):
    """A file on disk, with what changes when its content does."""

    path: str
    size: int
    mtime_ns: int


def read_afhq(data_root: Path, img_size: int, num_workers: int) -> tuple[ImageSet, ImageSet | None]:
    """AFHQ's dogs, one class, sorted by name: the training images, and those of val/ or test/ if there are any."""
    train_directory = data_root / "afhq" / "train" / "dog"
    if not train_directory.is_dir():
        raise DataError(f"no {train_directory}: unpack AFHQ (from the page of StarGAN v2) so that it is there")
    directories = [train_directory]
    directories += [path for part in ("val", "test") if (path := data_root / "afhq" / part / "dog").is_dir()][:1]
    parts = []
    for directory in directories:
        files, _ = scan(directory)
        files = [file for file in files if file.path.lower().endswith((".jpg", ".jpeg", ".png"))]
        if not files:
            raise DataError(f"{directory}: holds no .jpg or .png files, unpack AFHQ again")
        images = decode_cached(files, data_root, img_size, num_workers)
        parts.append(ImageSet(images, torch.zeros(len(images), dtype=torch.int64)))
    return parts[0], parts[1] if len(parts) > 1 else None


def read_folder(root: Path, img_size: int, num_workers: int) -> tuple[ImageSet, int]:
    """The images below `root` and the number of classes: its sub-folders, sorted, or one if there are none."""
    if not root.is_dir():
        raise DataError(f"no directory {root}: name the folder of images with --data_root")
    files, classes = scan(root)
    if files and classes:
        raise DataError(f"{files[0].path}: lies beside sub-folders, which are classes: move it into one of them")
    files_of_class = [list_images(directory) for directory in classes] or [files]
    for directory, members in zip(classes or [root], files_of_class, strict=True):
        if not members:
            raise DataError(f"{directory}: holds no images, add some or remove it")
    images = decode_cached([file for members in files_of_class for file in members], root, img_size, num_workers)
    counts = torch.tensor([len(members) for members in files_of_class])
    return ImageSet(images, torch.arange(len(counts)).repeat_interleave(counts)), len(counts)


def scan(directory: Path | str) -> tuple[list[ImageFile], list[str]]:
    """The files and the directories right below `directory`, sorted by name, without the hidden ones.

    Raises `DataError` for what is neither, and for a symbolic link to a directory: links can form a loop.
    """
    files, directories = [], []
    path = directory
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                path = entry.path
                if entry.name.startswith("."):
                    continue
                status = entry.stat()
                if stat.S_ISDIR(status.st_mode) and not entry.is_symlink():
                    directories.append(path)
                elif stat.S_ISREG(status.st_mode):
                    files.append(ImageFile(path, status.st_size, status.st_mtime_ns))
                elif stat.S_ISDIR(status.st_mode):
                    raise DataError(f"{path}: a symbolic link to a directory, put the directory itself there")
                else:
                    raise DataError(f"{path}: neither a file nor a directory, remove it")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): repair or remove it") from None
    return sorted(files), sorted(directories)


def list_images(directory: str) -> list[ImageFile]:
    """All files below `directory`, sorted by path."""
    found, pending = [], [directory]
    while pending:
        files, directories = scan(pending.pop())
        found += files
        pending += directories
    return sorted(found)


def resize(image: Image.Image, img_size: int) -> Image.Image:
    """PIL's bilinear filter, whose support grows with the scale: antialiased."""
    return image.resize((img_size, img_size), Image.Resampling.BILINEAR)


def decode_file(path: str, img_size: int) -> np.ndarray:
    """One image file as uint8 (3, img_size, img_size)."""
    return np.asarray(resize(read_image(path), img_size)).transpose(2, 0, 1)


def decode(files: list[ImageFile], img_size: int, num_workers: int) -> np.ndarray:
    """Image files as uint8 (N, 3, img_size, img_size), in order."""
    images = np.empty((len(files), 3, img_size, img_size), np.uint8)
    decoded = decode_each([file.path for file in files], img_size, num_workers)
    for row, image in enumerate(distributed.bar(decoded, "decoding", total=len(files), unit="image")):
        images[row] = image
    return images


def decode_each(paths: list[str], img_size: int, num_workers: int) -> Iterator[np.ndarray]:
    """`decode_file` of each path, in order. Processes, as threads are slower than none where images are small."""
    decode_one = functools.partial(decode_file, img_size=img_size)
    if num_workers == 0:
        yield from map(decode_one, paths)
    else:
        with concurrent.futures.ProcessPoolExecutor(num_workers) as pool:
            yield from pool.map(decode_one, paths, chunksize=32)


# ---- the cache of decoded images ----


def decode_cached(files: list[ImageFile], root: Path, img_size: int, num_workers: int) -> torch.Tensor:
    """`decode`, or its result of an earlier time from `root`/.cache if no file has changed since.

    Any number of runs may do this at once: each writes its own file and then renames it.
    """
    path = root / ".cache" / f"{cache_key(files, root, img_size)}.npy"
    shape = (len(files), 3, img_size, img_size)
    try:
        return torch.from_numpy(read_cache(path, shape))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        print(f"{path}: damaged ({one_line(error)}), decoding the images again", file=sys.stderr)
    images = decode(files, img_size, num_workers)
    try:
        write_cache(path, images)
    except DataError as error:
        print(f"{one_line(error)}; the next run decodes the images again", file=sys.stderr)
    return torch.from_numpy(images)


def cache_key(files: list[ImageFile], root: Path, img_size: int) -> str:
    """Changes with the relative path, size or time of any file, the image size and the way of decoding."""
    listing = [(path.removeprefix(str(root)), size, mtime_ns) for path, size, mtime_ns in files]
    return hashlib.sha256(repr((CACHE_FORMAT, img_size, listing)).encode()).hexdigest()[:32]


def read_cache(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The array that `write_cache` wrote; `ValueError` or `OSError` unless it is whole and of this shape.

    It is mapped, copy on write: all processes on a machine share one copy, and no write reaches the file. A run keeps
    what it mapped when another one replaces the file.
    """
    images = np.lib.format.open_memmap(path, mode="c")
    if images.dtype != np.uint8 or images.shape != shape:
        raise ValueError(f"it holds {images.dtype} {images.shape} instead of uint8 {shape}")
    with path.open("rb") as file:
        file.seek(images.offset + images.nbytes)
        if file.read(9) != checksum(images):
            raise ValueError("its checksum does not fit")
    return images


def write_cache(path: Path, images: np.ndarray):
    """The array as .npy, followed by its checksum, whole or not at all."""
    with atomic_write(path) as file:
        np.save(file, images)
        file.write(checksum(images))


def checksum(images: np.ndarray) -> bytes:
    """The sum of the 64-bit words: at copy speed (a CRC takes longer than the read), yet any flipped bit changes it."""
    data = images.reshape(-1)
    end = data.size - data.size % 8
    total = int(data[:end].view(np.uint64).sum()) + int(data[end:].sum())
    return (total % 2**64).to_bytes(8, "little")

"""Images in: one reader per data set, each to uint8 (N, 3, H, W) and class labels; subsets and the held-out part."""

import functools
import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image, features

from utils import distributed
from utils.errors import DataError, UsageError
from utils.files import atomic_write, file_hash
from utils.safe_files import check_memory, one_line, printable, read_archive, read_file, read_image, unpickle_dict

DATASETS = ("digits", "cifar10", "cifar100", "cifar10_rand", "afhq", "folder")
SUFFIXES = tuple(
    ".png .apng .jpg .jpeg .jpe .jfif .mpo .webp .avif .bmp .gif .tif .tiff .ppm .pgm .pbm .pnm .jp2 .tga".split()
)
SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "lost+found"}  # lower case
CACHE_FORMAT = 2  # changes whenever the same files would be decoded to other pixels
THREAD_BLOCK = 256  # tasks in a queue: a million of them would fill gigabytes


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
    split alone is. `hflip` is for "folder": the other sets have their own rule. `num_workers` threads decode image
    files (0: this one does). `download` fetches CIFAR if it is not there.

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
        num_classes = 100 if name == "cifar100" else 10
        train, test = read_cifar(num_classes, data_root, download)
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


def read_cifar(num_classes: int, data_root: Path, download: bool) -> tuple[ImageSet, ImageSet]:
    """CIFAR-10's or CIFAR-100's training and test images, from the unpacked directory or else from the archive."""
    if num_classes == 10:
        directory, label_key = data_root / "cifar-10-batches-py", "labels"
        names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    else:
        directory, label_key = data_root / "cifar-100-python", "fine_labels"
        names = ["train", "test"]
    archive = data_root / f"cifar-{num_classes}-python.tar.gz"
    if download and not all((directory / name).is_file() for name in names):
        download_cifar(num_classes, data_root)
    if directory.is_dir():
        paths = [directory / name for name in names]
        contents: Iterator[bytes] = (read_file(path) for path in paths)
    elif archive.is_file():
        paths = [archive / directory.name / name for name in names]
        contents = iter(read_archive(archive, [f"{directory.name}/{name}" for name in names]))
    else:
        what_to_do = "put one there, or fetch it with --download (python version, from the CIFAR page)"
        raise DataError(f"no {directory} and no {archive}: {what_to_do}")
    parts = [parse_cifar(data, path, label_key, num_classes) for data, path in zip(contents, paths, strict=True)]
    return join(parts[:-1]), parts[-1]


def parse_cifar(data: bytes, path: Path, label_key: str, num_classes: int) -> ImageSet:
    """One of CIFAR's pickles, in which a row of `data` is the 1,024 red, then green, then blue values of an image."""
    content = unpickle_dict(data, path)
    pixels, labels = content.get("data"), content.get(label_key)
    if not isinstance(pixels, np.ndarray) or pixels.shape[1:] != (3 * 32 * 32,):
        raise DataError(f"{path}: its `data` is not an array of (N, 3072) bytes: fetch it again")
    if not isinstance(labels, list) or len(labels) != len(pixels):
        raise DataError(f"{path}: its `{label_key}` is not a list of {len(pixels)} classes: fetch it again")
    if not all(type(label) is int and 0 <= label < num_classes for label in labels):
        raise DataError(f"{path}: its `{label_key}` are not numbers of 0 .. {num_classes - 1}: fetch it again")
    images = torch.from_numpy(pixels.reshape(-1, 3, 32, 32).copy())
    return ImageSet(images, torch.tensor(labels, dtype=torch.int64))


def download_cifar(num_classes: int, data_root: Path):
    """Fetches and unpacks CIFAR below `data_root`; `DataError` if that fails."""
    import torchvision  # slow to import, and needed here only

    try:
        getattr(torchvision.datasets, f"CIFAR{num_classes}")(data_root, download=True)
    except Exception as error:  # whatever a network, a server or a damaged archive can bring about
        where = f"put cifar-{num_classes}-python.tar.gz from the CIFAR page into {data_root}"
        raise DataError(f"--download: cannot fetch it ({one_line(error)}): {where}") from None


# ---- data sets of image files ----


def read_afhq(data_root: Path, img_size: int, num_workers: int) -> tuple[ImageSet, ImageSet | None]:
    """AFHQ's dogs, one class, sorted by name: the training images, and those of val/ or test/ if there are any."""
    train, *others = (data_root / "afhq" / part / "dog" for part in ("train", "val", "test"))
    if not train.is_dir():
        raise DataError(f"no {train}: unpack AFHQ (from the page of StarGAN v2) so that it is there")
    parts = []
    for folder in [train, *filter(Path.is_dir, others)][:2]:
        paths = [path for group in list_images(folder) for path in group]
        images = read_cached(paths, data_root, img_size, num_workers)
        parts.append(ImageSet(images, torch.zeros(len(images), dtype=torch.int64)))
    return parts[0], parts[1] if len(parts) > 1 else None


def read_folder(root: Path, img_size: int, num_workers: int) -> tuple[ImageSet, int]:
    """The images below `root` and the number of classes: its sub-folders, sorted, or one if there are none."""
    if not root.is_dir():
        raise DataError(f"no directory {root}: name the folder of images with --data_root")
    classes = list_images(root, classes=True)
    images = read_cached([path for members in classes for path in members], root, img_size, num_workers)
    counts = torch.tensor([len(members) for members in classes])
    return ImageSet(images, torch.arange(len(counts)).repeat_interleave(counts)), len(counts)


def list_images(folder: Path, classes: bool = False) -> list[list[str]]:
    """The images in a folder, one sorted list of paths; if it has none, those below each of its sub-folders, one each.

    An image is a file whose name ends in one of `SUFFIXES`. Hidden files and `SYSTEM_FILES` are ignored. Everything
    else is passed over and named in one line on stderr: other files, sub-folders without images, and sub-folders beside
    images.

    Raises `DataError` if there are no images, for what `scan` refuses, and for images beside sub-folders with images if
    sub-folders are `classes`.
    """
    images, folders, others = scan(folder)
    groups = [images] if images else []
    for path in folders:
        found, others_below = ([], []) if images and not classes else walk(path)
        if images and found:
            raise DataError(f"{printable(images[0])}: lies beside sub-folders, which are classes: move it into one")
        if found:
            groups.append(found)
        others += others_below if found else [path + os.sep]
    if not groups:
        raise DataError(f"{printable(folder)}: no images in it, no names that end in {' '.join(SUFFIXES)}")
    if others and distributed.is_main():
        names = [os.path.relpath(path, folder) + os.sep * path.endswith(os.sep) for path in others[:5]]
        line = f"{folder}: passed over {len(others)} other files or sub-folders: {', '.join(names)}"
        print(printable(line) + ", ..." * (len(others) > 5), file=sys.stderr)
    return groups


def walk(folder: str) -> tuple[list[str], list[str]]:
    """The images at any depth below a folder, and the other files, sorted by path."""
    images, others, pending = [], [], [folder]
    while pending:
        found, folders, passed = scan(pending.pop())
        images += found
        others += passed
        pending += folders
    return sorted(images), sorted(others)


def scan(folder: Path | str) -> tuple[list[str], list[str], list[str]]:
    """The images, the sub-folders and the other files right in a folder, sorted by path.

    Raises `DataError` if it cannot be read, for an image that is no file (opening a pipe would wait for ever), and for
    a symbolic link to a directory: links can form a loop.
    """
    images, folders, others = [], [], []
    path = folder
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                path, name = entry.path, entry.name.lower()
                if name.startswith(".") or name in SYSTEM_FILES:
                    continue
                if entry.is_dir() and entry.is_symlink():
                    raise DataError(f"{printable(path)}: a symbolic link to a directory, put the directory there")
                if entry.is_dir():
                    folders.append(path)
                elif not name.endswith(SUFFIXES):
                    others.append(path)
                elif entry.is_file():
                    images.append(path)
                else:
                    raise DataError(f"{printable(path)}: neither a file nor a directory, remove it")
    except OSError as error:
        raise DataError(f"{printable(path)}: cannot be read ({error.strerror}): repair or remove it") from None
    return sorted(images), sorted(folders), sorted(others)


def resize(image: Image.Image, img_size: int) -> Image.Image:
    """PIL's bilinear filter, whose support grows with the scale: antialiased."""
    return image.resize((img_size, img_size), Image.Resampling.BILINEAR)


def read_images(paths: list[str], img_size: int | None = None, num_workers: int = 0) -> np.ndarray:
    """Image files as uint8 (N, 3, H, W), in order: resized to `img_size`, or else all of one size.

    Raises `DataError` if they do not fit into memory, and after all have been tried for those that cannot be read or
    have another size than the first.
    """
    images, first, bad = None, None, []
    with threads(num_workers) as each:
        results = each(functools.partial(try_image, img_size=img_size), paths)
        for row, pixels in enumerate(distributed.bar(results, "decoding", total=len(paths), unit="image")):
            if isinstance(pixels, DataError):
                bad.append(str(pixels))
                continue
            if images is None:
                check_memory(Path(paths[row]).parent, len(paths) * pixels.nbytes)
                images, first = np.empty((len(paths), *pixels.shape), np.uint8), Path(paths[row]).name
            if pixels.shape == images.shape[1:]:
                images[row] = pixels
            else:
                (_, height, width), (_, *wanted) = pixels.shape, images.shape[1:]
                bad.append(printable(f"{paths[row]}: is {height}x{width}, {first} is {wanted[0]}x{wanted[1]}"))
    if bad:
        more = f"; and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise DataError(f"{'; '.join(bad[:10])}{more}: remove or replace {'them' if len(bad) > 1 else 'it'}")
    return images


def try_image(path: str, img_size: int | None) -> np.ndarray | DataError:
    """One image file as uint8 (3, H, W), or what is wrong with it."""
    try:
        image = read_image(path)
    except DataError as error:
        return error
    return np.asarray(image if img_size is None else resize(image, img_size)).transpose(2, 0, 1)


@contextmanager
def threads(number: int) -> Iterator[Callable]:
    """A `map` over lists that runs in threads (0: in this one); leaving the block drops what has not begun.

    Pillow and hashlib let other threads run meanwhile: from some 256x256 pixels on, threads are as fast as processes.
    """
    if number == 0:
        yield map
        return
    pool = ThreadPoolExecutor(number)

    def map_in_blocks(function: Callable, items: list) -> Iterator:
        for start in range(0, len(items), THREAD_BLOCK):
            yield from pool.map(function, items[start : start + THREAD_BLOCK])

    try:
        yield map_in_blocks
    finally:
        pool.shutdown(cancel_futures=True)


def read_cached(paths: list[str], root: Path, img_size: int, num_workers: int) -> torch.Tensor:
    """`read_images`, or its result of an earlier time from `root`/.cache if no file has changed since.

    What comes from there is mapped, copy on write: all processes on a machine share one copy, and no write reaches the
    file. Any number of runs may do this at once: each writes its own file and then renames it.
    """
    path = root / ".cache" / f"{cache_key(paths, img_size, num_workers)}.npy"
    try:
        images = np.lib.format.open_memmap(path, mode="c")
        if images.dtype != np.uint8 or images.shape != (len(paths), 3, img_size, img_size):
            raise ValueError(f"it holds {images.dtype} {images.shape}")
        return torch.from_numpy(images)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        print(f"{printable(path)}: damaged ({one_line(error)}), decoding the images again", file=sys.stderr)
    images = read_images(paths, img_size, num_workers)
    try:
        with atomic_write(path) as file:
            np.save(file, images)
    except DataError as error:
        print(f"{one_line(error)}; the next run decodes the images again", file=sys.stderr)
    return torch.from_numpy(images)


def cache_key(paths: list[str], img_size: int, num_workers: int) -> str:
    """Follows the files' contents in their order, and all else that decides the pixels."""
    decoders = [PIL.__version__, *map(features.version, ("libjpeg_turbo", "webp", "avif", "jpg_2000"))]
    key = hashlib.sha256(repr((CACHE_FORMAT, img_size, decoders)).encode())
    with threads(num_workers) as each:
        for digest in distributed.bar(each(content_hash, paths), "reading", total=len(paths), unit="image", delay=1):
            key.update(digest)
    return key.hexdigest()[:32]


def content_hash(path: str) -> bytes:
    """SHA-256 of a file; empty if it cannot be read, which decoding will say."""
    try:
        return bytes.fromhex(file_hash(path))
    except OSError:
        return b""

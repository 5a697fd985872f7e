"""Images in: one reader per data set, each to uint8 (N, 3, H, W) and class labels; subsets and the held-out part."""

import hashlib
import importlib.util
import os
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image, features

from utils import distributed
from utils.errors import DataError, UsageError, warn
from utils.files import atomic_write, file_hash
from utils.images import in_threads, list_images, read_images
from utils.safe_files import one_line, read_archive, read_file, unpickle_dict

DATASETS = ("digits", "cifar10", "cifar100", "cifar10_rand", "afhq", "folder")
CACHE_FORMAT = 2  # changes whenever the same files would be decoded to other pixels


class ImageSet(NamedTuple):
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
    files (0 means 1). `download` fetches CIFAR if it is not there.

    Raises `UsageError` for an argument out of range, `DataError` for files that are missing or not what they should be.
    """
    data_root, is_cifar, test = Path(data_root), name.startswith("cifar"), None
    if name not in DATASETS:
        raise UsageError(f"--dataset={name}: unknown, choose one of {', '.join(DATASETS)}")
    for flag, value, least in (("img_size", img_size, 1), ("num_train", num_train, 0), ("subset_seed", subset_seed, 0)):
        if value < least:
            raise UsageError(f"--{flag}={value}: must be at least {least}")
    if is_cifar and img_size != 32:
        raise UsageError(f"--img_size={img_size}: {name} has images of 32x32, use --img_size=32")
    if hflip and not (is_cifar or name == "folder"):
        raise UsageError(f"--hflip: {name} is trained without flips, use it with --dataset=folder only")
    if download and not is_cifar:
        raise UsageError(f"--download: fetches CIFAR only, not {name}")

    if name == "digits":
        train, num_classes = read_digits(img_size), 10
    elif name == "folder":
        train, num_classes = read_folder(data_root, img_size, num_workers)
    elif name == "afhq":
        train_folder, *others = (data_root / "afhq" / part / "dog" for part in ("train", "val", "test"))
        train, num_classes = read_folder(train_folder, img_size, num_workers)
        if found := [folder for folder in others if folder.is_dir()]:
            test, _ = read_folder(found[0], img_size, num_workers)
    else:
        num_classes = 100 if name == "cifar100" else 10
        train, test = read_cifar(num_classes, data_root, download)

    total = len(train.labels)
    if num_train > total:
        raise UsageError(f"--num_train={num_train}: {name} has {total} training images, give at most that many")
    subset, heldout = torch.arange(total), [test] if test else []
    if 0 < num_train < total:
        chosen = stratified_subset(train.labels.numpy(), num_train, subset_seed)
        rest = np.setdiff1d(subset, chosen)
        heldout.insert(0, ImageSet(train.images[rest], train.labels[rest]))
        subset, train = torch.from_numpy(chosen), ImageSet(train.images[chosen], train.labels[chosen])
    return Dataset(train, join(heldout) if heldout else None, num_classes, hflip or is_cifar, subset)


def join(parts: list[ImageSet]) -> ImageSet:
    """One image set after the other."""
    return ImageSet(*map(torch.cat, zip(*parts, strict=True)))


def fingerprint(images: torch.Tensor) -> str:
    """SHA-256 (hex) of the shape and the bytes of a uint8 tensor, the same on every device and memory layout."""
    digest = hashlib.sha256(repr(tuple(images.shape)).encode())
    digest.update(images.contiguous().cpu().numpy())
    return digest.hexdigest()


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


def read_digits(img_size: int) -> ImageSet:
    """scikit-learn's handwritten digits: v of 0 .. 16 becomes the grey level round(255 v / 16).

    Read from the file that scikit-learn comes with, since importing it takes a second.
    """
    package = importlib.util.find_spec("sklearn")
    path = Path(package.origin if package else "sklearn/").parent / "datasets/data/digits.csv.gz"
    if not path.exists():
        raise DataError(f"{path}: not found: the digits need scikit-learn as in requirements.txt")
    rows = np.loadtxt(path, delimiter=",", dtype=np.int64)  # 8x8 values, then the class
    levels = np.rint(rows[:, :-1].reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)
    images = np.stack(
        [np.asarray(Image.fromarray(level).resize((img_size, img_size), Image.Resampling.BILINEAR)) for level in levels]
    )
    return ImageSet(torch.from_numpy(images)[:, None].repeat(1, 3, 1, 1), torch.from_numpy(rows[:, -1]))


def read_cifar(num_classes: int, data_root: Path, download: bool) -> tuple[ImageSet, ImageSet]:
    """CIFAR-10's or CIFAR-100's training and test images, from the unpacked directory or else from the archive.

    In its pickles, a row of `data` is the 1,024 red, then green, then blue values of an image.
    """
    if num_classes == 10:
        directory, label_key = data_root / "cifar-10-batches-py", "labels"
        names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    else:
        directory, label_key, names = data_root / "cifar-100-python", "fine_labels", ["train", "test"]
    archive = data_root / f"cifar-{num_classes}-python.tar.gz"
    what_to_do = f"put {archive.name} from the CIFAR page into {data_root}"
    if download and not all((directory / name).is_file() for name in names):
        import torchvision  # slow to import, and needed here only

        try:
            getattr(torchvision.datasets, f"CIFAR{num_classes}")(data_root, download=True)
        except Exception as error:  # whatever a network, a server or a damaged archive can bring about
            raise DataError(f"--download: cannot fetch it ({one_line(error)}): {what_to_do}") from None
    if directory.is_dir():
        files = {directory / name: read_file(directory / name) for name in names}
    elif archive.is_file():
        files = read_archive(archive, [f"{directory.name}/{name}" for name in names])
    else:
        raise DataError(f"no {directory} and no {archive}: {what_to_do}, or fetch it with --download")
    parts = []
    for path, data in files.items():
        content = unpickle_dict(data, path)
        pixels, labels = content.get("data"), content.get(label_key)
        in_range = isinstance(labels, list) and all(label in range(num_classes) for label in labels)
        if not in_range or not isinstance(pixels, np.ndarray) or pixels.shape != (len(labels), 3 * 32 * 32):
            what = f"N numbers of 0 .. {num_classes - 1} in `{label_key}` and (N, 3072) bytes in `data`"
            raise DataError(f"{path}: does not hold {what}: fetch it again")
        images = torch.from_numpy(pixels.reshape(-1, 3, 32, 32).copy())
        parts.append(ImageSet(images, torch.tensor(labels, dtype=torch.int64)))
    return join(parts[:-1]), parts[-1]


def read_folder(folder: Path, img_size: int, num_workers: int) -> tuple[ImageSet, int]:
    """The images below a folder and the number of classes: its sub-folders, sorted, or one if there are none."""
    if not folder.is_dir():
        raise DataError(f"no directory {folder}: put the images there, or name another place with --data_root")
    classes = list_images(folder, classes=True)
    images = read_cached(list(chain(*classes)), folder, img_size, num_workers)
    counts = torch.tensor([len(members) for members in classes])
    return ImageSet(images, torch.arange(len(counts)).repeat_interleave(counts)), len(counts)


def read_cached(paths: list[str], root: Path, img_size: int, num_workers: int) -> torch.Tensor:
    """`read_images`, or its result of an earlier time from `root`/.cache if no file has changed since.

    What comes from there is mapped, copy on write: all processes on a machine share one copy, and no write reaches the
    file. Any number of runs may do this at once: each writes its own file and then renames it.
    """
    decoders = [PIL.__version__, *map(features.version, ("libjpeg_turbo", "webp", "avif", "jpg_2000"))]
    key = hashlib.sha256(repr((CACHE_FORMAT, img_size, decoders)).encode())
    with closing(in_threads(content_hash, paths, num_workers)) as hashes:
        for digest in distributed.bar(hashes, "reading", total=len(paths), unit="image", delay=1):
            key.update(digest)
    path = root / ".cache" / f"{key.hexdigest()[:32]}.npy"
    try:
        return torch.from_numpy(np.lib.format.open_memmap(path, mode="c"))
    except (OSError, ValueError) as error:
        if os.access(path, os.F_OK):
            warn(f"{path}: damaged ({one_line(error)}), decoding the images again")
    images = read_images(paths, img_size, num_workers)
    try:
        with atomic_write(path) as file:
            np.save(file, images)
    except DataError as error:
        warn(f"{error}; the next run decodes the images again")
    return torch.from_numpy(images)


def content_hash(path: str) -> bytes:
    """SHA-256 of a file; empty if it cannot be read, which decoding will say."""
    try:
        return bytes.fromhex(file_hash(path))
    except OSError:
        return b""

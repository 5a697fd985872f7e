"""Generated images in and out: uint8, N x 3 x H x W, the ones that a user would publish."""

import os
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from utils import distributed
from utils.bar import progress_bar
from utils.errors import DataError, one_line, warn
from utils.images import (
    CHANGES,
    SUFFIXES,
    central_square,
    fingerprint,
    list_images,
    read_images,
    resized,
    scan,
    size_of,
)
from utils.safe_files import check_memory

# Floats may be this far outside of [0, 1], by rounding or an average of models: they are clipped.
TOLERANCE = 1e-3
LOOKED_AT = 10_000  # images, at most, whose values `odd_values` looks at
# by how much more of the samples than of the training images may be so
ODD_SHARES = {"are black": 0.01, "have one colour only": 0.01, "are grey": 0.5}
ODD_LEVELS = 0.25  # the same of values that are 0, and of those that are 255
ODD_RANGE = 0.6  # the range of 98 % of the values may be so much of the training images'
# red less blue may differ by so many levels, and so many standard errors, before they can be swapped
SWAPPED_LEVELS, SWAPPED_ERRORS = 4, 4


def evenly_spaced(total, number):
    """Indices of at most `number` of `total` images, of all classes if these are in order: int64."""
    number = min(number, total)
    return torch.arange(number) * total // number


def content_order(images):
    """The order of the images (N, 3, H, W) uint8 by their hashes: indices, int64 (N,)."""
    hashes = [fingerprint(image) for image in images]
    return torch.tensor(sorted(range(len(images)), key=hashes.__getitem__))


def save_pngs(folder, images):
    """Write uint8 images (N, 3, H, W) as 00000.png, ... into a folder; a DataError if it has others."""
    names = png_names(folder, len(images))
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        bar = progress_bar(names, desc="save PNG", unit="image")
        for name, image in zip(bar, images.permute(0, 2, 3, 1), strict=True):
            Image.fromarray(image.numpy()).save(Path(folder) / name)
    except OSError as error:
        what = f"can't be written ({error.strerror or error}); check it and its space"
        raise DataError(f"{folder}: {what}") from None


def png_names(folder, number):
    """The names of so many images in a folder; raises a DataError if it holds other images."""
    names = [f"{i:0{max(5, len(str(number - 1)))}d}.png" for i in range(number)]
    present = {Path(path).name for path in scan(folder)[0]} if Path(folder).is_dir() else set()
    if others := sorted(present.difference(names)):
        what = "an image of another run is in the folder; empty it or name another one"
        raise DataError(f"{Path(folder) / others[0]}: {what}")
    return names


def load_samples(path, img_size=None, resize="crop"):
    """Images made by anything: a .npy, an .npz, or a folder of images -> uint8 (N, 3, H, W) on the CPU.

    Arrays are uint8, or float in [0, 1] (clipped if at most `TOLERANCE` beyond it, and rounded), NCHW or
    NHWC. An .npz holds one array, or the images are under `images` or `arr_0`. A folder's images are
    those of `utils.images.list_images`, in the order of their names. Grey images get three channels.

    Args:
        img_size: height and width that square images must have; None: they stay as they are.
        resize: what becomes of images that are not square where there is an img_size: of `RESIZES`.

    Raises:
        DataError: NaN, values out of range, object arrays, other shapes, an ambiguous layout, more than
            fits in memory, images of several sizes."""
    path = Path(path)
    if path.is_dir():
        paths = [image for group in list_images(path) for image in group]
        images = torch.from_numpy(read_images(paths, img_size, resize=resize, keeps_squares=True))
    elif not path.is_file():
        raise DataError(f"{path}: no such file or folder; give an .npy, an .npz or a folder of images")
    elif zipfile.is_zipfile(path):
        refuse_other_archives(path)
        images = to_images(path, next(iter(read_npz(path, ("images", "arr_0")).values())))
    else:
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # a hostile file can make NumPy raise anything
            what = f"no .npy or .npz of numbers that can be read ({one_line(error)})"
            raise DataError(f"{path}: {what}") from None
        images = to_images(path, array)
    height, width = images.shape[2:]
    if img_size is not None and height != width:
        box = central_square(width, height) if resize == "crop" else (0, 0, width, height)
        left, top, right, bottom = box
        what = "(width x height) are not square and are"
        warn(f"{path}: images of {size_of(images)} {what} {CHANGES[resize]}")
        images = resized(images[:, :, top:bottom, left:right], img_size)
    if img_size is not None and images.shape[2:] != (img_size, img_size):
        what = f"holds {size_of(images)} images (width x height), not {img_size}x{img_size}"
        raise DataError(f"{path}: {what}; give --img_size or resize them")
    return images


def warn_of_odd_values(path, images, training):
    """Warn, on rank 0, where the values of --samples=`path` can hardly be meant; returns that text."""
    odd = odd_values(images, training) if distributed.is_main() else []
    said = f"--samples={path}: odd, are they what is meant? {'; '.join(odd)}" if odd else None
    if said:
        warn(f"warning: {said}")
    return said


def odd_values(images, training):
    """What is odd in the values of images beside those of training images, as texts."""
    (shares, levels), (known, known_levels) = values_of(images), values_of(training)
    kinds = (what for what, allowed in ODD_SHARES.items() if shares[what] > known[what] + allowed)
    what = next(kinds, None)  # the others follow from it
    odd = [f"{shares[what]:.1%} {what}, of the training images {known[what]:.1%}"] if what else []
    (low, high), (known_low, known_high) = most_levels(levels), most_levels(known_levels)
    more = (levels - known_levels)[[0, 255]]
    if high - low < ODD_RANGE * (known_high - known_low):
        lie = f"98% of the values lie between {low} and {high}"
        odd.append(f"{lie}, of the training images' between {known_low} and {known_high}")
    elif more.max() > ODD_LEVELS:
        level = 255 * int(more.argmax())
        known_share = f"of the training images' {known_levels[level]:.1%}"
        odd.append(f"{levels[level]:.1%} of the values are {level}, {known_share}")
    if swapped := colours_swapped(images, training):
        odd.append(swapped)
    rows = evenly_spaced(len(images), LOOKED_AT)
    different = len({fingerprint(images[row]) for row in rows})
    if len(rows) > 1 and different <= len(rows) / 2:
        some = f"only {different:,} of {len(rows):,} are different"
        odd.append(some if different > 1 else "all are equal")
    return odd


def colours_swapped(images, training):
    """What to say where red and blue seem to have changed places in images (N, 3, H, W), or None."""
    parts = [channel_means(part) for part in (images, training)]
    differences = [means[:, 0] - means[:, 2] for means in parts]
    error = sum(values.var(correction=0) / len(values) for values in differences).sqrt()
    own, known = (means.mean(dim=0) for means in parts)
    size = (known[0] - known[2]).abs()
    is_other = (own - known).abs().max() > max(SWAPPED_LEVELS, SWAPPED_ERRORS * error)
    if not is_other or (own.flip(0) - known).abs().max() > size / 2:
        return None
    own, known = (" ".join(f"{value:.0f}" for value in mean) for mean in (own, known))
    return f"red, green and blue have the means {own}, of the training images {known}: are red and blue swapped?"


def channel_means(images):
    """The means of the channels of images (N, 3, H, W) uint8: (n, 3), n at most `LOOKED_AT`."""
    rows = evenly_spaced(len(images), LOOKED_AT)
    return torch.cat([images[block].double().mean(dim=(2, 3)) for block in rows.split(256)])


def values_of(images):
    """Of images (N, 3, H, W) uint8, the shares of those of `ODD_SHARES`, and of each level: (256,)."""
    levels, kinds = torch.zeros(256, dtype=torch.int64), []
    for rows in evenly_spaced(len(images), LOOKED_AT).split(256):
        block = images[rows]
        levels += torch.bincount(block.flatten(), minlength=256)
        low, high = block.flatten(2).aminmax(dim=2)
        one_colour, black = (low == high).all(dim=1), (high == 0).all(dim=1)
        grey = (block == block[:, :1]).flatten(1).all(dim=1)
        kinds.append(torch.stack([black, one_colour, grey], dim=1))
    shares = torch.cat(kinds).double().mean(dim=0).tolist()
    return dict(zip(ODD_SHARES, shares, strict=True)), levels.double() / levels.sum()


def most_levels(levels):
    """The lowest and the highest level without the outer 1 % of each end; levels: (256,) shares."""
    below = levels.cumsum(0)
    return [int((below < share).sum()) for share in (0.01, 0.99)]


def sample_names(path, number):
    """The names of the images that `load_samples` reads, str (N,): paths in a folder, else numbers."""
    if not Path(path).is_dir():
        return np.arange(number).astype(str)
    paths = (image for group in list_images(path, quiet=True) for image in group)
    return np.array([os.path.relpath(image, path) for image in paths])


def refuse_other_archives(path):
    """Raise a DataError for zip archives that are no .npz: of image files, or of torch.save."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # a hostile file can make zipfile raise anything, which `read_npz` says
        return
    number = sum(name.lower().endswith(SUFFIXES) for name in names)
    if number:
        raise DataError(f"{path}: a zip of {number:,} image files: unpack it, and name the folder")
    if any(name.endswith("/data.pkl") for name in names):
        advice = "write the images by numpy.save, as (N, 3, H, W) uint8"
        raise DataError(f"{path}: written by torch.save: {advice}")


def read_npz(path, names):
    """{name: array} of the arrays in an .npz that are among `names`, in that order, or of its only one.

    Raises:
        DataError: none of them, a damaged file, pickles, or more than the free memory when unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            check_memory(path, sum(member.file_size for member in archive.infolist()))
        with np.load(path, allow_pickle=False) as archive:
            chosen = [name for name in names if name in archive.files]
            chosen = archive.files if len(archive.files) == 1 else chosen
            if not chosen:
                held = [name[:40] for name in sorted(archive.files)[:5]]
                more = f" and {len(archive.files) - 5:,} more" if len(archive.files) > 5 else ""
                raise DataError(f"{path}: holds {held}{more}, none is called {' or '.join(names)}")
            return {name: np.asarray(archive[name]) for name in chosen}
    except DataError:
        raise
    except Exception as error:  # a hostile file can make zipfile and NumPy raise anything
        raise DataError(f"{path}: not a readable .npz ({one_line(error)})") from None


def to_images(path, array):
    """An array of grey or RGB images, NCHW or NHWC, as uint8 (N, 3, H, W); a DataError names `path`."""
    shape, dtype = array.shape, array.dtype
    if dtype != np.uint8 and dtype.kind != "f":
        raise DataError(f"{path}: an array of {dtype}; images are uint8, or float in [0, 1]")
    if len(shape) != 4 or 0 in shape:
        what = "images are (N, 3, H, W) or (N, H, W, 3), and at least one"
        raise DataError(f"{path}: an array of shape {shape}; {what}")
    axes = [axis for axis in (1, 3) if shape[axis] in (1, 3)]
    if len(axes) != 1:
        ambiguous = "may be (N, C, H, W) or (N, H, W, C)"
        which = ambiguous if axes else "has no axis of 3 (RGB) or 1 (grey) channels"
        raise DataError(f"{path}: shape {shape} {which}; give (N, 3, H, W) with H and W above 3")
    array = np.moveaxis(array, axes[0], 1)
    N, _, height, width = array.shape
    check_memory(path, 3 * N * height * width)
    images = np.empty((N, 3, height, width), np.uint8)
    for start in range(0, N, 1000):  # not all at once, to spare memory
        block = array[start : start + 1000]
        if dtype != np.uint8:
            # A NaN fails both comparisons.
            low, high = float(block.min()), float(block.max())
            if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):
                what = f"{path}: values from {low!r} to {high!r} in images {start} and following"
                form = f"floats must be in [0, 1], at most {TOLERANCE} beyond it, and no NaN"
                raise DataError(f"{what}; {form}, and pixels of 0..255 must be uint8")
            block = np.round(block.clip(0, 1).astype(np.float64) * 255)
        images[start : start + 1000] = block
    return torch.from_numpy(images)

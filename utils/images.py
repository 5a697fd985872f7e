"""Image files of all kinds in, without trust in them; and pixels as pictures."""

import contextlib
import hashlib
import logging
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from utils import distributed
from utils.bar import progress_bar
from utils.errors import DataError, UsageError, one_line, warn
from utils.files import is_hidden
from utils.safe_files import check_memory

# What PIL has to say is of metadata. Once for all: filters are shared by the threads that decode.
warnings.filterwarnings("ignore", module="PIL")
logging.getLogger("PIL").setLevel(logging.CRITICAL)
# PIL would refuse a PNG for the workflow that a generator has written into it, of a megabyte or more
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28

CHANGES = {"crop": "cut to their central square", "squeeze": "squeezed"}
RESIZES = tuple(CHANGES)  # what may become of images that are not square
SUFFIXES = tuple(
    ".png .apng .jpg .jpeg .jpe .jfif .mpo .webp .avif .bmp .gif .tif .tiff .ppm .pgm .pbm .pnm .jp2 .tga".split()
)
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "TGA")
TIFF_BITS, TIFF_PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0


def list_images(folder, classes=False, quiet=False):
    """The images in a folder, a sorted list of paths; if it has none, a list for each sub-folder.

    An image's name ends in one of `SUFFIXES`. What `is_hidden` is ignored. What else is
    passed over is named on stderr, if not quiet: other files, sub-folders without or beside images.

    Raises:
        DataError: no images, what `scan` refuses, or, if sub-folders are `classes`, images beside such.
    """
    images, folders, others = scan(folder)
    groups = [images] if images else []
    for path in folders:
        found, _, others_below = scan(path, deep=True) if classes or not images else ([], [], [])
        if images and found:
            raise DataError(f"{images[0]}: lies beside sub-folders, which are classes: move it into one")
        groups += [found] if found else []
        others += others_below if found else [path + os.sep]
    if not groups:
        raise DataError(f"{folder}: no images in it, no names that end in {' '.join(SUFFIXES)}")
    if others and not quiet and distributed.is_main():
        names = ", ".join(path.removeprefix(os.path.join(folder, "")) for path in others[:5])  # noqa: PTH118
        more = ", ..." if len(others) > 5 else ""
        warn(f"{folder}: passed over {len(others)} other files or sub-folders: {names}{more}")
    return groups


def scan(folder, deep=False):
    """The images, sub-folders and other files in a folder, sorted; with `deep` at any depth below it.

    Raises:
        DataError: it cannot be read, or holds an image that is no file (opening a pipe would wait for
            ever) or a symbolic link to a directory (links can form a loop)."""
    images, folders, others, pending = [], [], [], [folder]
    try:
        while pending:
            path = pending.pop()
            for entry in os.scandir(path):
                path, name = entry.path, entry.name.lower()
                if is_hidden(name):
                    continue
                if entry.is_dir() and entry.is_symlink():
                    raise DataError(f"{path}: a symbolic link to a directory, put the directory there")
                if entry.is_dir():
                    (pending if deep else folders).append(path)
                elif not name.endswith(SUFFIXES):
                    others.append(path)
                elif entry.is_file():
                    images.append(path)
                else:
                    raise DataError(f"{path}: neither a file nor a directory, remove it")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): repair or remove it") from None
    return sorted(images), sorted(folders), sorted(others)


def is_within(path, folder):
    """Whether `path` is a folder or lies in it, where `scan` sees it; links and .. are resolved."""
    path, folder = (Path(os.path.realpath(place)) for place in (path, folder))
    return path.is_relative_to(folder) and not any(map(is_hidden, path.relative_to(folder).parts))


def keep_apart(folders, others, written):
    """Refuse places where images would be taken for other ones, in this run or in the next.

    folders: whose files are listed as images, the training images' first; [] for other data sets.
    others: {flag: images to measure, or None}. Those of `samples` may be the training images themselves.
    written: {flag, or "" for an argument: what will be written, or None}.

    Raises:
        UsageError: one of `others` is a folder in that of the training images, or has it in it, or one
            of `written` lies in any of these folders."""
    others = {flag: path for flag, path in others.items() if path and Path(path).is_dir()}
    for flag, path in others.items():
        for folder in folders[:1]:
            inside, around = is_within(path, folder), is_within(folder, path)
            if inside and around and flag != "samples":
                raise UsageError(f"--{flag}={path}: these are the training images: name others")
            if inside != around:
                what = f"lies in {folder}" if inside else f"has {folder} in it"
                raise UsageError(f"--{flag}={path}: {what}, the training images: keep the two apart")
    for flag, path in written.items():
        # a log directory has its images one level down
        places = [path, Path(path) / "sample"] if flag == "logdir" else [path]
        for folder in (*folders, *others.values()):
            if path and any(is_within(place, folder) for place in places):
                name, hidden = f"--{flag}={path}" if flag else path, Path(folder) / ".out"
                what = f"what is written there would be among the images in {folder}"
                raise UsageError(f"{name}: {what}: choose another place, or a hidden one such as {hidden}")


def read_images(paths, img_size=None, num_workers=0, resize="crop", keeps_squares=False):
    """Image files as uint8 (N, 3, H, W), in order.

    Args:
        img_size: side in pixels that they are resized to; None: they stay, and must have one size.
        num_workers: threads.
        resize: what images that are not square become, of `RESIZES`; how many these are is said.
        keeps_squares: only those are resized that are not square; the others must have one size.

    Raises:
        DataError: they do not fit into memory; once all were tried, those bad or of another size."""
    images, first, bad, changed = None, None, [], 0
    read = partial(resized_image, img_size=img_size, resize=resize, keeps_squares=keeps_squares)
    with contextlib.closing(decoded(read, paths, num_workers, bad)) as decoding:
        for row, (found, is_square) in decoding:
            changed += not is_square
            if images is None:
                check_memory(Path(paths[row]).parent, len(paths) * found.nbytes)
                images, first = np.empty((len(paths), *found.shape), np.uint8), Path(paths[row]).name
            if found.shape == images.shape[1:]:
                images[row] = found
            else:
                sizes = f"is {size_of(found)}, {first} is {size_of(images)} (width x height)"
                bad.append(f"{paths[row]}: {sizes}")
    if changed and distributed.is_main():
        what = f"{changed} of {len(paths)} images are not square and are {CHANGES[resize]}, see --resize"
        warn(f"{os.path.commonpath([Path(path).parent for path in paths])}: {what}")
    return images


def decoded(read, paths, num_workers, bad):
    """Yield (row, read(path)) of the paths in order, by so many threads; at the end refuse bad images.

    bad: a list of what is wrong with images, a text each, to which their DataErrors are added."""

    def attempt(path):
        try:
            return read(path)
        except DataError as error:
            return error

    with contextlib.closing(in_threads(attempt, paths, num_workers)) as results:
        for row, found in enumerate(progress_bar(results, "decoding", total=len(paths), unit="image")):
            if isinstance(found, DataError):
                bad.append(str(found))
            else:
                yield row, found
    if bad:
        more = f"; and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise DataError(f"{'; '.join(bad[:10])}{more}: remove or replace {'them' if len(bad) > 1 else 'it'}")


def size_of(images):
    """Width x height of images (..., H, W), for messages."""
    return f"{images.shape[-1]}x{images.shape[-2]}"


def resized_image(path, img_size, resize, keeps_squares):
    """One image file as uint8 (3, H, W), and whether it was square; or a DataError."""
    image = read_image(path)
    is_square = image.width == image.height
    if img_size and not (is_square and keeps_squares):
        box = central_square(*image.size) if resize == "crop" else None
        # PIL's filter grows with the scale: antialiased
        image = image.resize((img_size, img_size), Image.Resampling.BILINEAR, box)
    return np.asarray(image).transpose(2, 0, 1), is_square or not img_size


def central_square(width, height):
    """(left, top, right, bottom) of the largest square in the middle of an image."""
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def in_threads(function, items, number):
    """The function's results in order, from so many threads; closing it drops what has not begun."""
    with ThreadPoolExecutor(number or 1) as pool:
        for start in range(0, len(items), 256):  # a million tasks in a queue would fill gigabytes
            yield from pool.map(function, items[start : start + 256])


def read_image(path):
    """A picture in RGB, of an animation the first, upright as its EXIF data says if that can be read.

    Raises:
        DataError: missing, none of `FORMATS`, damaged, refused by `to_rgb`, or a decompression bomb."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            with contextlib.suppress(Exception):  # what is odd elsewhere in the EXIF data
                ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image)
    except Exception as error:  # a hostile file can make a decoder raise anything
        raise DataError(f"{path}: cannot be read as an image ({one_line(error)})") from None


def to_rgb(image):
    """The image in RGB: transparency over white, 16-bit grey v as round(v / 257), else as PIL does.

    Raises:
        ValueError: the range of the values is unknown (32-bit integers, floats)."""
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


def normalize(images):
    """Images as the network sees them: uint8 0..255 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x):
    """Network output of any shape as uint8: clip((x + 1) / 2, 0, 1) * 255, rounded. NaN becomes 0."""
    return x.float().add(1).mul(127.5).nan_to_num(nan=0.0).clamp(0, 255).round().to(torch.uint8)


def non_finite_images(x):
    """Which of the images x (N, C, H, W) hold a NaN or an infinity: bool (N,)."""
    return (~torch.isfinite(x)).flatten(1).any(dim=1)


def of_non_finite(what, bad, number):
    """What is to be said where so many of a number of images are not finite, or None."""
    return f"{bad:,} of {number:,} {what} hold values that are not finite, black here" if bad else None


def image_grid(images, columns=8):
    """Images (B, C, H, W) in rows of at most `columns`, on black and 2 pixels apart: (C, H', W')."""
    from torchvision.utils import make_grid  # slow to import, and needed here only

    return make_grid(images, nrow=columns)


def altered(image, stream):
    """A uint8 image (3, H, W) shifted by up to a pixel, brighter or darker by up to a tenth, with noise.

    Edges are repeated; the noise has a deviation of 3 grey levels. stream: the `torch.Generator` of all.
    """
    down, right = torch.randint(3, (2,), generator=stream).tolist()
    brightness = 0.9 + 0.2 * torch.rand((), generator=stream)
    noise = 3 * torch.randn(image.shape, generator=stream)
    shifted = moved_by(image, 1 - down, 1 - right).float()
    return (brightness * shifted + noise).round().clamp(0, 255).to(torch.uint8)


def moved_by(images, down, right):
    """Images (..., H, W) moved by so many pixels, their edges repeated."""
    height, width = images.shape[-2:]
    rows = (torch.arange(height) - down).clamp(0, height - 1)
    return images[..., rows, :][..., (torch.arange(width) - right).clamp(0, width - 1)]


def equal_images(images):
    """The group of each image (N, ...) uint8 equal in pixels: int64 (N,), numbered by their firsts."""
    numbers = {}
    digests = (hashlib.sha256(image).digest() for image in images.contiguous().numpy())
    return torch.tensor([numbers.setdefault(digest, len(numbers)) for digest in digests])


def united(groups, others):
    """Groups (N,) in which images are together that are so in `groups` or in `others`, directly or not.

    All int64; they are numbered by their firsts."""
    M, N = int(groups.max()) + 1, len(groups)
    links = coo_array((np.ones(N), (groups.numpy(), M + others.numpy())), shape=(M + N, M + N))
    _, part = connected_components(links, directed=False)
    numbers = {}
    return torch.tensor([numbers.setdefault(n, len(numbers)) for n in part[groups.numpy()].tolist()])


def firsts(group):
    """Which images are the first of their group, int64 (N,): bool (N,)."""
    order = group.argsort(stable=True)
    return torch.ones_like(group, dtype=torch.bool).index_put((order[1:],), group[order].diff() > 0)


def fingerprint(images):
    """SHA-256 (hex) of the shape and bytes of a uint8 tensor, the same on every device and layout."""
    digest = hashlib.sha256(repr(tuple(images.shape)).encode())
    digest.update(images.contiguous().cpu().numpy())
    return digest.hexdigest()


def resized(images, img_size):
    """uint8 images (N, 3, H, W) at a size, by PIL, bilinear, antialiased: (N, 3, size, size)."""
    if images.shape[2:] == (img_size, img_size):
        return images.contiguous()
    if not len(images):
        return images.new_empty(0, images.shape[1], img_size, img_size)
    pictures = (Image.fromarray(image) for image in images.permute(0, 2, 3, 1).numpy())
    size, filter = (img_size, img_size), Image.Resampling.BILINEAR
    rows = np.stack([np.asarray(picture.resize(size, filter)) for picture in pictures])
    return torch.from_numpy(rows).permute(0, 3, 1, 2).contiguous()

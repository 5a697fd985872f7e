"""Generated images in and out: uint8, N x 3 x H x W, the ones that a user would publish."""

import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from utils import distributed
from utils.errors import DataError
from utils.files import atomic_write
from utils.images import list_images, read_images, scan
from utils.safe_files import check_memory, one_line

# Floats may be this far outside of [0, 1], by rounding or an average of models: they are clipped.
TOLERANCE = 1e-3

# Deflate reaches 1,000 : 1 on zeros and less than 10 : 1 on images. More than this is no honest archive of images.
BOMB_RATIO = 100
BOMB_BYTES = 2**30


def non_finite_images(x):
    """Which of the images x (N, C, H, W) hold a NaN or an infinity: bool (N,)."""
    return (~torch.isfinite(x)).flatten(1).any(dim=1)


def check_images(images):
    """Raises ValueError unless `images` are uint8 of shape (N, 3, H, W) with N > 0."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError(f"expected uint8 images (N, 3, H, W), got {images.dtype} {tuple(images.shape)}")


def save_samples(path, images):
    """Writes uint8 images (N, 3, H, W) as one .npy, atomically. Raises DataError if it can't be written."""
    check_images(images)
    with atomic_write(path) as file:
        np.save(file, images.cpu().numpy(), allow_pickle=False)


def save_pngs(folder, images):
    """Writes uint8 images (N, 3, H, W) as 00000.png, 00001.png, ... into `folder`, over files of the same names.

    Raises DataError if the folder can't be written, or holds other images, which would be measured with these.
    """
    check_images(images)
    folder = Path(folder)
    names = png_names(folder, len(images))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        bar = distributed.bar(names, desc="save PNG", unit="image")
        for name, image in zip(bar, images.permute(0, 2, 3, 1), strict=True):
            Image.fromarray(image.cpu().numpy()).save(folder / name)
    except OSError as error:
        raise DataError(f"{folder}: can't be written ({error.strerror or error}); check it and its space") from None


def png_names(folder, number):
    """The names of so many images in a folder. Raises DataError if it holds other .png files."""
    digits = max(5, len(str(number - 1)))
    names = [f"{i:0{digits}d}.png" for i in range(number)]
    folder = Path(folder)
    found = scan(folder)[0] if folder.is_dir() else []
    others = sorted({Path(path).name for path in found}.difference(names))
    if others:
        raise DataError(f"{folder / others[0]}: an image of another run is in the folder; empty it or name another one")
    return names


def load_samples(path, img_size=None):
    """Images made by anything: a .npy, an .npz, or a folder of images -> uint8 tensor (N, 3, H, W) on the CPU.

    Arrays are uint8, or float in [0, 1] (clipped if at most `TOLERANCE` beyond it, and rounded to uint8), NCHW or NHWC.
    An .npz holds one array, or the images are under `images` or `arr_0`. A folder's images are those of
    `dataset.list_images`, in the order of their names. Grey images are repeated to three channels, as the data sets'
    are. `img_size` is the height and width that the images must have; any if None.

    Raises DataError, naming the file, for everything else: NaN, values out of range, object arrays, other shapes, an
    ambiguous layout, more than fits in memory, an archive that unpacks to absurd size, images of several sizes.
    """
    path = Path(path)
    if path.is_dir():
        paths = [image for group in list_images(path) for image in group]
        images = torch.from_numpy(read_images(paths))
    elif not path.is_file():
        raise DataError(f"{path}: no such file or folder; give an .npy, an .npz or a folder of images")
    elif path.suffix.lower() == ".npy":
        images = _load_npy(path)
    elif path.suffix.lower() == ".npz":
        images = _load_npz(path)
    else:
        raise DataError(f"{path}: neither .npy nor .npz nor a folder of images")
    height, width = images.shape[2:]
    if img_size is not None and (height, width) != (img_size, img_size):
        raise DataError(
            f"{path}: holds {height}x{width} images, not {img_size}x{img_size}; give --img_size or resize them"
        )
    return images


def npz_headers(path):
    """{name: (shape, dtype)} of the arrays in an .npz, without unpacking them. Raises DataError if it is no such file.

    Also raises it for an archive that would unpack to more than the free memory, or to absurd size (a zip bomb).
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            headers = {member.filename.removesuffix(".npy"): _npy_header(archive, member) for member in members}
    except Exception as error:  # a hostile file can make zipfile and NumPy raise anything
        raise DataError(f"{path}: not a readable .npz ({one_line(error)})") from None
    for member in members:
        size = member.file_size
        if size > BOMB_BYTES and size > BOMB_RATIO * member.compress_size:
            raise DataError(f"{path}: unpacks {member.compress_size:,} bytes to {size:,}; refused as a zip bomb")
        check_memory(path, size)
    return headers


def _npy_header(archive, member):
    with archive.open(member) as stream:
        # Later versions of the format are for structured arrays, and their headers may be gigabytes long.
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError(f"{member.filename} is not in version 1.0 of the .npy format")
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    return shape, dtype


def read_npz(path, name):
    """The array `name` of an .npz that `npz_headers` has accepted. Raises DataError if it is damaged or pickled."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return archive[name]
    except Exception as error:  # a hostile file can make zipfile and NumPy raise anything
        raise DataError(f"{path}: array {name!r} can't be read ({one_line(error)})") from None


def _load_npy(path):
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # a hostile file can make NumPy raise anything
        raise DataError(f"{path}: not a readable .npy of numbers ({one_line(error)})") from None
    return _array_to_images(path, array, _channel_axis(path, array.shape, array.dtype))


def _load_npz(path):
    headers = npz_headers(path)
    name = next((name for name in ("images", "arr_0") if name in headers), None)
    if name is None and len(headers) == 1:
        name = next(iter(headers))
    if name is None:
        raise DataError(f"{path}: holds {sorted(headers)}; call the array of images 'images' or 'arr_0'")
    axis = _channel_axis(path, *headers[name])
    return _array_to_images(path, read_npz(path, name), axis)


def _channel_axis(path, shape, dtype):
    """Which axis of an image array is the channels, 1 or 3, from its header. DataError unless it can be images."""
    if dtype != np.uint8 and dtype.kind != "f":
        raise DataError(f"{path}: an array of {dtype}; images are uint8, or float in [0, 1]")
    if len(shape) != 4 or 0 in shape:
        raise DataError(f"{path}: an array of shape {shape}; images are (N, 3, H, W) or (N, H, W, 3), and at least one")
    axes = [axis for axis in (1, 3) if shape[axis] in (1, 3)]
    if len(axes) == 2:
        raise DataError(f"{path}: shape {shape} may be (N, C, H, W) or (N, H, W, C); give images larger than 3 pixels")
    if not axes:
        raise DataError(f"{path}: shape {shape} has no axis of 3 (RGB) or 1 (grey) channels at place 1 or 3")
    return axes[0]


def _array_to_images(path, array, axis):
    """(N, C, H, W) or (N, H, W, C) array -> uint8 tensor (N, 3, H, W), a thousand images at a time to spare memory."""
    array = np.moveaxis(array, axis, 1)
    N, _, height, width = array.shape
    check_memory(path, 3 * N * height * width)
    images = np.empty((N, 3, height, width), np.uint8)
    for start in range(0, N, 1000):
        block = array[start : start + 1000]
        if block.dtype != np.uint8:
            # A NaN fails both comparisons.
            low, high = float(block.min()), float(block.max())
            if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):
                raise DataError(
                    f"{path}: values from {low!r} to {high!r} in images {start} and following; floats must be in "
                    f"[0, 1], at most {TOLERANCE} beyond it, and no NaN, and pixels of 0..255 must be uint8"
                )
            block = np.round(block.clip(0, 1).astype(np.float64) * 255)
        images[start : start + 1000] = block
    return torch.from_numpy(images)

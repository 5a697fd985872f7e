"""Pictures for the eye: generated images beside their nearest training images, the most memorised first."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from utils.files import atomic_write
from utils.images import image_grid, read_image

IMAGES_PER_ROW = 16
PAIRS_PER_PICTURE = 128
PICTURES = 5
GAP = 2  # pixels between images, of `image_grid`
SHOWN, ENLARGED, CAPTION = 96, 4, 28  # of each grid in a comparison: its first pixels, so many times; pixels of text


def save_grids(folder, generated, training, nearest, ratio):
    """Write grid_image0.png .. grid_image4.png with pairs (nearest training image, generated image), 8 pairs a row.

    The 640 lowest ratios are shown, in ascending order, row by row. Where there are fewer images there are fewer
    pictures, the last one shorter, and those that an earlier run left beyond them are removed.

    Args:
        folder: of the pictures.
        generated, training: (N, 3, H, W) and (M, 3, H, W), uint8.
        nearest: (N,) the index of each generated image's nearest training image.
        ratio: (N,) its memorisation ratio.

    Returns:
        The paths written.
    """
    paths = [Path(folder) / f"grid_image{k}.png" for k in range(PICTURES)]
    chosen = ratio.argsort(stable=True)[: PICTURES * PAIRS_PER_PICTURE].split(PAIRS_PER_PICTURE)
    for path, rows in zip(paths, chosen, strict=False):
        pairs = torch.stack([training[nearest[rows]], generated[rows]], dim=1).flatten(0, 1)
        save_picture(path, Image.fromarray(image_grid(pairs, IMAGES_PER_ROW).permute(1, 2, 0).numpy()))
    for path in paths[len(chosen) :]:
        path.unlink(missing_ok=True)
    return paths[: len(chosen)]


def closest_pairs(path, N):
    """The pairs in the first row of a grid_image0.png of N images, at most 8: (P, 2, 3, H, H) uint8."""
    grid, columns = read_image(path), min(IMAGES_PER_ROW, 2 * N)
    step = (grid.width - GAP) // columns
    row = torch.from_numpy(np.array(grid.crop((GAP, GAP, grid.width, step)))).permute(2, 0, 1)
    images = [row[..., i * step : (i + 1) * step - GAP] for i in range(columns)]
    return torch.stack(images).unflatten(0, (-1, 2))


def save_comparison(path, grids):
    """Write one picture of the first rows of several grids, {label: path of a grid_image0.png}, enlarged."""
    images = {label: read_image(grid) for label, grid in grids.items()}
    pictures = {label: i.crop((0, 0, i.width, min(SHOWN, i.height))) for label, i in images.items()}
    width = ENLARGED * max(image.width for image in pictures.values())
    height = sum(CAPTION + ENLARGED * image.height for image in pictures.values())
    whole, y = Image.new("RGB", (width, height), "white"), 0
    for label, image in pictures.items():
        text = f"{label}: nearest training image and generated image side by side, most memorised first"
        ImageDraw.Draw(whole).text((6, y + 5), text, fill="black", font_size=16)
        large = image.resize((ENLARGED * image.width, ENLARGED * image.height), Image.Resampling.NEAREST)
        whole.paste(large, (0, y + CAPTION))
        y += CAPTION + large.height
    save_picture(path, whole)


def save_picture(path, picture):
    with atomic_write(path) as file:
        picture.save(file, format="PNG")

"""Pictures for the eye: generated images beside their nearest training images, the most memorised first."""

from pathlib import Path

import torch
from PIL import Image, ImageDraw

from utils.files import atomic_write
from utils.images import image_grid
from utils.safe_files import read_image

IMAGES_PER_ROW = 16
PAIRS_PER_PICTURE = 128
PICTURES = 5
CAPTION = 28  # pixels
ENLARGED = 4


def save_grids(folder, generated, training, nearest, ratio):
    """Writes grid_image0.png .. grid_image4.png with pairs (nearest training image, generated image), 8 pairs a row.

    generated: uint8 (N, 3, H, W); training: uint8 (M, 3, H, W), of the same size; nearest: (N,) the index of each
    generated image's nearest training image; ratio: (N,) its memorisation ratio. The 640 lowest ratios are shown, in
    ascending order, row by row. Returns the list of the paths written: fewer than five, the last picture shorter, if
    there are fewer than 640 generated images. Pictures that an earlier run left beyond those are removed.
    Raises DataError if a picture can't be written.
    """
    paths = [Path(folder) / f"grid_image{k}.png" for k in range(PICTURES)]
    chosen = ratio.argsort(stable=True)[: PICTURES * PAIRS_PER_PICTURE].split(PAIRS_PER_PICTURE)
    for path, rows in zip(paths, chosen, strict=False):
        pairs = torch.stack([training[nearest[rows]], generated[rows]], dim=1).flatten(0, 1)
        save_picture(path, as_picture(pairs, IMAGES_PER_ROW))
    for path in paths[len(chosen) :]:
        path.unlink(missing_ok=True)
    return paths[: len(chosen)]


def save_comparison(path, grids, height=96):
    """One picture of the first `height` pixels of several grids, {label: path of a grid_image0.png}. DataError."""
    images = {label: read_image(grid) for label, grid in grids.items()}
    save_labelled(path, {label: i.crop((0, 0, i.width, min(height, i.height))) for label, i in images.items()})


def save_pairs(path, pairs):
    """One picture with a row of pairs for every label: {label: uint8 (P, 2, 3, H, W)}, training image first."""
    rows = {label: torch.as_tensor(of_label).flatten(0, 1) for label, of_label in pairs.items()}
    save_labelled(path, {label: as_picture(row, len(row)) for label, row in rows.items()})


def as_picture(images, columns):
    """Images (N, 3, H, W) in rows, as a PIL image."""
    return Image.fromarray(image_grid(images, columns).permute(1, 2, 0).numpy())


def save_labelled(path, pictures):
    """PIL images {label: image} below each other, enlarged, each under its label."""
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

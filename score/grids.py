"""Pictures for the eye: generated images beside their nearest training images, and several sets in rows:

python -m score.grids OUT.png training=FOLDER default=generate.npy IET-AGC=generate.npy
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from score.samples import load_samples
from utils import startup
from utils.files import atomic_write
from utils.images import image_grid, keep_apart, read_image

IMAGES_PER_ROW = 16
PAIRS_PER_PICTURE = 128
PICTURES = 5
GAP = 2  # pixels between images, of `image_grid`
SHOWN, ENLARGED = 96, 4  # of each grid in a comparison: its first pixels, and so many times as large
COLUMNS, SIDE = 12, 64  # images in a row of a set, and the pixels of one
CAPTION = 28  # pixels of the text above a row


def save_grids(folder, generated, training, nearest, ratio):
    """Write grid_image0.png .. grid_image4.png of pairs (nearest training image, generated), 8 a row.

    The 640 lowest ratios are shown, in ascending order, row by row. Where there are fewer images there
    are fewer pictures, the last one shorter, and those that an earlier run left beyond them are removed.
    Returns the paths written.

    generated, training: (N, 3, H, W) and (M, 3, H, W), uint8; nearest: (N,) the index of each generated
    image's nearest training image; ratio: (N,) its memorisation ratio."""
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
    """Write one picture of the first rows of {label: path of a grid_image0.png}, enlarged."""
    rows = {}
    for label, grid in grids.items():
        text = f"{label}: pairs of training image and generated image"
        image = read_image(grid)
        first = image.crop((0, 0, image.width, min(SHOWN, image.height)))
        size = ENLARGED * first.width, ENLARGED * first.height
        rows[text] = first.resize(size, Image.Resampling.NEAREST)
    save_rows(path, rows)


def save_sets(path, sets):
    """Write one picture of the first of {label: uint8 images (N, 3, H, W)}, a row each."""
    rows = {}
    for label, images in sets.items():
        shown = images[:COLUMNS]
        row = Image.fromarray(torch.cat(list(shown), dim=2).permute(1, 2, 0).numpy())
        rows[label] = row.resize((len(shown) * SIDE, SIDE), Image.Resampling.NEAREST)
    save_rows(path, rows)


def save_rows(path, rows):
    """Write {text: PIL image} as one picture, each below its text."""
    width = max(image.width for image in rows.values())
    height = sum(CAPTION + image.height for image in rows.values())
    whole, y = Image.new("RGB", (width, height), "white"), 0
    for text, image in rows.items():
        ImageDraw.Draw(whole).text((6, y + 5), text, fill="black", font_size=16)
        whole.paste(image, (0, y + CAPTION))
        y += CAPTION + image.height
    save_picture(path, whole)


def save_picture(path, picture):
    with atomic_write(path) as file:
        picture.save(file, format="PNG")


def main():
    parser = startup.Parser("python -m score.grids", description="The first images of sets in rows.")
    parser.add_argument("out", type=Path, help="PNG that is made")
    parser.add_argument("sets", nargs="+", metavar="LABEL=IMAGES", help="a folder, an .npy or an .npz")
    options = parser.parse_args()
    sets = [startup.split_label(argument) for argument in options.sets]
    keep_apart([path for _, path in sets if path.is_dir()], {}, {"": options.out})
    save_sets(options.out, {label: load_samples(path) for label, path in sets})


if __name__ == "__main__":
    startup.run(main)

"""Pictures for the eye: every generated image beside its nearest training image, the most memorised first."""

from pathlib import Path

import torch
from PIL import Image, ImageDraw

from score.samples import check_images
from utils.files import atomic_write
from utils.images import image_grid, read_image

IMAGES_PER_ROW = 16
PAIRS_PER_PICTURE = 128
PICTURES = 5


def save_grids(folder, generated, training, nearest, ratio):
    """Writes grid_image0.png .. grid_image4.png with pairs (nearest training image, generated image), 8 pairs a row.

    generated: uint8 (N, 3, H, W); training: uint8 (M, 3, H, W), of the same size; nearest: (N,) the index of each
    generated image's nearest training image; ratio: (N,) its memorisation ratio. The 640 lowest ratios are shown, in
    ascending order, row by row. Returns the list of the paths written: fewer than five, the last picture shorter, if
    there are fewer than 640 generated images. Pictures that an earlier run left beyond those are removed.
    Raises DataError if a picture can't be written.
    """
    check_images(generated)
    check_images(training)
    folder = Path(folder)
    order = ratio.argsort(stable=True)[: PICTURES * PAIRS_PER_PICTURE].cpu()
    written = []
    for k, chosen in enumerate(order.split(PAIRS_PER_PICTURE)):
        originals = training[nearest[chosen.to(nearest.device)].to(training.device)].cpu()
        copies = generated[chosen.to(generated.device)].cpu()
        pairs = originals.new_empty(2 * len(chosen), *originals.shape[1:])
        pairs[0::2], pairs[1::2] = originals, copies
        picture = image_grid(pairs, IMAGES_PER_ROW).permute(1, 2, 0).numpy()
        written.append(folder / f"grid_image{k}.png")
        with atomic_write(written[-1]) as file:
            Image.fromarray(picture).save(file, format="PNG")
    for k in range(len(written), PICTURES):
        (folder / f"grid_image{k}.png").unlink(missing_ok=True)
    return written


def save_comparison(path, grids, height=96, scale=4):
    """One picture with the top of several grids below each other, enlarged, each under its label.

    path: the .png to write; grids: {label: path of a grid_image0.png}; height: pixels taken from the top of each.
    Raises DataError if a grid cannot be read or the picture cannot be written.
    """
    tops = {}
    for label, grid in grids.items():
        image = read_image(grid)
        tops[label] = image.crop((0, 0, image.width, min(height, image.height)))
    save_labelled(path, tops, scale)


def save_pairs(path, pairs, scale=4):
    """One picture with a row of pairs for every label: {label: uint8 (P, 2, 3, H, W)}, training image first."""
    rows = {}
    for label, of_label in pairs.items():
        images = torch.as_tensor(of_label).flatten(0, 1)
        rows[label] = Image.fromarray(image_grid(images, len(images)).permute(1, 2, 0).numpy())
    save_labelled(path, rows, scale)


def save_labelled(path, pictures, scale):
    """Pictures {label: PIL image} below each other, enlarged, each under its label, as one .png."""
    caption = 28
    large = {
        label: image.resize((scale * image.width, scale * image.height), Image.Resampling.NEAREST)
        for label, image in pictures.items()
    }
    width, height = (
        max(image.width for image in large.values()),
        sum(image.height + caption for image in large.values()),
    )
    whole = Image.new("RGB", (width, height), "white")
    draw, y = ImageDraw.Draw(whole), 0
    for label, image in large.items():
        text = f"{label}: nearest training image and generated image side by side, most memorised first"
        draw.text((6, y + 5), text, fill="black", font_size=16)
        whole.paste(image, (0, y + caption))
        y += image.height + caption
    with atomic_write(path) as file:
        whole.save(file, format="PNG")

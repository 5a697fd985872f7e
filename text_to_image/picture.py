"""The first images of several sets, a row each, as one picture:

python -m text_to_image.picture OUT.png training=FOLDER default=generate.npy IET-AGC=generate.npy
"""

from pathlib import Path

from PIL import Image, ImageDraw

from score.compare import split_label
from score.grids import save_picture
from score.samples import load_samples
from utils import startup
from utils.images import keep_apart

COLUMNS, SIDE, CAPTION = 12, 64, 24  # images of a row, pixels of an image and of the text above a row


def picture(rows):
    """A picture of {label: uint8 images (N, 3, H, W)}, a row of the first images below each label."""
    whole = Image.new("RGB", (COLUMNS * SIDE, len(rows) * (CAPTION + SIDE)), "white")
    for row, (label, images) in enumerate(rows.items()):
        top = row * (CAPTION + SIDE)
        ImageDraw.Draw(whole).text((4, top + 5), label, fill="black", font_size=14)
        for column, image in enumerate(images[:COLUMNS]):
            image = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((SIDE, SIDE), Image.Resampling.NEAREST)
            whole.paste(image, (column * SIDE, top + CAPTION))
    return whole


def main():
    parser = startup.Parser(prog="python -m text_to_image.picture", description=__doc__.partition(":")[0])
    parser.add_argument("out", type=Path, help="PNG that is made")
    parser.add_argument("sets", nargs="+", metavar="LABEL=IMAGES", help="a folder of images, or an .npy or .npz")
    options = parser.parse_args()
    sets = [split_label(argument) for argument in options.sets]
    keep_apart([path for _, path in sets if path.is_dir()], {}, {"": options.out})
    save_picture(options.out, picture({label: load_samples(path) for label, path in sets}))


if __name__ == "__main__":
    startup.run(main)

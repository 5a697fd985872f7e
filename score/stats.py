"""A command that writes the reference statistics of FID and fpd, mean and covariance, to a file:

python -m score.stats --dataset=cifar10 --data_root=data --output=results/cifar10.train.npz
"""

if __name__ == "__main__":  # before the imports that take seconds
    from utils import startup

    startup.prepare()

import argparse
import os
from pathlib import Path

import torch

from dataset import DATASETS, load_dataset
from score.fid import DIMENSIONS, compute_statistics, provenance_of, save_statistics
from score.inception import Inception, find_weights
from utils import startup
from utils.errors import UsageError
from utils.files import make_directory


def main(arguments=None):
    """Computes and writes what the arguments say. Raises UserError."""
    parser = startup.Parser(
        prog="python -m score.stats",
        description="Write mean and covariance of a data set to an .npz.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    path = {"type": os.path.expanduser}
    parser.add_argument("--dataset", choices=DATASETS, required=True)
    parser.add_argument("--data_root", **path, default="./data", help="directory of the data sets")
    for name, default, what in (
        ("img_size", 32, "height and width in pixels"),
        ("num_train", 0, "size of the training subset, 0 for all images"),
        ("subset_seed", 0, "seed of the training subset"),
        ("batch_size", 50, "images a step of Inception"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=what)
    parser.add_argument("--split", choices=("train", "heldout"), default="train", help="which images")
    parser.add_argument("--features", choices=tuple(DIMENSIONS), default="inception", help="of which features")
    parser.add_argument("--inception_weights", **path, help="a file like pytorch-fid's; else found or downloaded")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="where Inception runs")
    parser.add_argument("--output", **path, required=True, help="the .npz to write")
    options = parser.parse_args(arguments)
    if options.batch_size < 1:
        raise UsageError(f"--batch_size={options.batch_size}: must be at least 1")
    if not options.output.endswith(".npz"):
        raise UsageError(f"--output={options.output}: must end in .npz")
    try:
        torch.zeros(1, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device={options.device}: not a device of this machine ({error})") from None
    make_directory(Path(options.output).parent, "output")

    inception = None
    if options.features == "inception":
        inception = Inception(find_weights(options.inception_weights), options.device)
    subset = {"num_train": options.num_train, "subset_seed": options.subset_seed}
    data = load_dataset(options.dataset, options.data_root, options.img_size, **subset)
    chosen = data.train if options.split == "train" else data.heldout
    if chosen is None or len(chosen.images) < 2:
        raise UsageError(f"--split={options.split}: fewer than 2 images of {options.dataset} in it, no covariance")
    mu, sigma = compute_statistics(chosen.images, inception, options.batch_size)
    save_statistics(options.output, mu, sigma, **provenance_of(chosen.images, inception))
    print(f"{options.output}: {options.features} statistics of {len(chosen.images):,} images")


if __name__ == "__main__":
    startup.run(main)

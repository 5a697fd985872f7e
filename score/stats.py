"""Files of the reference statistics of FID and fpd, mean and covariance, and a command that writes them:

python -m score.stats --dataset=cifar10 --data_root=data --output=results/cifar10.train.npz
"""

if __name__ == "__main__":  # before the imports that take seconds
    from utils import startup

    startup.prepare()

import os
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from dataset import DATASETS, fingerprint, load_dataset
from score.fid import DIMENSIONS, compute_statistics
from score.inception import Inception, find_weights
from score.samples import npz_headers, read_npz
from utils import distributed, startup
from utils.errors import DataError, UsageError
from utils.files import atomic_write, make_directory

CACHE = Path("results/stats")


def save_statistics(path, mu, sigma, **provenance):
    """Writes the published format, an .npz with `mu` (D,) and `sigma` (D, D), atomically.

    `provenance`, strings by name, says what they were computed from. Raises DataError if the file can't be written.
    """
    with atomic_write(path) as file:
        np.savez(file, mu=mu, sigma=sigma, **{name: np.array(text) for name, text in provenance.items()})


def load_statistics(path):
    """(mu (D,), sigma (D, D), provenance) of a statistics file, float64; provenance is {} in published files.

    Raises DataError if the file is missing, damaged, has other shapes, values that are not finite, or no covariance.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    headers = npz_headers(path)
    if not headers.keys() >= {"mu", "sigma"}:
        raise DataError(f"{path}: holds {sorted(headers)}; statistics are 'mu' and 'sigma'")
    (mu_shape, mu_type), (sigma_shape, sigma_type) = headers["mu"], headers["sigma"]
    if mu_type.kind != "f" or sigma_type.kind != "f" or len(mu_shape) != 1 or sigma_shape != mu_shape * 2:
        raise DataError(
            f"{path}: mu is {mu_type} {mu_shape} and sigma {sigma_type} {sigma_shape}; "
            "they must be float (D,) and (D, D)"
        )
    mu, sigma = (read_npz(path, name).astype(np.float64) for name in ("mu", "sigma"))
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise DataError(f"{path}: holds values that are not finite; compute it again")
    if (sigma.diagonal() < 0).any() or not np.allclose(sigma, sigma.T, rtol=1e-3, atol=1e-6 * sigma.diagonal().max()):
        raise DataError(f"{path}: sigma is no covariance (not symmetric, or a negative variance); compute it again")
    texts = [name for name, (shape, dtype) in headers.items() if shape == () and dtype.kind == "U"]
    return mu, sigma, {name: str(read_npz(path, name)) for name in texts}


def provenance_of(images, features, inception=None):
    """What decides the statistics of uint8 images (N, 3, H, W): the features, the pixels and the Inception weights."""
    provenance = {"features": features, "images": fingerprint(images)}
    if features == "inception":
        provenance["weights"] = inception.weights_hash
    return provenance


def reference_statistics(images, features, cache_path=None, inception=None, batch_size=50):
    """As `compute_statistics`, but read from a file if it exists, else kept there.

    cache_path: what a person has named. Raises DataError if that cannot be read, was made from other images, features
    or weights, or could not be written, which shows before the work. A file that does not say what it was made from, as
    the published ones, is taken at its word, with a warning.
    None: in ./results/stats, named by what it is made from. A warning says so if that cannot be read or written.
    """
    provenance = provenance_of(images, features, inception)
    path = Path(cache_path or CACHE / ("-".join(text[:16] for text in provenance.values()) + ".npz"))
    statistics = None
    if distributed.is_main():
        with _only_a_warning(unless=cache_path):
            if os.access(path, os.F_OK):  # False also where a directory may not be read
                statistics = _known_statistics(path, provenance)
            elif cache_path:
                make_directory(path.parent, "fid_cache")
    statistics = distributed.from_main(statistics)
    if statistics is None:
        statistics = compute_statistics(images, features, inception, batch_size)
        if distributed.is_main():
            with _only_a_warning(unless=cache_path):
                save_statistics(path, *statistics, **provenance)
    return statistics


@contextmanager
def _only_a_warning(unless):
    try:
        yield
    except DataError as error:
        if unless:
            raise
        print(f"warning: {error}; going on without it", file=sys.stderr)


def _known_statistics(path, provenance):
    mu, sigma, found = load_statistics(path)
    _check_provenance(path, len(mu), found, provenance)
    return mu, sigma


def _check_provenance(path, dimension, found, expected):
    advice = "give another --fid_cache or remove the file"
    for name, text in expected.items():
        if name in found and found[name] != text:
            raise DataError(f"{path}: statistics of other {name} ({found[name][:16]}, not {text[:16]}); {advice}")
    if dimension != DIMENSIONS[expected["features"]]:
        wanted = f"the {DIMENSIONS[expected['features']]} {expected['features']} features"
        raise DataError(f"{path}: statistics of {dimension} features instead of {wanted}; {advice}")
    if not found.keys() >= expected.keys():
        warnings.warn(f"{path}: doesn't say what it was computed from; taken to be of these images", stacklevel=4)


def parse_arguments(arguments):
    """The command line of `python -m score.stats`. Raises UsageError."""
    parser = startup.Parser(
        prog="python -m score.stats", description="Write mean and covariance of a data set to an .npz."
    )
    parser.add_argument("--dataset", choices=DATASETS, required=True)
    path = {"type": os.path.expanduser}
    parser.add_argument("--data_root", **path, default="./data", help="directory of the data sets (%(default)s)")
    parser.add_argument("--img_size", type=int, default=32, help="height and width in pixels (default: %(default)s)")
    parser.add_argument("--num_train", type=int, default=0, help="size of the training subset, 0 for all images")
    parser.add_argument("--subset_seed", type=int, default=0, help="seed of the training subset (default: %(default)s)")
    parser.add_argument("--split", choices=("train", "heldout"), default="train", help="default: %(default)s")
    parser.add_argument("--features", choices=tuple(DIMENSIONS), default="inception", help="default: %(default)s")
    parser.add_argument("--inception_weights", **path, help="a file like pytorch-fid's (default: found or downloaded)")
    parser.add_argument(
        "--device", default="auto", help="auto is cuda if there is one, else cpu (default: %(default)s)"
    )
    parser.add_argument("--batch_size", type=int, default=50, help="images a step of Inception (default: %(default)s)")
    parser.add_argument("--output", **path, required=True, help="the .npz to write")
    options = parser.parse_args(arguments)
    if options.batch_size < 1:
        raise UsageError(f"--batch_size={options.batch_size}: must be at least 1")
    if not options.output.endswith(".npz"):
        raise UsageError(f"--output={options.output}: must end in .npz")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device={options.device}: not a device of this machine ({error})") from None
    return options


def write_statistics(options):
    """Computes and writes what the parsed `options` say. Raises UserError."""
    make_directory(Path(options.output).parent, "output")
    inception = None
    if options.features == "inception":
        inception = Inception(find_weights(options.inception_weights), options.device)
    data = load_dataset(
        options.dataset,
        options.data_root,
        options.img_size,
        num_train=options.num_train,
        subset_seed=options.subset_seed,
    )
    chosen = data.train if options.split == "train" else data.heldout
    if chosen is None or len(chosen.images) < 2:
        raise UsageError(f"--split={options.split}: fewer than 2 images of {options.dataset} in it, no covariance")
    mu, sigma = compute_statistics(chosen.images, options.features, inception, options.batch_size)
    save_statistics(options.output, mu, sigma, **provenance_of(chosen.images, options.features, inception))
    print(f"{options.output}: {options.features} statistics of {len(chosen.images):,} images")


def main(arguments=None):
    """Runs the command. Raises UserError."""
    write_statistics(parse_arguments(arguments))


if __name__ == "__main__":
    startup.run(main)

"""The reference statistics of FID and fpd, mean and covariance of the images of a data set, as a file:

python -m score.stats --dataset=cifar10 --data_root=data --output=results/cifar10.train.npz

Of --fid_reference and --fid_features, for --fid_cache and for other programs. An older file is replaced.
"""

if __name__ == "__main__":  # before the imports that take seconds
    from utils import startup

    startup.prepare()

from pathlib import Path

from absl import flags as absl_flags

from dataset import load_dataset
from score.fid import compute_statistics, provenance_of, save_statistics
from score.inception import Inception, find_weights
from training import flags
from training.launch import pick_device, run
from utils import distributed
from utils.errors import UsageError
from utils.files import make_directory

FLAGS = absl_flags.FLAGS
absl_flags.DEFINE_string("output", None, "the .npz to write")


def main():
    output = Path(FLAGS.output or "").expanduser()
    if output.suffix != ".npz":
        raise UsageError(f"--output={output}: name the file to write, with the suffix .npz")
    device = pick_device(FLAGS.device)
    make_directory(output.parent, "output")
    inception = None
    if FLAGS.fid_features == "inception":
        inception = Inception(find_weights(FLAGS.inception_weights), device)
    images = flags.reference_images(FLAGS, flags.call(FLAGS, load_dataset, FLAGS.dataset))
    if len(images) < 2:
        raise UsageError(f"--fid_reference={FLAGS.fid_reference}: 1 image of {FLAGS.dataset}, which has no covariance")
    statistics = compute_statistics(images, inception, FLAGS.batch_size)
    if distributed.is_main():
        save_statistics(output, *statistics, **provenance_of(images, inception))
    print(f"{output}: {FLAGS.fid_features} statistics of {len(images):,} images")


if __name__ == "__main__":
    run(main)

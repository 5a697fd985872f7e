"""FID and Inception score, or fpd, of generated images against real ones."""

import sys

from dataset import fingerprint
from score.fid import frechet_distance, inception_score, inception_statistics_and_probs, pixel_statistics
from score.inception import FEATURES, Inception
from score.stats import reference_statistics
from utils import distributed
from utils.errors import UsageError
from utils.files import file_hash

SPLITS = 10  # of the Inception score
FID_IMAGES = FEATURES  # with fewer the covariance has no full rank
IS_IMAGES = 5000


class Quality:
    """The network and the reference that generated images are scored with.

    Both are made ready here, before any long work.

    Args:
        reference: (M, 3, H, W) uint8 real images.
        num_images: how many images will be scored.
        weights: the Inception weights file (`find_weights`), not needed for pixels.
        features: `inception` (FID and IS) or `pixels` (fpd).
        cache: as `cache_path` of `score.stats.reference_statistics`.
        device: of the Inception network.
        batch_size: images per call of it.

    Raises:
        DataError: damaged Inception weights, or a cache that is of other images or cannot be written.
        UsageError: too few images.
    """

    def __init__(self, reference, num_images, weights, features, cache, device, batch_size):
        least = SPLITS if features == "inception" else 2
        for name, number in (("generated", num_images), ("real", len(reference))):
            if number < least:
                raise UsageError(f"{number} {name} images: {features} features need at least {least} to be scored")
        self.warning = few_images(num_images, len(reference)) if features == "inception" else None
        if self.warning and distributed.is_main():
            print(f"warning: {self.warning}", file=sys.stderr)
        self.features = features
        self.batch_size = batch_size
        self.inception = Inception(weights, device) if features == "inception" else None
        self.weights_hash = file_hash(weights) if features == "inception" else None
        self.reference_hash = fingerprint(reference)
        self.reference = reference_statistics(reference, features, cache, self.inception, batch_size)

    def identity(self):
        """What decides the scores of given images: JSON values."""
        return {"features": self.features, "weights_sha256": self.weights_hash, "reference_sha256": self.reference_hash}

    def __call__(self, images):
        """The scores of uint8 images (N, 3, H, W): {"fid", "is", "is_std"} or {"fpd"}.

        All processes take part, with the same images, and are given the scores.
        """
        probs = None
        if self.features == "pixels":
            statistics = pixel_statistics(images)
        else:
            statistics, probs = inception_statistics_and_probs(images, self.inception, self.batch_size)
        return distributed.from_main(self.scores(statistics, probs) if distributed.is_main() else None)

    def scores(self, statistics, probs):
        """The scores from the statistics of the features and, for Inception's, the class probabilities."""
        distance = frechet_distance(*statistics.mean_and_covariance(), *self.reference)
        if self.features == "pixels":
            return {"fpd": distance}
        score, spread = inception_score(probs, SPLITS)
        return {"fid": distance, "is": score, "is_std": spread}


def few_images(generated, real):
    """What is to be said of FID and IS of so few images, or None."""
    wanted = [f"FID needs {FID_IMAGES:,} of each"] if min(generated, real) < FID_IMAGES else []
    wanted += [f"IS needs {IS_IMAGES:,} generated ones"] if generated < IS_IMAGES else []
    if not wanted:
        return None
    return f"{generated:,} generated and {real:,} real images: {' and '.join(wanted)} to mean much"

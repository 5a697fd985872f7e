"""What a checkpoint is measured with: held-out real images for quality, distinct training images for memorisation."""

import contextlib
import io

import numpy as np
import torch

from dataset import load_dataset
from experiments.patches import write_patches
from score.fid import frechet_distance, pixel_statistics
from score.generate import generate
from score.memorization import above_floor, measures, memorization_ratio, nearest_neighbors

PAIRS = 10
RESAMPLES = 10  # of the generated images, for the spread of the Frechet distance


def load_images(about):
    """(training images, held-out images), uint8 (N, 3, H, W), of an `arms.Subject`."""
    if about.name.startswith("digits"):
        data = load_dataset("digits", "data", about.side, num_train=about.num_train)
        return data.train.images, data.heldout.images
    train = about.data_root
    write_patches(train.parent, about.num_train, about.side)
    both = (load_dataset("folder", root, about.side).train.images for root in (train, train.with_name("heldout")))
    return tuple(both)


def fpd(images, reference):
    """Frechet distance on pooled pixels of images to the (mean, covariance) of others."""
    return frechet_distance(*pixel_statistics(images).mean_and_covariance(), *reference)


class Judge:
    """The measures of a sampler's images, and the floor.

    Neighbours are searched for among the distinct training images: a repeated one would be its own second neighbour,
    and every ratio of its copies would come out higher. `distinct` are those, in the order in which they first occur,
    and `group[j]` says which of them training image j is.

    Args:
        about: an `arms.Subject`, which says how many images to generate from a checkpoint.
    """

    def __init__(self, about):
        self.training, self.heldout = load_images(about)
        self.images = about.images
        rows = self.training.flatten(1).numpy()
        _, first, group = np.unique(rows, axis=0, return_index=True, return_inverse=True)
        order = first.argsort()
        self.distinct = self.training[torch.from_numpy(first[order])]
        self.group = order.argsort()[group]
        self.reference = pixel_statistics(self.heldout).mean_and_covariance()
        sq_distance, index = nearest_neighbors(self.heldout, self.distinct)
        self.floor_ratio = memorization_ratio(sq_distance).numpy()
        shuffled = self.heldout[torch.randperm(len(self.heldout), generator=torch.Generator().manual_seed(0))]
        size = min(self.images, len(shuffled) // 2)
        sample, rest = shuffled[:size], shuffled[size:]
        self.floor = {
            "heldout": without_curve(measures(sq_distance, index, self.distinct)),
            "images held out": len(self.heldout),
            "images held out, sample": len(sample),
            "fpd of training images": fpd(self.distinct, self.reference),
            "fpd of a held-out sample to the others": fpd(sample, pixel_statistics(rest).mean_and_covariance()),
        }

    def __call__(self, sampler, seed):
        """(JSON values of a point, arrays to keep) of images that a sampler generates."""
        with contextlib.redirect_stderr(io.StringIO()):  # bars of several processes would write over each other
            images = generate(sampler, self.images, self.images, seed)
        sq_distance, index = nearest_neighbors(images, self.distinct)
        found, ratio = measures(sq_distance, index, self.distinct), memorization_ratio(sq_distance)
        point = {"fpd": fpd(images, self.reference), "fpd_std": self.fpd_spread(images)}
        point |= {**without_curve(found), "mq_above_floor": above_floor(found, self.floor["heldout"])}
        top = ratio.argsort(stable=True)[:PAIRS]
        kept = {
            "ratio": ratio.numpy().astype(np.float32),
            "nearest": index[:, 0].numpy().astype(np.int32),
            "top": top.numpy(),
            "pairs": torch.stack([self.distinct[index[top, 0]], images[top]], dim=1).numpy(),
        }
        return point, kept

    def fpd_spread(self, images):
        """Standard deviation of the Frechet distance over images drawn again with replacement."""
        random = torch.Generator().manual_seed(0)
        draws = (images[torch.randint(len(images), (len(images),), generator=random)] for _ in range(RESAMPLES))
        return float(np.std([fpd(drawn, self.reference) for drawn in draws], ddof=1))


def without_curve(found):
    return {name: value for name, value in found.items() if name != "mq_curve"}

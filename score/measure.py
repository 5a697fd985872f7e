"""A few numbers of a set of images: what a training watches, and experiments/cifar10.py publishes."""

from score.evaluate import evaluate, mean_of
from score.fid import compute_statistics, frechet_distance
from score.similarity import embed, measure_similarity
from score.swd import sliced_wasserstein
from utils import distributed


def measure_against(training, heldout, reference=None, space=None, groups=None, device="cpu"):
    """A function that measures images, uint8 (N, 3, H, W), against real ones, as the evaluations do.

    What the real images alone decide is computed here, once. All processes take part in both.

    Args:
        training: (M, 3, H, W) uint8, every image once.
        heldout: (L, 3, H, W) uint8, not trained on: what they reach in the place of generated images is
            the floor of MQ.
        reference: (R, 3, H, W) uint8, what fpd and SWD are to, at least 2; None: heldout.
        space: the `FeatureSpace` that copies are searched for in; None: pixels.
        groups: (M,) int64, of the training images, as for `neighbors_of_groups`; None for no groups.
        device: where to compute.

    Returns a function of images, whose result is a dict of JSON values: "fpd" and, from 16 pixels on,
    "swd"; "mq_above_floor", {p: the share below the threshold less that of heldout}; "mq_fraction",
    "f_mem" and all else in `evaluate`'s "pixels", or in what `measure_similarity` finds."""
    reference = heldout if reference is None else reference
    features = None if space is None else embed(space, training)

    def copies(images):
        if space is None:
            return evaluate(images, training, groups=groups, device=device)[0]["pixels"]
        return measure_similarity(embed(space, images), features, space.threshold, groups=groups)[0]

    statistics, floor = compute_statistics(reference), copies(heldout)["mq_fraction"]

    def measure(images):
        numbers = copies(images)
        numbers["mq_above_floor"] = {p: share - floor[p] for p, share in numbers["mq_fraction"].items()}
        of_images = compute_statistics(images)
        if distributed.is_main():
            numbers["fpd"] = frechet_distance(*of_images, *statistics)
            levels = sliced_wasserstein(reference, images, device)
            numbers |= {"swd": mean_of(levels)} if levels else {}
        return distributed.from_main(numbers)

    return measure

"""Images held back while they are generated: one too near to a training image is made again."""

import time

import torch

from score.memorization import memorization_ratio, neighbors_of_groups
from score.similarity import most_similar, unit_features
from utils import distributed

TRIES = 20


def hold_back(make, margin):
    """`make` as a function of image numbers, which makes those again that are held back.

    Of each image its first try that is not held back is delivered, of TRIES at most; if all are, the one
    with the largest margin.

    Args:
        make: a function of image numbers and of a try, from 0, that decides the noise; returns tensors
            with a row for each image, the images first.
        margin: a function of images (B, 3, H, W) uint8; returns (B,), below 0 for those to hold back.

    The function returns the tensors of `make`, on the CPU, and two more: tries (B,) int64, the number of
    the delivered one, -1 where all were held back; seconds (B, 2) float64, the part that each image has
    in the time of all tries and of all first ones."""

    def make_held_back(numbers):
        begin = time.perf_counter()
        kept = [rows.cpu() for rows in make(numbers, 0)]
        of_first = time.perf_counter() - begin
        margins = margin(kept[0]) if len(numbers) else torch.empty(0)
        tries = torch.where(margins < 0, -1, 0)
        for t in range(1, TRIES):
            held = (margins < 0).nonzero().flatten()
            if not len(held):
                break
            made = [rows.cpu() for rows in make([numbers[row] for row in held.tolist()], t)]
            found = margin(made[0])
            better = found > margins[held]
            rows = held[better]
            for old, new in zip(kept, made, strict=True):
                old[rows] = new[better]
            margins[rows] = found[better]
            tries[held[found >= 0]] = t
        seconds = torch.tensor([time.perf_counter() - begin, of_first], dtype=torch.float64)
        share = seconds / max(1, len(numbers) * distributed.world_size())  # all processes work at a time
        return *kept, tries, share.expand(len(numbers), 2)

    return make_held_back


def ratio_margin(images, training, groups, below, **search):
    """By how many percent the ratios of images, `memorization_ratio`, are not below a number: (N,).

    Other arguments as for `neighbors_of_groups`."""
    sq_distance, _ = neighbors_of_groups(images, training, groups, **search)
    return 100 * memorization_ratio(sq_distance).cpu() - below


@torch.no_grad()
def similarity_margin(images, space, training, above):
    """By how much the largest similarities of images to training images are not above a number: (N,).

    space: a `FeatureSpace`; training: (M, D), its features, of length 1."""
    features = torch.cat([unit_features(space, batch) for batch in images.split(space.batch_size)])
    return above - most_similar(features, training, 1)[0][:, 0].double().cpu()


def add_to_record(record, tries, seconds):
    """Add rows of `hold_back` to a record of images, a dict of JSON values that generate.json holds."""
    kept = record.get("held_back", {"tries": [], "timed": 0, "seconds": [0.0, 0.0]})
    total = [a + b for a, b in zip(kept["seconds"], seconds.sum(dim=0).tolist(), strict=True)]
    timed, tries = kept["timed"] + len(tries), kept["tries"] + tries.tolist()
    record["held_back"] = {"tries": tries, "timed": timed, "seconds": total}


def held_back(record):
    """What result.json says of the images that such a record is of, {} where none could be held back."""
    if "held_back" not in record:
        return {}
    kept = record["held_back"]
    tries, (of_all, of_first) = torch.tensor(kept["tries"]), kept["seconds"]
    numbers = {
        "share": (tries != 0).double().mean().item(),
        "made": int(torch.where(tries < 0, TRIES, tries + 1).sum()),
        "tries": TRIES,
        "after_tries": int((tries < 0).sum()),
        "seconds_per_image": of_all / kept["timed"],
        "seconds_per_image_without": of_first / kept["timed"],
    }
    return {"held_back": numbers}

"""All numbers of one set of images, as all_in.py writes them and the experiments publish them."""

import functools
import itertools
from pathlib import Path

import numpy as np
import torch

from score import fid, memorization
from score.inception import DIMENSION
from score.samples import content_order, evenly_spaced, read_npz
from score.swd import sliced_wasserstein
from utils import distributed
from utils.errors import DataError, UsageError, warn
from utils.files import atomic_write, file_hash
from utils.images import equal_images, fingerprint, firsts
from utils.name_lists import write_table

SPLITS = 10  # of the Inception score
FID_IMAGES = DIMENSION  # with fewer the covariance has no full rank
IS_IMAGES = 5000
SWD = "Karras et al. 2018"  # what scores that earlier versions have written lack
LEAST_HELDOUT = 4  # for two halves of two
ROUGH = 500  # held-out images, below which a floor is rough
COVER_IMAGES = 10_000  # at most, of precision and recall, which take the square of their number
SAMPLES_ORDER = 1  # changes whenever `by_content` would give other scores
IDENTITY = ("images_sha256", "training_sha256", "groups_sha256")  # what kept neighbours are of


def evaluate(
    images, training, heldout=None, folder=None, sets=None, hflip=False, names=None, groups=None,
    **search,
):  # fmt: skip
    """All numbers of a set of images in pixels, as JSON values, and their nearest training images.

    Args:
        images, training: (N, 3, H, W) and (M, 3, H, W), uint8. Training images that occur several times
            should be here once: a repeated one is its own second neighbour.
        heldout: (L, 3, H, W) uint8, real images that were not trained on. What they reach in the place
            of generated ones is the floor; None for no floor.
        folder: where neighbours are kept, and looked for before they are searched; None for nowhere.
        sets: the `identity` of images, training and groups, which folder needs.
        hflip: whether training flips images: then mirror images are searched for too.
        names: (N,) and (M,) str, of images and training, for nearest.csv in folder; None for none.
        groups: (M,) int64: neighbours are those of `neighbors_of_groups`; None for no groups.
        search: settings of `nearest_neighbors`.

    Returns:
        numbers: {"pixels": those of `measure_distances`; with hflip "mirrored", the `extraction` of
            training and mirror images; with held-out images "mq_above_floor", the shares below each
            threshold less those of held-out images, and `data_copying`}; in the same shape "holdout".
        nearest: (sq_distance, index), as `neighbors_of_groups` returns them."""
    search |= {"groups": groups}

    def measure(images, name, sets, named=None):
        path = folder and Path(folder) / f"{name}.npz"
        nearest = neighbors(images, training, path, sets, named, **search)
        numbers = memorization.measure_distances(*nearest, training, groups)
        if hflip:
            path = path and path.with_stem(f"{name}_mirrored")
            mirrored = neighbors(images.flip(-1), training, path, sets, k=2, **search)
            nearer = memorization.nearer_of_both(nearest, mirrored, groups)
            numbers["mirrored"] = memorization.extraction(*nearer, groups)
        return numbers, nearest

    named = dict(zip(("image_names", "training_names"), names, strict=True)) if names else None
    pixels, nearest = measure(images, "memorization", sets, named)
    if names and distributed.is_main():
        write_nearest(Path(folder) / "nearest.csv", *nearest, *names)
    numbers = {"pixels": pixels}
    if heldout is not None:
        sha256 = {"images_sha256": fingerprint(heldout)}
        floor, of_heldout = measure(heldout, "holdout", sets and sets | sha256)
        numbers["holdout"] = {"N": len(heldout), **sha256, "pixels": floor}
        shares = pixels["mq_fraction"].items()
        pixels["mq_above_floor"] = {p: share - floor["mq_fraction"][p] for p, share in shares}
        if distributed.is_main():
            pixels |= memorization.data_copying(images, training, heldout, nearest[0], of_heldout[0])
    return distributed.from_main(numbers), nearest


def count_repeats(group, M):
    """What result.json says of images that equal others.

    group: (M + L,) int64, of `equal_images`, of M training images and then L held-out ones."""
    L = len(group) - M
    is_repeat, is_leak = ~firsts(group), group[M:] <= group[:M].max()
    counts = {
        "repeated_training_images": is_repeat[:M].sum().item(),
        "heldout_in_training": is_leak.sum().item(),
        "repeated_heldout_images": (is_repeat[M:] & ~is_leak).sum().item(),
    }
    said = (
        f"of {M:,} training images equal others, and count once",
        f"of {L:,} held-out images equal training images, and are left out",
        f"of {L:,} held-out images equal other held-out ones, and count once",
    )
    lines = [f"{n:,} {what}" for n, what in zip(counts.values(), said, strict=True) if n]
    return {**counts, "repeats_warning": "; ".join(lines) or None}


def floor_warning(heldout):
    """What is to be said of floors of held-out images (L, 3, H, W), or None for none, or None."""
    if heldout is None or len(heldout) >= ROUGH:
        return None
    return f"{len(heldout)} held-out images: with less than {ROUGH} the floors are rough"


def identity(images, training):
    """What two sets of images are known by in the files about them."""
    return {"images_sha256": fingerprint(images), "training_sha256": fingerprint(training)}


def count_groups(groups, path):
    """What result.json says of groups (M,) of training images, or None, which a file has."""
    if groups is None:
        return {}
    sizes = groups.bincount()
    number = {"number": int((sizes > 1).sum()), "largest": int(sizes.max())}
    return {"groups": {"sha256": file_hash(path), **number}}


def write_nearest(path, sq_distance, index, image_names, training_names, similarity=None):
    """Write a table of the nearest training image of every image, the most alike first.

    sq_distance, index: (N, k), of `neighbors_of_groups`; without a second image d_1 / d_2 is empty.
    similarity: (N,), of features whose distances these are: a column more, by which rows are sorted."""
    ratio, d = memorization.memorization_ratio(sq_distance), sq_distance
    columns, rows = ["image", "nearest training image", "ratio", "d_1 / d_2"], []
    columns += [] if similarity is None else ["similarity"]
    for i in (ratio if similarity is None else -similarity).argsort(stable=True).tolist():
        second = d[i, 1].item() if d.shape[1] > 1 else 0.0
        quotient = f"{d[i, 0].item() / second:.6f}" if second > 0 else ""
        nearest = training_names[index[i, 0].item()]
        rows.append([image_names[i], nearest, f"{ratio[i].item():.6f}", quotient])
        rows[-1] += [] if similarity is None else [f"{similarity[i].item():.6f}"]
    write_table(path, columns, rows)


def neighbors(images, training, path=None, sets=None, named=None, device=None, **search):
    """`neighbors_by_all`, but read from the file `path` if it is of these sets, else kept there.

    named: {name of an array in the file: names of images}, or None."""
    known = distributed.from_main(known_neighbors(path, sets) if path and distributed.is_main() else None)
    nearest = known or memorization.neighbors_by_all(images, training, device=device, **search)
    sq_distance, index = nearest
    if path and distributed.is_main() and not (known and (not named or has_names(path, named))):
        ratio = memorization.memorization_ratio(sq_distance)
        arrays = {"ratio": ratio, "index": index, "sq_distance": sq_distance}
        arrays = {name: array.cpu().numpy() for name, array in arrays.items()}
        with atomic_write(path) as file:
            np.savez(file, **arrays, **sets, **(named or {}))
    return tuple(array.to(device or training.device) for array in nearest)


def has_names(path, named):
    """Whether a file holds arrays (N,) of these names, as `neighbors` writes them."""
    saved = read_npz(path, ("index", *named))
    return all(np.array_equal(saved.get(name), names) for name, names in named.items())


def known_neighbors(path, sets):
    """(sq_distance, index) in a file if it is there and of these sets, of `IDENTITY`, else None."""
    if not Path(path).exists():
        return None
    try:
        saved = read_npz(path, ("sq_distance", "index", *IDENTITY))
    except DataError as error:
        warn(f"warning: {error}: searching again")
        return None
    is_theirs = all(str(saved.get(key)) == str(sets.get(key)) for key in IDENTITY)
    return tuple(torch.from_numpy(saved[key]) for key in ("sq_distance", "index")) if is_theirs else None


class Quality:
    """The reference that generated images are scored against, made ready here, before any long work.

    `scored_with`, of JSON values, decides the scores of given images; `warning` is what is to be said of
    them, or None.

    Args:
        reference: (M, 3, H, W) uint8 real images.
        number: how many images will be scored.
        space: the `FeatureSpace` of distance, precision and recall; Inception's has a score, too.
        device: of the sliced Wasserstein distance.
        fid_cache: as `cache` of `reference_statistics`.
        heldout: (L, 3, H, W) uint8 real images that were not trained on, for floors; None for none.
        by_content: take images in their `content_order`, so that scores do not depend on their order.

    Raises:
        DataError: a cache that is of other images or cannot be written.
        UsageError: too few images."""

    def __init__(self, reference, number, space, device, fid_cache=None, heldout=None, by_content=False):
        least = SPLITS if space.logits else 2
        for name, given in (("generated", number), ("real", len(reference))):
            if given < least:
                raise UsageError(f"{given} {name} images: at least {least} are needed for scores")
        fewest = min(number, len(reference))
        wanted = [f"FID needs {FID_IMAGES:,} of each"] if fewest < FID_IMAGES else []
        wanted += [f"IS needs {IS_IMAGES:,} generated ones"] if number < IS_IMAGES else []
        self.warning = None
        if space.logits and wanted:
            numbers = f"{number:,} generated and {len(reference):,} real images"
            self.warning = f"{numbers}: {' and '.join(wanted)} to mean much"
            if distributed.is_main():
                warn(f"warning: {self.warning}")
        if heldout is not None and by_content:
            heldout = heldout[content_order(heldout)]
        self.space, self.device, self.heldout, self.by_content = space, device, heldout, by_content
        self.scored_with = fid.provenance_of(reference, space) | {"swd": SWD}
        self.scored_with |= {"samples_order": SAMPLES_ORDER} if by_content else {}
        if heldout is not None:
            self.scored_with["heldout"] = fingerprint(heldout)
        if fid_cache and (word := fid.taken_at_its_word(fid_cache)):
            self.scored_with["statistics"] = word
        self.reference = fid.reference_statistics(reference, space, fid_cache)
        self.all_real = reference[content_order(reference)] if by_content else reference
        # an equal image is the nearest other one, so repeats would cover nothing
        self.distinct = self.all_real[firsts(equal_images(self.all_real))]
        if len(self.distinct) < len(reference):
            self.scored_with["distinct"] = len(self.distinct)
        self.real = self.distinct[:COVER_IMAGES] if by_content else evenly(self.distinct, COVER_IMAGES)

    @functools.cached_property
    def real_features(self):
        """Those of evenly spaced reference images, or the first by content, on rank 0."""
        return in_order(self.batches(self.real))[0]

    def __call__(self, images):
        """Scores of uint8 (N, 3, H, W): "fid", "is", "is_std" or "fpd"; "precision", "recall", "swd".

        All processes take part, with the same images, and are given the scores. Precision and recall are
        of the first `COVER_IMAGES`, and of as many reference images."""
        space, order = self.space, content_order(images) if self.by_content else None
        real, batches, scores = self.real_features, self.batches(images, order), None
        features = (features for features, _ in batches)
        statistics = fid.mean_and_covariance(features, space.dimension, space.device)
        features, probs = in_order(batches)
        if distributed.is_main():
            scores = {space.distance: fid.frechet_distance(*statistics, *self.reference)}
            if space.logits:
                scores["is"], scores["is_std"] = fid.inception_score(probs, SPLITS)
            sets = (part.to(space.device) for part in (real, features[:COVER_IMAGES]))
            scores |= fid.precision_recall(*sets)
            in_turn = images if order is None else images[order]
            levels = sliced_wasserstein(self.all_real, in_turn, self.device, True)
            if levels:
                scores["swd"] = mean_of(levels)
                scores |= {f"swd_{side}": value for side, value in levels.items()}
        return distributed.from_main(scores) | self.floors(len(images))

    @functools.cache  # noqa: B019 - as long as the process lives there are one or two of these
    def floors(self, number):
        """What held-out images reach in the place of `number` generated ones: {} without any.

        "precision_floor" and "recall_floor" are against the reference, or where that has some of these
        images, of one half of them against the other; "swd_floor" is always between halves."""
        if self.heldout is None or len(self.heldout) < LEAST_HELDOUT:
            return {}
        halves = self.heldout[::2], self.heldout[1::2]
        of_reference = set(map(fingerprint, self.distinct))
        overlaps = any(fingerprint(image) in of_reference for image in self.heldout)
        real, others = halves if overlaps else (self.distinct, self.heldout)
        sets = evenly(real, COVER_IMAGES), evenly(others, number)
        features, floors = [in_order(self.batches(part[:COVER_IMAGES]))[0] for part in sets], None
        if distributed.is_main():
            covered = fid.precision_recall(*(part.to(self.space.device) for part in features))
            floors = {f"{name}_floor": share for name, share in covered.items()}
            levels = sliced_wasserstein(*(evenly(half, number) for half in halves), self.device)
            floors |= {"swd_floor": mean_of(levels)} if levels else {}
        return distributed.from_main(floors)

    def batches(self, images, order=None):
        batches = fid.feature_batches(images, self.space, order)
        return [(features.cpu(), probs.cpu()) for features, probs in batches]


def evenly(images, number):
    return images[evenly_spaced(len(images), number)]


def mean_of(levels):
    return sum(levels.values()) / len(levels)


def in_order(batches):
    """Features and probabilities of all processes' batches, in the order of the images, on rank 0."""
    gathered = distributed.gather(batches)
    if gathered is None:
        return None, None
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*gathered))
    return [torch.cat(parts) for parts in zip(*filter(None, in_turn), strict=True)]

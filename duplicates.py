"""Copies within a data set: pairs, groups, and which images to keep; nothing is deleted or moved.

    python duplicates.py --dataset=folder --data_root=my/images --duplicates_dir=results/duplicates
    python main.py --train --dataset=folder --data_root=my/images --keep_list=results/duplicates/keep.txt

With held-out images, of --heldout, --num_train or a test split, also those that training images leak into.
An interrupted search goes on, and one with more images than before compares the new ones only.
"""

import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from absl.flags import FLAGS
from PIL import Image

from dataset import image_folders
from score.duplicates import NEAR, NEIGHBORS, SIMILAR, Features, Lists, Pixels, greedy_groups, scored_pairs, search
from score.duplicates_report import write_duplicates_report
from score.features import COPIES
from score.record import say, take_directories
from score.samples import read_npz
from training import build, flags
from training.launch import pick_device, run
from training.recorded import default_resize
from utils import distributed
from utils.bar import progress_bar
from utils.errors import DataError, UsageError
from utils.files import atomic_write, file_hash, read_json, write_json
from utils.images import equal_images, fingerprint, firsts, keep_apart
from utils.name_lists import GROUP_COLUMNS, check_line_breaks, write_names, write_table

PAIR_COLUMNS = ("score", "kind", "part", "image", "other")
LISTS = ("pairs.csv", "groups.csv", "keep.txt")
EQUALS = 50  # at most, with which an image that equals others is paired
FINDER = (
    flags.text("duplicates_dir", "./results/duplicates", "directory of pairs.csv, groups.csv, keep.txt and the page"),
    flags.choice("features", "pixels", COPIES, "what images are compared in"),
    flags.number("near", NEAR, "score below which a pair is near, and grouped", 0.0, 1.0),
    flags.number("similar", SIMILAR, "score below which a pair is similar, at least --near", 0.0, 1.0),
    flags.text("captions", None, "captions of the images, as in text_to_image: groups with several are marked"),
)


def define(values):
    """Define the flags: those of main.py, and the finder's."""
    flags.define(values)
    flags.register(values, [FINDER])


def equal_pairs(equal, N):
    """Pairs of images with the same pixels, [(part, image, other)]; N: how many are training images.

    equal: (N + L,) int64, of `equal_images`. An image is paired with the first `EQUALS` of its equals."""
    members, pairs = defaultdict(list), []
    for image, number in enumerate(equal.tolist()):
        part = "train" if image < N else "heldout"
        others = members[number][:EQUALS]
        if part == "train":
            members[number].append(image)
        pairs += [(part, other, image) if part == "train" else (part, image, other) for other in others]
    return pairs


def near_pairs(images, distinct, N, space, path):
    """Pairs of distinct images, [(score, part, image, other)], the surest first, of scores below 1.

    images: (N + L, 3, H, W) uint8, N training images and those held out; distinct: numbers of those to
    compare; space: a `FeatureSpace`, or None for pixels; path: of what an earlier search has found."""
    digests = [f"{'train' if i < N else 'heldout'} {fingerprint(images[i])}" for i in distinct.tolist()]
    of_space = (space.name, space.preprocess, space.weights_hash) if space else ("pixels",)
    made_by = ", ".join([*filter(None, of_space), "version 1", f"{images.shape[-1]} pixels"])
    order, found = earlier_search(path, digests, made_by)
    distinct, digests = distinct[order], [digests[i] for i in order]
    compared = Features(images, distinct, space) if space else Pixels(images, distinct)
    is_key = distinct < N
    done = len(found[0].index) if found else 0
    say_time(compared, len(distinct), done)

    def save(found):
        arrays = {name: np.stack(column) for name, column in zip(Lists._fields, zip(*found, strict=True), strict=True)}
        with atomic_write(path) as file:
            np.savez(file, made_by=made_by, digests=digests[: len(found[0].index)], **arrays)

    found = search(compared, is_key, found, save)
    pairs, scores = scored_pairs(compared, found, is_key)
    rows = []
    for (a, b), score in zip(distinct[pairs].tolist(), scores.tolist(), strict=True):
        part, pair = ("train", sorted((a, b))) if a < N else ("heldout", (a, b))
        rows.append((round(score, 6), part, *pair))
    return sorted(rows)


def earlier_search(path, digests, made_by):
    """The order in which images are searched, and the `Lists` of the first of them, or None.

    What an earlier search has found at `path` is gone on with if all its images are still there."""
    order, where = list(range(len(digests))), {digest: i for i, digest in enumerate(digests)}
    if not path.exists():
        return order, None
    try:
        saved = read_npz(path, ["made_by", "digests", *Lists._fields])
    except DataError as error:
        say(f"{error}: searching again")
        return order, None
    earlier = [str(digest) for digest in saved["digests"]]
    if str(saved["made_by"]) != made_by or not where.keys() >= set(earlier):
        say(f"{path}: of other images or features: all are searched again")
        return order, None
    first = [where[digest] for digest in earlier]
    order = first + sorted(set(order) - set(first))
    columns = (map(torch.from_numpy, saved[name]) for name in Lists._fields)
    return order, [Lists(*lists) for lists in zip(*columns, strict=True)]


def say_time(compared, n, done):
    """Print how many images there are and, measured on a small part, how long their search will take."""
    known = f", {done:,} of them known from an earlier search" if done else ""
    queries, half, time_needed = compared.keys[:4096], 4096, ""
    if n >= 2 * half and n > done:
        worst = compared.nearest(queries, compared.keys[:half], NEIGHBORS)[0][:, -1]
        start = time.perf_counter()
        compared.nearest(queries, compared.keys[half : 2 * half], NEIGHBORS, worst)
        pairs = (n**2 - done**2) * len(compared.queries)
        seconds = (time.perf_counter() - start) / (len(queries) * half) * pairs
        time_needed = f", some {seconds / 60:.1f} min"
    print(f"searching {n:,} distinct images{known}{time_needed}", flush=True)


def groups_of(rows, equal, areas):
    """Groups of training images, the surest first: [[(image, score, kind)]], the one that is kept first.

    rows: near pairs, [(score, part, image, other)]; equal: (N,) int64, of `equal_images`; areas: a
    function of images, their files' pixels. Of a group the image with the most pixels is kept, of equal
    ones the first.
    """
    members = defaultdict(list)
    for image, number in enumerate(equal.tolist()):
        members[number].append(image)
    near = [(score, int(equal[a]), int(equal[b])) for score, part, a, b in rows if part == "train"]
    numbers = sorted({n for _, a, b in near for n in (a, b)} | {n for n, images in members.items() if len(images) > 1})
    size = areas([image for n in numbers for image in members[n]])
    for n in numbers:
        members[n].sort(key=lambda image: (-size[image], image))
    order = sorted(numbers, key=lambda n: (-size[members[n][0]], members[n][0]))
    pairs = torch.tensor([(a, b) for _, a, b in near], dtype=torch.int64).view(-1, 2)
    nearest = greedy_groups(pairs, torch.tensor([score for score, *_ in near], dtype=torch.float64), order)
    groups = {n: [(image, 0.0, "exact") for image in members[n]] for n in order if n not in nearest}
    for n, (kept, score) in nearest.items():
        groups[kept] += [(image, score, "near") for image in members[n]]
    groups = [[group[0], *sorted(group[1:], key=lambda row: (row[1], row[0]))] for group in groups.values()]
    return sorted(filter(lambda group: len(group) > 1, groups), key=lambda group: (group[-1][1], group[0][0]))


def areas_of(images, names, folders):
    """{image: width times height of its file}, 1 of data sets that are no folders."""
    if not folders:
        return dict.fromkeys(images, 1)
    areas = {}
    for image in progress_bar(images, "sizes", unit="image", delay=1):
        path = folders[0] / names[image]
        with Image.open(path if path.exists() else folders[0] / names[image].rsplit(" copy ", 1)[0]) as picture:
            areas[image] = picture.width * picture.height
    return areas


def captions_of(names):
    """{image: its captions} of --captions, or {}."""
    if not FLAGS.captions:
        return {}
    from text_to_image.data import match, read_captions  # imports diffusers, which takes seconds

    texts = match(read_captions(FLAGS.captions), list(names), FLAGS.captions, FLAGS.data_root)
    return dict(enumerate(texts))


def conflicts(group, labels, captions):
    """What the images of a group do not agree in: "labels", "captions", both or nothing, in words."""
    images = [image for image, *_ in group]
    of_labels = {int(labels[image]) for image in images}
    of_captions = {tuple(captions.get(image, ())) for image in images}
    return " and ".join(what for what, values in (("labels", of_labels), ("captions", of_captions)) if len(values) > 1)


def main():
    if distributed.world_size() > 1:
        raise UsageError("duplicates.py is one process: start it without torchrun")
    if FLAGS.similar < FLAGS.near:
        raise UsageError(f"--similar={FLAGS.similar}: below --near={FLAGS.near}, whose pairs are similar too")
    folder, start = Path(FLAGS.duplicates_dir), time.perf_counter()
    device = pick_device(FLAGS.device)
    in_pixels = FLAGS.features == "pixels"
    space = None if in_pixels else build.copies_space(FLAGS, FLAGS.features, device, "features")
    default_resize(FLAGS)
    folders = image_folders(FLAGS.dataset, FLAGS.data_root)
    keep_apart(folders, {"heldout": FLAGS.heldout}, {"duplicates_dir": folder})
    data = build.dataset(FLAGS)
    images, names, N = data.train.images, list(data.train.names), len(data.train.images)
    check_line_breaks(folder / "keep.txt", names)
    captions = captions_of(names)
    if data.heldout:
        images, names = torch.cat([images, data.heldout.images]), names + list(data.heldout.names)

    with take_directories({"duplicates_dir": folder}):
        check_lists(folder)
        equal = equal_images(images)
        distinct = torch.cat([firsts(equal[:N]), firsts(equal[N:])]) if data.heldout else firsts(equal)
        scored = near_pairs(images, distinct.nonzero().flatten(), N, space, folder / "search.npz")
        pairs = [(0.0, "exact", *pair) for pair in equal_pairs(equal, N)]
        for score, *pair in scored:
            if score < FLAGS.similar and equal[pair[1]] != equal[pair[2]]:
                pairs.append((score, "near" if score < FLAGS.near else "similar", *pair))
        groups = groups_of(
            [row for row in scored if row[0] < FLAGS.near], equal[:N], lambda images: areas_of(images, names, folders)
        )
        dropped = {image for group in groups for image, *_ in group[1:]}
        said = [conflicts(group, data.train.labels, captions) for group in groups]

        result = {
            "images": N, "heldout_images": len(images) - N, "features": FLAGS.features,
            "near": FLAGS.near, "similar": FLAGS.similar,
            "pairs": dict(Counter(f"{part} {kind}" for _, kind, part, *_ in pairs)),
            "groups": len(groups), "largest_group": max(map(len, groups), default=0),
            "kept": N - len(dropped), "not_kept": len(dropped), "conflicts": sum(map(bool, said)),
            "leaked": len({a for _, kind, part, a, _ in pairs if part == "heldout" and kind != "similar"}),
            "histogram": histogram([score for score, *_ in scored]),
            "training_sha256": fingerprint(data.train.images), "flags": flags.as_dict(FLAGS),
            "seconds": round(time.perf_counter() - start, 1),
        }  # fmt: skip
        write_json(folder / "result.json", result)  # without hashes, since the lists are not whole yet
        write_table(
            folder / "pairs.csv", PAIR_COLUMNS,
            [(f"{score:.6f}", kind, part, names[a], names[b]) for score, kind, part, a, b in pairs],
        )  # fmt: skip
        write_table(folder / "groups.csv", GROUP_COLUMNS, group_rows(groups, names))
        write_names(folder / "keep.txt", [name for i, name in enumerate(names[:N]) if i not in dropped])
        write_duplicates_report(folder / "duplicates.html", result, images, names, pairs, groups, said)
        result["sha256"] = {name: file_hash(folder / name) for name in LISTS}
        write_json(folder / "result.json", result)
    print_summary(result, folder)


def check_lists(folder):
    """Raise a DataError if a file would be replaced that is of others or was corrected by hand."""
    path, hashes = folder / "result.json", {}
    advice = "move it elsewhere, or choose another --duplicates_dir"
    if path.exists():
        known = read_json(path)
        if not isinstance(known, dict) or "duplicates_dir" not in known.get("flags", {}):
            raise DataError(f"{path}: not written by duplicates.py: {advice}")
        if "sha256" not in known:
            return  # an earlier call was killed while it wrote them
        hashes = known["sha256"]
    for name in LISTS:
        file = folder / name
        if file.exists() and file_hash(file) != hashes.get(name):
            what = "was changed since it was made" if hashes else "not written by duplicates.py"
            raise DataError(f"{file}: {what}: {advice}")


def group_rows(groups, names):
    """The rows of groups.csv, the kept image of each group first."""
    rows = []
    for number, ((kept, *_), *others) in enumerate(groups):
        rows.append((number, names[kept], "yes", "", ""))
        rows += [(number, names[image], "no", f"{score:.6f}", kind) for image, score, kind in others]
    return rows


def histogram(scores):
    """How many of the scores are in each hundredth from 0 to 1."""
    return np.histogram(scores, bins=100, range=(0, 1))[0].tolist()


def print_summary(result, folder):
    """What a person wants to know first."""
    counts = ", ".join(f"{count:,} {kind}" for kind, count in result["pairs"].items()) or "none"
    print(f"pairs: {counts}")
    print(f"  {result['groups']:,} groups, the largest of {result['largest_group']}")
    print(f"  keep.txt keeps {result['kept']:,} of {result['images']:,} training images; nothing was deleted")
    if result["heldout_images"]:
        what = f"{result['leaked']:,} of {result['heldout_images']:,} held-out images"
        print(f"  {what} are near to training images")
    print(f"  written to {folder}: look at {folder / 'duplicates.html'}")


if __name__ == "__main__":
    run(main, define)

"""Copies within a data set: an exact search, the scores of pairs, groups of copies that form no chains.

The score of a pair is its squared distance over the mean of that to the 50 nearest images, as the ratio of
Liu et al. 2024; a copy has a small one. Without a network, distances are those of pixels less their mean
and divided by their norm: of images pooled to 16x16 to find candidates, of shifted crops to score these.
"""

import itertools
from collections import defaultdict, namedtuple

import numpy as np
import torch
from torch.nn.functional import avg_pool2d

from score.memorization import NEIGHBORS, nearest_neighbors
from score.similarity import embed, most_similar, squared_distance
from utils.bar import progress_bar
from utils.images import equal_images, moved_by, resized

# of scores, in pixels: below the first nearly all pairs are copies, below the second most copies are
NEAR, SIMILAR = 0.3, 0.5
SIDE = 32  # images are compared at this size, in pixels
LEVELS = 32  # of an 8-bit code to a standard deviation
UNIT = 255**2 / (LEVELS**2 * 3 * (SIDE // 2) ** 2)  # of distances of codes: images have length 1
MIRROR = 1.5  # a mirrored pair counts as so much farther: it had a second chance to be near by accident
LEAST = 0.25  # of the median scale: where 50 neighbours are copies too, their mean is no scale
CANDIDATE = 0.9, 0.5  # farther than these shares of the mean and of the median scale no pair is scored
BLOCK = 4096  # images between two saves
PAIRS = 256  # scored at once

# of every image, nearest first: sq_distance (N, 50) float64, infinite where there are fewer; index int64
Lists = namedtuple("Lists", "sq_distance index")


def standard_images(images):
    """uint8 images (N, 3, H, W) at the size that they are compared at: (N, 3, 32, 32)."""
    return images if images.shape[2:] == (SIDE, SIDE) else resized(images, SIDE)


def codes_of(images):
    """Pixels of `standard_images`, pooled, less their mean, over their deviation: uint8 (N, 3, 16, 16).

    128 is the mean, 32 levels are a standard deviation; an image of one colour is all 128."""
    pooled = 4 * avg_pool2d(images.double(), 2)  # integers: their sums are exact
    deviation, mean = torch.std_mean(pooled, dim=(1, 2, 3), correction=0, keepdim=True)
    codes = LEVELS * (pooled - mean) / deviation.clamp(min=1e-9) + 128
    return codes.round().clamp(0, 255).to(torch.uint8)


def aligned_distance(a, b, shift):
    """The least squared distance of crops of two images of which one is moved by up to `shift` pixels.

    Every crop is pooled by 2, less its mean and divided by its norm; one of one colour is like no other.

    a, b: (B, 3, 32, 32) uint8. Returns (B,) float32 in [0, 4], the same for (b, a)."""
    a, b = crops_of(a, shift), crops_of(b, shift)
    middle = a.shape[1] // 2
    cosines = [torch.bmm(b, a[:, middle, :, None]), torch.bmm(a, b[:, middle, :, None])]
    return (2 - 2 * torch.cat(cosines, dim=1).amax(dim=(1, 2))).clamp(min=0)


def crops_of(images, shift):
    """Nine crops of images (B, 3, 32, 32), from the upper left to the lower right: (B, 9, D) of length 1."""
    rows = images.float()
    rows = rows[:, :, :-1] + rows[:, :, 1:]
    pooled, L, places = rows[..., :-1] + rows[..., 1:], SIDE - 2 * shift - 1, (0, shift, 2 * shift)
    cut = [pooled[:, :, top : top + L : 2, left : left + L : 2] for top in places for left in places]
    cut = torch.stack(cut, dim=1).flatten(2)
    cut -= cut.mean(dim=2, keepdim=True)
    return cut / cut.norm(dim=2, keepdim=True).clamp(min=1e-3)


class Pixels:
    """What images are compared by without a network.

    images: (N, 3, H, W) uint8; rows: int64, those of them that are compared. Every image is searched for
    as it is and mirrored; one of less than 16 pixels, in which a pixel is more than codes let pass, also
    moved by a pixel in all eight directions."""

    unit = UNIT

    def __init__(self, images, rows):
        self.shift = max(2, SIDE // images.shape[-1])
        if images.shape[2:] != (SIDE, SIDE):  # else they are not copied
            images = torch.cat([standard_images(images[part]) for part in rows.split(BLOCK)])
            rows = torch.arange(len(rows))
        self.images, self.rows = images, rows  # of the standard size, and which of them are compared
        moves = itertools.product((-self.shift, 0, self.shift), repeat=2) if self.shift > 2 else [(0, 0)]
        moved = {move: self.moved_codes(*move) for move in moves}
        self.keys, self.queries = moved[0, 0], []
        for codes in (self.keys, *(codes for move, codes in moved.items() if any(move))):
            self.queries += [(False, codes), (True, codes.flip(-1))]

    def moved_codes(self, down, right):
        """`codes_of` all images, moved by so many pixels."""
        parts = self.rows.split(BLOCK)
        return torch.cat([codes_of(moved_by(self.images[part], down, right)) for part in parts])

    def nearest(self, queries, keys, k, below=None):
        """The k nearest keys nearer than `below`, (n,) or None: sq_distance and index, (n, k), of codes.

        Their distances are integers / 255^2, and UNIT times that between images of length 1."""
        return nearest_neighbors(queries, keys, k, below=below)

    def score(self, first, second, is_mirrored):
        """Squared distances (P,) of pairs of images, by their numbers."""
        parts = []
        for pair in zip(first.split(PAIRS), second.split(PAIRS), strict=True):
            a, b = (self.images[self.rows[rows]] for rows in pair)
            parts.append(aligned_distance(a.flip(-1) if is_mirrored else a, b, self.shift))
        return torch.cat(parts)


class Features:
    """What images are compared by in a `score.features.FeatureSpace`; others as for `Pixels`."""

    unit = 1.0

    def __init__(self, images, rows, space):
        images = images[rows]
        self.keys = embed(space, images)
        self.queries = [(False, self.keys), (True, embed(space, images.flip(-1)))]

    def nearest(self, queries, keys, k, below=None):
        similarity, index = most_similar(queries, keys, k)
        return squared_distance(similarity), index

    def score(self, first, second, is_mirrored):
        return squared_distance((self.queries[is_mirrored][1][first] * self.keys[second]).sum(dim=1))


def nearer(lists, others, k=NEIGHBORS):
    """The k nearest of two lists of every image, `Lists` each."""
    sq_distance, index = (torch.cat(columns, dim=1) for columns in zip(lists, others, strict=True))
    order = sq_distance.argsort(dim=1, stable=True)[:, :k]
    return Lists(sq_distance.gather(1, order), index.gather(1, order))


def nothing(n):
    """The `Lists` of n images that have no neighbours yet."""
    shape = (n, NEIGHBORS)
    return Lists(torch.full(shape, torch.inf, dtype=torch.float64), torch.full(shape, -1))


def search(compared, is_key, found=None, save=None, block=BLOCK):
    """The 50 nearest training images of every image, itself left out, and of all its `queries`.

    Every pair is compared. Images come in blocks: a block is searched for among all before it and itself,
    and those before it look through the block. So a search can be gone on with, with more images too.

    Args:
        compared: `Pixels` or `Features` of N images.
        is_key: (N,) bool, which are training images; the first is one.
        found: the `Lists` of the first images for every query, of an earlier search.
        save: called with the lists after every block.

    Returns:
        the `Lists` of all images for every query, those of the images as they are first."""
    N, numbers = len(is_key), torch.arange(len(is_key))
    found = list(found or (nothing(0) for _ in compared.queries))
    done = len(found[0].index)
    with progress_bar(total=N**2, initial=done**2, desc="searching", unit="pair", unit_scale=True) as bar:
        for start in range(done, N, block):
            end = min(start + block, N)
            before, new = numbers[:start], numbers[start:end]
            for way, (_, queries) in enumerate(compared.queries):

                def look(rows, keys, lists, queries=queries):
                    """The `Lists` of the images `rows`, with the nearer ones of the images `keys`."""
                    if not len(rows) or not len(keys):
                        return lists
                    worst = lists.sq_distance[:, -1]
                    below = worst if worst.isfinite().all() else None
                    sq_distance, place = compared.nearest(queries[rows], compared.keys[keys], NEIGHBORS + 1, below)
                    index = keys[place].masked_fill(place < 0, -1)
                    is_itself = index == rows[:, None]
                    return nearer(lists, Lists(sq_distance.masked_fill(is_itself, torch.inf), index))

                old = look(before, new[is_key[new]], found[way])
                own = look(new, numbers[:end][is_key[:end]], nothing(len(new)))
                found[way] = Lists(*(torch.cat(columns) for columns in zip(old, own, strict=True)))
            bar.update(end**2 - start**2)
            if save:
                save(found)
    return found


def scales(lists, is_key):
    """What the distances of an image are divided by, (N,): the mean to its 50 nearest, or more.

    At least a quarter of the median of all training images': else 50 copies of one image would be far
    from each other.

    Returns:
        scale (N,), mean (N,), and the median."""
    is_there = lists.sq_distance.isfinite()
    mean = lists.sq_distance.where(is_there, 0).sum(dim=1) / is_there.sum(dim=1).clamp(min=1)
    median = mean[is_key].median()
    return mean.clamp(min=LEAST * median), mean, median


def scored_pairs(compared, found, is_key):
    """All pairs that might be alike: their images' numbers (P, 2) int64, and scores (P,) below 1.

    compared, found, is_key: as for and of `search`. The surest pairs are first; of two training images the
    one with the lower number is, else that which is held out. No pair is there twice."""
    N, (scale, mean, median) = len(is_key), scales(found[0], is_key)
    reach = torch.maximum(CANDIDATE[0] * mean, CANDIDATE[1] * median)
    addresses, scores = [], []
    for (is_mirrored, _), lists in zip(compared.queries, found, strict=True):
        row, column = (lists.sq_distance <= reach[:, None]).nonzero(as_tuple=True)
        other = lists.index[row, column]
        swap = is_key[row] & (other < row)
        first, second = other.where(swap, row), row.where(swap, other)
        address = (first * N + second).unique()
        first, second = address // N, address % N
        sq_distance = compared.score(first, second, is_mirrored)
        both = compared.unit * torch.minimum(scale[first], scale[second]).where(is_key[first], scale[first])
        addresses.append(address)
        factor = MIRROR if is_mirrored else 1.0
        scores.append((factor * sq_distance / both).masked_fill(sq_distance == 0, 0.0))
    address, score = torch.cat(addresses), torch.cat(scores)
    order = torch.from_numpy(np.lexsort((score, address)))
    address, score = address[order], score[order]
    is_best = address.diff(prepend=torch.tensor([-1])) > 0  # the nearer of an image and its mirror image
    address, score = address[is_best & (score < 1)], score[is_best & (score < 1)]
    order = score.argsort(stable=True)
    return torch.stack([address // N, address % N], dim=1)[order], score[order]


def count_near(images, training):
    """How many of uint8 images (N, 3, H, W) are near, in pixels, to one of training (M, 3, H, W)."""
    N, M = len(images), len(training)
    both, rows = torch.cat([training, images]), torch.arange(M, M + N)
    compared = Pixels(both, torch.arange(M + N))
    of_training = Pixels(training, torch.arange(M))
    of_training.queries = of_training.queries[:1]  # they give the scale of scores only
    lists = search(of_training, torch.ones(M, dtype=torch.bool))
    lists += [nothing(M)] * (len(compared.queries) - 1)
    found = []
    for (_, queries), own in zip(compared.queries, lists, strict=True):
        nearest = nearer(nothing(N), Lists(*compared.nearest(queries[rows], compared.keys[:M], NEIGHBORS)))
        found.append(Lists(*(torch.cat(columns) for columns in zip(own, nearest, strict=True))))
    pairs, score = scored_pairs(compared, found, torch.arange(M + N) < M)
    equal = equal_images(both)
    is_near = torch.isin(equal, equal[:M])
    is_near[pairs[score < NEAR, 0]] = True
    return is_near[M:].sum().item()


def greedy_groups(pairs, score, order):
    """Groups in which every image is in a pair with the one that is kept: no chains.

    Images are gone through in `order`, numbers; one that is in no pair with a kept image is kept. Each of
    the others goes to the kept image that its score is lowest with.

    pairs: (P, 2) int64; score: (P,). Returns {image: (kept image, score)} of those that are not kept."""
    near = defaultdict(dict)
    for (a, b), s in zip(pairs.tolist(), score.tolist(), strict=True):
        near[a][b] = near[b][a] = s
    kept = set()
    for image in order:
        if kept.isdisjoint(near.get(image, ())):
            kept.add(image)
    nearest = {}
    for image in order:
        if image not in kept:
            s, to = min((s, other) for other, s in near[image].items() if other in kept)
            nearest[image] = to, s
    return nearest

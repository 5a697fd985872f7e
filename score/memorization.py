"""How much of the training set generated images give away: an exact search for neighbours, and figures.

Distances are squared L2 distances of images in [0, 1], summed over all 3*H*W values, d_1 <= d_2 <= ...
for each image.

Pixels 0..255 become codes around the middle grey, v = 255 x - 128. Products of codes and their sums are
integers, exact on every device and in every order of summation, and so are the squared distances |a|^2 +
|b|^2 - 2 a.b. (distance, index) packed into one integer has no ties: nothing else is needed.
"""

import functools
import time

import numpy as np
import torch

from score.features import pooled
from utils import distributed
from utils.bar import progress_bar

NEIGHBORS = 50  # of the mean in the ratio
THRESHOLDS = (15, 20, 30, 40, 50, 60, 70, 80, 90)  # of MQ, in percent
CELLS, CELL_IMAGES = 30, 20  # of C_T: at most so many cells, and images that a cell needs

LEVELS = 255
MIDDLE = 128
# products of two codes, of at most 2^14 each, whose sums are exact
FLOAT32_TERMS = 2**10
INT32_TERMS = 2**16
LIST_ENTRIES = 2**26  # neighbours that are listed at a time: large groups need many per image


@torch.no_grad()
def nearest_neighbors(
    generated, training, k=NEIGHBORS, batch_generated=2048, batch_training=4096, device=None,
    progress=False, below=None,
):  # fmt: skip
    """The k nearest training images of every generated image, by squared L2 distance in [0, 1].

    Args:
        generated: (N, 3, H, W), uint8 that stands for value / 255, or float that is exactly n / 255 with
            n = 0..255.
        training: (M, 3, H, W), likewise.
        k: how many; all M if there are fewer.
        batch_generated, batch_training: images per matrix product; memory grows with them, never with N
            * M.
        device: where to compute; default: that of `training`. Images that are elsewhere come block by
            block.
        progress: show a bar.
        below: (N,) float64, only training images nearer than that are wanted; None: all are. It is faster.

    Returns:
        sq_distance (N, k) float64, ascending, integers / 255^2, and index (N, k) int64, equal distances
        by lower index, on the device. A copy has distance 0. Nothing depends on the batch sizes. Where
        fewer are nearer than `below`, infinity and -1.

    Raises:
        ValueError: an empty set, values between the levels, different image shapes."""
    if generated.shape[1:] != training.shape[1:]:
        shapes = " and of ".join(str(tuple(images.shape[1:])) for images in (generated, training))
        raise ValueError(f"images of {shapes} have no distance")
    device = torch.device(device or training.device)
    generated, training = levels_of(generated, "generated"), levels_of(training, "training")
    integers = integers_are_faster(training.shape[1], device)
    k = min(k, len(training))
    size = max(batch_training, k)
    batches = generated.split(batch_generated)
    # per image, ascending: squared distance less |a|^2, times the number of training images, plus index
    best = [torch.empty(len(batch), 0, dtype=torch.int64, device=device) for batch in batches]
    norm_generated = squared_norms(generated, device)
    if below is not None:
        below = (below.to(device) * LEVELS**2).round().long()
        packed = (below - norm_generated) * len(training) + len(training) - 1
        best = list(packed[:, None].expand(-1, k).split(batch_generated))
    allowed, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    settings = {"desc": "nearest neighbours", "unit": "image", "disable": not progress}
    with progress_bar(total=len(training), **settings) as bar:
        for start in range(0, len(training), size):
            block = training[start : start + size].to(device)
            keys, norm = slices_of(block, integers), squared_norms(block, device)
            for i, batch in enumerate(batches):
                products = multiply(slices_of(batch.to(device), integers), keys, integers)
                best[i] = update_best(best[i], products, norm, start, *training.shape, k)
            bar.update(len(block))
    torch.backends.cuda.matmul.allow_tf32 = allowed
    best = torch.cat(best)
    sq_distance, index = norm_generated[:, None] + best // len(training), best % len(training)
    if below is None:
        return sq_distance.double() / LEVELS**2, index
    is_wanted = sq_distance < below[:, None]
    return (sq_distance.double() / LEVELS**2).where(is_wanted, torch.inf), index.where(is_wanted, -1)


def neighbors_by_all(generated, training, groups=None, **settings):
    """`neighbors_of_groups`, each process searching for its part; all are given the whole."""
    part = generated[distributed.share(len(generated))]
    # a process without images searches for one, to know the shape of nothing
    nearest = neighbors_of_groups(part if len(part) else generated[:1], training, groups, **settings)
    return tuple(distributed.join_rows(rows[: len(part)]) for rows in nearest)


def neighbors_of_groups(generated, training, groups=None, k=NEIGHBORS, **settings):
    """`nearest_neighbors`, but d_2 .. d_k are of other groups than the nearest training image's.

    groups: (M,) int64, the group of every training image; None: each is a group of its own.

    Returns `others_left_out` of (sq_distance, index)."""
    searched, found = k + largest_group(groups) - 1, []
    for part in generated.split(max(1, LIST_ENTRIES // searched)):
        nearest = nearest_neighbors(part, training, searched, **settings)
        found.append(others_left_out(*nearest, groups, k))
    return tuple(torch.cat(rows) for rows in zip(*found, strict=True))


def largest_group(groups):
    """The size of the largest group of (M,) int64; 1 of None, where each image is one of its own."""
    return 1 if groups is None else int(groups.bincount().max())


def group_of(index, groups):
    """The groups of training images by their index, int64 of any shape; the index without groups."""
    return index if groups is None else groups.to(index.device)[index]


def others_left_out(values, index, groups, k):
    """The first k of each row, without others of the group of the first.

    values, index: (N, m) distances or similarities and training images, the nearest first, m at least k
    plus the size of the largest group less 1, or all images. groups: as for `neighbors_of_groups`.

    Returns values and index (N, k); NaN and -1 where a row has fewer."""
    group = group_of(index, groups)
    left_out = group == group[:, :1]
    left_out[:, 0] = False
    order = left_out.int().argsort(dim=1, stable=True)[:, :k]
    values, index, left_out = (rows.gather(1, order) for rows in (values, index, left_out))
    return values.masked_fill(left_out, torch.nan), index.masked_fill(left_out, -1)


def update_best(best, products, norm, start, M, D, k):
    """The k best (n, k) of the best so far and a block of training images, from number `start` of M on.

    products: a.b (n, m) of codes of D values; norm: |b|^2 (m,). All are integers."""
    # |b|^2 - 2 a.b stays below 3 * 2^14 * D
    dtype = torch.int32 if 3 * 2**14 * D < 2**31 else torch.int64
    score = products.to(dtype).mul_(-2).add_(norm.to(dtype))
    worst = (best[:, -1:] // M).to(dtype) if best.shape[1] else None
    packed = improvements(score, worst, start, M)
    return torch.cat([best, packed], dim=1).topk(k, dim=1, largest=False).values


def improvements(score, worst, start, M):
    """The scores (n, m) of a block below `worst` (n, 1), packed with their index: int64 (n, w), padded.

    A score equal to `worst` loses its tie, since the indices of later blocks are higher. Few scores are
    below it after the first blocks, and the rest need not be sorted."""
    better = None if worst is None else score < worst
    if better is None or int(better.count_nonzero()) > better.numel() // 16:
        return score.long() * M + torch.arange(start, start + score.shape[1], device=score.device)
    row, column = better.nonzero(as_tuple=True)
    count = torch.bincount(row, minlength=len(score))
    place = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    packed = row.new_full((len(score), int(count.max())), torch.iinfo(torch.int64).max)
    packed[row, place] = score[row, column].long() * M + (start + column)
    return packed


def signed(images):
    """uint8 as int8 around the middle: one bit of every byte changes."""
    return (images ^ MIDDLE).view(torch.int8)


def squared_norms(images, device):
    """|v|^2 of `signed` images (n, D), uint8: int64 (n,) on the device."""
    chunks = (signed(rows.to(device)).float() for rows in images.split(256))
    return torch.cat([rows.square_().sum(dim=1, dtype=torch.float64) for rows in chunks]).long()


def slices_of(images, integers):
    """`signed` images (n, D), uint8, in slices of exact products: int8, or float32 for floats."""
    parts = signed(images).split(INT32_TERMS if integers else FLOAT32_TERMS, dim=1)
    return [part.contiguous() if integers else part.float() for part in parts]


def multiply(a, b, integers):
    """a b^T of `slices_of` (n, D) and (m, D): int32, or int64 where sums may exceed that.

    torch._int_mm is the only product of 8-bit integers that torch has. On processors with units for them
    it takes a third of the time; not on GPUs, where it wants other shapes than images have."""
    dtype = torch.int32 if sum(part.shape[1] for part in a) <= INT32_TERMS else torch.int64
    parts = zip(a, b, strict=True)
    products = (torch._int_mm(x, y.T) if integers else x @ y.T for x, y in parts)
    return functools.reduce(torch.add, (product.to(dtype) for product in products))


def integers_are_faster(D, device):
    """Whether this machine multiplies D codes faster as integers, as those with 8-bit units do."""
    if device.type != "cpu":
        return False
    codes, seconds = torch.zeros(256, min(D, INT32_TERMS), dtype=torch.uint8), {}
    for integers in (True, False, True, False):  # the second time counts
        start = time.perf_counter()
        multiply(slices_of(codes, integers), slices_of(codes, integers), integers)
        seconds[integers] = time.perf_counter() - start
    return seconds[True] < seconds[False]


def levels_of(images, name):
    """Images (N, 3, H, W) as uint8 levels (N, 3*H*W); a ValueError for others, which it calls `name`."""
    is_uint8 = images.dtype == torch.uint8
    if images.ndim != 4 or 0 in images.shape or not (is_uint8 or images.is_floating_point()):
        what = f"{images.dtype} {tuple(images.shape)}"
        raise ValueError(f"{name} must be uint8 or float (N, 3, H, W), not {what}")
    if is_uint8:
        return images.flatten(1)
    levels = (images * LEVELS).round().clamp(0, LEVELS).to(torch.uint8)
    if not torch.equal(levels.to(images.dtype) / LEVELS, images):
        advice = "round them to uint8, as all_in.py does"
        raise ValueError(f"{name} holds values other than 0/255 .. 255/255: {advice}")
    return levels.flatten(1)


def memorization_ratio(sq_distance):
    """ratio(g) = d_1 / mean(d_1 .. d_50) of Liu et al. 2024: (N,) in [0, 1], 0 where the mean is.

    sq_distance: (N, k) ascending, k = 50, or as many as there are; NaN where a row has fewer."""
    mean = sq_distance.nanmean(dim=1) if sq_distance.isnan().any() else sq_distance.mean(dim=1)
    return torch.where(mean > 0, sq_distance[:, 0] / mean, torch.zeros_like(mean))


def memorized_quantity(ratio, thresholds=THRESHOLDS):
    """MQ of Liu et al. 2024: {p: how many of the ratios (N,) are below p percent}."""
    return {p: int((100 * ratio < p).sum()) for p in thresholds}


def shares_below(ratio):
    """MQ as shares of the images, at the published thresholds and, a list, at 0, 1, ... 100 percent."""
    fractions = {str(p): count / len(ratio) for p, count in memorized_quantity(ratio).items()}
    curve = memorized_quantity(ratio, range(101)).values()
    return {"mq_fraction": fractions, "mq_curve": [count / len(ratio) for count in curve]}


def closer_than_third(sq_distance):
    """Which generated images have sqrt(d_1) / sqrt(d_2) < 1/3 (Gu et al. 2023): bool (N,).

    sq_distance: (N, k) ascending. An exact copy always counts, also where it copies a repeated training
    image (d_1 = d_2 = 0) or where there is only one (k = 1 or NaN); without a d_2 nothing else counts.
    """
    copies = sq_distance[:, 0] == 0
    return copies if sq_distance.shape[1] == 1 else copies | (9 * sq_distance[:, 0] < sq_distance[:, 1])


def extraction(sq_distance, index, groups=None):
    """f_mem, the share of images that are `closer_than_third`, and how many groups they are of.

    Arguments as `neighbors_of_groups` takes and returns them."""
    memorized = closer_than_third(sq_distance)
    extracted = len(group_of(index[memorized, 0], groups).unique())
    return {"f_mem": memorized.double().mean().item(), "extracted": extracted}


def nearer_of_both(nearest, mirrored, groups=None):
    """The two nearest training images of two groups, as near as they or their mirror images.

    Returns sq_distance and index, (N, 2). Where there is one group only, the nearest is both.

    Args:
        nearest: (sq_distance, index) of generated images, as of `neighbors_of_groups` with k >= 2.
        mirrored: the same of the mirrored generated images, which are as far from a training image as
            the generated ones from its mirror image.
        groups: as there."""
    pairs = zip(nearest, mirrored, strict=True)
    sq_distance, index = (torch.cat([a[:, :2], b[:, :2]], dim=1) for a, b in pairs)
    order = sq_distance.argsort(dim=1, stable=True)
    sq_distance, index = sq_distance.gather(1, order), index.gather(1, order)
    # of these four, two are of each search, so one of another group than the first is among them
    group = group_of(index, groups)
    second = (group != group[:, :1]).int().argmax(dim=1, keepdim=True)
    columns = torch.cat([torch.zeros_like(second), second], dim=1)
    return sq_distance.gather(1, columns), index.gather(1, columns)


def authenticity(sq_distance, index, training, groups=None):
    """AuthPct of Alaa et al. 2022 ("How Faithful is your Synthetic Data?") in pixels, a share in [0, 1].

    A generated image is authentic if it is farther from its nearest training image than that one is from
    its own nearest of another group; where there is only one, nothing is. All processes take part.

    sq_distance, index, groups: as `neighbors_of_groups` returns and takes them for `training`, which is
    (M, 3, H, W)."""
    if len(training) == 1:
        return 0.0
    nearest, of_generated = index[:, 0].unique(return_inverse=True)
    images = training[nearest.to(training.device)]
    to_training, itself = neighbors_by_all(images, training, groups, k=2, device=index.device)
    # a copy elsewhere comes first or second, with 0
    is_own = group_of(itself[:, 0], groups) == group_of(nearest, groups)
    to_other = torch.where(is_own, to_training[:, 1], to_training[:, 0])
    return (sq_distance[:, 0] > to_other[of_generated]).double().mean().item()


def data_copying(images, training, heldout, sq_distance, sq_distance_heldout):
    """C_T of Meehan, Chaudhuri and Dasgupta 2020: far below 0 is copying, far above 0 is underfitting.

    In every cell of the training images, by k-means on their pooled pixels, the Mann-Whitney U of the
    distances d_1 of generated against held-out images, as a z-score; then the mean over the cells,
    weighted by their share of the held-out images. Cells with fewer than `CELL_IMAGES` of either are
    left out.

    Args:
        images, training, heldout: (N, 3, H, W), (M, 3, H, W) and (L, 3, H, W), uint8.
        sq_distance, sq_distance_heldout: (N, k) and (L, k) as `nearest_neighbors` returns them for
            `training`.

    Returns:
        {"c_t": float, "c_t_cells": how many cells it is of}, or {} if all are left out."""
    # two seconds that others need not wait
    from scipy.stats import mannwhitneyu
    from sklearn.cluster import KMeans

    k = min(CELLS, len(training), max(1, min(len(images), len(heldout)) // (5 * CELL_IMAGES)))
    kmeans = KMeans(k, n_init=1, random_state=0).fit(pooled(training))
    cell, cell_heldout = (kmeans.predict(pooled(x)) for x in (images, heldout))
    z, weights = [], []
    for c in range(k):
        generated = sq_distance[cell == c, 0].cpu()
        real = sq_distance_heldout[cell_heldout == c, 0].cpu()
        n, m = len(real), len(generated)
        if min(n, m) >= CELL_IMAGES:
            U = mannwhitneyu(generated, real, method="asymptotic").statistic
            z.append((U - n * m / 2) / (n * m * (n + m + 1) / 12) ** 0.5)
            weights.append(n)
    return {"c_t": float(np.average(z, weights=weights)), "c_t_cells": len(z)} if z else {}


def measure_distances(sq_distance, index, training, groups=None):
    """The numbers of one set of images in pixels, as JSON values; arguments as for `authenticity`."""
    ratio = memorization_ratio(sq_distance)
    return {
        "mq": {str(p): count for p, count in memorized_quantity(ratio).items()}, **shares_below(ratio),
        **extraction(sq_distance, index, groups),
        "auth_pct": 100 * authenticity(sq_distance, index, training, groups),
    }  # fmt: skip

"""Exact nearest neighbours of images, by integer matrix products.

Pixels become int8 codes around the middle grey, so that products of codes and their sums are exact integers on every
device and in every order of summation.

Images of 256 levels (uint8, or floats that are all some n / 255) are their codes: v = 255 x - 128. Their squared
distances |a|^2 + |b|^2 - 2 a.b are then exact integers, and (distance, index) packed into one integer has no ties:
nothing else is needed.

Other floats take two codes, v = hi + lo / 256 + r with a small rest r. With c = hi + lo / 256,

    a.b = hi_a.hi_b + (hi_a.lo_b + lo_a.hi_b) / 256 + lo_a.lo_b / 2^16 + c_a.r_b + r_a.v_b,

of which the first two terms are computed. By Cauchy-Schwarz the others are at most
|lo_a| |lo_b| / 2^16 + |c_a| |r_b| + |r_a| |v_b|, and float32 adds the terms of |a|^2 + |b|^2 - 2 a.b with an error of
at most 2^-20 (|a|^2 + |b|^2). So a computed squared distance is off by at most the sum of those, eps. If b is one of
the k nearest, its true distance is at most the k-th smallest computed one plus eps, and its computed one at most that
plus 2 eps. Whatever is within that is kept and measured directly, as the sum of (a - b)^2 in float64.
"""

import time

import torch

import distributed

LEVELS = 255
MIDDLE = 128
LARGEST = 100  # value accepted: what lies outside [0, 1] is measured right, but the further, the slower
# products of two int8 codes, of at most 2^14 each, whose sums are exact
FLOAT32_TERMS = 2**10
INT32_TERMS = 2**16
CHUNK = 32  # images converted or measured at a time: they stay in the processor's cache


@torch.no_grad()
def nearest_neighbors(generated, training, k=50, batch_generated=2048, batch_training=4096, progress=False):
    """The k nearest training images of every generated image, by squared L2 distance over all 3*H*W values in [0, 1].

    Args:
        generated: (N, 3, H, W), float in [0, 1], or uint8 that stands for value / 255.
        training: (M, 3, H, W), likewise.
        k: how many; all M if there are fewer.
        batch_generated, batch_training: images per matrix product; memory grows with them, never with N * M.
        progress: show a bar.

    Returns:
        sq_distance (N, k) float64, ascending, and index (N, k) int64, equal distances by lower index, on the device of
        `training`. A copy has distance 0. Between images of 256 levels the distances are integers / 255^2; between
        others they are sums in float64. Nothing depends on the batch sizes.

    Raises:
        ValueError: an empty set, NaN, infinite or huge values, different image shapes, k or a batch below 1.
    """
    _check_arguments(generated, training, k, batch_generated, batch_training)
    generated = _levels_or_floats(generated.to(training.device).flatten(1), "generated")
    training = _levels_or_floats(training.flatten(1), "training")
    k = min(k, len(training))
    search = _search_levels if generated.dtype == training.dtype == torch.uint8 else _search_floats
    multiply = _fastest_product(training)
    found = []
    show = progress and distributed.is_main()
    with distributed.bar(total=len(generated), desc="nearest neighbours", unit="image", disable=not show) as bar:
        for batch in generated.split(batch_generated):
            found.append(search(batch, training, k, max(batch_training, k), multiply))
            bar.update(len(batch))
    sq_distance, index = zip(*found, strict=True)
    return torch.cat(sq_distance), torch.cat(index)


def nearest_other(training, rows):
    """Squared distance, float64 (len(rows),), of the training images `rows` to their nearest other training image.

    A copy elsewhere in the training set counts, with 0. Infinite where there is no other image.
    """
    if len(rows) == 0:
        return torch.empty(0, dtype=torch.float64, device=training.device)
    sq_distance, index = nearest_neighbors(training[rows], training, k=2)
    if sq_distance.shape[1] == 1:
        return torch.full((len(rows),), torch.inf, dtype=torch.float64, device=sq_distance.device)
    return torch.where(index[:, 0] == rows.to(index.device), sq_distance[:, 1], sq_distance[:, 0])


def _search_levels(generated, training, k, block_size, multiply):
    """`nearest_neighbors` of uint8 images (n, D) among (M, D), in integers."""
    M, D = training.shape
    # |b|^2 - 2 a.b stays below 3 * 2^14 * D
    dtype = torch.int32 if 3 * 2**14 * D < 2**31 else torch.int64
    codes, norm = _levels_to_codes(generated)
    best = norm.new_empty(len(generated), 0)  # packed: squared distance less |a|^2, times M, plus index
    for start in range(0, M, block_size):
        keys, key_norm = _levels_to_codes(training[start : start + block_size])
        score = _product(codes, keys, multiply).to(dtype).mul_(-2).add_(key_norm.to(dtype))
        packed = _improvements(score, (best[:, -1:] // M).to(dtype) if start else None, start, M)
        best = torch.cat([best, packed], dim=1).topk(k, dim=1, largest=False).values
    return (norm[:, None] + best // M).double() / LEVELS**2, best % M


def _improvements(score, worst, start, M):
    """The scores (n, m) of a block below `worst` (n, 1), packed with their index: int64 (n, w), padded.

    A score equal to `worst` loses its tie, since the indices of later blocks are higher.
    """
    better = None if worst is None else score < worst
    if better is None or int(better.count_nonzero()) > better.numel() // 16:
        return score.long() * M + torch.arange(start, start + score.shape[1], device=score.device)
    row, column = better.nonzero(as_tuple=True)
    return _in_rows(row, score[row, column].long() * M + (start + column), len(score), torch.iinfo(torch.int64).max)


def _search_floats(generated, training, k, block_size, multiply):
    """`nearest_neighbors` of images (n, D) among (M, D), at least one side float: approximate, then measured."""
    n, limit = len(generated), 4 * k + 256
    codes = _floats_to_codes(generated)
    settled = torch.ones(n, dtype=torch.bool, device=training.device)  # has no more than `limit` candidates
    score = torch.empty(n, 0, device=training.device)  # computed squared distances less |a|^2, ascending
    index = torch.empty(n, 0, dtype=torch.int64, device=training.device)
    kth = torch.full((n,), torch.inf, dtype=torch.float64, device=training.device)
    eps = torch.zeros_like(kth)
    for start in range(0, len(training), block_size):
        new, error = _approximate(codes, _floats_to_codes(training[start : start + block_size]), multiply)
        eps = torch.maximum(eps, error)
        if start == 0:
            kth = new.topk(k, dim=1, largest=False).values[:, -1].double()
        near = (new <= _round_up(kth + 2 * eps)[:, None]) & settled[:, None]
        settled &= near.count_nonzero(dim=1) <= limit
        row, column = (near & settled[:, None]).nonzero(as_tuple=True)
        score = torch.cat([score, _in_rows(row, new[row, column], n, torch.inf, at_least=k)], dim=1)
        index = torch.cat([index, _in_rows(row, column + start, n, -1, at_least=k)], dim=1)
        score, order = score.sort(dim=1)
        index = index.gather(1, order)
        kth = torch.minimum(kth, score[:, k - 1].double())
        candidates = (score <= _round_up(kth + 2 * eps)[:, None]).sum(dim=1)
        settled &= candidates <= limit
        width = max(k, int(candidates.clamp(max=limit).max()))
        score, index = score[:, :width], index[:, :width]

    row, place = ((index >= 0) & settled[:, None]).nonzero(as_tuple=True)
    measured = _in_rows(row, _measure(generated, row, training, index[row, place]), n, torch.inf, at_least=k)
    index = _in_rows(row, index[row, place], n, len(training), at_least=k)
    sq_distance, index = _first_by_distance_and_index(measured, index, k)
    every = torch.arange(len(training), device=training.device)
    for i in (~settled).nonzero()[:, 0]:
        to_all = _measure(generated, i.expand(len(training)), training, every)
        sq_distance[i], index[i] = _first_by_distance_and_index(to_all, every, k)
    return sq_distance, index


def _approximate(codes, keys, multiply):
    """|b|^2 - 2 a.b in float32 (n, m), and the bound of its error, float64 (n,): see the docstring of this file."""
    high, low, norm, low_norm, rest = codes
    key_high, key_low, key_norm, key_low_norm, key_rest = keys
    mixed = _product(torch.cat([high, low], dim=1), torch.cat([key_low, key_high], dim=1), multiply)
    score = _product(high, key_high, multiply).float().add_(mixed, alpha=1 / 256).mul_(-2).add_(key_norm.float())
    missed = (
        low_norm * key_low_norm.max() / 2**16 + (norm.sqrt() + rest) * key_rest.max() + rest * key_norm.max().sqrt()
    )
    return score, 2 * missed + (norm + key_norm.max()) / 2**20


def _round_up(x):
    """Float64 as a float32 that is not smaller."""
    return torch.nextafter(x.float(), x.new_tensor(torch.inf, dtype=torch.float32))


def _first_by_distance_and_index(sq_distance, index, k):
    """The k first of each row, sorted by distance and equal distances by index; (..., w) each -> (..., k) each."""
    index, order = index.sort(dim=-1)
    sq_distance, again = sq_distance.gather(-1, order).sort(dim=-1, stable=True)
    return sq_distance[..., :k], index.gather(-1, again)[..., :k]


def _in_rows(row, values, n, fill, at_least=0):
    """Values (P,), those of row 0 first, as a matrix (n, longest row or `at_least`), filled up with `fill`."""
    count = torch.bincount(row, minlength=n)
    place = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    matrix = values.new_full((n, max(at_least, int(count.max()))), fill)
    matrix[row, place] = values
    return matrix


def _levels_to_codes(images):
    """uint8 (n, D) as int8 around the middle, and their squared norms, int64 (n,)."""
    codes = (images ^ MIDDLE).view(torch.int8)
    norm = torch.cat([chunk.float().square_().sum(dim=1, dtype=torch.float64) for chunk in codes.split(CHUNK)])
    return codes, norm.long()


def _floats_to_codes(images):
    """Codes hi and lo, int8 (n, D); |v|^2, |lo| and an upper bound of the norm of the rest, float64 (n,)."""
    high, low = (torch.empty(images.shape, dtype=torch.int8, device=images.device) for _ in range(2))
    norm, low_norm, rest = torch.empty(3, len(images), dtype=torch.float64, device=images.device)
    arithmetic = 0.0
    if images.dtype != torch.uint8:
        # 255 x - 128 in float32 is off by at most 2^-16, and by more outside [0, 1]
        arithmetic = 2.0**-16 * max(1.0, float(images.max()), -float(images.min())) * images.shape[1] ** 0.5
    for start in range(0, len(images), CHUNK):
        rows = slice(start, start + CHUNK)
        v = images[rows].float() - MIDDLE if images.dtype == torch.uint8 else images[rows].float() * LEVELS - MIDDLE
        high[rows] = v.round().clamp_(-128, 127)
        remainder = v - high[rows]
        low[rows] = (remainder * 256).round().clamp_(-128, 127)
        norm[rows] = v.double().square_().sum(dim=1)
        low_norm[rows] = low[rows].float().square_().sum(dim=1, dtype=torch.float64).sqrt()
        rest[rows] = 1.01 * (remainder - low[rows] / 256).square_().sum(dim=1).sqrt() + arithmetic
    return high, low, norm, low_norm, rest


def _measure(generated, row, training, column):
    """Squared distances, float64 (P,), of generated[row] and training[column], each the sum of (a - b)^2."""
    sq_distance = torch.empty(len(row), dtype=torch.float64, device=training.device)
    for start in range(0, len(row), CHUNK):
        pairs = slice(start, start + CHUNK)
        difference = _values(generated[row[pairs]]).sub_(_values(training[column[pairs]]))
        sq_distance[pairs] = torch.linalg.vecdot(difference, difference)
    return sq_distance


def _values(images):
    """Images in [0, 1] as float64."""
    return images.double().div_(LEVELS) if images.dtype == torch.uint8 else images.double()


def _product(a, b, multiply):
    """a b^T of int8 codes (n, D) and (m, D), exact: int32, or int64 where the sums may be larger than that."""
    if a.shape[1] <= INT32_TERMS:
        return multiply(a, b)
    parts = zip(a.split(INT32_TERMS, dim=1), b.split(INT32_TERMS, dim=1), strict=True)
    return sum(multiply(x.contiguous(), y.contiguous()).long() for x, y in parts)


def _integer_product(a, b):
    """a b^T of int8 (n, D) and (m, D), D at most 2^16, in int32."""
    return torch._int_mm(a, b.T)


def _float_product(a, b):
    """The same by float32 products short enough to be exact, also where float32 means TF32."""
    parts = zip(a.split(FLOAT32_TERMS, dim=1), b.split(FLOAT32_TERMS, dim=1), strict=True)
    return sum((x.float() @ y.float().T).int() for x, y in parts)


def _fastest_product(images):
    """The way of multiplying codes that is faster here: processors without int8 units lose time with integers."""
    if images.device.type != "cpu":
        return _float_product
    codes = torch.zeros(256, min(images.shape[1], INT32_TERMS), dtype=torch.int8)
    seconds = {}
    for product in (_integer_product, _float_product):
        product(codes, codes)
        start = time.perf_counter()
        product(codes, codes)
        seconds[product] = time.perf_counter() - start
    return min(seconds, key=seconds.get)


def _levels_or_floats(images, name):
    """Images (n, D) as uint8 levels if every value is one of 0/255 .. 255/255, else as they are."""
    if images.dtype == torch.uint8:
        return images
    levels = torch.empty(images.shape, dtype=torch.uint8, device=images.device)
    exact = True
    for rows, out in zip(images.split(CHUNK), levels.split(CHUNK), strict=True):
        low, high = rows.aminmax()
        if not (low >= -LARGEST and high <= LARGEST):
            raise ValueError(f"{name} holds NaN, infinite or huge values: images are in [0, 1]")
        exact = exact and bool(low >= 0) and bool(high <= 1)
        if exact:
            level = (rows * LEVELS).round_()
            exact = torch.equal(level / LEVELS, rows)
            out.copy_(level)
    return levels if exact else images


def _check_arguments(generated, training, k, batch_generated, batch_training):
    for name, images in (("generated", generated), ("training", training)):
        if images.ndim != 4 or 0 in images.shape:
            raise ValueError(f"{name} must be (N, 3, H, W) with at least one image, not {tuple(images.shape)}")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise ValueError(f"{name} must be uint8 or float, not {images.dtype}")
    if generated.shape[1:] != training.shape[1:]:
        raise ValueError(
            f"images of generated are {tuple(generated.shape[1:])}, those of training {tuple(training.shape[1:])}"
        )
    for name, value in (("k", k), ("batch_generated", batch_generated), ("batch_training", batch_training)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")

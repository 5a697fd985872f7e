"""Exact nearest neighbours of images, by products of integers.

Pixels 0..255 become codes around the middle grey, v = 255 x - 128. Products of codes and their sums are integers, exact
on every device and in every order of summation, and so are the squared distances |a|^2 + |b|^2 - 2 a.b. (distance,
index) packed into one integer has no ties: nothing else is needed.
"""

import time
from contextlib import contextmanager

import torch

from utils import distributed

LEVELS = 255
MIDDLE = 128
# products of two codes, of at most 2^14 each, whose sums are exact
FLOAT32_TERMS = 2**10
INT32_TERMS = 2**16
CPU_CHUNK = 32  # images converted at a time, so that they stay in the processor's cache
GPU_CHUNK_VALUES = 2**26


@torch.no_grad()
def nearest_neighbors(
    generated, training, k=50, batch_generated=2048, batch_training=4096, device=None, progress=False
):
    """The k nearest training images of every generated image, by squared L2 distance over all 3*H*W values in [0, 1].

    Args:
        generated: (N, 3, H, W), uint8 that stands for value / 255, or float that is exactly n / 255 with n = 0..255.
        training: (M, 3, H, W), likewise.
        k: how many; all M if there are fewer.
        batch_generated, batch_training: images per matrix product; memory grows with them, never with N * M.
        device: where to compute; default: that of `training`. Images that are elsewhere come block by block.
        progress: show a bar.

    Returns:
        sq_distance (N, k) float64, ascending, integers / 255^2, and index (N, k) int64, equal distances by lower index,
        on the device. A copy has distance 0. Nothing depends on the batch sizes.

    Raises:
        ValueError: an empty set, values between the levels, different image shapes, k or a batch below 1.
    """
    _check_arguments(generated, training, k, batch_generated, batch_training)
    device = torch.device(device or training.device)
    generated, training = _levels(generated.flatten(1), "generated"), _levels(training.flatten(1), "training")
    multiply = _fastest_product(training.shape[1], device)
    norm = _squared_norms(training, device)
    k = min(k, len(training))
    found = []
    show = progress and distributed.is_main()
    bar = distributed.bar(total=len(generated), desc="nearest neighbours", unit="image", disable=not show)
    with bar, _full_float32():
        for batch in generated.split(batch_generated):
            found.append(_search(batch.to(device), training, norm, k, max(batch_training, k), multiply))
            bar.update(len(batch))
    sq_distance, index = zip(*found, strict=True)
    return torch.cat(sq_distance), torch.cat(index)


def nearest_other(training, rows, device=None):
    """Squared distance, float64 (len(rows),), of the training images `rows` to their nearest other training image.

    A copy elsewhere in the training set counts, with 0. Infinite where there is no other image. `device` as above.
    """
    device = torch.device(device or training.device)
    if len(rows) == 0:
        return torch.empty(0, dtype=torch.float64, device=device)
    sq_distance, index = nearest_neighbors(training[rows.to(training.device)], training, k=2, device=device)
    if sq_distance.shape[1] == 1:
        return torch.full((len(rows),), torch.inf, dtype=torch.float64, device=device)
    return torch.where(index[:, 0] == rows.to(device), sq_distance[:, 1], sq_distance[:, 0])


def _search(generated, training, norm, k, block_size, multiply):
    """`nearest_neighbors` of images (n, D) among (M, D), both uint8, in integers; norm: of the training images."""
    M, D = training.shape
    # |b|^2 - 2 a.b stays below 3 * 2^14 * D
    dtype = torch.int32 if 3 * 2**14 * D < 2**31 else torch.int64
    codes = _codes(generated)
    best = norm.new_empty(len(generated), 0)  # packed: squared distance less |a|^2, times M, plus index
    for start in range(0, M, block_size):
        keys = _codes(training[start : start + block_size].to(generated.device))
        score = multiply(codes, keys).to(dtype).mul_(-2).add_(norm[start : start + block_size].to(dtype))
        packed = _improvements(score, (best[:, -1:] // M).to(dtype) if start else None, start, M)
        best = torch.cat([best, packed], dim=1).topk(k, dim=1, largest=False).values
    own = _squared_norms(generated, generated.device)
    return (own[:, None] + best // M).double() / LEVELS**2, best % M


def _improvements(score, worst, start, M):
    """The scores (n, m) of a block below `worst` (n, 1), packed with their index: int64 (n, w), padded.

    A score equal to `worst` loses its tie, since the indices of later blocks are higher.
    """
    better = None if worst is None else score < worst
    if better is None or int(better.count_nonzero()) > better.numel() // 16:
        return score.long() * M + torch.arange(start, start + score.shape[1], device=score.device)
    row, column = better.nonzero(as_tuple=True)
    return _in_rows(row, score[row, column].long() * M + (start + column), len(score), torch.iinfo(torch.int64).max)


def _in_rows(row, values, n, fill):
    """Values (P,), those of row 0 first, as a matrix (n, longest row), filled up with `fill`."""
    count = torch.bincount(row, minlength=n)
    place = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    matrix = values.new_full((n, int(count.max())), fill)
    matrix[row, place] = values
    return matrix


def _codes(images):
    """uint8 as int8 around the middle: one bit of every byte changes."""
    return (images ^ MIDDLE).view(torch.int8)


def _squared_norms(images, device):
    """|v|^2 of the codes of images (n, D), uint8: int64 (n,) on the device."""
    chunk = CPU_CHUNK if device.type == "cpu" else max(1, GPU_CHUNK_VALUES // images.shape[1])
    chunks = (_codes(rows.to(device)).float() for rows in images.split(chunk))
    return torch.cat([rows.square_().sum(dim=1, dtype=torch.float64) for rows in chunks]).long()


def _integer_product(a, b):
    """a b^T of codes (n, D) and (m, D), int8: int32, or int64 where the sums may be larger than that.

    torch._int_mm is the only product of 8-bit integers that torch has: on processors with units for them it takes a
    third of the time of float32. Not on GPUs, where it wants other shapes than images have.
    """
    if a.shape[1] <= INT32_TERMS:
        return torch._int_mm(a, b.T)
    parts = zip(a.split(INT32_TERMS, dim=1), b.split(INT32_TERMS, dim=1), strict=True)
    return sum(torch._int_mm(x.contiguous(), y.contiguous().T).long() for x, y in parts)


def _float_product(a, b):
    """The same by float32 products short enough to be exact."""
    dtype = torch.int32 if a.shape[1] <= INT32_TERMS else torch.int64
    parts = zip(a.split(FLOAT32_TERMS, dim=1), b.split(FLOAT32_TERMS, dim=1), strict=True)
    return sum((x.float() @ y.float().T).to(dtype) for x, y in parts)


def _fastest_product(D, device):
    """The way of multiplying D codes that is faster here: processors without 8-bit units lose time with integers."""
    if device.type != "cpu":
        return _float_product
    codes = torch.zeros(256, min(D, INT32_TERMS), dtype=torch.int8)
    seconds = {}
    for product in (_integer_product, _float_product):
        product(codes, codes)
        start = time.perf_counter()
        product(codes, codes)
        seconds[product] = time.perf_counter() - start
    return min(seconds, key=seconds.get)


@contextmanager
def _full_float32():
    """Within this no product of float32 is rounded to TF32, whatever --precision says."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _levels(images, name):
    """Images (n, D) as uint8 levels."""
    if images.dtype == torch.uint8:
        return images
    levels = torch.empty(images.shape, dtype=torch.uint8, device=images.device)
    for rows, out in zip(images.split(1024), levels.split(1024), strict=True):
        level = (rows * LEVELS).round_().clamp_(0, LEVELS)
        if not torch.equal(level / LEVELS, rows):
            raise ValueError(
                f"{name} holds values other than 0/255 .. 255/255: round the images to uint8, as all_in.py does"
            )
        out.copy_(level)
    return levels


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

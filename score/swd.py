"""The sliced Wasserstein distance of Karras et al. 2018 (arXiv:1710.10196, section 5), as in their code.

It needs no trained network and sees detail: image sets are compared by their patches, at several scales.
"""

import numpy as np
import torch
import torch.nn.functional as F

from score.samples import evenly_spaced
from utils.bar import progress_bar
from utils.seeding import generator

LEAST_SIZE = 16  # of a level of the pyramid
PATCH, PATCHES = 7, 128  # side in pixels, and how many of an image
REPEATS, DIRECTIONS = 4, 128
MOST_IMAGES = 10_000  # of a set
BLOCK = 500  # images at a time
BINOMIAL = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16


def sliced_wasserstein(a, b, device="cpu", progress=False):
    """The distance of two sets of images by the side of each level, {"16": d, ...}; {} below 16 pixels.

    As many images are taken of both, evenly spaced, at most `MOST_IMAGES`: the fewer they are, the
    larger the distance between sets of one kind. The patches and directions are drawn by a fixed seed.

    a, b: (N, 3, H, H) and (M, 3, H, H), uint8. device: where to compute. progress: show a bar."""
    sides, number = level_sides(a.shape[-1]), min(len(a), len(b), MOST_IMAGES)
    a, b = (images[evenly_spaced(len(images), number)] for images in (a, b))
    distances = {}
    is_shown = progress and sides
    with progress_bar(total=len(sides) * REPEATS, desc="SWD", unit="slice", disable=not is_shown) as bar:
        for level, side in enumerate(sides):
            sets = {"a": a, "b": b}.items()
            patches = [level_patches(images, level, len(sides), name, device) for name, images in sets]
            slices = []
            for repeat in range(REPEATS):
                stream = generator("cpu", "swd", side, repeat)
                directions = torch.randn(patches[0].shape[1], DIRECTIONS, generator=stream)
                slices.append(projected_distance(*patches, F.normalize(directions, dim=0).to(device)))
                bar.update()
            distances[str(side)] = 1000 * sum(slices) / REPEATS
    return distances


def level_sides(side):
    """The sides of the levels of the pyramid, from that of the images down by halves, to at least 16."""
    sides = [side] if side >= LEAST_SIZE else []
    while sides and sides[-1] % 2 == 0 and sides[-1] // 2 >= LEAST_SIZE:
        sides.append(sides[-1] // 2)
    return sides


def blurred(images):
    """Images (N, C, H, W) convolved with the 5x5 binomial kernel, mirrored at the borders."""
    kernel = torch.outer(BINOMIAL, BINOMIAL).to(images).expand(images.shape[1], 1, 5, 5)
    return F.conv2d(F.pad(images, [2, 2, 2, 2], mode="reflect"), kernel, groups=images.shape[1])


def doubled(images):
    """Images (N, C, H, W) at twice the size: zeros between the pixels, then the kernel."""
    N, C, H, W = images.shape
    wide = images.new_zeros(N, C, 2 * H, 2 * W)
    wide[:, :, ::2, ::2] = 4 * images
    return blurred(wide)


def laplacian_level(images, level, levels):
    """One level of the Laplacian pyramid of images (N, C, H, W), float; the last is a blurred image."""
    for _ in range(level):
        images = blurred(images)[:, :, ::2, ::2]
    return images if level == levels - 1 else images - doubled(blurred(images)[:, :, ::2, ::2])


def level_patches(images, level, levels, name, device):
    """Random patches of one level of images (N, 3, H, H), normalised: (128 N, 147) float32.

    Each colour channel of all patches has mean 0 and standard deviation 1. name: of the set, which draws
    for itself."""
    parts = []
    for block, part in enumerate(images.split(BLOCK)):
        pixels = laplacian_level(part.to(device).float(), level, levels)
        stream = generator("cpu", "swd", name, level, block)
        shape = (2, len(part), PATCHES, 1, 1)
        places = torch.randint(pixels.shape[-1] - PATCH + 1, shape, generator=stream).to(device)
        offsets = torch.arange(PATCH, device=device)
        rows, columns = places[0] + offsets[:, None], places[1] + offsets
        image = torch.arange(len(part), device=device)[:, None, None, None]
        patches = pixels.permute(0, 2, 3, 1)[image, rows, columns]  # (N, 128, 7, 7, 3)
        parts.append(patches.flatten(0, 1))
    patches = torch.cat(parts)
    mean, std = patches.mean(dim=(0, 1, 2)), patches.std(dim=(0, 1, 2), correction=0)
    return ((patches - mean) / std.clamp(min=1e-8)).flatten(1)


def projected_distance(a, b, directions):
    """The mean over directions (D, S) of the 1-Wasserstein distance of a and b, (n, D), projected."""
    on_cpu, total = directions.device.type == "cpu", 0.0
    for part in directions.T.split(16):
        projections = [(part @ points.T) for points in (a, b)]
        if on_cpu:  # NumPy's sort of float32 is several times as fast
            x, y = (torch.from_numpy(np.sort(rows.numpy(), axis=1)) for rows in projections)
        else:
            x, y = (rows.sort(dim=1).values for rows in projections)
        total += (x - y).abs().mean(dim=1).double().sum().item()
    return total / directions.shape[1]

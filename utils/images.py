"""Pixels of network outputs, and many images as one picture."""

import torch
import torch.nn.functional as F


def to_uint8(x):
    """Network output in [-1, 1] as pixels: clip((x + 1) / 2, 0, 1) * 255, rounded to uint8.

    Takes and returns any shape, on x's device. NaN becomes 0: find those with `non_finite_images` and report them.
    """
    return x.float().add(1).mul(127.5).nan_to_num(nan=0.0).clamp(0, 255).round().to(torch.uint8)


def image_grid(images, columns=8, gap=2):
    """Images (B, C, H, W) in rows of at most `columns`, on black and `gap` apart: (C, rows (H + gap) + gap, ...).

    What torchvision.utils.make_grid makes of two images or more; importing torchvision takes a second, and torch's
    compiler comes with it.
    """
    B, C, H, W = images.shape
    columns = min(columns, B)
    rows = -(-B // columns)
    cells = images.new_zeros(rows * columns, C, H + gap, W + gap)
    cells[:B, :, gap:, gap:] = images
    grid = cells.view(rows, columns, C, H + gap, W + gap).permute(2, 0, 3, 1, 4)
    return F.pad(grid.reshape(C, rows * (H + gap), columns * (W + gap)), (0, gap, 0, gap))

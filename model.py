"""The DDPM UNet (Ho et al. 2020), with the parameter names of pytorch-ddpm and IET_AGC so that their weights load.

It knows nothing of diffusion: it maps an image, a timestep and an optional class to an image.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn


def sinusoidal_table(T, dim):
    """Interleaved [sin, cos] of t * 10000^(-2i/dim), t = 0..T-1 (Vaswani et al. 2017); float32 (T, dim), dim even."""
    frequency = torch.exp(-math.log(10000) / dim * torch.arange(0, dim, 2, dtype=torch.float64))
    angle = torch.arange(T, dtype=torch.float64)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).float()


def xavier_(module, gain=1.0):
    """Xavier-uniform weights and zero bias, in place; returns the module."""
    nn.init.xavier_uniform_(module.weight, gain)
    nn.init.zeros_(module.bias)
    return module


def conv(in_ch, out_ch, kernel, stride=1, gain=1.0):
    """A convolution that keeps height and width, or divides them by the stride."""
    return xavier_(nn.Conv2d(in_ch, out_ch, kernel, stride, padding=kernel // 2), gain)


def linear(in_features, out_features):
    return xavier_(nn.Linear(in_features, out_features))


class Embedding(nn.Module):
    """A table followed by a two-layer perceptron: indices (B,) -> (B, dim)."""

    def __init__(self, table, ch, dim):
        super().__init__()
        self.timembedding = nn.Sequential(table, linear(ch, dim), nn.SiLU(), linear(dim, dim))

    def forward(self, index):
        return self.timembedding(index)


class DownSample(nn.Module):
    """Half the size by a convolution of stride 2: (B, C, H, W) -> (B, C, H/2, W/2)."""

    def __init__(self, ch):
        super().__init__()
        self.main = conv(ch, ch, 3, stride=2)

    def forward(self, x, temb, cemb):
        return self.main(x)


class UpSample(nn.Module):
    """Twice the size, by the nearest pixel and a convolution: (B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, ch):
        super().__init__()
        self.main = conv(ch, ch, 3)

    def forward(self, x, temb, cemb):
        return self.main(F.interpolate(x, scale_factor=2, mode="nearest"))


class AttnBlock(nn.Module):
    """Single-head self-attention over the H*W positions, with a residual connection: (B, C, H, W) -> the same."""

    def __init__(self, ch, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, ch)
        self.proj_q = conv(ch, ch, 1)
        self.proj_k = conv(ch, ch, 1)
        self.proj_v = conv(ch, ch, 1)
        self.proj = conv(ch, ch, 1)

    def forward(self, x):
        h = self.group_norm(x)
        # (B, 1 head, H*W, C)
        q, k, v = (proj(h).flatten(2).mT[:, None] for proj in (self.proj_q, self.proj_k, self.proj_v))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(h[:, 0].mT.view_as(x))


class ResBlock(nn.Module):
    """GroupNorm-swish-conv twice around the time and class embeddings, a shortcut, then optional attention.

    (B, in_ch, H, W) -> (B, out_ch, H, W).
    """

    def __init__(self, in_ch, out_ch, tdim, dropout, attn, conditional, groups):
        super().__init__()
        self.block1 = nn.Sequential(nn.GroupNorm(groups, in_ch), nn.SiLU(), conv(in_ch, out_ch, 3))
        self.temb_proj = nn.Sequential(nn.SiLU(), linear(tdim, out_ch))
        # without classes it is a name in the published checkpoints only, and is not trained
        self.cemb_proj = nn.Sequential(nn.SiLU(), linear(tdim, out_ch)).requires_grad_(conditional)
        self.block2 = nn.Sequential(
            nn.GroupNorm(groups, out_ch), nn.SiLU(), nn.Dropout(dropout), conv(out_ch, out_ch, 3, gain=1e-5)
        )
        self.shortcut = conv(in_ch, out_ch, 1) if in_ch != out_ch else nn.Identity()
        self.attn = AttnBlock(out_ch, groups) if attn else nn.Identity()

    def forward(self, x, temb, cemb):
        h = self.block1(x)
        shift = self.temb_proj(temb)
        if cemb is not None:
            shift = shift + self.cemb_proj(cemb)
        h = self.block2(h + shift[:, :, None, None])
        return self.attn(h + self.shortcut(x))


class UNet(nn.Module):
    """The DDPM UNet.

    Args:
        T: number of timesteps; `forward` takes t in 0..T-1.
        ch: base width, a multiple of groups.
        ch_mult: width of each level as a multiple of ch; each level after the first halves the image.
        attn: levels (0-based indices into ch_mult) with self-attention.
        num_res_blocks: residual blocks per level on the way down (one more on the way up).
        dropout: probability in [0, 1).
        num_labels: number of classes, or None for an unconditional network.
        groups: of every GroupNorm, 32 in the published networks. With one channel a group, the norm that opens block2
            takes out just what the embeddings have added, and the block sees neither t nor the class.

    Raises:
        ValueError: a level in attn does not exist; from torch, ch is not a multiple of groups.
    """

    def __init__(self, T, ch, ch_mult, attn, num_res_blocks, dropout, num_labels=None, groups=32):
        super().__init__()
        if any(not 0 <= level < len(ch_mult) for level in attn):
            raise ValueError(f"attn {list(attn)} names a level that ch_mult {list(ch_mult)} does not have (0-based)")
        tdim = 4 * ch
        conditional = num_labels is not None
        self.time_embedding = Embedding(nn.Embedding.from_pretrained(sinusoidal_table(T, ch)), ch, tdim)
        if conditional:
            self.cond_embedding = Embedding(nn.Embedding(num_labels + 1, ch, padding_idx=0), ch, tdim)
        self.num_labels = num_labels
        self.groups = groups
        block = partial(ResBlock, tdim=tdim, dropout=dropout, conditional=conditional, groups=groups)

        self.head = conv(3, ch, 3)
        self.downblocks = nn.ModuleList()
        skip_channels = [ch]
        now_ch = ch
        for level, mult in enumerate(ch_mult):
            for _ in range(num_res_blocks):
                self.downblocks.append(block(now_ch, ch * mult, attn=level in attn))
                now_ch = ch * mult
                skip_channels.append(now_ch)
            if level < len(ch_mult) - 1:
                self.downblocks.append(DownSample(now_ch))
                skip_channels.append(now_ch)

        self.middleblocks = nn.ModuleList([block(now_ch, now_ch, attn=attention) for attention in (True, False)])

        self.upblocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(ch_mult))):
            for _ in range(num_res_blocks + 1):
                self.upblocks.append(block(skip_channels.pop() + now_ch, ch * mult, attn=level in attn))
                now_ch = ch * mult
            if level > 0:
                self.upblocks.append(UpSample(now_ch))
        self.tail = nn.Sequential(nn.GroupNorm(groups, now_ch), nn.SiLU(), conv(now_ch, 3, 3, gain=1e-5))

    def forward(self, x, t, labels=None):
        """Predict from noisy images.

        Args:
            x: (B, 3, H, W), H and W divisible by 2^(levels - 1).
            t: (B,) int64 in 0..T-1.
            labels: (B,) int64, classes 0..num_labels-1 or -1 for no class; None leaves the conditional term out.

        Returns:
            What the network was trained to predict, (B, 3, H, W).
        """
        temb = self.time_embedding(t)
        cemb = None if labels is None else self.cond_embedding(labels + 1)
        h = self.head(x)
        skips = [h]
        for block in self.downblocks:
            h = block(h, temb, cemb)
            skips.append(h)
        for block in self.middleblocks:
            h = block(h, temb, cemb)
        for block in self.upblocks:
            if isinstance(block, ResBlock):
                h = torch.cat([h, skips.pop()], dim=1)
            h = block(h, temb, cemb)
        return self.tail(h)

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """As `nn.Module.load_state_dict`, but also loads pytorch-ddpm's weights, which have no `cemb_proj` at all."""
        own = self.state_dict()
        unused = {key: own[key] for key in own if ".cemb_proj." in key}
        if self.num_labels is None and not any(key in state_dict for key in unused):
            state_dict = {**state_dict, **unused}
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

"""Randomness addressed by what it is for, such as (seed, "batch", shard, step), never by when or where it is drawn.

The same address gives the same numbers in any process and after any restart: a run has no random state to save.
"""

import hashlib

import torch


def derive_seed(*address):
    """A 63-bit seed from integers and strings: the leading bits of the BLAKE2 hash of the address."""
    digest = hashlib.blake2b(repr(address).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(device, *address):
    """A fresh `torch.Generator` on the device, seeded by the address."""
    return torch.Generator(device).manual_seed(derive_seed(*address))


def seed_of_try(seed, t):
    """The seed of what is drawn for the t-th time, from 0: first the seed itself."""
    return derive_seed(seed, "try", t) if t else seed


def sample_noise(seed, indices, shape, device):
    """Standard normal noise for generated images: a function that draws (B, *shape) float32, and on when called again.

    Image i has a stream of its own, drawn on the CPU, so that neither the batch size nor the device changes an image.
    """
    streams = [generator("cpu", seed, "image", i) for i in indices]
    return lambda *_: torch.stack([torch.randn(shape, generator=stream) for stream in streams]).to(device)

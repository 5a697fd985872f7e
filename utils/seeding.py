"""Randomness addressed by what it is for, never by when or where it is drawn.

Every random stream of the project has an address such as (seed, "batch", shard, step). The same address gives the
same numbers in any process and after any restart, so a run has no random state to save.
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


class SampleNoise:
    """Standard normal noise for generated images: image i has a stream of its own, (seed, "image", i).

    The streams are drawn on the CPU, so that neither the batch size nor the device changes an image.

    Args:
        seed: of the whole generation.
        indices: numbers of the images of this batch.
        shape: (C, H, W) of one image.
        device: where the noise is wanted.
    """

    def __init__(self, seed, indices, shape, device):
        self.generators = [generator("cpu", seed, "image", i) for i in indices]
        self.shape = shape
        self.device = device

    def __call__(self, like=None):
        """The next draw of every stream: (B, C, H, W) float32. `like` is there for the sampler and not needed."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)

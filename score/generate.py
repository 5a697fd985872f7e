"""Images from a trained network: image i depends on (network, sampler, seed, i) and on nothing else."""

import torch
from tqdm import tqdm

from score.samples import non_finite_images, to_uint8
from seeding import SampleNoise, derive_seed


def draw_labels(seed, indices, num_labels):
    """The classes of images `indices`, uniform over 0..num_labels-1: int64 (B,)."""
    return torch.tensor([derive_seed(seed, "label", i) % num_labels for i in indices])


@torch.no_grad()
def generate_batches(
    sampler,
    num_images,
    batch_size,
    seed,
    *,
    first=0,
    num_labels=None,
    legacy_labels=False,
    precision=torch.float32,
):
    """Generate images first..num_images-1 batch by batch with a progress bar, the network in evaluation mode.

    Args:
        sampler: a `GaussianDiffusionSampler` on its device.
        num_images, batch_size: how many in all, and per call of the sampler.
        seed: of x_T, of the classes, and of the noise of stochastic samplers.
        first: images before this one are there already.
        num_labels: draw a class for every image; None for an unconditional network.
        legacy_labels: the network was trained with embedding row c, not c + 1, for class c.
        precision: dtype of autocast.

    Yields:
        (B, 3, H, W) uint8 on the CPU, and which of them had a NaN or an infinity (0 in their pixels): bool (B,).
    """
    device = sampler.betas.device
    shape = (3, sampler.img_size, sampler.img_size)
    was_training = sampler.model.training
    sampler.model.eval()
    with tqdm(total=num_images, initial=first, desc="generate", unit="image", dynamic_ncols=True) as bar:
        for start in range(first, num_images, batch_size):
            indices = range(start, min(start + batch_size, num_images))
            labels = None
            if num_labels is not None:
                labels = draw_labels(seed, indices, num_labels).to(device) - int(legacy_labels)
            noise = SampleNoise(seed, indices, shape, device)
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                x_0 = sampler(noise(), labels, noise)
            yield to_uint8(x_0).cpu(), non_finite_images(x_0).cpu()
            bar.update(len(indices))
    sampler.model.train(was_training)


def generate(sampler, num_images, batch_size, seed, **settings):
    """All images at once: (N, 3, H, W) uint8 on the CPU; arguments as for `generate_batches`."""
    return torch.cat([images for images, _ in generate_batches(sampler, num_images, batch_size, seed, **settings)])

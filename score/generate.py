"""Images from a trained network: image i depends on (network, sampler, seed, i) and on nothing else."""

import torch

from score.samples import non_finite_images
from utils import distributed
from utils.images import to_uint8
from utils.seeding import derive_seed, sample_noise


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
    dtype=torch.float32,
):
    """Generate images first..num_images-1 batch by batch with a progress bar, the network in evaluation mode.

    Every process makes a batch at a time; rank 0 is given all of them in order, the others nothing.

    Args:
        sampler: a `GaussianDiffusionSampler` on its device.
        num_images, batch_size: how many in all, and per call of the sampler.
        seed: of x_T, of the classes, and of the noise of stochastic samplers.
        first: images before this one are there already.
        num_labels: draw a class for every image; None for an unconditional network.
        legacy_labels: the network was trained with embedding row c, not c + 1, for class c.
        dtype: of autocast; float32 for none.

    Yields:
        (B, 3, H, W) uint8 on the CPU, and which of them had a NaN or an infinity (0 in their pixels): bool (B,).
    """
    device = sampler.betas.device
    shape = (3, sampler.img_size, sampler.img_size)
    was_training = sampler.model.training
    sampler.model.eval()
    with distributed.bar(total=num_images, initial=first, desc="generate", unit="image") as bar:
        for start in range(first, num_images, batch_size * distributed.world_size()):
            batches = range(start, min(start + batch_size * distributed.world_size(), num_images))
            indices = batches[distributed.share(len(batches))]
            x_0 = torch.empty(0, *shape, device=device)
            if indices:
                labels = None
                if num_labels is not None:
                    labels = draw_labels(seed, indices, num_labels).to(device) - int(legacy_labels)
                noise = sample_noise(seed, indices, shape, device)
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    x_0 = sampler(noise(), labels, noise)
            made = distributed.gather((to_uint8(x_0).cpu(), non_finite_images(x_0).cpu()))
            if distributed.is_main():
                images, not_finite = zip(*made, strict=True)
                yield torch.cat(images), torch.cat(not_finite)
            bar.update(len(batches))
    sampler.model.train(was_training)


def generate(sampler, num_images, batch_size, seed, **settings):
    """All images at once, in every process: (N, 3, H, W) uint8 on the CPU; arguments as for `generate_batches`."""
    batches = [images for images, _ in generate_batches(sampler, num_images, batch_size, seed, **settings)]
    return distributed.from_main(torch.cat(batches) if batches else None)

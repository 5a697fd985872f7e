"""Which images, flips, timesteps and noise belong to a step: a pure function of (seed, shard, step).

Processes that share a batch draw all of it and take their part, so that no image depends on how many they are.
"""

from collections import namedtuple
from dataclasses import KW_ONLY, dataclass

import torch

from utils.errors import UsageError
from utils.images import normalize
from utils.seeding import derive_seed, generator, sample_noise

# What one training step is made of: x_0 (B, 3, H, W) float32 in [-1, 1]; labels (B,) int64, -1 for no class, or None;
# t (B,) int64; eps (B, 3, H, W) float32; index (B,) int64, the images' slots in the training set; eps_n as eps, always
# the same for a slot, or None.
Batch = namedtuple("Batch", "x_0 labels t eps index eps_n", defaults=[None])


def to_device(value, device):
    """The tensor on the device; from the host's memory to a GPU it goes while both work on, so it has to be pinned."""
    if value.device.type == "cpu" and device.type == "cuda":
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


@dataclass(eq=False)
class ShardBatches:
    """The batches of one shard, addressed by the shard's own step number (counted over all epochs and rounds).

    Args:
        images: (N, 3, H, W) uint8, the whole training set, on the training device or in host memory.
        labels: (N,) int64, or None for unconditional training.
        index: (M,) int64 numbers of the shard's images.
        device: where the batches are wanted; default: where the images are.
        batch_size: B <= M; the last incomplete batch of an epoch is dropped.
        T: timesteps are drawn uniformly from 0..T-1.
        seed, shard: the address of the shard's randomness.
        hflip: mirror every image with probability 1/2.
        label_dropout: probability that a label is replaced by -1.
        ambient_t: above 0, batches have `eps_n`.
        part: which samples of every batch are wanted.

    Raises:
        UsageError: the shard is smaller than one batch.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    index: torch.Tensor
    device: torch.device | None = None
    _: KW_ONLY
    batch_size: int
    T: int
    seed: int
    shard: int = 0
    hflip: bool = False
    label_dropout: float = 0.0
    ambient_t: int = 0
    part: slice | None = None

    def __post_init__(self):
        if len(self.index) < self.batch_size:
            raise UsageError(
                f"--batch_size={self.batch_size} is larger than the {len(self.index)} images of "
                f"shard {self.shard}: lower --batch_size or --client_num, or use more images"
            )
        self.device = torch.device(self.device or self.images.device)
        self.labels = None if self.labels is None else self.labels.to(self.device)
        self.part = self.part or slice(None)
        self.steps_per_epoch = len(self.index) // self.batch_size
        self.use(self.index)

    def use(self, index):
        """Go on with other images, as many as before."""
        self.index = index.to(self.images.device)
        self._epoch = self._order = None  # the last order made, since every step of an epoch needs it

    def epoch_order(self, epoch):
        """The shard's images in the order of an epoch: (M,) int64."""
        if epoch != self._epoch:
            stream = generator("cpu", self.seed, "order", self.shard, epoch)
            order = torch.randperm(len(self.index), generator=stream).to(self.index.device)
            self._epoch, self._order = epoch, self.index[order]
        return self._order

    def slots(self, step):
        """The slots of a step's images, of all parts: (B,) int64."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return self.epoch_order(epoch)[position * self.batch_size :][: self.batch_size]

    def __call__(self, step):
        """The `Batch` of a step."""
        x_0, labels, index = self.images_of(self.slots(step)[self.part])
        B, device = self.batch_size, self.device
        stream = generator(device, self.seed, "batch", self.shard, step)
        t = torch.randint(self.T, (B,), generator=stream, device=device)[self.part]
        eps = torch.randn((B, *x_0.shape[1:]), generator=stream, device=device)[self.part]
        eps_n = self.fixed_noise(index, x_0.shape[1:])
        if self.hflip:
            mirrored = (torch.rand(B, generator=stream, device=device) < 0.5)[self.part, None, None, None]
            x_0 = torch.where(mirrored, x_0.flip(-1), x_0)
            eps_n = None if eps_n is None else torch.where(mirrored, eps_n.flip(-1), eps_n)
        if labels is not None and self.label_dropout > 0:
            dropped = (torch.rand(B, generator=stream, device=device) < self.label_dropout)[self.part]
            labels = labels.masked_fill(dropped, -1)
        return Batch(x_0, labels, t, eps, index, eps_n)

    def augmented(self, index, magnitude):
        """The `Batch` of threshold-aware augmentation (Guan et al. 2025): RandAugment, then a fresh t and eps.

        Draws from torch's default generator.

        Args:
            index: (B,) int64 slots.
            magnitude: of two operations on each image.
        """
        from torchvision.transforms import RandAugment  # takes a second, which only those wait who need it

        augment = RandAugment(num_ops=2, magnitude=magnitude)
        x_0, labels, index = self.images_of(index.to(self.images.device), augment)
        t = torch.randint(self.T, (len(index),), device=self.device)
        return Batch(x_0, labels, t, torch.randn_like(x_0), index, self.fixed_noise(index, x_0.shape[1:]))

    def images_of(self, index, augment=None):
        """x_0, labels and numbers of the images in slots (B,), on the device; augment: a function of an image."""
        images = self.images[index]
        if augment:
            images = torch.stack([augment(image) for image in images])
        index = to_device(index, self.device)
        labels = None if self.labels is None else self.labels[index]
        return normalize(to_device(images, self.device)), labels, index

    def fixed_noise(self, index, shape):
        """The noise eps_n that belongs to each slot (B,), or None without `ambient_t`."""
        if not self.ambient_t:
            return None
        return sample_noise(derive_seed(self.seed, "ambient"), index.tolist(), shape, self.device)()

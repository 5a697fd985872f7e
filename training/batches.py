"""Which images, flips, timesteps and noise belong to a step: a pure function of (seed, shard, step).

Processes that share a batch draw all of it and take their part: no image depends on how many they are.
"""

from collections import namedtuple

import torch

from utils.errors import UsageError
from utils.images import firsts, normalize
from utils.seeding import generator

# What one training step is made of: x_0 (B, 3, H, W) float32 in [-1, 1]; labels (B,) int64, -1 for no
# class, or None; t (B,) int64; eps (B, 3, H, W) float32; slots (B,) int64, where the images are in the
# training set; mirrored (B,) bool, which of x_0 are mirrored.
Batch = namedtuple("Batch", "x_0 labels t eps slots mirrored")


def to_device(value, device):
    """The tensor on the device; from host memory to a GPU it goes while both work, so it is pinned."""
    if value.device.type == "cpu" and device.type == "cuda":
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


def epoch_size(slots, groups=None):
    """How many images an epoch draws of slots (M,): all; with groups, int64 (N,), one of each there."""
    return len(slots) if groups is None else len(groups[slots.cpu()].unique())


class Batches:
    """The order of one shard's images, addressed by its own step number over all epochs and rounds.

    Args:
        slots: (M,) int64, those of the shard's images in the training set.
        device: where batches are wanted.
        batch_size: B <= M; the last incomplete batch of an epoch is dropped.
        T: timesteps are drawn uniformly from 0..T-1.
        seed, shard: the address of the shard's randomness.
        groups: (N,) int64, the group of every slot of the training set: an epoch draws one random member
            of each. None: it draws all slots.

    Raises:
        UsageError: the shard is smaller than one batch.
    """

    def __init__(self, slots, device, batch_size, T, seed, shard, groups=None):
        size, things = epoch_size(slots, groups), "images" if groups is None else "groups"
        if size < batch_size:
            what = f"--batch_size={batch_size} is larger than the {size} {things} of shard {shard}"
            raise UsageError(f"{what}: lower --batch_size or --client_num, or use more images")
        self.device, self.batch_size, self.T = torch.device(device), batch_size, T
        self.seed, self.shard, self.groups = seed, shard, groups
        self.steps_per_epoch = size // batch_size
        self.use(slots)

    def use(self, slots):
        """Go on with other images, or groups, as many as before."""
        self.slots = slots
        self.epoch = self.order = None  # the last order made, since every step of an epoch needs it

    def draw_order(self, stream):
        """Positions (M,) int64 in the shard, in the order of an epoch, drawn from a generator.

        With groups, M of them, the first of each; then in another order, since large groups come early.
        """
        order = torch.randperm(len(self.slots), generator=stream)
        if self.groups is None:
            return order
        drawn = order[firsts(self.groups[self.slots.cpu()[order]])]
        return drawn[torch.randperm(len(drawn), generator=stream)]

    def slots_of(self, step):
        """The slots of a step's images: (B,) int64."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            order = self.draw_order(generator("cpu", self.seed, "order", self.shard, epoch))
            self.epoch, self.order = epoch, self.slots[order.to(self.slots.device)]
        return self.order[position * self.batch_size :][: self.batch_size]


class ShardBatches(Batches):
    """The batches of one shard of images, by the shard's own step number.

    Args:
        images: (N, 3, H, W) uint8, the whole training set, on the training device or in host memory.
        labels: (N,) int64, or None for unconditional training.
        slots, batch_size, T, seed, shard, groups: as for `Batches`.
        device: as there; by default the images'.
        hflip: mirror every image with probability 1/2.
        label_dropout: probability that a label is replaced by -1.
        part: a slice, which samples of every batch are wanted.
    """

    def __init__(
        self, images, labels, slots, device=None, *, batch_size, T, seed, shard=0,
        hflip=False, label_dropout=0.0, part=slice(None), groups=None,
    ):  # fmt: skip
        self.images, self.hflip, self.label_dropout, self.part = images, hflip, label_dropout, part
        super().__init__(slots, device or images.device, batch_size, T, seed, shard, groups)
        self.labels = None if labels is None else labels.to(self.device)

    def use(self, slots):
        super().use(slots.to(self.images.device))

    def __call__(self, step):
        """The `Batch` of a step."""
        x_0, labels, slots = self.images_of(self.slots_of(step)[self.part])
        B, device = self.batch_size, self.device
        stream = generator(device, self.seed, "batch", self.shard, step)
        t = torch.randint(self.T, (B,), generator=stream, device=device)[self.part]
        eps = torch.randn((B, *x_0.shape[1:]), generator=stream, device=device)[self.part]
        mirrored = torch.zeros(len(x_0), dtype=torch.bool, device=device)
        if self.hflip:
            mirrored = (torch.rand(B, generator=stream, device=device) < 0.5)[self.part]
            x_0 = torch.where(mirrored[:, None, None, None], x_0.flip(-1), x_0)
        if labels is not None and self.label_dropout > 0:
            dropped = (torch.rand(B, generator=stream, device=device) < self.label_dropout)[self.part]
            labels = labels.masked_fill(dropped, -1)
        return Batch(x_0, labels, t, eps, slots, mirrored)

    def augmented(self, slots, magnitude):
        """The `Batch` of threshold-aware augmentation (Guan et al. 2025): RandAugment, new t and eps.

        Draws from torch's default generator. slots: (B,) int64; magnitude: of two operations an image.
        """
        x_0, labels, slots = self.images_of(slots.to(self.images.device), rand_augment(magnitude))
        t = torch.randint(self.T, (len(slots),), device=self.device)
        return Batch(x_0, labels, t, torch.randn_like(x_0), slots, torch.zeros_like(t, dtype=torch.bool))

    def images_of(self, slots, augment=None):
        """x_0, labels and slots of slots (B,), on the device; augment: a function of an image."""
        images = self.images[slots]
        if augment:
            images = torch.stack([augment(image) for image in images])
        slots = to_device(slots, self.device)
        labels = None if self.labels is None else self.labels[slots]
        return normalize(to_device(images, self.device)), labels, slots


def rand_augment(magnitude):
    """RandAugment with two operations of a magnitude: a function of a uint8 image (3, H, W)."""
    from torchvision.transforms import RandAugment  # takes a second, which only those wait who need it

    return RandAugment(num_ops=2, magnitude=magnitude)

"""Images from a trained network: image i depends on (network, sampler, seed, i) and on nothing else."""

import hashlib
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from score.record import say_non_finite
from score.reject import add_to_record, hold_back
from utils import distributed
from utils.bar import progress_bar
from utils.errors import DataError, one_line, warn
from utils.files import atomic_write, file_hash, read_json, sync, write_json
from utils.images import non_finite_images, to_uint8
from utils.safe_files import check_memory
from utils.seeding import derive_seed, generator, sample_noise, seed_of_try

FILE, RECORD, PART_RECORD = "generate.npy", "generate.json", "generate.part.json"


class MeanPrediction(nn.Module):
    """Several networks as one that predicts the mean of their predictions: an ensemble of scores."""

    def __init__(self, nets):
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, x, t, labels=None):
        return sum(net(x, t, labels) for net in self.nets) / len(self.nets)


def draw_labels(seed, indices, num_labels, classes=None):
    """Classes of the images `indices`, uniform over a list, None for 0..num_labels-1: int64 (B,)."""
    classes = classes or range(num_labels)
    return torch.tensor([classes[derive_seed(seed, "label", i) % len(classes)] for i in indices])


def grid_noise(device, sample_size, img_size, seed, num_labels=None, classes=None):
    """x_T (B, 3, H, W) and classes (B,), or None, of a training's sample grids, always the same."""
    x_T = torch.randn((sample_size, 3, img_size, img_size), generator=generator("cpu", seed, "x_T"))
    labels = None
    if num_labels is not None:
        labels = draw_labels(seed, range(sample_size), num_labels, classes).to(device)
    return x_T.to(device), labels


@torch.no_grad()
def generate_batches(
    sampler, num_images, batch_size, seed, *,
    first=0, num_labels=None, classes=None, legacy_labels=False, dtype=torch.float32, margin=None,
):  # fmt: skip
    """Generate images first..num_images-1 batch by batch with a bar, the network in evaluation mode.

    Every process makes a batch at a time; rank 0 is given all of them in order, the others nothing.

    Args:
        sampler: a `GaussianDiffusionSampler` on its device.
        num_images, batch_size: how many in all, and per call of the sampler.
        seed: of x_T, of the classes, and of the noise of stochastic samplers.
        first: images before this one are there already.
        num_labels, classes: as for `draw_labels`; num_labels is None for an unconditional network.
        legacy_labels: the network was trained with embedding row c, not c + 1, for class c.
        dtype: of autocast; float32 for none.
        margin: of `hold_back`; None: no image is made again.

    Yields: (B, 3, H, W) uint8 on the CPU, and bool (B,), which had NaN or infinity (0 in their pixels);
    with a margin, tries and seconds of `hold_back` too.
    """
    device, shape = sampler.betas.device, (3, sampler.img_size, sampler.img_size)

    def make(indices, t=0):
        x_0 = torch.empty(0, *shape, device=device)
        if indices:
            labels = None
            if num_labels is not None:
                labels = draw_labels(seed, indices, num_labels, classes).to(device) - int(legacy_labels)
            noise = sample_noise(seed_of_try(seed, t), indices, shape, device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                x_0 = sampler(noise(), labels, noise)
        return to_uint8(x_0), non_finite_images(x_0)

    was_training = sampler.model.training
    sampler.model.eval()
    made = hold_back(make, margin) if margin else make
    yield from over_ranks(first, num_images, batch_size, made)
    sampler.model.train(was_training)


def over_ranks(first, number, batch_size, make):
    """What all processes make for the images first..number-1, a batch each at a time, with a bar.

    make: a function of a range of images, which may be empty; returns tensors with a row for each.

    Yields: on rank 0, lists of these tensors on the CPU, the rows of all in order; elsewhere nothing."""
    block = batch_size * distributed.world_size()
    with progress_bar(total=number, initial=first, desc="generate", unit="image") as bar:
        for start in range(first, number, block):
            batch = range(start, min(start + block, number))
            made = make(batch[distributed.share(len(batch))])
            gathered = distributed.gather([rows.cpu() for rows in made])
            if distributed.is_main():
                yield [torch.cat(parts) for parts in zip(*gathered, strict=True)]
            bar.update(len(batch))


def generate(sampler, num_images, batch_size, seed, **settings):
    """All images at once, in every process: (N, 3, H, W) uint8 on the CPU; as `generate_batches`."""
    made = list(generate_batches(sampler, num_images, batch_size, seed, **settings))
    batches = [images for images, _ in made]
    say_non_finite("generated images", sum(int(bad.sum()) for _, bad in made), num_images)
    empty = torch.empty(num_images, 3, sampler.img_size, sampler.img_size, dtype=torch.uint8)
    return distributed.broadcast(torch.cat(batches) if batches else empty, 0)


def generate_into(directory, origin, make_batches, num_images, img_size, description):
    """Images kept in a directory, each batch before the next is made: a killed generation goes on there.

    Returns (N, 3, H, W) uint8 on the CPU, in every process. Image i does not depend on how many there
    are, so those that are there are always the first of any number. When complete they are generate.npy,
    described by generate.json. Before, their pixels are in a file of which generate.part.json says how
    many are done; its name is made of the origin, so that two processes never mix theirs.

    Args:
        directory: of these files, which rank 0 reads and writes.
        origin: a dict of JSON values, all that images depend on: those of another are not continued.
        make_batches: a function of how many images are there; returns the rest, as `generate_batches`.
        img_size: height and width of an image.
        description: JSON values that generate.json is to hold beside what is known here.

    Raises:
        DataError: they do not fit into memory, or cannot be written."""
    directory = Path(directory)
    check_memory(f"--num_images={num_images}", num_images * 3 * img_size**2)
    images = torch.empty(num_images, 3, img_size, img_size, dtype=torch.uint8)
    record = earlier_images(directory, origin, images) if distributed.is_main() else None
    done = distributed.from_main(record and record["done"])
    if done:
        print(f"{directory}: {done} of {num_images} images are there already")
    batches = make_batches(done)
    if distributed.is_main():
        write_images(directory, record, images, batches, description)
    else:
        list(batches)
    return distributed.broadcast(images, 0)


def earlier_images(directory, origin, images):
    """Copy the images of this origin that a directory holds into `images`; returns their record."""
    known = {"origin": origin, "done": 0, "non_finite": [], "seconds": {"generate": 0}}
    for name in (RECORD, PART_RECORD):
        record = read_json(directory / name) if (directory / name).exists() else {}
        done = min(record.get("done", 0), len(images))
        if record.get("origin") != origin or done <= known["done"]:
            continue
        path = directory / record["file"]
        try:
            if name == PART_RECORD:
                pixels = np.memmap(path, np.uint8, "r", shape=(done, *images.shape[1:]))
            else:
                pixels = np.load(path, mmap_mode="r", allow_pickle=False)
            if name == PART_RECORD or file_hash(path) == record["file_sha256"]:
                images.numpy()[:done] = pixels[:done]
                bad = [i for i in record["non_finite"] if i < done]
                known |= {"done": done, "non_finite": bad, "seconds": record["seconds"]}
                if kept := record.get("held_back"):
                    known["held_back"] = kept | {"tries": kept["tries"][:done]}
        except (OSError, ValueError) as error:
            warn(f"{path}: cannot be read ({one_line(error)}): its images are made again")
    return known


def write_images(directory, record, images, batches, description):
    """Add batches to the images that `record`, of `earlier_images`, knows, and write generate.npy."""
    digest = hashlib.sha256(json.dumps(record["origin"]).encode()).hexdigest()
    part = directory / f"generate.part.{digest[:8]}"
    begin = time.perf_counter() - record["seconds"]["generate"]
    try:
        part.touch()
        with part.open("r+b") as file:  # what is in it already is written over with the same
            file.write(images[: record["done"]].numpy())
            for made, bad, *of_tries in batches:
                done = record["done"]
                images[done : done + len(made)] = made
                file.write(made.numpy())
                sync(file)
                record["done"] += len(made)
                record["non_finite"] += [done + i for i in bad.nonzero().flatten().tolist()]
                record["seconds"] = {"generate": round(time.perf_counter() - begin, 3)}
                if of_tries:
                    add_to_record(record, *of_tries)
                write_json(directory / PART_RECORD, record | {"file": part.name})
        with atomic_write(directory / FILE) as file:
            np.save(file, images.numpy())
        whole = {**description, **record, "non_finite_images": len(record["non_finite"])}
        whole |= {"file": FILE, "file_sha256": file_hash(directory / FILE)}
        write_json(directory / RECORD, whole)
        for path in (directory / PART_RECORD, *directory.glob("generate.part.????????")):
            path.unlink(missing_ok=True)
    except OSError as error:
        what = f"cannot be written ({error.strerror}): check the directory and its space"
        raise DataError(f"{part}: {what}") from error

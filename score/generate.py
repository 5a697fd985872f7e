"""Images from a trained network: image i depends on (network, sampler, seed, i) and on nothing else."""

import itertools
import secrets
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch

from score.samples import non_finite_images
from utils import distributed
from utils.errors import DataError
from utils.files import file_hash, read_json, sync, sync_directory, write_json
from utils.images import to_uint8
from utils.safe_files import check_memory, one_line
from utils.seeding import derive_seed, sample_noise

FILE, RECORD, PART_RECORD = "generate.npy", "generate.json", "generate.part.json"


def draw_labels(seed, indices, num_labels):
    """The classes of images `indices`, uniform over 0..num_labels-1: int64 (B,)."""
    return torch.tensor([derive_seed(seed, "label", i) % num_labels for i in indices])


@torch.no_grad()
def generate_batches(
    sampler, num_images, batch_size, seed, *, first=0, num_labels=None, legacy_labels=False, dtype=torch.float32
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
    shape = (num_images, 3, sampler.img_size, sampler.img_size)
    return distributed.broadcast(torch.cat(batches) if batches else torch.empty(shape, dtype=torch.uint8), 0)


def generate_into(directory, origin, make_batches, num_images, img_size, about):
    """Images kept in a directory, each batch safe on disk before the next is made: a killed generation goes on there.

    Image i does not depend on how many there are, so those that are there are always the first of any number. When
    complete they are generate.npy, described by generate.json. Before, generate.part.json names the file that they are
    in, which has a name of its own for every start: what another process writes is never taken for this one's.

    Args:
        directory: of these files, which rank 0 reads and writes.
        origin: a dict of JSON values, all that the images depend on; images of another origin are not continued.
        make_batches: a function of the number of images that are there; returns the rest, as `generate_batches` does.
        num_images: how many are wanted.
        img_size: height and width of an image.
        about: JSON values that generate.json is to say of the images beside its own.

    Returns:
        (N, 3, H, W) uint8 on the CPU, in every process.

    Raises:
        DataError: there is no room for all of the images, or they cannot be written.
    """
    directory = Path(directory)
    check_memory(f"--num_images={num_images}", num_images * 3 * img_size**2)
    images = torch.empty(num_images, 3, img_size, img_size, dtype=torch.uint8)
    record = earlier_images(directory, origin, images) if distributed.is_main() else None
    done, file = distributed.from_main((record["done"], record["file"]) if distributed.is_main() else None)
    if done:
        print(f"{directory}: {done} of {num_images} images are there already")
    if done < num_images or file != FILE:
        batches = make_batches(done)
        if distributed.is_main():
            write_images(directory, record, images, batches, about)
        else:
            list(batches)
    return distributed.broadcast(images, 0)


def earlier_images(directory, origin, images):
    """Copy the images of this origin that a directory holds to the beginning of `images`.

    Returns the record of those: their number is "done", and "file" is generate.npy if that is all and nothing else.
    """
    paths = [directory / name for name in (RECORD, PART_RECORD)]
    records = [read_json(path) for path in paths if path.exists()]
    records = [record for record in records if record.get("origin") == origin and "file" in record]
    for record in sorted(records, key=lambda record: -min(record["done"], len(images))):
        path, done = directory / record["file"], min(record["done"], len(images))
        try:
            if record.get("file_sha256") not in (None, file_hash(path)):
                continue
            images.numpy()[:done] = np.load(path, mmap_mode="r", allow_pickle=False)[:done]
        except (OSError, ValueError) as error:
            print(f"{path}: cannot be read ({one_line(error)}): its images are made again", file=sys.stderr)
            continue
        file = None if path.name == FILE and record["done"] > done else path.name
        bad = [i for i in record["non_finite"] if i < done]
        return {"origin": origin, "file": file, "done": done, "non_finite": bad, "seconds": record["seconds"]}
    return {"origin": origin, "file": None, "done": 0, "non_finite": [], "seconds": {"generate": 0}}


def write_images(directory, record, images, batches, about):
    """Add batches to the images that `record` knows, as `earlier_images` returns it, and finish generate.npy."""
    needed, free = (size / 2**30 for size in (images.nbytes, shutil.disk_usage(directory).free))
    if needed > free:
        raise DataError(f"--generate_dir={directory}: needs {needed:.1f} GiB, {free:.1f} are free: choose another one")
    continued, part = record["file"], directory / f"generate.part.{secrets.token_hex(4)}"
    begin = time.perf_counter() - record["seconds"]["generate"]
    try:
        with part.open("xb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": tuple(images.shape)}
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + images.nbytes)  # so it can be read before the last image is there
            file.write(images[: record["done"]].numpy())
            record["file"] = part.name
            for made, bad in itertools.chain([(images[:0], torch.zeros(0))], batches):  # at first what was there
                file.write(made.numpy())
                done = record["done"]
                images[done : done + len(made)] = made
                record["non_finite"] += [done + i for i in bad.nonzero().flatten().tolist()]
                record["done"] += len(made)
                record["seconds"] = {"generate": round(time.perf_counter() - begin, 3)}
                sync(file)
                write_json(directory / PART_RECORD, record)
                if continued not in (None, FILE):
                    (directory / continued).unlink(missing_ok=True)
        # until the file has its name, generate.part.json still says where the images are
        about = {**about, **record, "non_finite_images": len(record["non_finite"])}
        write_json(directory / RECORD, about | {"file": FILE, "file_sha256": file_hash(part)})
        part.replace(directory / FILE)
        sync_directory(directory)
        for path in (directory / PART_RECORD, *directory.glob("generate.part.????????")):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{part}: cannot be written ({error.strerror}): check the directory and its space") from error

"""Generated images on their way to a file: kept batch by batch, so that a killed generation goes on where it was."""

import os
import time
from pathlib import Path

import numpy as np
import torch

from errors import DataError
from files import file_hash, read_json, write_json
from score.samples import load_samples, save_samples

FILE, PART = "generate.npy", "generate.part"


class GeneratedImages:
    """The images that one network, sampler and seed make, in a directory.

    Image i does not depend on how many there are, so those that are there are always the first of any number.

    Args:
        directory: holds generate.npy and generate.json when complete, generate.part and generate.part.json before.
        origin: a dict of JSON values, all that the images depend on; images of another origin are not continued.
        img_size: height and width of an image.
    """

    def __init__(self, directory, origin, img_size):
        self.directory = Path(directory)
        self.origin = origin
        self.shape = (3, img_size, img_size)
        self.image_bytes = 3 * img_size * img_size
        self.seconds = 0.0
        self.non_finite = []
        self.images = torch.empty(0, *self.shape, dtype=torch.uint8)

    @property
    def done(self):
        """How many images there are."""
        return len(self.images)

    def record(self):
        """What the JSON file beside the images says of them."""
        return {
            "origin": self.origin,
            "done": self.done,
            "non_finite": self.non_finite,
            "non_finite_images": len(self.non_finite),
            "seconds": {"generate": round(self.seconds, 3)},
        }

    def load(self, num_images):
        """Take over the images 0..num_images-1 that earlier calls have made; returns whether the file is just these."""
        whole, part = self._read("generate.json"), self._read(f"{PART}.json")
        if whole and file_hash(self.directory / FILE) == whole["file_sha256"]:
            self._take(load_samples(self.directory / FILE, self.shape[1]), whole, num_images)
            if whole["done"] == num_images:
                return True
        if (
            part
            and part["done"] > self.done
            and (self.directory / PART).stat().st_size >= part["done"] * self.image_bytes
        ):
            data = np.fromfile(self.directory / PART, np.uint8, part["done"] * self.image_bytes)
            self._take(torch.from_numpy(data).view(-1, *self.shape), part, num_images)
        return False

    def _read(self, name):
        path = self.directory / name
        record = read_json(path) if path.exists() else {}
        return record if record.get("origin") == self.origin else None

    def _take(self, images, record, num_images):
        self.images = images[:num_images]
        self.non_finite = [i for i in record["non_finite"] if i < num_images]
        self.seconds = record["seconds"]["generate"]

    def extend(self, batches):
        """Add batches (images uint8, which were not finite), each safe on disk before the next is made."""
        path = self.directory / PART
        since = time.perf_counter()
        try:
            # what is written over in a part of the same origin is written again, the same
            with path.open("r+b" if self._read(f"{PART}.json") and path.exists() else "wb") as file:
                file.write(self.images.numpy().tobytes())
                for images, bad in batches:
                    file.write(images.numpy().tobytes())
                    file.flush()
                    os.fsync(file.fileno())
                    self.non_finite += (len(self.images) + bad.nonzero().flatten()).tolist()
                    self.images = torch.cat([self.images, images])
                    self.seconds += time.perf_counter() - since
                    since = time.perf_counter()
                    write_json(self.directory / f"{PART}.json", self.record())
        except OSError as error:
            raise DataError(
                f"{path}: cannot be written ({error.strerror}): check the directory and its space"
            ) from error

    def finish(self, provenance):
        """Write generate.npy, and what made it to generate.json; the parts go."""
        save_samples(self.directory / FILE, self.images)
        digest = file_hash(self.directory / FILE)
        write_json(self.directory / "generate.json", {**provenance, **self.record(), "file_sha256": digest})
        for name in (PART, f"{PART}.json"):
            (self.directory / name).unlink(missing_ok=True)

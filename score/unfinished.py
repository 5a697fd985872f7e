"""Generated images on their way to a file: kept batch by batch, so that a killed generation goes on where it was."""

import secrets
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch

from score.samples import check_memory
from utils.errors import DataError
from utils.files import file_hash, read_json, sync, sync_directory, write_json
from utils.safe_files import one_line

FILE, RECORD, PART_RECORD = "generate.npy", "generate.json", "generate.part.json"


class GeneratedImages:
    """The first images that one network, sampler and seed make, in a directory.

    Image i does not depend on how many there are, so those that are there are always the first of any number. When
    complete they are generate.npy, described by generate.json. Before, generate.part.json names the file that they are
    in, which has a name of its own for every start: what another process writes is never taken for this one's.

    Args:
        directory: of these files.
        origin: a dict of JSON values, all that the images depend on; images of another origin are not continued.
        num_images: how many are wanted.
        img_size: height and width of an image.
    """

    def __init__(self, directory, origin, num_images, img_size):
        self.directory = Path(directory)
        self.origin = origin
        check_memory(f"--num_images={num_images}", num_images * 3 * img_size**2)
        self.images = torch.empty(num_images, 3, img_size, img_size, dtype=torch.uint8)
        self.not_finite = torch.zeros(num_images, dtype=torch.bool)
        self.done = 0
        self.seconds = 0.0
        self.continued = None  # the unfinished file that images were taken from

    def record(self, file):
        """What the JSON file beside the images says of them, which are in `file`."""
        return {
            "origin": self.origin,
            "file": file.name,
            "done": self.done,
            "non_finite": runs_of(self.not_finite),
            "non_finite_images": int(self.not_finite.sum()),
            "seconds": {"generate": round(self.seconds, 3)},
        }

    def load(self):
        """Take over what earlier calls have made of these images; returns whether generate.npy is just these."""
        whole, part = self._read(RECORD), self._read(PART_RECORD)
        if whole and self._take(whole) and whole["done"] == self.done == len(self.images):
            return True
        if part and part["done"] > self.done and self._take(part):
            self.continued = self.directory / part["file"]
        return False

    def _read(self, name):
        path = self.directory / name
        record = read_json(path) if path.exists() else {}
        return record if record.get("origin") == self.origin and "file" in record else None

    def _take(self, record):
        """Copy the images that a record describes; returns whether they are there and what it says they are."""
        path = self.directory / record["file"]
        try:
            if record.get("file_sha256") not in (None, file_hash(path)):
                return False
            made = np.load(path, mmap_mode="r", allow_pickle=False)
            done = min(record["done"], len(self.images))
            self.images.numpy()[:done] = made[:done]
        except (OSError, ValueError) as error:
            print(f"{path}: cannot be read ({one_line(error)}): its images are made again", file=sys.stderr)
            return False
        self.done, self.seconds = done, record["seconds"]["generate"]
        self.not_finite[:] = False
        for first, end in record["non_finite"]:
            self.not_finite[first:end] = True
        return True

    def complete(self, batches, provenance):
        """Add batches (images uint8, which were not finite), each safe on disk before the next is made; then finish.

        provenance: JSON values that generate.json is to say of the images beside its own.
        Raises DataError if there is no room for all of the images, or they cannot be written.
        """
        self._check_room()
        part = self.directory / f"generate.part.{secrets.token_hex(4)}"
        since = time.perf_counter()
        try:
            with part.open("xb") as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": tuple(self.images.shape)}
                np.lib.format.write_array_header_1_0(file, header)
                file.truncate(file.tell() + self.images.nbytes)  # so it can be read before the last image is there
                file.write(self.images[: self.done].numpy())
                self._save_part(file, part)
                if self.continued:
                    self.continued.unlink(missing_ok=True)
                for images, bad in batches:
                    file.write(images.numpy())
                    added = slice(self.done, self.done + len(images))
                    self.images[added], self.not_finite[added] = images, bad
                    self.done = added.stop
                    self.seconds += time.perf_counter() - since
                    since = time.perf_counter()
                    self._save_part(file, part)
            whole = self.directory / FILE
            # until the file has its name, generate.part.json still says where the images are
            record = {**provenance, **self.record(whole), "file_sha256": file_hash(part)}
            write_json(self.directory / RECORD, record)
            part.replace(whole)
            sync_directory(self.directory)
            for path in (self.directory / PART_RECORD, *self.directory.glob("generate.part.????????")):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise DataError(
                f"{part}: cannot be written ({error.strerror}): check the directory and its space"
            ) from error

    def _check_room(self):
        size, free = self.images.nbytes, shutil.disk_usage(self.directory).free
        if size > free:
            raise DataError(
                f"--generate_dir={self.directory}: {len(self.images):,} images take {size / 2**30:.1f} GiB, "
                f"{free / 2**30:.1f} are free: choose another directory"
            )

    def _save_part(self, file, part):
        sync(file)
        write_json(self.directory / PART_RECORD, self.record(part))


def runs_of(flags):
    """Where flags (N,) bool are true, as JSON: [[first, end], ...], `end` excluded."""
    edges = torch.nn.functional.pad(flags.int(), (1, 1)).diff().nonzero().flatten()
    return edges.view(-1, 2).tolist()

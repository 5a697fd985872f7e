"""Exact 50 nearest neighbours against faiss.IndexFlatL2: on noise, on natural images, and the memory it takes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import sklearn.datasets
import torch
from PIL import Image

from benchmarks.timing import alternate, row
from score.memorization import nearest_neighbors
from utils.errors import DataError

GENERATED, TRAINING, SIZE, K = 4096, 50_000, 32, 50


def noise(number, seed):
    """Uniform noise, the worst case of any search: uint8 (number, 3, 32, 32)."""
    stream = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (number, 3, SIZE, SIZE), dtype=torch.uint8, generator=stream)


def natural(number, seed):
    """Patches of scikit-learn's two photographs at random places, scales, flips and exposures: uint8."""
    photographs = [Image.fromarray(image) for image in sklearn.datasets.load_sample_images().images]
    random = np.random.default_rng(seed)
    patches = np.empty((number, SIZE, SIZE, 3), np.uint8)
    for patch in patches:
        photograph = photographs[random.integers(len(photographs))]
        side = min(int(SIZE * 2 ** random.uniform(0, 3.5)), *photograph.size)
        x, y = (int(random.integers(length - side + 1)) for length in photograph.size)
        pixels = np.asarray(photograph.resize((SIZE, SIZE), Image.BILINEAR, box=(x, y, x + side, y + side)))
        pixels = pixels[:, ::-1] if random.random() < 0.5 else pixels
        patch[:] = np.clip(pixels * random.uniform(0.5, 1.5), 0, 255)
    return torch.from_numpy(patches).permute(0, 3, 1, 2).contiguous()


def measure(scale=1.0):
    """Rows of the table; `scale` multiplies both numbers of images. Ours takes the uint8 images, faiss their floats."""
    faiss = import_faiss()
    generated_number, training_number = (max(K, round(number * scale)) for number in (GENERATED, TRAINING))
    rows = []
    for name, make, target, at_most in (("noise", noise, 1.15, True), ("natural images", natural, 2.0, False)):
        generated, training = make(generated_number, 1), make(training_number, 2)
        as_floats = [(images.flatten(1).float() / 255).numpy() for images in (generated, training)]
        found = {}

        def ours(generated=generated, training=training, found=found):
            found["ours"] = nearest_neighbors(generated, training, K)

        def baseline(as_floats=as_floats, found=found):
            index = faiss.IndexFlatL2(as_floats[1].shape[1])
            index.add(as_floats[1])
            found["faiss"] = index.search(as_floats[0], K)

        seconds = alternate({"ours": ours, "faiss": baseline}, 3)
        what = f"50 nearest of {generated_number:,} x {training_number:,}, {name}: ours against faiss"
        rows.append(row(what, seconds["ours"], seconds["faiss"], target, at_most=at_most))
        rows.append(agreement(name, found["ours"], found["faiss"]))
    rows.append(memory(generated_number, training_number))
    return rows


def agreement(name, ours, theirs):
    """Which part of the neighbours faiss finds too: its float32 distances confuse near-ties, so not quite all."""
    both = torch.cat([ours[1], torch.from_numpy(theirs[1])], dim=1).sort(dim=1).values
    share = float((both[:, 1:] == both[:, :-1]).sum() / ours[1].numel())
    return {
        "what": f"share of the neighbours that faiss finds too, {name}",
        "ours": 1.0,
        "baseline": share,
        "ratio": share,
        "target": 0.99,
        "ok": share >= 0.99,
    }


def memory(generated_number, training_number):
    """Peak memory of a search beyond its inputs, in GiB, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.neighbors", str(generated_number), str(training_number)]
    peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    what = f"peak memory beyond the inputs, {generated_number:,} x {training_number:,} (GiB)"
    return {"what": what, "ours": peak, "baseline": 1.0, "ratio": peak, "target": 1.0, "ok": peak <= 1.0}


def import_faiss():
    try:
        import faiss
    except ImportError as error:
        raise DataError("faiss is not installed: pip install faiss-cpu==1.15.1, the baseline of the search") from error
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def peak_memory():
    """The largest resident memory of this process since the peak was last reset, in GiB (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


if __name__ == "__main__":
    sets = [noise(int(number), seed) for seed, number in enumerate(sys.argv[1:])]
    nearest_neighbors(sets[0][:64], sets[1][:64], K)  # what libraries take once
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is in use now
    before = peak_memory()
    nearest_neighbors(*sets, K)
    print(peak_memory() - before)

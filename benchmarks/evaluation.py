"""The exact neighbour search against faiss.IndexFlatL2, and the Frechet distance against pytorch-fid."""

import contextlib
import io
import multiprocessing
import warnings
from pathlib import Path

import faiss
import torch
from pytorch_fid.fid_score import calculate_frechet_distance

from benchmarks.step import noise
from benchmarks.timing import alternate, row
from score.fid import Statistics, frechet_distance
from score.memorization import nearest_neighbors

GENERATED, TRAINING, K = 4096, 50_000, 50


def measure(scale):
    """Rows of both; the scale multiplies the numbers of images and of features."""
    return search(*(max(K, round(number * scale)) for number in (GENERATED, TRAINING))) + distance(scale)


def search(N, M):
    """Of noise, of which no search can leave anything out. Ours takes uint8 images, faiss their floats.

    In float32 faiss confuses near-ties, so not quite all neighbours are the same.
    """
    generated, training = noise(N), noise(M)
    points, data = ((images.flatten(1).float() / 255).numpy() for images in (generated, training))
    faiss.omp_set_num_threads(torch.get_num_threads())
    found = {}

    def theirs():
        index = faiss.IndexFlatL2(data.shape[1])
        index.add(data)
        found["faiss"] = torch.from_numpy(index.search(points, K)[1])

    def ours():
        found["ours"] = nearest_neighbors(generated, training, K)[1]

    seconds = alternate({"ours": ours, "faiss": theirs}, 3)
    both = torch.cat([found["ours"], found["faiss"]], dim=1).sort(dim=1).values
    shared = float((both[:, 1:] == both[:, :-1]).sum() / found["ours"].numel())
    with multiprocessing.get_context("spawn").Pool(1) as process:
        peak = process.apply(peak_memory, (N, M))
    what = f"{K} nearest of {N:,} x {M:,} x 3,072"
    return [
        row(f"{what}: ours / faiss (s)", seconds["ours"], seconds["faiss"], at_most=1.15),
        row("share of these neighbours that faiss finds too", shared, at_least=0.99),
        row("peak memory of that search beyond its inputs (GiB)", peak, at_most=1.0),
    ]


def peak_memory(N, M):
    """GiB that a search takes beyond its inputs, of a fresh process (Linux)."""
    generated, training = noise(N), noise(M)
    nearest_neighbors(generated[:64], training[:64], K)  # what libraries take once
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use
    before = resident_peak()
    nearest_neighbors(generated, training, K)
    return resident_peak() - before


def resident_peak():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 2**20


def distance(scale):
    """Of features that are sparse, skewed and correlated, as Inception's are, with covariances of full rank.

    Where they have not, pytorch-fid's matrix square root is inaccurate, and there is nothing to be equal to.
    """
    features, inputs = (max(16, round(number * scale)) for number in (2048, 768))
    stream = torch.Generator().manual_seed(0)
    weight = torch.randn(inputs, features, generator=stream)
    arguments, found = [], {}
    for spread in (1.0, 1.2):
        statistics = Statistics(features)
        statistics.update((spread * torch.randn(3 * features, inputs, generator=stream) @ weight).relu())
        arguments += statistics.mean_and_covariance()

    def ours():
        found["ours"] = float(frechet_distance(*arguments))

    def theirs():
        # it prints and warns about singular products
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            found["pytorch-fid"] = float(calculate_frechet_distance(*arguments))

    seconds = alternate({"ours": ours, "pytorch-fid": theirs}, 3, warmup=0)
    difference = abs(found["ours"] / found["pytorch-fid"] - 1)
    return [
        row(f"Frechet distance, {features:,} features: pytorch-fid / ours (s)", *seconds.values(), at_least=5),
        row("relative difference of the two distances", difference, at_most=1e-6),
    ]

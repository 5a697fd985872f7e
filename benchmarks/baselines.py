"""Ours against honest baselines: the training step, the exact neighbour search, the Frechet distance."""

import statistics
import time
from functools import partial

import faiss
import torch
from pytorch_fid.fid_score import calculate_frechet_distance

from diffusion import GaussianDiffusionTrainer
from model import UNet
from score.fid import frechet_distance
from score.memorization import nearest_neighbors
from training.agc import AntiGradientControl
from training.batches import ShardBatches
from training.launch import pick_device
from training.learner import Learner

T = 1000
CIFAR10 = {"ch": 128, "ch_mult": [1, 2, 2, 2], "attn": [1], "num_res_blocks": 2}
DIGITS = {"ch": 32, "ch_mult": [1, 2], "attn": [1], "num_res_blocks": 1, "groups": 8}


def alternate(works, repeats, warmup=1):
    """Median seconds of each of {name: work}, called in turn, so that a disturbance meets all."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = {name: [] for name in works}
    for _ in range(warmup + repeats):
        for name, work in works.items():
            wait()
            start = time.perf_counter()
            work()
            wait()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[warmup:]) for name, seconds in times.items()}


def row(what, ours, baseline=None, at_most=None):
    """A row of the table; at_most: what ours / baseline should be."""
    ratio = None if baseline is None else ours / baseline
    target = f"at most {at_most:g}" if at_most else ""
    met = not at_most or ratio <= at_most
    return {"what": what, "ours": ours, "baseline": baseline, "ratio": ratio, "target": target, "ok": met}


def noise(number, size=32, device="cpu"):
    """Random images, uint8 (number, 3, size, size)."""
    return torch.randint(0, 256, (number, 3, size, size), dtype=torch.uint8, device=device)


def noise_to_search(scale, generated=4096, training=50_000, device="cpu"):
    """So many generated and training images, or a part of them: noise, where a search skips nothing."""
    torch.manual_seed(0)
    return [noise(max(50, round(number * scale)), device=device) for number in (generated, training)]


def make_net(architecture, device):
    """A UNet whose weights are as large as training makes them."""
    torch.manual_seed(0)
    net = UNet(T=T, dropout=0.1, **architecture).to(device)
    with torch.no_grad():
        for value in net.parameters():
            # the last layers start with a gain of 1e-5, and denormal numbers are slow
            if value.abs().max() < 1e-3:
                value.mul_(1e5)
    return net


def make_step(architecture, size, batch_size, device, **settings):
    """A learner, and a step of main_fed.py on random images, to be called."""
    objective = partial(GaussianDiffusionTrainer, beta_1=1e-4, beta_T=0.02, T=T)
    optimisation = {"lr": 2e-4, "warmup": 0, "grad_clip": 1.0, "ema_decay": 0.9999}
    learner = Learner(make_net(architecture, device), objective, **optimisation, **settings)
    images = noise(4 * batch_size, size, device)
    batches = ShardBatches(images, None, torch.arange(len(images)), batch_size=batch_size, T=T, seed=0, hflip=True)
    agc = AntiGradientControl(T).to(device)
    skip_counts = torch.zeros(len(images), dtype=torch.int64, device=device)

    def take_step():
        batch = batches(learner.step)
        loss, keep = agc(learner.losses(batch), batch.t)
        learner.update(loss)
        skip_counts[batch.slots] += ~keep

    return learner, take_step


def forward_backward(net, x, t, dtype=torch.float32):
    net.zero_grad()
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        prediction = net(x, t)
    (prediction.float() - x).square().mean().backward()


def step(scale):
    """Rows of two networks: main_fed.py's step against bare forward and backward; scale: of repeats."""
    device = pick_device(None)
    rows = []
    for name, architecture, size, batch, repeats in [("CIFAR-10", CIFAR10, 32, 4, 15), ("DIGITS", DIGITS, 8, 64, 41)]:
        x = torch.randn(batch, 3, size, size, device=device)
        t = torch.randint(T, (batch,), device=device)
        works = {
            "step": make_step(architecture, size, batch, device)[1],
            "bare": partial(forward_backward, make_net(architecture, device), x, t),
        }
        seconds = alternate(works, max(1, round(repeats * scale)), warmup=2)
        what = f"training step / forward + backward, {name} UNet, batch {batch} (s)"
        rows.append(row(what, seconds["step"], seconds["bare"], at_most=1.10))
    return rows


def evaluation(scale):
    """Rows of search and Frechet distance; the scale multiplies the numbers of images and features."""
    return [search(scale), distance(max(16, round(2048 * scale)))]


def search(scale):
    """A row of the search, which takes uint8 images, against faiss.IndexFlatL2, which takes floats."""
    generated, training = noise_to_search(scale)
    points, data = ((images.flatten(1).float() / 255).numpy() for images in (generated, training))
    faiss.omp_set_num_threads(torch.get_num_threads())

    def theirs():
        index = faiss.IndexFlatL2(data.shape[1])
        index.add(data)
        index.search(points, 50)

    seconds = alternate({"ours": lambda: nearest_neighbors(generated, training), "faiss": theirs}, 3)
    what = f"50 nearest of {len(generated):,} x {len(training):,} x 3,072: ours / faiss (s)"
    return row(what, seconds["ours"], seconds["faiss"], at_most=1.15)


def distance(number):
    """A row of the Frechet distance against pytorch-fid, of so many features, of full rank."""
    arguments = []
    for spread in (1.0, 1.2):
        features = spread * torch.rand(3 * number, number, dtype=torch.float64)
        arguments += [features.mean(dim=0).numpy(), features.T.cov().numpy()]
    works = {"ours": partial(frechet_distance, *arguments), "theirs": partial(calculate_frechet_distance, *arguments)}
    seconds = alternate(works, 3, warmup=0)
    return row(f"Frechet distance, {number:,} features: ours / pytorch-fid (s)", *seconds.values(), at_most=0.2)

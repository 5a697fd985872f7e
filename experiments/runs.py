"""The trainings of an experiment and what is measured of their checkpoints, each made once, on all cores.

A run is in <out>/runs/<data set>/<flags of the arm>/seed<seed>/: log/ is the log directory of main_fed.py, and
measured<images>.json what was measured with so many images. The same call goes on where it stopped.
"""

import argparse
import concurrent.futures
import contextlib
import ctypes
import functools
import io
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from absl.flags import FLAGS

from dataset import load_dataset
from diffusion import GaussianDiffusionSampler, GaussianDiffusionTrainer
from experiments.arms import BATCH, DATA, ENSEMBLE_STEPS, ROOT, SAMPLER, write_patches
from experiments.matched import WEIGHTS
from score.evaluate import evaluate
from score.fid import compute_statistics, frechet_distance
from score.generate import generate
from score.memorization import memorization_ratio
from training import checkpoint, flags
from training.batches import normalize
from utils import distributed, startup
from utils.errors import DataError
from utils.files import lock_directory, make_directory, read_json, write_json
from utils.seeding import generator

TIMESTEPS = 32  # at which the loss of an image is averaged


class Run(NamedTuple):
    """One training: names of its data set and arm, and what follows from them."""

    data: str
    arm: str
    seed: int
    images: int  # generated for every point
    directory: Path
    flags: list[str]
    steps_per_round: int  # over all shards


def positive(text):
    """A whole number above 0, for argparse."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


@contextlib.contextmanager
def begin(module, doc, arguments, own_flags, **defaults):
    """The options of a command line of experiments.<module>; in the repository's root, where config/ and data/ are.

    own_flags: {flag: settings of argparse}. Raises a DataError if --out cannot be written or another experiment does.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = startup.Parser(f"python -m experiments.{module}", description=doc, formatter_class=raw)
    shared = {
        "steps": {"type": positive, "help": "of default training, in place of the data set's own"},
        "points": {"type": positive, "help": "about so many measurements along a training, in place of its own"},
        "images": {"type": positive, "help": "images generated for every point, in place of its own"},
        "minutes": {"type": float, "default": 240, "help": "stop after so long; the same command goes on"},
        "out": {"type": os.path.expanduser, "default": "results", "help": "directory of all that is written"},
    }
    for flag, settings in (own_flags | shared).items():
        parser.add_argument(f"--{flag}", **settings)
    parser.set_defaults(**defaults)
    options = parser.parse_args(arguments)
    options.command = sys.argv[1:] if arguments is None else arguments
    options.start, options.out = time.time(), Path(options.out).resolve()
    options.deadline = options.start + 60 * options.minutes
    make_directory(options.out, "out")
    with lock_directory(options.out, "out"), contextlib.chdir(ROOT):
        yield options


def plan(name, arms, seeds, options):
    """All trainings of a data set, seed by seed, so that an experiment that is stopped has all arms.

    arms: {name: {flag: value}}; options: out, and steps, points and images, None for the data set's own.
    """
    data = DATA[name] | {key: getattr(options, key) for key in ("steps", "points", "images") if getattr(options, key)}
    runs = []
    for seed, (arm, own) in itertools.product(seeds, arms.items()):
        place = ",".join(f"{flag}={value}" for flag, value in own.items())
        directory = options.out / "runs" / name / place / f"seed{seed}"
        shards, per_shard = own["client_num"], data["num_train"] // own["client_num"]
        batch = min(BATCH, per_shard)
        per_epoch = shards * (per_shard // batch)
        total = data["steps"] * (1 if shards == 1 else ENSEMBLE_STEPS)
        longest = total // data["points"] // per_epoch  # a checkpoint is kept for each measurement
        epochs = max(1, min(own.get("local_epoch", data["round_steps"] // per_epoch), longest))
        rounds = max(1, total // (epochs * per_epoch))
        values = {
            **data["flags"], "train": True, "device": "cpu", "save_step": 0, "sample_step": 0, "log_step": 500,
            "batch_size": batch, **own, "local_epoch": epochs, "total_round": rounds,
            "save_round": max(1, round(rounds / data["points"])), **SAMPLER, "seed": seed, "logdir": directory / "log",
        }  # fmt: skip
        line = [f"--{flag}={value}" for flag, value in values.items()]
        runs.append(Run(name, arm, seed, data["images"], directory, line, epochs * per_epoch))
    return runs


def values_of(command):
    """absl's values of a command line of main_fed.py."""
    FLAGS.unparse_flags()
    flags.parse(FLAGS, [sys.argv[0], *command])
    return FLAGS


@functools.cache
def real_images(name):
    """(training images, which distinct image each is (M,), distinct training images, held-out images) of a data set.

    Images are uint8 (N, 3, H, W). Neighbours are searched for among the distinct ones: a repeated one would be its own
    second neighbour, and every ratio of its copies would come out higher.
    """
    values = values_of([f"--{flag}={value}" for flag, value in DATA[name]["flags"].items()])
    root = Path(values.data_root)
    if values.dataset == "folder":
        write_patches(root.parent, DATA[name]["num_train"], values.img_size)
    data = flags.call(values, load_dataset, values.dataset)
    training, heldout = data.train.images, data.heldout
    if heldout is None:
        heldout = flags.call(values, load_dataset, values.dataset, data_root=root.with_name("heldout")).train
    distinct, group = training.flatten(1).unique(dim=0, return_inverse=True)
    return training, group.numpy(), distinct.view(-1, *training.shape[1:]), heldout.images


def measure(images, training, heldout):
    """({measure: number}, ratio (N,), nearest training image (N,)) of images; all are uint8 (N, 3, H, W).

    Shares are in [0, 1]: MQ@p, f_mem (sqrt(d_1 / d_2) < 1/3), and AuthPct. fpd is that to the held-out images.
    """
    found, (sq_distance, index) = evaluate(images, training, scores=lambda images: {"fpd": fpd(images, heldout)})
    numbers = {
        "fpd": found["fpd"],
        **{f"MQ@{p}": share for p, share in found["mq_fraction"].items()},
        "f_mem": found["share_sqrt_d1_d2_below_third"],
        "AuthPct": found["auth_pct"] / 100,
    }
    return numbers, memorization_ratio(sq_distance).numpy(), index[:, 0].numpy()


def fpd(images, reference):
    """Frechet distance on pooled pixels between two sets of images."""
    return frechet_distance(*compute_statistics(images), *compute_statistics(reference))


def fpd_spread(images, reference):
    """Standard deviation of the Frechet distance over images drawn again with replacement, ten times."""
    random = torch.Generator().manual_seed(0)
    draws = (images[torch.randint(len(images), (len(images),), generator=random)] for _ in range(10))
    return float(np.std([fpd(drawn, reference) for drawn in draws], ddof=1))


def floor_of(name, images):
    """What held-out real images, and the training images themselves, reach in the place of `images` generated ones."""
    _, _, distinct, heldout = real_images(name)
    shuffled = heldout[torch.randperm(len(heldout), generator=torch.Generator().manual_seed(0))]
    size = min(images, len(shuffled) // 2)
    numbers = measure(heldout, distinct, heldout)[0]
    of_fpd = {"fpd of training images": fpd(distinct, heldout), "fpd": fpd(shuffled[:size], shuffled[size:])}
    return {**numbers, "images": len(heldout), "images of fpd": size, **of_fpd}


@torch.no_grad()
def per_image_loss(trainer, images, seed):
    """The training loss of every image, averaged over TIMESTEPS timesteps from 0 to T with the same noise for all.

    images: uint8 (N, 3, H, W). Returns (N,) float64.
    """
    x_0, total = normalize(images), torch.zeros(len(images), dtype=torch.float64)
    stream = generator("cpu", seed, "per-image loss")
    for i in range(TIMESTEPS):
        t = torch.full((len(x_0),), round((i + 0.5) * trainer.T / TIMESTEPS), dtype=torch.int64)
        eps = torch.randn(x_0.shape[1:], generator=stream).expand_as(x_0)
        total += trainer(x_0, None, t, eps).mean(dim=(1, 2, 3)).double()
    return (total / TIMESTEPS).numpy()


def measured(run):
    """What was measured of a training so far: {"points": [{"fpd": x, ...}]}, of its checkpoints' EMA and raw weights.

    And in the end of the last raw weights "nearest", the training image next to each generated one, "ratio", and
    "losses" and "skips" of all training images; the latter counts how often AGC has left each out.
    """
    path = run.directory / f"measured{run.images}.json"
    found = read_json(path) if path.exists() else {}
    return found if found.get("flags") == run.flags else {"flags": run.flags, "points": []}


def points_of(runs):
    """All points of several runs, with their arms and seeds."""
    return [{"arm": run.arm, "seed": run.seed, **point} for run in runs for point in measured(run)["points"]]


def end_with_parent(parent):
    """Have Linux end this process with SIGTERM when `parent`, which started it, has ended, by SIGKILL too."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it had ended before
        os._exit(1)


def train(run):
    """Train, which takes seconds if it is done. Raises a DataError with the last line of a training that fails."""
    run.directory.mkdir(parents=True, exist_ok=True)
    log, end = run.directory / "train.log", functools.partial(end_with_parent, os.getpid())
    command, environment = [sys.executable, "main_fed.py", *run.flags], {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        done = subprocess.run(command, env=environment, stdout=file, stderr=file, preexec_fn=end, check=False)
    if done.returncode:
        said = log.read_text(errors="replace").strip().rpartition("\n")[2]
        raise DataError(f"{log}: training failed: {said}")


def work(run):
    """Train one run and measure its checkpoints, on one thread."""
    torch.set_num_threads(1)
    train(run)
    training, _, distinct, heldout = real_images(run.data)
    values, result = values_of(run.flags), measured(run)
    averages = sorted(checkpoint.numbered(run.directory / "log", checkpoint.ROUNDS).items())
    for (r, path), weights in list(itertools.product(averages, reversed(WEIGHTS)))[len(result["points"]) :]:
        state = checkpoint.load(path)
        net = flags.unet(values, state, path).eval()
        checkpoint.load_weights(net, checkpoint.weights(state, weights == "ema", path), path)
        sampler = GaussianDiffusionSampler(net, **flags.sampler(values))
        with contextlib.redirect_stderr(io.StringIO()):  # bars of several processes would write over each other
            images = generate(sampler, run.images, run.images, run.seed)
        numbers, ratio, nearest = measure(images, distinct, heldout)
        point = {"round": r, "steps": r * run.steps_per_round, "weights": weights, **numbers}
        result["points"].append(point | {"fpd_std": fpd_spread(images, heldout), "images": run.images})
        if (r, weights) == (values.total_round, "raw"):
            losses = per_image_loss(flags.call(values, GaussianDiffusionTrainer, net), training, run.seed)
            arrays = {"ratio": ratio, "nearest": nearest, "losses": losses, "skips": state["index_array"]}
            result |= {name: array.tolist() for name, array in arrays.items()}
        write_json(run.directory / f"measured{run.images}.json", result)


def work_all(runs, deadline):
    """`work` of all runs that are not complete, until the deadline, one process per core; returns those that are."""
    missing = {run.directory: run for run in runs if "skips" not in measured(run)}.values()  # once for equal arms
    if missing and time.time() < deadline:
        real_images(runs[0].data)  # writes them, if need be, before several processes want them
        context = multiprocessing.get_context("spawn")
        with (
            concurrent.futures.ProcessPoolExecutor(os.cpu_count(), context, end_with_parent, (os.getpid(),)) as pool,
            distributed.bar(total=len(missing), desc=f"runs of {runs[0].data}", unit="run") as bar,
            contextlib.suppress(TimeoutError),
        ):
            try:
                # what is started here never sees Ctrl-C, and ends with this process
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
                jobs = [pool.submit(work, run) for run in missing]
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
                for job in concurrent.futures.as_completed(jobs, deadline - time.time()):
                    job.result()
                    bar.update()
            except BaseException:  # Ctrl-C too: nothing waits for what is at work, which goes on another time
                for process in multiprocessing.active_children():
                    process.terminate()
                raise
    return [run for run in runs if "skips" in measured(run)]

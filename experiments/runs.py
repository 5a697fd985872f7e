"""The trainings of the experiment and what is measured of their checkpoints, each made once, on all cores.

A run is in <out>/runs/<arm>/seed<seed>/: log/ is the log directory of main_fed.py, measured.json, or
stacked.json by experiments.stacked, what was measured. The
same call goes on where it stopped.
"""

import contextlib
import functools
import io
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import namedtuple

import torch
from absl.flags import FLAGS

from dataset import load_dataset
from diffusion import GaussianDiffusionSampler
from experiments.arms import ARMS, DATA, IMAGES, NETWORK, POINT, SAMPLER, SEEDS, START, TRAINING
from score.evaluate import evaluate
from score.fid import compute_statistics, frechet_distance
from score.generate import MeanPrediction, generate
from score.memorization import closer_than_third
from training import checkpoint, flags
from utils import distributed
from utils.errors import DataError
from utils.files import read_json, write_json

FILES = "stacked.json", "measured.json"  # what experiments.stacked and this module measure
POINTS = 6  # of a training of one round
OTHER_IMAGES = 1800  # at most, of "fpd of others", which depends on their number

# One training: the names of its arm and directory, its seed, the command line of main_fed.py, the checkpoint that it
# starts from or None, its rounds and the steps of one over all shards, and how many images a measurement generates.
Run = namedtuple("Run", "arm seed directory flags start rounds steps_per_round images")


def plan(out, scale=1.0, arms=None):
    """All trainings, seed by seed and of each the main arms first.

    Args:
        out: the directory of all that is written.
        scale: below 1: fewer steps, rounds and images, for a trial.
        arms: names of some of the `ARMS`; None for all.
    """
    order = itertools.product(range(1, max(map(max, SEEDS.values())) + 1), arms or ARMS)
    return [make_run(out, arm, seed, scale) for seed, arm in order if seed in SEEDS[arm]]


def make_run(out, arm, seed, scale):
    """The `Run` of an arm of `ARMS` with a seed; the other arguments as for `plan`."""
    own = dict(ARMS[arm])
    batch = own.get("batch_size", TRAINING["batch_size"])
    data = {name: own.get(name, value) for name, value in DATA.items()}
    slots = data["num_train"] + data["duplicates"] * (data["copies"] - 1)
    per_shard = slots if own.get("split") == "all" else slots // own["client_num"]
    per_epoch = own["client_num"] * (per_shard // batch)
    steps, start = round(own.pop("steps") * scale), own.pop("from", None)
    epochs, one_round = max(1, round(own.pop("local_epoch") * scale)), own.pop("one_round", False)
    if one_round:
        epochs = POINTS * max(1, round(epochs / POINTS))
    rounds = 1 if one_round else max(2, round(steps / (epochs * per_epoch)))
    directory = out / "runs" / arm / f"seed{seed}"
    values = {
        **DATA, **NETWORK, **TRAINING, **SAMPLER, "train": True, "device": "cpu", "sample_step": 0, "log_step": 500,
        "save_step": 0, **own, "local_epoch": epochs, "total_round": rounds, "seed": seed, "logdir": directory / "log",
    }  # fmt: skip
    if one_round:  # the shards' own networks are measured
        values |= {"save_step": epochs // POINTS * (per_shard // batch), "keep": POINTS}
    else:
        values["save_round"] = max(1, round(POINT * scale / (epochs * per_epoch)))
    if start:
        before = make_run(out, start, seed, scale)
        start = values["check_dir"] = (
            before.directory / "log" / checkpoint.round_name(max(1, round(START * before.rounds)))
        )
    lists = {flag: value if isinstance(value, list) else [value] for flag, value in values.items()}
    line = [f"--{flag}={value}" for flag, given in lists.items() for value in given]
    return Run(arm, seed, directory, line, start, rounds, epochs * per_epoch, max(100, round(IMAGES * scale)))


def values_of(command):
    """absl's values of a command line of main_fed.py."""
    FLAGS.unparse_flags()
    flags.parse(FLAGS, [sys.argv[0], *command])
    return FLAGS


def real_images(img_size):
    """(distinct training images, which of them are repeated (M,), held-out images), images uint8 (N, 3, H, W)."""
    data = load(img_size)
    return data.without_copies().train.images, data.slot_image.bincount() > 1, data.heldout.images


@functools.cache
def load(img_size, **changes):
    """The `dataset.Dataset` of all trainings, at a size; changes: of `DATA`."""
    data = {**DATA, "img_size": img_size, **changes}
    return load_dataset(data.pop("dataset"), "", **data)


def measure(images):
    """{measure: number} of uint8 images (N, 3, H, W); shares are in [0, 1].

    fpd is that to the held-out images; a generator that draws the repeated images less often has a better one, and so
    `fpd of others` is that of the images whose nearest is no repeated one. `near copies` is the share of the rest.
    f_mem (Gu et al. 2023) is also taken of repeated images alone; `extracted` counts those of which there is a copy.
    """
    distinct, repeated, heldout = real_images(images.shape[-1])
    found, (sq_distance, index) = evaluate(images, distinct, scores=lambda images: {"fpd": fpd(images, heldout)})
    copies, of_repeated = closer_than_third(sq_distance), repeated[index[:, 0]]
    return {
        "fpd": found["fpd"],
        "fpd of others": fpd(images[~of_repeated.cpu()][:OTHER_IMAGES], heldout),
        "f_mem": found["share_sqrt_d1_d2_below_third"],
        "f_mem of copies": (copies & of_repeated).double().mean().item(),
        "extracted": len(index[copies & of_repeated, 0].unique()),
        "near copies": of_repeated.double().mean().item(),
        **{f"MQ@{p}": found["mq_fraction"][p] for p in ("15", "30")},
        "images": len(images),
    }


def fpd(images, reference):
    """Frechet distance on pooled pixels between two sets of images."""
    return frechet_distance(*compute_statistics(images), *compute_statistics(reference))


def floor():
    """What held-out real images reach in the place of generated ones, and the fpd of sets of training images."""
    distinct, repeated, heldout = real_images(DATA["img_size"])
    shuffled = heldout[torch.randperm(len(heldout), generator=torch.Generator().manual_seed(0))]
    half = len(heldout) // 2
    sets = {
        "the training set": load(DATA["img_size"]).train.images,
        "distinct training images": distinct,
        "single images": distinct[~repeated][:OTHER_IMAGES],
    }
    fpds = {f"fpd of {name}": fpd(images, heldout) for name, images in sets.items()}
    of_halves = fpd(shuffled[:half], shuffled[half:])
    return {**measure(heldout), "fpd": of_halves, "fpd of others": of_halves, **fpds}


def measured(run, names=FILES):
    """What was measured of a training so far: {"flags", "points": [{"steps": n, "fpd": x, ...}], "complete": bool}.

    names: of the files where that may be, of which the last that is complete counts.
    """
    result = {"flags": run.flags, "points": [], "complete": False}
    for path in (run.directory / name for name in names):
        found = read_json(path) if path.exists() else {}
        if settings(found.get("flags", [])) == settings(run.flags) and (found["complete"] or not result["complete"]):
            result = found
    return result


def settings(command):
    """A command line without its paths, which change where results are moved."""
    return [flag for flag in command if not flag.startswith(("--logdir=", "--check_dir="))]


def begin_worker():
    """Leave Ctrl-C to the main process, which ends this one by SIGTERM, and with it the training that it waits for."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, leave)


def leave(*_):
    """Exit, and let no second signal interrupt that."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit()


def train(run):
    """Train, which takes seconds if it is done. Raises a DataError with the last line of a training that fails."""
    run.directory.mkdir(parents=True, exist_ok=True)
    log, environment = run.directory / "train.log", {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        command = [sys.executable, "main_fed.py", *run.flags]
        done = subprocess.run(command, env=environment, stdout=file, stderr=file, check=False)
    if done.returncode:
        said = log.read_text(errors="replace").strip().rpartition("\n")[2]
        raise DataError(f"{log}: training failed: {said}")


def networks(run, values):
    """(about, files of the networks whose mean prediction is measured) of every point of a training, in order.

    about: the steps made until there over all shards, and the steps one after the other.
    """
    log, K = run.directory / "log", values.client_num
    if run.start:
        yield {"steps": 0, "sequential": 0}, [run.start]
    if values.total_round > 1:
        for r, path in sorted(checkpoint.numbered(log, checkpoint.ROUNDS).items()):
            steps = r * run.steps_per_round
            yield {"steps": steps, "sequential": steps // K}, [path]
        return
    shards = [checkpoint.shard_files(log, k) for k in range(K)]
    for step in sorted(shards[0]):
        paths = [files[step] for files in shards]
        yield {"steps": K * step, "sequential": step}, paths
        yield {"steps": step, "sequential": step, "network": "sub-model"}, paths[:1]


def work(run):
    """Train one run and measure the EMA weights of its checkpoints, on one thread."""
    if not multiprocessing.parent_process().is_alive():
        sys.exit()  # killed: what is still in the queue is for another time
    values = values_of(run.flags)
    if run.start and not run.start.exists():
        return  # the training that it starts from comes first, another time
    train(run)
    result = measured(run, FILES[1:])
    for about, paths in list(networks(run, values))[len(result["points"]) :]:
        nets = []
        for path in paths:
            state = checkpoint.load(path)
            nets.append(flags.unet(values, state, path).eval())
            checkpoint.load_weights(nets[-1], checkpoint.weights(state, True, path), path)
        sampler = GaussianDiffusionSampler(MeanPrediction(nets), **flags.sampler(values))
        with contextlib.redirect_stderr(io.StringIO()):  # bars of several processes would write over each other
            images = generate(sampler, run.images, 512, run.seed)
        result["points"].append({**about, **measure(images)})
        write_json(run.directory / "measured.json", result)
    write_json(run.directory / "measured.json", result | {"complete": True})


def work_all(runs, deadline):
    """`work` of all runs that are not complete, until the deadline, one process per core; returns those that are."""
    missing = [run for run in runs if not measured(run)["complete"]]
    if missing and time.time() < deadline:
        with (  # whose end, by Ctrl-C too, ends what is at work, which goes on another time
            multiprocessing.get_context("spawn").Pool(os.cpu_count(), begin_worker) as pool,
            distributed.bar(total=len(missing), desc="runs", unit="run") as bar,
            contextlib.suppress(multiprocessing.TimeoutError),
        ):
            done = pool.imap_unordered(work, missing)
            for _ in missing:
                done.next(deadline - time.time())
                bar.update()
    return [run for run in runs if measured(run)["complete"]]

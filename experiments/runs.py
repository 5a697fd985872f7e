"""The trainings of an experiment and what is measured of their checkpoints, each made once, on all cores.

A run is in <out>/runs/<data set>/<arm>/seed<seed>/: log/ is the log directory of main_fed.py, points.json what was
measured, and measured/ what pictures and detectors are made of. The same call goes on where it stopped.
"""

import argparse
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import functools
import io
import itertools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from absl import flags as absl_flags

from dataset import load_dataset
from diffusion import GaussianDiffusionSampler
from experiments.arms import DATA, ROOT, Arm, Data, command_line, write_patches
from score.fid import frechet_distance, pixel_statistics
from score.generate import generate
from score.memorization import measures, memorization_ratio, nearest_neighbors
from training import checkpoint, flags
from utils import distributed, startup
from utils.errors import DataError
from utils.files import atomic_write, lock_directory, make_directory, read_json, write_text

FLAGS = absl_flags.FLAGS
WEIGHTS = ("raw", "ema")
PAIRS = 10  # most memorised images that are kept of a checkpoint
RESAMPLES = 10  # of the generated images, for the spread of the Frechet distance
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: its place in the experiment, its directory, its command line and the steps of a round."""

    data: Data
    arm: Arm
    seed: int
    directory: Path
    flags: tuple[str, ...]
    steps_per_round: int


def parser_of(name, doc):
    """A parser for `python -m experiments.<name>` with the flags that both experiments have."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = startup.Parser(f"python -m experiments.{name}", description=doc, formatter_class=raw)
    own = "in place of the data set's own"
    parser.add_argument("--steps", type=positive, help=f"of default training, {own}")
    parser.add_argument("--points", type=positive, help=f"about so many measurements along a training, {own}")
    parser.add_argument("--images", type=positive, help=f"images generated for every point, {own}")
    parser.add_argument("--minutes", type=float, default=240, help="stop after so long; the same command goes on")
    parser.add_argument("--out", type=absolute, default="results", help="directory of everything that is written")
    return parser


def positive(text):
    """A whole number above 0, for argparse."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def absolute(text):
    """A path, for argparse: the experiments work in another directory than their caller's."""
    return Path(os.path.expanduser(text)).resolve()  # noqa: PTH111 - an unknown user's ~ stays, as in a shell


@contextlib.contextmanager
def begin(options, arguments):
    """Work in the repository's root, where config/ and data/ are, as the only experiment that writes to --out.

    Raises a DataError if another one does, or if --out cannot be written.
    """
    options.command = sys.argv[1:] if arguments is None else arguments
    make_directory(options.out, "out")
    with lock_directory(options.out, "out"), contextlib.chdir(ROOT):
        yield options


def plan(name, arms, seeds, options):
    """All trainings of a data set, seed by seed, so that an experiment that is stopped has all arms.

    options: has `out`, `steps`, `points` and `images` of the command, None where the data set's own are meant.
    """
    own = {key: getattr(options, key) for key in ("steps", "points", "images") if getattr(options, key)}
    data, runs = dataclasses.replace(DATA[name], **own), []
    for seed in seeds:
        for arm in arms:
            place = re.sub(r"[^A-Za-z0-9.]+", "_", f"{arm.name} {arm.setting}".strip())
            directory = options.out / "runs" / name / place / f"seed{seed}"
            runs.append(Run(data, arm, seed, directory, *command_line(data, arm, seed, directory / "log")))
    return runs


def end_with_parent(parent):
    """Have the kernel end this process with SIGTERM when `parent`, which started it, has ended, by SIGKILL too.

    A training would go on otherwise and hold the log directory that the next start wants. Linux only.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it had ended before
        os._exit(1)


def is_trained(run):
    """Whether the training has been finished with these flags, which it then leaves in the file `trained`."""
    marker = run.directory / "trained"
    return marker.exists() and marker.read_bytes() == os.fsencode("\n".join(run.flags))


def train(run, deadline):
    """Train unless it is done. At the deadline it is stopped, to go on another time."""
    if is_trained(run) or time.time() > deadline:
        return
    run.directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "main_fed.py", *run.flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    errors, end = run.directory / "train.err", functools.partial(end_with_parent, os.getpid())
    with (
        errors.open("w") as err,
        subprocess.Popen(command, env=environment, stdout=err, stderr=err, preexec_fn=end) as process,
    ):
        try:
            code = process.wait(timeout=max(1.0, deadline - time.time()))
        except subprocess.TimeoutExpired:
            process.terminate()
            return
    if code:
        said = errors.read_text(errors="replace").strip().rpartition("\n")[2]
        raise DataError(f"{errors}: training failed: {said}")
    (run.directory / "trained").write_bytes(os.fsencode("\n".join(run.flags)))


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
    values = values_of(DATA[name].flags)
    root = Path(values.data_root)
    if values.dataset == "folder":
        write_patches(root.parent, DATA[name].num_train, values.img_size)
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
    sq_distance, index = nearest_neighbors(images, training)
    found = measures(sq_distance, index, training)
    numbers = {
        "fpd": fpd(images, heldout),
        **{f"MQ@{p}": share for p, share in found["mq_fraction"].items()},
        "f_mem": found["share_sqrt_d1_d2_below_third"],
        "AuthPct": found["auth_pct"] / 100,
    }
    return numbers, memorization_ratio(sq_distance).numpy(), index[:, 0].numpy()


def fpd(images, reference):
    """Frechet distance on pooled pixels between two sets of images."""
    return frechet_distance(*(x for i in (images, reference) for x in pixel_statistics(i).mean_and_covariance()))


def fpd_spread(images, reference):
    """Standard deviation of the Frechet distance over images drawn again with replacement."""
    random = torch.Generator().manual_seed(0)
    draws = (images[torch.randint(len(images), (len(images),), generator=random)] for _ in range(RESAMPLES))
    return float(np.std([fpd(drawn, reference) for drawn in draws], ddof=1))


def floor_of(data):
    """What held-out real images, and the training images themselves, reach in the place of generated ones."""
    _, _, distinct, heldout = real_images(data.name)
    shuffled = heldout[torch.randperm(len(heldout), generator=torch.Generator().manual_seed(0))]
    size = min(data.images, len(shuffled) // 2)
    numbers = measure(heldout, distinct, heldout)[0]
    of_fpd = {"fpd of training images": fpd(distinct, heldout), "fpd": fpd(shuffled[:size], shuffled[size:])}
    return {**numbers, "images": len(heldout), "images of fpd": size, **of_fpd}


def load_network(run, r, use_ema):
    """(network of a checkpoint, how often each training image was left out until then)."""
    path = run.directory / "log" / checkpoint.round_name(r)
    state = checkpoint.load(path)
    net = flags.unet(values_of(run.flags), state, path)
    checkpoint.load_weights(net, checkpoint.weights(state, use_ema, path), path)
    return net.eval(), state["index_array"].numpy()


def rounds_kept(run):
    """The rounds that there are checkpoints of, ascending."""
    return sorted(checkpoint.numbered(run.directory / "log", checkpoint.ROUNDS))


def arrays_path(run, r, weights):
    return run.directory / "measured" / f"round{r}_{weights}_{run.data.images}.npz"


def measure_all(run, deadline):
    """Measure the checkpoints of a training that have not been yet: points.json and measured/."""
    _, _, distinct, heldout = real_images(run.data.name)
    done = {(point["round"], point["weights"]) for point in read_points(run)}
    for r, weights in itertools.product(rounds_kept(run), WEIGHTS):
        if (r, weights) in done or time.time() > deadline:
            continue
        net, skips = load_network(run, r, weights == "ema")
        sampler = GaussianDiffusionSampler(net, **flags.sampler(values_of(run.flags)))
        with contextlib.redirect_stderr(io.StringIO()):  # bars of several processes would write over each other
            images = generate(sampler, run.data.images, run.data.images, run.seed)
        numbers, ratio, nearest = measure(images, distinct, heldout)
        top = ratio.argsort(kind="stable")[:PAIRS]
        pairs = torch.stack([distinct[nearest[top]], images[top]], dim=1).numpy()
        with atomic_write(arrays_path(run, r, weights)) as file:
            np.savez_compressed(file, ratio=ratio, nearest=nearest, pairs=pairs, skips=skips)
        point = {"round": r, "steps": r * run.steps_per_round, "weights": weights, **numbers}
        point |= {"fpd_std": fpd_spread(images, heldout), "images": len(images)}
        write_lines(run.directory / "points.json", [*all_points(run), point], depth=1)


def all_points(run):
    path = run.directory / "points.json"
    return read_json(path) if path.exists() else []


def read_points(run):
    """The points of a training so far, in the order of their steps; those of as many images as the run says."""
    points = [point for point in all_points(run) if point["images"] == run.data.images]
    return sorted(points, key=lambda point: point["steps"])


def is_complete(run):
    """Whether the run is trained and all its checkpoints are measured."""
    return is_trained(run) and len(read_points(run)) == len(WEIGHTS) * len(rounds_kept(run))


def is_measured(run):
    """Whether there is a point of the raw and of the EMA weights, as all tables need."""
    return {point["weights"] for point in read_points(run)} == set(WEIGHTS)


def last_point(run):
    """The last point of raw weights: a run that was stopped may have saved later checkpoints."""
    return [point for point in read_points(run) if point["weights"] == "raw"][-1]


def last_arrays(run):
    """What was kept of the last point of raw weights: {"ratio", "nearest", "pairs", "skips"}."""
    with np.load(arrays_path(run, last_point(run)["round"], "raw"), allow_pickle=False) as arrays:
        return dict(arrays)


def work(run, deadline):
    """Train and measure one run, on one thread; returns whether it is complete."""
    torch.set_num_threads(1)
    train(run, deadline)
    measure_all(run, deadline)
    return is_complete(run)


def work_all(runs, deadline):
    """`work` of all runs that are not complete, one process per core."""
    missing = [run for run in runs if not is_complete(run)]
    if not missing or time.time() > deadline:
        return
    real_images(runs[0].data.name)  # writes them, if need be, before several processes want them
    context = multiprocessing.get_context("spawn")
    done, desc = len(runs) - len(missing), f"runs of {runs[0].data.name}"
    with (
        concurrent.futures.ProcessPoolExecutor(os.cpu_count(), context, end_with_parent, (os.getpid(),)) as pool,
        distributed.bar(total=len(runs), initial=done, desc=desc, unit="run") as bar,
    ):
        try:
            # what is started here never sees Ctrl-C, and ends with this process
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            jobs = [pool.submit(work, run, deadline) for run in missing]
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
            for job in concurrent.futures.as_completed(jobs):
                bar.update(job.result())
        except BaseException:  # Ctrl-C too: nothing waits for what is at work, which goes on another time
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def write_lines(path, value, depth):
    """Write a value as JSON, atomically, with what lies deeper than `depth` on one line."""
    text = json.dumps(value, indent=2)
    text = re.sub(rf"\n {{{2 * depth + 2},}}|\n {{{2 * depth}}}(?=[\]}}])", " ", text)
    write_text(path, f"{text}\n")

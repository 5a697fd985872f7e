"""The trainings of an experiment and what is measured of their checkpoints, each made once, on all cores.

A run is in <out>/runs/<data set>/<arm>/seed<seed>/: log/ is the log directory of main_fed.py, points.json what was
measured, and measured/ what the intervals, pictures and detectors are made of. The same call goes on where it stopped.
"""

import concurrent.futures
import ctypes
import functools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from absl import flags as absl_flags

import distributed
from diffusion import GaussianDiffusionSampler
from errors import DataError
from experiments.arms import Arm, Subject, command_line, subject
from experiments.judge import Judge
from files import atomic_write, read_json, write_json
from model import UNet
from training import checkpoint, flags

FLAGS = absl_flags.FLAGS
ROOT = Path(__file__).parent.parent
WEIGHTS = ("raw", "ema")
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


@dataclass(frozen=True)
class Run:
    """One training: its place in the experiment, its directory, its command line and the steps of a round."""

    subject: Subject
    arm: Arm
    seed: int
    directory: Path
    flags: tuple[str, ...]
    steps_per_round: int


def plan(data, arms, seeds, options):
    """All trainings of a data set, seed by seed, so that an experiment that is stopped has all arms.

    options: has `out`, `steps`, `points` and `images` of the command.
    """
    about = subject(data, options)
    runs = []
    for seed in seeds:
        for arm in arms:
            place = re.sub(r"[^A-Za-z0-9.]+", "_", f"{arm.name} {arm.setting}".strip())
            directory = Path(options.out).resolve() / "runs" / data / place / f"seed{seed}"
            own, steps = command_line(about, arm, seed, directory / "log")
            runs.append(Run(about, arm, seed, directory, own, steps))
    return runs


def end_with_parent(parent):
    """Have the kernel end this process with SIGTERM when `parent`, which started it, has ended, killed or not.

    A training would go on otherwise and hold the log directory that the next start wants. Other systems than Linux
    have no such call.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)


def marker_of(run):
    """The file that a finished training leaves, with its flags."""
    return run.directory / "trained"


def is_trained(run):
    """Whether the training has been finished with these flags."""
    marker = marker_of(run)
    return marker.exists() and marker.read_bytes() == os.fsencode("\n".join(run.flags))


def train(run, deadline):
    """Train unless it is done; returns whether it is. At the deadline it is stopped, to go on another time."""
    if is_trained(run):
        return True
    if time.time() > deadline:
        return False
    run.directory.mkdir(parents=True, exist_ok=True)
    with (run.directory / "train.err").open("w") as err:
        command = [sys.executable, str(ROOT / "main_fed.py"), *run.flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        end = functools.partial(end_with_parent, os.getpid())
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=err, stderr=err, preexec_fn=end) as process:
            try:
                code = process.wait(timeout=max(1.0, deadline - time.time()))
            except subprocess.TimeoutExpired:
                process.terminate()
                process.wait()
                return False
    if code:
        last_words = (run.directory / "train.err").read_text(errors="replace")[-500:]
        raise DataError(f"{run.directory}/train.err: training failed: {last_words}")
    marker_of(run).write_bytes(os.fsencode("\n".join(run.flags)))
    return True


def flags_of(run):
    """The flags that a training was started with, as absl's values."""
    FLAGS.unparse_flags()
    flags.parse(FLAGS, [sys.argv[0], f"--flagfile={run.directory / 'log/flagfile.txt'}"])
    return FLAGS


def rounds_kept(run):
    """The rounds that there are checkpoints of, ascending."""
    return [checkpoint.progress_of(path)[0] for path in reversed(checkpoint.newest_first(run.directory / "log"))]


def load_network(run, r, use_ema):
    """(network of a checkpoint, how often each training image was left out until then)."""
    path = run.directory / "log" / checkpoint.round_name(r)
    state = checkpoint.load(path)
    net = UNet(**flags.unet(flags_of(run), state, path))
    checkpoint.load_weights(net, checkpoint.weights(state, use_ema, path), path)
    return net.eval(), state["index_array"]


def measured_path(run, r, weights):
    return run.directory / "measured" / f"round{r}_{weights}.npz"


def read_measured(run, r, weights):
    """What `Judge` kept of a checkpoint: {name: array}."""
    with np.load(measured_path(run, r, weights), allow_pickle=False) as arrays:
        return dict(arrays)


def evaluate(run, judge, deadline):
    """Measure the checkpoints of a training that have not been yet: points.json and measured/."""
    path = run.directory / "points.json"
    points = measured_already(run)
    done = {(point["round"], point["weights"]) for point in points}
    for r in rounds_kept(run):
        for weights in WEIGHTS:
            if (r, weights) in done or time.time() > deadline:
                continue
            net, skips = load_network(run, r, weights == "ema")
            sampler = GaussianDiffusionSampler(net, **flags.sampler(flags_of(run)))
            point, kept = judge(sampler, run.seed)
            with atomic_write(measured_path(run, r, weights)) as file:
                np.savez_compressed(file, **kept, skips=skips.numpy())
            points.append({"round": r, "steps": r * run.steps_per_round, "weights": weights, **point})
            write_json(path, points)


def with_published_sampler(run, judge):
    """The point of the last raw checkpoint with DDIM-50, kept beside the others."""
    r = last_round(run)
    path = run.directory / "measured" / f"round{r}_ddim50_{run.subject.images}.json"
    if not path.exists():
        net, _ = load_network(run, r, False)
        settings = flags.sampler(flags_of(run)) | {"sampler": "ddim", "steps": 50}
        write_json(path, judge(GaussianDiffusionSampler(net, **settings), run.seed)[0])
    return read_json(path)


def read_points(run):
    """The points of a training so far, in the order of their steps."""
    path = run.directory / "points.json"
    return sorted(read_json(path), key=lambda point: point["steps"]) if path.exists() else []


def measured_already(run):
    """The points that were measured with as many generated images as now; others are made again."""
    images = run.subject.images
    return [p for p in read_points(run) if len(read_measured(run, p["round"], p["weights"])["ratio"]) == images]


def is_complete(run):
    """Whether the run is trained and all its checkpoints are measured."""
    return is_trained(run) and len(measured_already(run)) == len(WEIGHTS) * len(rounds_kept(run))


def is_measured(run):
    """Whether there is a point of the raw and of the EMA weights, as all tables need."""
    return {point["weights"] for point in read_points(run)} == set(WEIGHTS)


def last_round(run):
    """The last round whose raw weights have been measured: a run that was stopped may have saved later ones."""
    return max(point["round"] for point in read_points(run) if point["weights"] == "raw")


def last_measured(run):
    """What `Judge` kept of the last raw checkpoint."""
    return read_measured(run, last_round(run), "raw")


@functools.cache
def judge_of(about):
    return Judge(about)


def work(run, deadline):
    """Train and measure one run in a process of its own, on one thread; returns whether it is complete."""
    torch.set_num_threads(1)
    train(run, deadline)
    if rounds_kept(run):
        evaluate(run, judge_of(run.subject), deadline)
    return is_complete(run)


def work_all(runs, deadline):
    """`work` of all runs that are not complete, one process per core."""
    judge_of(runs[0].subject)  # writes the data, if need be, before several processes want it
    missing = [run for run in runs if not is_complete(run)]
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(os.cpu_count(), context, end_with_parent, (os.getpid(),))
    done = len(runs) - len(missing)
    with distributed.bar(total=len(runs), initial=done, desc=f"runs of {runs[0].subject.name}", unit="run") as bar:
        try:
            # what is started here never sees Ctrl-C, and ends with this process
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            jobs = [pool.submit(work, run, deadline) for run in missing]
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
            for job in concurrent.futures.as_completed(jobs):
                bar.update(job.result())
        except BaseException:  # a signal too: what has begun saves and ends, what has not must not begin
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    pool.shutdown()

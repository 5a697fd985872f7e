"""The trainings of an experiment and what is measured of their checkpoints, made once, on all cores.

A run is in <out>/runs/<experiment>/<arm>/seed<seed>/: log/ is the log directory of main_fed.py,
measured.json, or stacked.json by experiments.stacked, what was measured. The same call goes on where it
stopped. What <out> has in the experiment's JSON file is not made again either.
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
from pathlib import Path

import torch
from absl.flags import FlagValues

from diffusion import GaussianDiffusionSampler
from experiments import altered, cifar10, digits
from experiments.images import load
from score.generate import MeanPrediction, generate_batches
from score.reject import add_to_record, held_back, ratio_margin
from training import build
from training.flags import define, parse
from training.resume import shard_files
from training.weights import ROUNDS, load_checkpoint, load_weights, numbered, round_name, weights_in
from utils.bar import progress_bar
from utils.errors import DataError, UsageError
from utils.files import read_json, write_json

FILES = "stacked.json", "measured.json"  # what experiments.stacked and this module measure
ROOT = Path(__file__).parent.parent
EXPERIMENTS = {"altered": altered, "cifar10": cifar10, "digits": digits}
LISTS = ("keep_list", "groups")  # flags that name files of the finder, known by their hashes
# flags that change where files are moved
OF_PLACES = ("--logdir=", "--check_dir=", "--data_root=", *(f"--{name}=" for name in LISTS))
OF_PLACES += ("--pretrained=", "--captions=")

# One training. flags: the command line of main_fed.py; data: arguments of `load`; start: a checkpoint, or
# None; steps_per_round: over all shards; images: how many a measurement generates
Run = namedtuple("Run", "experiment arm seed directory flags data start rounds steps_per_round images")


def plan(experiment, out, data_root, scale=1.0):
    """All `Run`s of an experiment, seed by seed, main arms first; scale: below 1 for a short trial."""
    seeds = EXPERIMENTS[experiment].SEEDS
    order = itertools.product(range(1, max(map(max, seeds.values())) + 1), EXPERIMENTS[experiment].ARMS)
    return [make_run(experiment, out, data_root, arm, seed, scale) for seed, arm in order if seed in seeds[arm]]


def lists_of(experiment, out):
    """The directory of the finder's files, of an experiment that uses them."""
    return out / "runs" / experiment / "lists"


def data_of(experiment, out, data_root):
    """The arguments of `load` of an experiment."""
    data = {**EXPERIMENTS[experiment].DATA, "data_root": data_root}
    return data | {name: lists_of(experiment, out) / data[name] for name in LISTS if name in data}


def find_copies(experiment, out, data_root):
    """Run the finder on the images of an experiment, in seconds if it is done, for `lists_of`."""
    lists = lists_of(experiment, out)
    if (lists / "result.json").exists():
        return
    lists.mkdir(parents=True, exist_ok=True)
    values = {**EXPERIMENTS[experiment].DATA, "data_root": data_root, "duplicates_dir": lists}
    flags = [f"--{name}={value}" for name, value in values.items() if name not in LISTS]
    call("duplicates.py", flags, lists / "duplicates.log")


def make_run(experiment, out, data_root, arm, seed, scale):
    """The `Run` of an arm with a seed; the other arguments as for `plan`."""
    spec = EXPERIMENTS[experiment]
    own = dict(spec.ARMS[arm])
    batch = own.get("batch_size", spec.TRAINING["batch_size"])
    lists = lists_of(experiment, out)
    own |= {name: lists / own[name] for name in LISTS if name in own}
    data = {name: own.get(name, value) for name, value in data_of(experiment, out, data_root).items()}
    slots = data["num_train"] + data.get("duplicates", 0) * (data.get("copies", 1) - 1)
    if own.keys() & {"keep_list", "balance_groups"}:  # one image of each group is kept
        slots = len((lists / "keep.txt").read_text().splitlines())
    per_shard = slots if own.get("split") == "all" else slots // own["client_num"]
    per_epoch = own["client_num"] * (per_shard // batch)
    steps, start = round(own.pop("steps") * scale), own.pop("from", None)
    epochs, one_round = max(1, round(own.pop("local_epoch") * scale)), own.pop("one_round", False)
    if one_round:
        epochs = spec.POINTS * max(1, round(epochs / spec.POINTS))
    rounds = 1 if one_round else max(2, round(steps / (epochs * per_epoch)))
    directory = out / "runs" / experiment / arm / f"seed{seed}"
    log = directory.parents[1] / own.pop("of", arm) / directory.name / "log"
    values = {
        **data, **spec.NETWORK, **spec.TRAINING, **spec.SAMPLER, "train": True, "device": "cpu", "sample_step": 0,
        "log_step": 500, "save_step": 0, **own, "local_epoch": epochs, "total_round": rounds, "seed": seed,
        "logdir": log,
    }  # fmt: skip
    if one_round:  # the shards' own networks are measured
        values |= {"save_step": epochs // spec.POINTS * (per_shard // batch), "keep": spec.POINTS}
    else:
        values["save_round"] = max(1, round(spec.POINT * scale / (epochs * per_epoch)))
    if start:
        before = make_run(experiment, out, data_root, start, seed, scale)
        start = values["check_dir"] = before.directory / "log" / round_name(max(1, round(spec.START * before.rounds)))
    lists = {flag: value if isinstance(value, list) else [value] for flag, value in values.items()}
    line = [f"--{flag}={value}" for flag, given in lists.items() for value in given]
    images = max(100, round(spec.IMAGES * scale))
    return Run(experiment, arm, seed, directory, line, data, start, rounds, epochs * per_epoch, images)


def values_of(command):
    """absl's values of a command line of main_fed.py."""
    values = FlagValues()
    define(values)
    parse(values, [sys.argv[0], *command])
    return values


def measure(run, images):
    """What the experiment of a run measures of images that were generated with it."""
    return EXPERIMENTS[run.experiment].measure(images, run.data)


def measured(run, names=FILES):
    """What was measured of a training so far, in the last complete file: the experiment's, then `names`.

    "points" are [{"steps": n, "fpd": x, ...}], "complete" says whether they are all, "device" and
    "stacked" how it was trained, "seconds" how long that took."""
    known = published(run.directory.parents[3] / f"{run.experiment}.json").get((run.arm, run.seed), {})
    result = {"flags": run.flags, "points": [], "complete": False}
    for found in (known, *(read_json(path) for name in names if (path := run.directory / name).exists())):
        is_its = settings(found.get("flags", [])) == settings(run.flags)
        if is_its and (found["complete"] or not result["complete"]):
            result = found
    return result


def published(path):
    """{(arm, seed): what `measured` returns} of the trainings in a file that the command has written."""
    return read_published(path, path.stat().st_mtime_ns) if path.exists() else {}


@functools.cache
def read_published(path, _):
    """What `published` returns; the second argument changes whenever the file does."""
    result, found = read_json(path), {}
    for training in result["trainings"]:
        of_run = {"arm": training["arm"], "seed": training["seed"]}
        points = [point for point in result["points"] if of_run.items() <= point.items()]
        points = [{name: value for name, value in point.items() if name not in of_run} for point in points]
        flags = [*result["flags"][training["arm"]], f"--seed={training['seed']}"]
        found[tuple(of_run.values())] = {**training, "flags": flags, "points": points, "complete": True}
    return found


def check_published(path, planned, found):
    """Check that a file of the command holds trainings of the planned runs only.

    found: what the finder's files are now, or None.

    Raises:
        UsageError: it holds others, or they were made with other lists."""
    if path.exists() and read_json(path).get("lists") != found:
        raise UsageError(f"{path}: was made with other lists of copies: choose another --out")
    own = {(run.arm, run.seed): settings(run.flags) for run in planned}
    for (arm, seed), found in published(path).items():
        if own.get((arm, seed)) != settings(found["flags"]):
            raise UsageError(f"{path}: {arm}, seed {seed} was made with other flags: choose another --out")


def settings(command):
    """The flags of a command line in a fixed order, without those of places."""
    return sorted(flag for flag in command if not flag.startswith(OF_PLACES))


def begin_worker():
    """Leave Ctrl-C to the main process, whose SIGTERM ends this one and the training it waits for."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, leave)


def leave(*_):
    """Exit, and let no second signal interrupt that."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit()


def train(run):
    """Train, in seconds if it is done; a DataError has the last line of a training that fails."""
    run.directory.mkdir(parents=True, exist_ok=True)
    call("main_fed.py", run.flags, run.directory / "train.log")


def call(script, flags, log):
    """Run a script, or "-m module", on one core; a DataError has its log's last line, if it fails."""
    with log.open("w") as file:
        settings = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "stdout": file, "stderr": file}
        done = subprocess.run([sys.executable, *script.split(), *flags], check=False, **settings)
    if done.returncode:
        said = log.read_text(errors="replace").strip().rpartition("\n")[2]
        raise DataError(f"{log}: {script} failed: {said}")


def networks(run, values):
    """(about, files of the networks whose mean prediction is measured) of every point, in order.

    about: the steps made until there over all shards, and the steps one after the other."""
    log, K = Path(values.logdir), values.client_num
    if run.start:
        yield {"steps": 0, "sequential": 0}, [run.start]
    if values.total_round > 1:
        for r, path in sorted(numbered(log, ROUNDS).items()):
            steps = r * run.steps_per_round
            yield {"steps": steps, "sequential": steps // K}, [path]
        return
    shards = [shard_files(log, k) for k in range(K)]
    for step in sorted(shards[0]):
        paths = [files[step] for files in shards]
        yield {"steps": K * step, "sequential": step}, paths
        yield {"steps": step, "sequential": step, "network": "sub-model"}, paths[:1]


def generate(run, values, sampler):
    """(uint8 images (N, 3, H, W), {} or what is said of those that were held back) of a sampler."""
    margin = None
    if values.reject_below is not None:
        data = load(**run.data)
        real = {"training": data.train.images, "groups": data.groups}
        margin = functools.partial(ratio_margin, **real, below=values.reject_below)
    images, record = [], {}
    for made, _, *of_tries in generate_batches(sampler, run.images, 512, run.seed, margin=margin):
        images.append(made)
        if of_tries:
            add_to_record(record, *of_tries)
    return torch.cat(images), held_back(record)


def work(run):
    """Train one run and measure the EMA weights of its checkpoints, on one thread.

    The checkpoints may be those of another arm, which has trained them before."""
    values = values_of(run.flags)
    if log_of(run).parent == run.directory:
        train(run)
    if measured(run)["complete"]:
        return  # only its checkpoints were needed
    measure_paths = functools.partial(measure_networks, run, values)
    found = networks(run, values)
    points = [(about, functools.partial(measure_paths, paths)) for about, paths in found]
    run.directory.mkdir(parents=True, exist_ok=True)
    measure_all(run, read_json(log_of(run) / "train.json")["seconds"], points)


def measure_networks(run, values, paths):
    """The numbers of images by the mean prediction of the EMA weights in files."""
    nets = []
    for path in paths:
        state = load_checkpoint(path)
        nets.append(build.unet(values, state, path).eval())
        load_weights(nets[-1], weights_in(state, True, path), path)
    sampler = GaussianDiffusionSampler(MeanPrediction(nets), **build.sampler_settings(values))
    images, said = generate(run, values, sampler)
    return {**measure(run, images), **said}


def measure_all(run, seconds, points):
    """Measure what is missing of the points, (about, function), of a training that took so long."""
    result = measured(run, FILES[1:]) | {"device": "cpu", "stacked": False, "seconds": seconds}
    for about, numbers_of in points[len(result["points"]) :]:
        with contextlib.redirect_stderr(io.StringIO()):  # bars of processes would overwrite each other
            result["points"].append({**about, **numbers_of()})
        write_json(run.directory / "measured.json", result)
    write_json(run.directory / "measured.json", result | {"complete": True})


def next_of(work, run):
    """Call work(run) in a process of the pool."""
    if not multiprocessing.parent_process().is_alive():
        sys.exit()  # killed: what is still in the queue is for another time
    work(run)


def log_of(run):
    """The log directory that has the checkpoints of a run."""
    flag = next(flag for flag in run.flags if flag.startswith("--logdir="))
    return Path(flag.removeprefix("--logdir="))


def file_of_another(run):
    """The file of another run without which a run cannot begin, or None."""
    return run.start or (None if log_of(run).parent == run.directory else log_of(run) / "train.json")


def work_all(wanted, planned, deadline, processes, work=work):
    """`work` of all wanted runs that are not complete, until the deadline.

    planned: all runs. Those that others need come first, complete or not: results have no checkpoints."""
    missing = [run for run in wanted if not measured(run)["complete"]]
    needing = [run for run in missing if file_of_another(run)]
    sources = {file_of_another(run).parent for run in needing if not file_of_another(run).exists()}
    alone = [run for run in planned if not file_of_another(run)]
    work_on([run for run in alone if run in missing or log_of(run) in sources], deadline, processes, work)
    work_on([run for run in needing if file_of_another(run).exists()], deadline, processes, work)


def work_on(runs, deadline, processes, work):
    """`work` of runs that do not need each other, several at once, until the deadline."""
    if runs and time.time() < deadline:
        with (  # whose end, by Ctrl-C too, ends what is at work, which goes on another time
            multiprocessing.get_context("spawn").Pool(processes, begin_worker) as pool,
            progress_bar(total=len(runs), desc="runs", unit="run") as bar,
            contextlib.suppress(multiprocessing.TimeoutError),
        ):
            done = pool.imap_unordered(functools.partial(next_of, work), runs)
            for _ in runs:
                done.next(deadline - time.time())
                bar.update()

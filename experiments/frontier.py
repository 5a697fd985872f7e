"""The memorisation frontier: quality against memorisation along whole trainings, for the four arms of the ablation.

python -m experiments.frontier --num_train=64 --seeds=1,2,3 --minutes=60

Every arm is trained with every seed, and its checkpoints are evaluated, raw and EMA. What is there already is not made
again: the same command goes on where it was stopped.
"""

import argparse
import concurrent.futures
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from absl import flags as absl_flags
from tqdm import tqdm

from benchmarks.__main__ import machine
from dataset import load_dataset
from diffusion import GaussianDiffusionSampler
from errors import DataError, UsageError, UserError
from experiments.matched import interval
from experiments.plot import plot_frontier
from files import atomic_write, read_json, write_json
from model import UNet
from score.frechet import frechet_distance
from score.generate import generate
from score.memorization import above_floor, measures, memorization_ratio, nearest_neighbors
from score.stats import pixel_statistics
from training import checkpoint, flags

FLAGS = absl_flags.FLAGS
ROOT = Path(__file__).parent.parent
SHARDS = 4
ARMS = {
    "default": ["--client_num=1", "--anti_grad=off"],
    "IET": [f"--client_num={SHARDS}", "--anti_grad=off"],
    "AGC": ["--client_num=1"],
    "IET-AGC": [f"--client_num={SHARDS}"],
}
THRESHOLDS = (15, 30, 50)


@dataclass(frozen=True)
class Run:
    """One training: its place in the experiment, its directory and its command line."""

    arm: str
    seed: int
    directory: Path
    flags: tuple[str, ...]
    steps_per_round: int


def plan(options):
    """All trainings, seed by seed, so that an experiment that is stopped has all arms.

    A round of every arm has the same number of steps in all. The arms with an ensemble are given more rounds: each
    sub-model makes a part of the steps only.
    """
    batch = min(16, options.num_train // SHARDS)
    epochs = max(1, options.round_steps * batch // options.num_train)
    common = (
        "--flagfile=config/DIGITS.txt", "--train", "--device=cpu", "--warmup=100", "--save_step=0", "--sample_step=0",
        "--log_step=500", f"--num_train={options.num_train}", f"--batch_size={batch}", f"--local_epoch={epochs}",
        f"--save_round={options.evaluate_every}",
    )  # fmt: skip
    runs = []
    for seed in options.seeds:
        for arm in options.arms:
            directory = Path(options.out) / "runs" / f"digits{options.num_train}" / arm / f"seed{seed}"
            rounds = options.rounds * (2 if "IET" in arm else 1)
            own = (*ARMS[arm], f"--total_round={rounds}", f"--seed={seed}", f"--logdir={directory / 'log'}")
            shards = SHARDS if "IET" in arm else 1
            steps = epochs * shards * (options.num_train // shards // batch)
            runs.append(Run(arm, seed, directory, (*common, *own), steps))
    return runs


def train(run, deadline):
    """Train unless it is done; returns whether it is. At the deadline it is stopped, to go on another time."""
    if (run.directory / "trained").exists():
        return True
    if time.monotonic() > deadline:
        return False
    run.directory.mkdir(parents=True, exist_ok=True)
    with (run.directory / "train.err").open("w") as err:
        command = [sys.executable, str(ROOT / "main_fed.py"), *run.flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=err, stderr=err) as process:
            try:
                code = process.wait(timeout=max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.terminate()
                process.wait()
                return False
    if code:
        last_words = (run.directory / "train.err").read_text()[-500:]
        raise DataError(f"{run.directory}/train.err: training failed: {last_words}")
    (run.directory / "trained").touch()
    return True


class Judge:
    """What every checkpoint is measured with: the training images, the held-out ones, and the floor.

    Args:
        data: a `dataset.Dataset` with held-out images.
        images: how many to generate from a checkpoint.
    """

    def __init__(self, data, images):
        self.training, self.heldout, self.images = data.train.images, data.heldout.images, images
        self.reference = pixel_statistics(self.heldout).mean_and_covariance()
        sq_distance, index = nearest_neighbors(self.heldout, self.training)
        self.floor_ratio = memorization_ratio(sq_distance)
        shuffled = self.heldout[torch.randperm(len(self.heldout), generator=torch.Generator().manual_seed(0))]
        sample, rest = shuffled[:images], shuffled[images:]
        self.floor = {
            "heldout": measures(sq_distance, index, self.training),
            "fpd of training images to held-out": self.distance(self.training, self.reference),
            f"fpd of {len(sample)} held-out images to the others": self.distance(
                sample, pixel_statistics(rest).mean_and_covariance()
            ),
        }

    @staticmethod
    def distance(images, reference):
        return frechet_distance(*pixel_statistics(images).mean_and_covariance(), *reference)

    def __call__(self, sampler, seed):
        """(measures with `fpd` and `mq_above_floor`, ratios (N,)) of a sampler's images."""
        images = generate(sampler, self.images, self.images, seed)
        sq_distance, index = nearest_neighbors(images, self.training)
        result = measures(sq_distance, index, self.training)
        result |= {"fpd": self.distance(images, self.reference)}
        return result | {"mq_above_floor": above_floor(result, self.floor["heldout"])}, memorization_ratio(sq_distance)


def flags_of(run):
    """The flags that a training was started with, as absl's values."""
    FLAGS.unparse_flags()
    FLAGS([sys.argv[0], f"--flagfile={run.directory / 'log/flagfile.txt'}"])
    return FLAGS


def evaluate(run, judge, deadline):
    """Evaluate the checkpoints of a training that have not been yet; returns all points of it.

    A point is what `Judge` says of the raw or the EMA weights after a number of steps; its ratios are in a file.
    """
    path = run.directory / "points.json"
    points = read_json(path) if path.exists() else []
    done = {(point["round"], point["weights"]) for point in points}
    values = flags_of(run)
    for file in reversed(checkpoint.newest_first(run.directory / "log")):
        r, _ = checkpoint.progress_of(file)
        for weights in ("raw", "ema"):
            if (r, weights) in done or time.monotonic() > deadline:
                continue
            net = UNet(**flags.unet(values))
            checkpoint.load_weights(net, checkpoint.weights(checkpoint.load(file), weights == "ema", file), file)
            result, ratio = judge(GaussianDiffusionSampler(net, **flags.sampler(values)), run.seed)
            with atomic_write(ratios_path(run, r, weights)) as out:
                np.save(out, ratio.numpy().astype(np.float32))
            points.append({"round": r, "steps": r * run.steps_per_round, "weights": weights, **result})
            write_json(path, points)
    return points


def ratios_path(run, r, weights):
    return run.directory / "ratios" / f"round{r}_{weights}.npy"


def matched_table(runs, points, floor_ratio, weights, qualities):
    """{quality: {arm: {"MQ@p": interval}}} of the arms at the same Frechet distance to held-out images."""
    arms = list(dict.fromkeys(run.arm for run in runs))
    paths = {arm: [] for arm in arms}
    for run in runs:
        chosen = sorted((p for p in points[run] if p["weights"] == weights), key=lambda point: point["steps"])
        paths[run.arm].append([(p["fpd"], np.load(ratios_path(run, p["round"], weights))) for p in chosen])
    return {
        f"{quality:.2f}": {
            arm: {f"MQ@{p}": interval(paths[arm], quality, p, floor_ratio) for p in THRESHOLDS} for arm in arms
        }
        for quality in qualities
    }


def collect(runs, judge, options, seconds):
    """The whole experiment as one dict of JSON values, and the plot."""
    points = {run: evaluate(run, judge, 0.0) for run in runs if (run.directory / "points.json").exists()}
    runs = list(points)
    best = {arm: min(p["fpd"] for run in runs if run.arm == arm for p in points[run]) for arm in {r.arm for r in runs}}
    qualities = [max(best.values()) * factor for factor in (1.0, 1.15, 1.4, 1.8)]
    floor_ratio = judge.floor_ratio.numpy()
    return {
        "command": " ".join(["python -m experiments.frontier", *options.command]),
        "machine": machine(),
        "seconds": seconds,
        "training images": len(judge.training),
        "generated images": options.images,
        "floor": judge.floor,
        "flags": {run.arm: list(run.flags) for run in runs},
        "points": [{"arm": run.arm, "seed": run.seed, **point} for run in runs for point in points[run]],
        "matched quality": {
            weights: matched_table(runs, points, floor_ratio, weights, qualities) for weights in ("raw", "ema")
        },
    }


def print_table(result):
    for weights, table in result["matched quality"].items():
        print(f"{weights} weights, MQ above the floor of held-out images, mean over seeds [95 % interval]")
        for quality, arms in table.items():
            for arm, found in arms.items():
                cells = (
                    f"{name} {value['mean']:+.1%} [{value['low']:+.1%}, {value['high']:+.1%}]"
                    for name, value in found.items()
                    if value["reached"]
                )
                print(f"| fpd {quality} | {arm} | {' | '.join(cells) or 'not reached'} |")


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(prog="python -m experiments.frontier", description=__doc__)
    numbers = lambda text: [int(number) for number in text.split(",")]  # noqa: E731
    parser.add_argument("--num_train", type=int, default=64, help="digits to train on")
    parser.add_argument("--seeds", type=numbers, default=[1, 2, 3], help="of training and sampling, with commas")
    parser.add_argument("--arms", type=lambda text: text.split(","), default=list(ARMS), help="some of the four")
    parser.add_argument("--round_steps", type=int, default=500, help="steps of a round, over all shards")
    parser.add_argument("--rounds", type=int, default=12, help="rounds of default and AGC; IET and IET-AGC make twice")
    parser.add_argument("--evaluate_every", type=int, default=2, help="rounds between two points")
    parser.add_argument("--images", type=int, default=512, help="images generated for every point")
    parser.add_argument("--minutes", type=float, default=240, help="stop after so long; the same command goes on")
    parser.add_argument("--out", default="results", help="directory of everything that is written")
    options = parser.parse_args(arguments)
    if not set(options.arms) <= set(ARMS):
        raise UsageError(f"--arms={','.join(options.arms)}: choose some of {','.join(ARMS)}")
    options.command = sys.argv[1:] if arguments is None else arguments
    return options


def experiment(options):
    start = time.monotonic()
    deadline = start + 60 * options.minutes
    runs = plan(options)
    data = load_dataset("digits", "data", 8, num_train=options.num_train)
    judge = Judge(data, options.images)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=len(runs), desc="trainings") as bar:
        for done in pool.map(lambda run: train(run, deadline), runs):
            bar.update(done)
    for run in tqdm(runs, desc="evaluations"):
        if checkpoint.newest_first(run.directory / "log"):
            evaluate(run, judge, deadline)
    path = Path(options.out) / "frontier.json"
    before = read_json(path) if path.exists() else {}
    name = f"digits{options.num_train}"
    seconds = before.get(name, {}).get("seconds", 0) + time.monotonic() - start
    result = collect(runs, judge, options, round(seconds, 1))
    write_json(path, {**before, name: result})
    plot_frontier(path.with_suffix(".png"), {**before, name: result})
    print_table(result)


def main(arguments=None):
    try:
        experiment(parse_arguments(arguments))
    except UserError as error:
        print(f"experiments.frontier: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

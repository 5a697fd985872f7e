"""What is compared: the data sets, the four arms of the ablation, and the settings that were tried in tuning."""

import re
from dataclasses import dataclass
from pathlib import Path

from errors import UsageError
from files import read_json

SHARDS = 4
BATCH = 16
ENSEMBLE_STEPS = 2  # times those of default training, over all shards: a sub-model makes a part of them only
SAMPLER = ("--sampler=dpmpp", "--sample_steps=20")


@dataclass(frozen=True)
class Subject:
    """A data set to train on.

    `steps` are those of default training; ensembles are given ENSEMBLE_STEPS times as many. A round has `round_steps`
    steps over all shards. About `points` checkpoints are measured, with `images` generated images each. `data_root` is
    where patches are.
    """

    name: str
    num_train: int
    flags: tuple[str, ...]
    steps: int
    round_steps: int
    points: int
    images: int
    side: int
    data_root: Path | None = None


@dataclass(frozen=True)
class Arm:
    """A way to train: flags of main_fed.py. A round is made of 1 / `more_rounds` of the subject's steps.

    `setting` is the name of the trial that a tuned arm repeats: another choice is another training.
    """

    name: str
    shards: int
    flags: tuple[str, ...]
    more_rounds: int = 1
    setting: str = ""


OFF = ("--anti_grad=off",)
ARMS = {
    "default": Arm("default", 1, OFF),
    "IET": Arm("IET", SHARDS, OFF),
    "AGC": Arm("AGC", 1, ()),
    "IET-AGC": Arm("IET-AGC", SHARDS, ()),
}
# equal effort: as many trials for both, every knob of each at least once; every checkpoint of a trial is measured, with
# raw and EMA weights, which is early stopping
TRIALS = {
    "default": [
        ARMS["default"],
        Arm("dropout 0.3", 1, (*OFF, "--dropout=0.3")),
        Arm("dropout 0.5", 1, (*OFF, "--dropout=0.5")),
        Arm("shift 1", 1, (*OFF, "--shift=1")),
        Arm("shift 1, dropout 0.3", 1, (*OFF, "--shift=1", "--dropout=0.3")),
        Arm("EMA decay 0.999", 1, (*OFF, "--ema_decay=0.999")),
        Arm("EMA decay 0.999, dropout 0.5", 1, (*OFF, "--ema_decay=0.999", "--dropout=0.5")),
        Arm("dropout 0.7", 1, (*OFF, "--dropout=0.7")),
        Arm("dropout 0.8", 1, (*OFF, "--dropout=0.8")),
        Arm("dropout 0.9", 1, (*OFF, "--dropout=0.9")),
        Arm("EMA decay 0.999, dropout 0.7", 1, (*OFF, "--ema_decay=0.999", "--dropout=0.7")),
    ],
    "IET-AGC": [
        ARMS["IET-AGC"],
        Arm("2 shards", 2, ()),
        Arm("5 times as many rounds", SHARDS, (), more_rounds=5),
        Arm("mem_ratio 1.25", SHARDS, ("--mem_ratio=1.25",)),
        Arm("arr_ema_decay 0.95", SHARDS, ("--arr_ema_decay=0.95",)),
        Arm("ascend 0.1", SHARDS, ("--anti_grad=ascend", "--anti_grad_weight=0.1")),
        Arm("1 shard, dropout 0.5", 1, ("--dropout=0.5",)),
        Arm("1 shard, dropout 0.5, mem_ratio 1.25", 1, ("--dropout=0.5", "--mem_ratio=1.25")),
        Arm("1 shard, dropout 0.7", 1, ("--dropout=0.7",)),
        Arm("1 shard, dropout 0.8", 1, ("--dropout=0.8",)),
        Arm("2 shards, dropout 0.7", 2, ("--dropout=0.7",)),
    ],
}


def subject(name, options):
    """The data set of a name such as digits64 or patches128.

    options: has `out` of a command, where patches are written, and what it says of `steps`, `points` and `images`, None
    where the data set's own are meant.

    Raises:
        UsageError: it is no such name.
    """
    match = re.fullmatch(r"(digits|patches)(\d+)", name)
    if not match or int(match[2]) < 2 * SHARDS:
        raise UsageError(f"--data={name}: name data sets like digits64 or patches128, of at least {2 * SHARDS} images")
    kind, size = match[1], int(match[2])
    if kind == "digits":
        flags = ("--flagfile=config/DIGITS.txt", f"--num_train={size}")
        side, data_root = 8, None
        steps, round_steps, points, images = (5600, 400, 12, 512) if size <= 64 else (6000, 500, 6, 384)
    else:
        data_root = Path(options.out).resolve() / "data" / name / "train"
        flags = ("--flagfile=config/PATCHES.txt", f"--data_root={data_root}")
        side, steps, round_steps, points, images = 16, 1600, 400, 4, 256
    steps, points, images = options.steps or steps, options.points or points, options.images or images
    return Subject(name, size, flags, steps, round_steps, points, images, side, data_root)


def tuned_arms(out):
    """{"tuned default": arm, "tuned IET-AGC": arm} as tuning.json has chosen them, or {} if there is none yet."""
    path = Path(out) / "tuning.json"
    if not path.exists():
        return {}
    best = read_json(path)["best"]
    chosen = {}
    for method, trials in TRIALS.items():
        arm = next(trial for trial in trials if trial.name == best[method]["setting"])
        chosen[f"tuned {method}"] = Arm(f"tuned {method}", arm.shards, arm.flags, arm.more_rounds, arm.name)
    return chosen


def command_line(subject, arm, seed, logdir):
    """(flags of main_fed.py, steps of a round over all shards). A checkpoint is kept for each measurement."""
    batch = min(BATCH, subject.num_train // arm.shards)
    per_epoch = arm.shards * (subject.num_train // arm.shards // batch)
    total = subject.steps * (1 if arm.shards == 1 else ENSEMBLE_STEPS)
    epochs = max(1, min(subject.round_steps, total // subject.points) // arm.more_rounds // per_epoch)
    rounds = max(1, total // (epochs * per_epoch))
    save_round = max(1, round(rounds / subject.points))
    flags = (
        *subject.flags, "--train", "--device=cpu", "--save_step=0", "--sample_step=0", "--log_step=500",
        f"--batch_size={batch}", f"--client_num={arm.shards}", f"--local_epoch={epochs}", f"--total_round={rounds}",
        f"--save_round={save_round}", f"--seed={seed}", f"--logdir={logdir}", *SAMPLER, *arm.flags,
    )  # fmt: skip
    return flags, epochs * per_epoch

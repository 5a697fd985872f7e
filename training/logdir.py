"""The log directory of a run: its lock, run.json, what may be in it; what it says of a checkpoint."""

import os
import socket
from contextlib import suppress
from pathlib import Path

import numpy as np

from training.weights import BEST, CHECKPOINTS, EXPORTED, FORMAT, load_checkpoint, own_files
from utils import distributed
from utils.errors import DamagedError, DataError, UsageError
from utils.files import atomic_write, lock_directory, read_json, remove, write_json, write_text

YOUNG_EMA = 0.05  # the share of their random start in EMA weights from which on it is said
UNRECORDED = {"alter_copies": False, "balance_groups": False}  # what earlier versions could not do
OWN_FILES = (
    rf"{CHECKPOINTS}|sample/(ema_step|shard\d+_step|average_round)\d+\.png|metrics(\.rank\d+)?\.jsonl"
    r"|train\.json|(rank\d+/)?events\.out\.tfevents\..*\.iet_agc|run\.json|flagfile\.txt|subset\.npy"
    rf"|best\.json|{BEST}"
)
# of a killed save
LEFTOVERS = r"(state/)?\.(best_)?(ckpt|global_ckpt_round|shard|average_round)\w+\.pt\.[0-9a-f]{8}\.tmp"
EVALUATIONS = r"eval_(ckpt|global_ckpt_round)\d+k?\.json"  # main.py --eval makes them in any directory


def run_file(path):
    """The run.json of the log directory that a checkpoint file lies in."""
    return (path.parent.parent if path.parent.name == "state" else path.parent) / "run.json"


def training_of(path):
    """The settings of a checkpoint's training, with those changed on the way in "changed", or None."""
    if path.suffix == EXPORTED:
        settings = load_checkpoint(path).get("flags")
        return settings and completed(settings)
    run = read_run(run_file(path))
    if run is None:
        return None
    texts = [f"{c['flag']}: {c['before']}, then {c['after']}" for c in run["changes"]]
    return run["settings"] | ({"changed": texts} if texts else {})


def read_run(path):
    """{"settings": {name: JSON value}, "changes": [...]} of a run.json; None if missing or none."""
    run = read_json(path) if path.exists() else None
    if not isinstance(run, dict) or not isinstance(run.get("settings"), dict):
        return None
    return {"settings": completed(run["settings"]), "changes": [dict(change) for change in run.get("changes", [])]}


def completed(settings):
    """The settings of a run and what earlier versions did unrecorded: they squeezed images, mirrored CIFAR's."""
    settings = UNRECORDED | settings
    if settings.get("script") in ("main", "main_fed") and "resize" not in settings:
        is_cifar = str(settings.get("dataset")).startswith("cifar")
        settings |= {"resize": "squeeze", "hflip": is_cifar or settings.get("hflip")}
    if settings.get("script") == "text_to_image.main_fed":
        settings.setdefault("lora_rank", 0)
    return settings


class LogDirectory:
    """The log directory of a run: locked while this lives, compared with the run, written by `begin`.

    Args:
        settings: {name: JSON value} of what the result depends on, kept as `run.json`.
        fixed: names of those that a continued run cannot change: what it has saved depends on them.
        flagfile: text of `flagfile.txt`.
        subset: (N,) int64, the training images' numbers in the whole training set, kept as `subset.npy`:
            skip counts and neighbour indices count in it.
        fresh, overwrite, allow_change: the flags; the first two together remove an earlier run's files.

    Raises:
        DataError: it cannot be written, another process has it, or it holds what no run of ours wrote.
        UsageError: what is in it is not this run."""

    def __init__(
        self, path, settings, fixed, flagfile, subset, *,
        fresh=False, overwrite=False, allow_change=False,
    ):  # fmt: skip
        self.path, self.settings, self.flagfile, self.subset = Path(path), settings, flagfile, subset
        if distributed.is_main():
            self.lock = lock_directory(self.path, "logdir")
            self.check_contents(fixed, fresh, overwrite, allow_change)
        holder, lock = distributed.from_main(str(os.getpid())), self.path / ".lock"
        if not distributed.is_main() and (not lock.exists() or lock.read_text() != holder):
            where = f"on {socket.gethostname()} not the directory that rank 0 has opened"
            raise DataError(f"--logdir={path}: {where}: choose one that all machines share")

    def check_contents(self, fixed, fresh, overwrite, allow_change):
        """Raise an error if what is there is of others or another run; remove it if that was asked."""
        files, before, self.changes = [*own_files(self.path, OWN_FILES)], self.settings, []
        if files:
            try:
                run = read_run(self.path / "run.json")
                before, self.changes = run["settings"], run["changes"]
            except (DataError, TypeError, ValueError) as error:
                what = "not of a run of this program, as run.json beside it is missing, damaged or of another"
                raise DataError(f"{files[0]}: {what}: choose another --logdir") from error
        for file in own_files(self.path, CHECKPOINTS):
            if not is_ours(file):
                what = "of another program, or another version of this one, and cannot be continued"
                raise DataError(f"{file}: {what}: choose another --logdir")
        if fresh:
            files = [*own_files(self.path, f"{OWN_FILES}|{EVALUATIONS}")]
            if files and not overwrite:
                raise UsageError(f"--fresh: {files[0]} is of an earlier run: add --overwrite to delete that run")
            for file in files:
                if file.name != "run.json":  # `begin` replaces it
                    remove(file)
            before, self.changes = self.settings, []
        changed = [name for name, value in self.settings.items() if before.get(name) != value]
        for name in sorted(changed, key=lambda name: name not in fixed):
            if name in fixed or not allow_change:
                flag = name if name == "script" or " " in name else f"--{name}"
                why = "--allow_change continues all the same"
                if name in fixed:
                    why = "what it has saved depends on it"
                what = f"the run in {self.path} was started with {before.get(name)} ({why})"
                advice = "give the flags and files of that run" if " " in name else "give that"
                raise UsageError(f"{flag}={self.settings[name]}: {what}: {advice}, or choose another --logdir")
        for name in changed:
            self.changes.append({"flag": name, "before": before.get(name), "after": self.settings[name]})

    def begin(self, steps):
        """Write what the run is made of, once all processes have read theirs; `steps` are done."""
        distributed.barrier()
        if distributed.is_main():
            changes = [{**c, "step": min(steps, c.get("step", steps))} for c in self.changes]
            write_json(self.path / "run.json", {"settings": self.settings, "changes": changes})
            write_text(self.path / "flagfile.txt", self.flagfile)
            with atomic_write(self.path / "subset.npy") as file:
                np.save(file, self.subset.numpy())
            for file in own_files(self.path, LEFTOVERS):
                remove(file)
        distributed.barrier()


def is_ours(path):
    """Whether a checkpoint in a log directory is of this version; a damaged one is taken for it."""
    try:
        return load_checkpoint(path, check=False).get("format") == FORMAT
    except DataError as error:
        return isinstance(error, DamagedError)


# ---- how much of the EMA weights is still what a training started from


def random_start(run, steps):
    """The share of the EMA weights that is the random start after so many steps; run: of `read_run`."""
    settings, share, done = run["settings"], 1.0, 0
    if settings.get("check_dir") or not settings.get("unet_from_scratch", True):
        return 0.0
    for change in run["changes"]:
        if change["flag"] == "ema_decay":
            own_step = change["step"] // settings.get("client_num", 1)  # of all shards together
            until = max(done, min(steps, own_step))
            share *= change["before"] ** (until - done)
            done = until
    return share * settings["ema_decay"] ** (steps - done)


def steps_made(state, settings):
    """The steps that a network in a checkpoint has made, of averages those of a shard, or None."""
    if "round" not in state:
        return state.get("step")
    if "steps_per_round" in state:
        return state["round"] * min(state["steps_per_round"])
    slots, split = len(state["index_array"]), settings["split"]
    size = slots if split == "all" else slots // settings["client_num"]
    return state["round"] * settings["local_epoch"] * (size // settings["batch_size"])


def ema_start(path):
    """`random_start` of the EMA weights in a checkpoint, or None if unknown, as of published ones."""
    if path.suffix == EXPORTED:
        return load_checkpoint(path).get("ema_start")
    run = read_run(run_file(path))
    if run is None:
        return None
    with suppress(KeyError, TypeError):  # an older version recorded less, or a file tells no steps
        return random_start(run, steps_made(load_checkpoint(path, check=False), run["settings"]))


def young_ema(path, share):
    """What to say of EMA weights in a file, of which a share is their random start; None if nothing."""
    if share is None or share <= YOUNG_EMA:
        return None
    advice = "train longer, or with a lower --ema_decay"
    return f"{path}: {share:.1%} of the EMA weights are still the random start of the training: {advice}"


def say_young_ema(logdir, steps):
    """Say at the start of a run of so many steps if too much of its EMA will be the random start."""
    share = random_start(read_run(Path(logdir) / "run.json"), steps) if distributed.is_main() else 0.0
    if share > YOUNG_EMA:
        what = f"after all {steps:,} steps {share:.1%} of the EMA weights will still be the random start"
        print(f"{what}: train longer, or with a lower --ema_decay")

"""All files that a run continues from, and its log directory; also what IET_AGC and pytorch-ddpm have published.

main.py writes ckpt{steps}.pt. main_fed.py writes global_ckpt_round{r}.pt and, to continue from, state/: a file per
shard and save, and the averages that are not to stay. It stands at (rounds done, own steps of every shard), since in a
round no shard depends on another. Which process trains a shard is not in the files.
"""

import json
import os
import pickle
import re
import socket
import sys
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from utils import distributed
from utils.errors import DamagedError, DataError, UsageError
from utils.files import atomic_write, lock_directory, make_directory, read_json, remove, write_json
from utils.safe_files import one_line

FORMAT = 4  # of what a run needs to continue
FOR_RESUMING = ("optim", "scaler", "seconds", "milestone")  # what main.py's older checkpoints lack

# the files of a run by their paths in its log directory, the number in parentheses
STEPS, ROUNDS, AVERAGES = r"ckpt(\d+k?)\.pt", r"global_ckpt_round(\d+)\.pt", r"state/average_round(\d+)\.pt"
CHECKPOINTS = rf"{STEPS}|{ROUNDS}|{AVERAGES}|state/shard\d+_step(\d+)\.pt"
OWN_FILES = (
    rf"{CHECKPOINTS}|sample/(ema_step|shard\d+_step|average_round)\d+\.png|metrics(\.rank\d+)?\.jsonl|train\.json"
    r"|(rank\d+/)?events\.out\.tfevents\..*\.iet_agc|run\.json|flagfile\.txt|subset\.npy"
)
LEFTOVERS = r"(state/)?\.(ckpt|global_ckpt_round|shard|average_round)\w+\.pt\.[0-9a-f]{8}\.tmp"  # of a killed save
EVALUATIONS = r"eval_(ckpt|global_ckpt_round)\d+k?\.json"  # main.py --eval makes them in any directory

# published global_ckpt files hold their skip counts as a NumPy array
NUMPY_TYPES = [
    np.ndarray,
    np.dtype,
    (np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
    (np._core.multiarray._reconstruct, "numpy._core.multiarray._reconstruct"),
    *(type(np.dtype(kind)) for kind in "?bhilBHILefd"),
]


def step_name(step):
    """File name of the checkpoint after `step` steps: ckpt400k.pt, or ckpt1234.pt for no multiple of 1,000."""
    return f"ckpt{step // 1000}k.pt" if step and step % 1000 == 0 else f"ckpt{step}.pt"


def round_name(number):
    """File name of the averages after round `number`, counted from 1."""
    return f"global_ckpt_round{number}.pt"


def own_files(directory, pattern):
    """The files in a log directory, or in directories in it, whose paths in it match a pattern."""
    paths = [path for level in ("*", "*/*") for path in sorted(Path(directory).glob(level))]
    return [path for path in paths if re.fullmatch(pattern, str(path.relative_to(directory)))]


def numbered(directory, pattern):
    """{number: path} of the files in a log directory whose paths match a pattern with one group, the highest first."""
    names = {path: str(path.relative_to(directory)) for path in own_files(directory, pattern)}
    found = {int(re.fullmatch(pattern, name)[1].replace("k", "000")): path for path, name in names.items()}
    return dict(sorted(found.items(), reverse=True))


def save(path, state):
    """Write a checkpoint so that a reader, or a run killed at any instant, finds the whole file or none.

    torch.save writes a zip archive with a CRC-32 of every record, which `load` checks.

    Raises:
        DataError: it cannot be written, e.g. for want of room; what was at `path` is still there.
    """
    with atomic_write(path) as file:
        try:
            torch.save({"format": FORMAT, **state}, file)
        except RuntimeError as error:
            # closing its archive fails after a failed write, which hides the reason
            raise error.__context__ if isinstance(error.__context__, OSError) else error  # noqa: B904


def load(path, device="cpu", mmap=False):
    """The dict that a checkpoint or an exported file holds, on the device; no code of the file runs.

    mmap: tensors are read from the file when they are needed, and without a look at the checksums.

    Raises:
        DamagedError: what was written, if it was a checkpoint, is not there any more.
        DataError: missing, unreadable, or no checkpoint.
    """
    path, foreign = Path(path), False
    try:
        if path.suffix == ".safetensors":
            return load_exported(path, device)
        with path.open("rb") as file:
            foreign = file.read(1) == b"\x80"  # of torch's older format, which this program does not write
            if is_zip := zipfile.is_zipfile(file):
                archive = zipfile.ZipFile(file)
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                    raise ValueError("it is compressed, as no checkpoint is: refused as a zip bomb")
                if not mmap and (damaged := archive.testzip()):
                    raise ValueError(f"damaged: the checksum of {damaged} is wrong")
                foreign = not mmap  # if torch cannot read it now
        with torch.serialization.safe_globals(NUMPY_TYPES), warnings.catch_warnings(action="ignore"):
            state = torch.load(path, map_location=device, weights_only=True, mmap=mmap and is_zip)
        if not isinstance(state, dict):
            raise TypeError(f"it holds a {type(state).__name__}, not a dict")
        return state
    except Exception as error:  # damage and malice can make zipfile and the unpickler raise anything
        if mmap:
            return load(path, device)  # which looks whether it is damaged
        reason = one_line(error)[:200]
        if isinstance(error, pickle.UnpicklingError):
            reason = "no checkpoint, or one that holds more than tensors and plain values, which could run code"
        kind = DataError if foreign or isinstance(error, OSError) else DamagedError
        raise kind(f"{path}: cannot be read as a checkpoint ({reason})") from error


def load_exported(path, device):
    """What `training.export` has written, as the dict of a checkpoint: EMA or raw weights, norm_groups and flags."""
    with safe_open(path, framework="pt", device=str(device)) as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    try:
        flags = json.loads(metadata["flags"])
        kind = "ema_model" if flags["use_ema"] else "net_model"
        return {kind: tensors, "norm_groups": int(flags["norm_groups"]), "flags": flags}
    except (KeyError, TypeError, ValueError) as error:
        what = "its metadata does not say what network it is of"
        raise ValueError(f"{what}: export the checkpoint with python -m training.export") from error


def is_whole(path):
    """Whether a checkpoint of a run is undamaged; a damaged one is named on stderr and left as it is."""
    try:
        load(path)
    except DamagedError as error:
        print(f"{error}: passed over", file=sys.stderr)
        return False
    return True


def find(name):
    """The checkpoint file that a flag names: the file itself, or the newest of a directory."""
    path = Path(name)
    if not path.is_dir():
        return path
    found = numbered(path, ROUNDS) or numbered(path, STEPS)
    if not found:
        raise DataError(f"{path}: holds no ckpt*.pt and no global_ckpt_round*.pt; name a checkpoint or its directory")
    return next(iter(found.values()))


def weights(state, use_ema, path):
    """The state dict of the EMA or raw weights in a checkpoint of main or main_fed, ours or published.

    A file that is a UNet's state dict itself holds one kind of weights only, and they are taken for both.
    """
    names = ("ema_model", "global_ema_model") if use_ema else ("net_model", "global_model")
    for name in names:
        if name in state:
            return state[name]
    if any(str(key).endswith("head.weight") for key in state):
        return state
    raise DataError(f"{path}: has neither {names[0]} nor {names[1]}; it holds {', '.join(map(str, state))}")


def load_weights(net, state_dict, path):
    """Load a checkpoint's weights into a UNet; keys and shapes must fit.

    What DataParallel, torch.compile or an outer module have put before all keys is left out.

    Raises:
        DataError: names the first key that is missing, left over or of another shape.
    """
    try:
        heads = [match for match in (re.fullmatch(r"(.*\.)?head\.weight", key) for key in state_dict) if match]
        if len(heads) != 1:
            entries = ", ".join(map(str, [*state_dict][:3]))
            raise DataError(f"{path}: holds no weights of this UNet: its entries are {entries}, ...")
        prefix = heads[0][1] or ""
        net.load_state_dict({k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)})
    except (RuntimeError, TypeError, AttributeError) as error:
        problem = str(error).splitlines()[1:] or [str(error)]
        what = "does not fit the network of the flags (--ch, --ch_mult, --attn, --num_labels, ...)"
        raise DataError(f"{path}: {what}: {problem[0].strip()[:300]}") from error


# ---- the log directory of a run


class LogDirectory:
    """The log directory of a run: taken, compared with what the run is made of, and written by `begin` only.

    Args:
        path: the directory, made if missing.
        settings: {name: JSON value} of what the result depends on, kept as `run.json`.
        fixed: names of those that a continued run cannot change, since what it has saved depends on them.
        flagfile: text of `flagfile.txt`, for `--flagfile`.
        subset: (N,) int64, the training images' numbers in the whole training set, kept as `subset.npy`: skip counts
            and neighbour indices count in it.
        fresh, overwrite, allow_change: the flags. `fresh` with `overwrite` removes the files of an earlier run.

    Rank 0 does all this; the other processes wait for it. The lock is held as long as the object lives.

    Raises:
        DataError: the directory cannot be made or written, another process has it, or it holds what no run of this
            program has written.
        UsageError: what is in it is not this run.
    """

    def __init__(self, path, settings, fixed, flagfile, subset, *, fresh=False, overwrite=False, allow_change=False):
        self.path, self.settings, self.flagfile, self.subset = Path(path), settings, flagfile, subset
        if not distributed.is_main():
            holder, lock = distributed.from_main(None), self.path / ".lock"
            if not lock.exists() or lock.read_text().strip() != holder:
                where = f"--logdir={path}: not the directory that rank 0 has opened, on {socket.gethostname()}"
                raise DataError(f"{where}: choose one on a file system that all machines share")
            return
        files = own_files(self.path, OWN_FILES)
        before, self.changes = self.recorded(files[0]) if files else (settings, [])
        for file in own_files(self.path, CHECKPOINTS):
            if not is_ours(file):
                what = "of another program, or another version of this one, and cannot be continued"
                raise DataError(f"{file}: {what}: choose another --logdir")
        if fresh:
            files = own_files(self.path, f"{OWN_FILES}|{EVALUATIONS}")
            if files and not overwrite:
                raise UsageError(f"--fresh: {files[0]} is of an earlier run: add --overwrite to delete that run")
            before, self.changes = settings, []
        self.new_changes = [
            {"flag": name, "before": before.get(name), "after": value}
            for name, value in settings.items()
            if before.get(name) != value
        ]
        for change in sorted(self.new_changes, key=lambda change: change["flag"] not in fixed):
            name, started_with, value = change.values()
            if name in fixed or not allow_change:
                flag = name if name == "script" or " " in name else f"--{name}"
                why = "what it has saved depends on it" if name in fixed else "--allow_change continues all the same"
                what = f"{flag}={value}: the run in {path} was started with {started_with} ({why})"
                raise UsageError(f"{what}: give that, or choose another --logdir")
        make_directory(self.path, "logdir")
        self.lock = lock_directory(self.path, "logdir")
        for file in files if fresh else ():
            if file.name != "run.json":  # `begin` replaces it
                remove(file)
        distributed.from_main(str(os.getpid()))

    def recorded(self, file):
        """(settings, changes) of the run that is there, `file` being one of its files."""
        with suppress(DataError, KeyError, TypeError):
            run = read_json(self.path / "run.json")
            return run["settings"], run["changes"]
        what = "not of a run of this program, as run.json beside it is missing, damaged or of another"
        raise DataError(f"{file}: {what}: choose another --logdir")

    def begin(self, steps, later):
        """Write what the run is made of, now that all processes have what they continue from.

        Args:
            steps: that are done, over all shards.
            later: files of later steps, which the run will make again.

        Raises:
            UsageError: they were made with other settings, so they would not come out the same.
        """
        distributed.barrier()
        if distributed.is_main():
            if later and (self.new_changes or any(change["step"] > steps for change in self.changes)):
                what = f"made with other settings (--allow_change), and a run continued at step {steps} replaces it"
                raise UsageError(f"{later[0]}: {what}: choose another --logdir, or go on without the change")
            changes = self.changes + [{**change, "step": steps} for change in self.new_changes]
            write_json(self.path / "run.json", {"settings": self.settings, "changes": changes})
            with atomic_write(self.path / "flagfile.txt") as file:
                file.write(self.flagfile.encode(errors="surrogateescape"))
            with atomic_write(self.path / "subset.npy") as file:
                np.save(file, self.subset.numpy())
            for file in own_files(self.path, LEFTOVERS):
                remove(file)
        distributed.barrier()


def is_ours(path):
    """Whether a checkpoint in a log directory is of this version of this program; a damaged one is taken for it."""
    try:
        return load(path, mmap=True).get("format") == FORMAT
    except DamagedError:
        return True
    except DataError:
        return False


def nothing_to_continue(path):
    """The error where a new start would replace what is whole."""
    what = "what the run needs beside it to be continued is missing or damaged"
    return DataError(f"{path}: {what}: choose another --logdir, or start over with --fresh --overwrite")


def restore(learner, state, path):
    """Continue a learner from its `state_dict` in a checkpoint; raises a DataError if it does not fit the network."""
    load_weights(learner.net, state["net_model"], path)
    learner.load_state_dict(state)


# ---- main.py


def newest_step(logdir):
    """(the newest whole checkpoint of main.py, or None; files of later steps).

    Raises:
        DataError: it lacks what a run continues from.
    """
    files = list(numbered(logdir, STEPS).values())
    for i, path in enumerate(files):
        if is_whole(path):
            if "optim" not in load(path, mmap=True):
                raise nothing_to_continue(path)
            return path, files[:i]
    return None, files


def save_step(logdir, state, milestone, keep):
    """Write the checkpoint of main.py after a step.

    The `keep` newest have all that a run continues from. Of the older ones milestones stay, with what evaluation needs.
    """
    save(logdir / step_name(state["step"]), {**state, "milestone": milestone})
    until_now = [path for step, path in numbered(logdir, STEPS).items() if step <= state["step"]]
    for path in until_now[keep:]:
        with suppress(DamagedError):  # a damaged one stays as it is
            if "optim" not in load(path, mmap=True):
                break  # nor do those before it have more
            old = load(path)
            if old["milestone"]:
                save(path, {name: value for name, value in old.items() if name not in FOR_RESUMING})
            else:
                remove(path)


# ---- main_fed.py


def shard_files(logdir, shard):
    """{own step: path} of what was saved of a shard, the newest first."""
    return numbered(logdir, rf"state/shard{shard}_step(\d+)\.pt")


def newest_round(steps_per_round, logdir):
    """(rounds done, own steps of the shards, file of the average, later files) of the newest files that fit together.

    A shard at step 0 has no file, and there is no average before round 1.

    Raises:
        DataError: nothing can be continued, but there are whole files, which a new start would replace.
    """
    averages = numbered(logdir, AVERAGES) | numbered(logdir, ROUNDS)
    shards = [shard_files(logdir, shard) for shard in range(len(steps_per_round))]
    for r in [*sorted(averages, reverse=True), 0]:
        if r and not is_whole(averages[r]):
            continue
        ranges = [range(r * n, (r + 1) * n + 1) for n in steps_per_round]
        steps = [
            next((step for step, path in files.items() if step in own and is_whole(path)), 0)
            for files, own in zip(shards, ranges, strict=True)
        ]
        if all(step in own for step, own in zip(steps, ranges, strict=True)):
            break
    later = [path for s, path in averages.items() if s > r]
    for files, own in zip(shards, steps, strict=True):
        later += [path for step, path in files.items() if step > own]
    if not any(steps) and (whole := next((path for path in later if is_whole(path)), None)):
        raise nothing_to_continue(whole)
    return r, steps, averages.get(r), later


def restore_shard(shard, step, logdir):
    """Continue a shard from its file after `step` of its own steps; returns what the file holds.

    Raises:
        DataError: it does not fit the run.
    """
    path = shard_files(logdir, shard.number)[step]
    state = load(path)
    restore(shard.learner, state, path)
    shard.load_state_dict(state)
    return state


def save_shard(logdir, number, state, end_of_round, keep):
    """Write the file of a shard.

    Its `keep` newest files stay, and that of the end of the last round: all shards need it until the next average.
    """
    save(logdir / "state" / f"shard{number}_step{state['step']}.pt", state)
    until_now = {step: path for step, path in shard_files(logdir, number).items() if step <= state["step"]}
    for step in list(until_now)[keep:]:
        if step != end_of_round:
            remove(until_now[step])


def save_average(logdir, state, publish, keep):
    """Write the average of a round, for the next round to start from: to stay if `publish`, else `keep` of them do."""
    r = state["round"]
    save(logdir / (round_name(r) if publish else f"state/average_round{r}.pt"), state)
    until_now = [path for s, path in numbered(logdir, AVERAGES).items() if s <= r]
    for path in until_now[keep:]:
        remove(path)

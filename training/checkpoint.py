"""All files that a run continues from, and its log directory; also what IET_AGC and pytorch-ddpm have published.

main.py writes ckpt{steps}.pt. main_fed.py writes global_ckpt_round{r}.pt and, to continue from, state/: a file per
shard and save, whichever process made it, and the averages that are not to stay. It stands at (rounds done, own steps
of every shard), since in a round no shard depends on another.
"""

import json
import os
import pickle
import re
import socket
import warnings
import zipfile
from contextlib import suppress
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from utils import distributed
from utils.errors import DamagedError, DataError, UsageError, warn
from utils.files import atomic_write, lock_directory, read_json, remove, write_json, write_text
from utils.safe_files import one_line

EXPORTED = ".safetensors"  # the suffix of what `training.export` writes
FORMAT = 4  # of what a run needs to continue
YOUNG_EMA = 0.05  # the share of their random start in EMA weights from which on it is said
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
NUMPY_TYPES = [np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in "?bhilBHILefd")]
for module in ("numpy.core", "numpy._core"):
    NUMPY_TYPES.append((np._core.multiarray._reconstruct, f"{module}.multiarray._reconstruct"))


def step_name(step):
    """File name of the checkpoint after `step` steps: ckpt400k.pt, or ckpt1234.pt for no multiple of 1,000."""
    return f"ckpt{step // 1000}k.pt" if step and step % 1000 == 0 else f"ckpt{step}.pt"


def round_name(number):
    """File name of the averages after round `number`, counted from 1."""
    return f"global_ckpt_round{number}.pt"


def own_files(directory, pattern):
    """{path: match} of the files in a log directory, or in directories in it, whose paths in it match a pattern."""
    paths = [path for level in ("*", "*/*") for path in sorted(Path(directory).glob(level))]
    found = {path: re.fullmatch(pattern, str(path.relative_to(directory))) for path in paths}
    return {path: match for path, match in found.items() if match}


def numbered(directory, pattern):
    """{number: path} of the files in a log directory whose paths match a pattern with one group, the highest first."""
    found = {int(match[1].replace("k", "000")): path for path, match in own_files(directory, pattern).items()}
    return dict(sorted(found.items(), reverse=True))


def save(path, state):
    """Write a checkpoint whole or, with a DataError, not at all; what was at `path` is still there then."""
    with atomic_write(path) as file:
        try:
            torch.save({"format": FORMAT, **state}, file)
        except RuntimeError as error:
            # closing its archive fails after a failed write, which hides the reason
            raise error.__context__ if isinstance(error.__context__, OSError) else error  # noqa: B904


def load(path, device="cpu", check=True):
    """The dict that a checkpoint or an exported file holds, on the device; no code of the file runs.

    Its tensors are mapped: read from the file when they are needed. check: read all now, and compare the checksums.

    Raises:
        DamagedError: what was written, if it was a checkpoint, is not there any more.
        DataError: missing, unreadable, or no checkpoint.
    """
    path, kind = Path(path), DataError
    try:
        if path.suffix == EXPORTED:
            return load_exported(path, device)
        with path.open("rb") as file:
            is_zip = file.read(1) != b"\x80"  # of torch's older format, which this program does not write
            if is_zip:
                kind = DamagedError
                archive = zipfile.ZipFile(file)
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                    raise ValueError("it is compressed, as no checkpoint is: refused as a zip bomb")
                if check and (damaged := archive.testzip()):
                    raise ValueError(f"damaged: the checksum of {damaged} is wrong")
                kind = DataError  # if torch cannot read it all the same
        with torch.serialization.safe_globals(NUMPY_TYPES), warnings.catch_warnings(action="ignore"):
            mmap = is_zip and str(path).isprintable()  # torch cannot map a file whose name is no UTF-8
            state = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
        if not isinstance(state, dict):
            raise TypeError(f"it holds a {type(state).__name__}, not a dict")
        return state
    except Exception as error:  # damage and malice can make zipfile and the unpickler raise anything
        if not check:
            return load(path, device)  # which finds out whether it is damaged
        reason = one_line(error)[:200]
        if isinstance(error, pickle.UnpicklingError):
            reason = "no checkpoint, or one that holds more than tensors and plain values, which could run code"
        kind = DataError if isinstance(error, OSError) else kind
        raise kind(f"{path}: cannot be read as a checkpoint ({reason})") from error


def load_exported(path, device):
    """What `training.export` has written, as the dict of a checkpoint: EMA or raw weights, norm_groups and flags."""
    with safe_open(path, framework="pt", device=str(device)) as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    try:
        flags = json.loads(metadata["flags"])
        kind = "ema_model" if flags["use_ema"] else "net_model"
        share = {"ema_start": float(metadata["ema_start"])} if "ema_start" in metadata else {}
        return {kind: tensors, "norm_groups": int(flags["norm_groups"]), "flags": flags, **share}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError("its metadata does not say what network it is of: use python -m training.export") from error


def load_whole(path):
    """What a checkpoint of a run holds; None if it is damaged, which is said on stderr, and it is left as it is."""
    try:
        return load(path)
    except DamagedError as error:
        warn(f"{error}: passed over, what it held is made again")
        return None


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
    """Load a checkpoint's weights into a UNet. What DataParallel or torch.compile have put before all keys is left out.

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


# ---- how much of the EMA weights is still what a training started from


def random_start(run, steps):
    """The share of the EMA weights that is the random start of a training after so many steps of a network.

    run: of `read_run`.
    """
    settings, share, done = run["settings"], 1.0, 0
    if settings.get("check_dir") or not settings.get("unet_from_scratch", True):
        return 0.0
    for change in run["changes"]:
        if change["flag"] == "ema_decay":
            own_step = change["step"] // settings.get("client_num", 1)  # it is recorded for all shards together
            until = max(done, min(steps, own_step))
            share *= change["before"] ** (until - done)
            done = until
    return share * settings["ema_decay"] ** (steps - done)


def steps_of(state, settings):
    """The steps that a network in a checkpoint has made, of averages those of a shard, or None.

    settings: of the training, where the checkpoint is an average.
    """
    if "round" not in state:
        return state.get("step")
    slots, split = len(state["index_array"]), settings["split"]
    size = slots if split == "all" else slots // settings["client_num"]
    return state["round"] * settings["local_epoch"] * (size // settings["batch_size"])


def ema_start(path):
    """`random_start` of the EMA weights in a checkpoint, or None where that is not known, as of published ones."""
    if path.suffix == EXPORTED:
        return load(path).get("ema_start")
    run = read_run(run_file(path))
    if run is None:
        return None
    with suppress(KeyError, TypeError):  # of a version that recorded less, or a file that does not say its steps
        return random_start(run, steps_of(load(path, check=False), run["settings"]))


def young_ema(path, share):
    """What is to be said of EMA weights in a file, of which a share is their random start; None if nothing is."""
    if share is None or share <= YOUNG_EMA:
        return None
    advice = "train longer, or with a lower --ema_decay"
    return f"{path}: {share:.1%} of the EMA weights are still the random start of the training: {advice}"


def say_young_ema(logdir, steps):
    """Print at the start of a run how much of the EMA weights its random start will be at its end, if it is too much.

    steps: of a network, in the whole run.
    """
    share = random_start(read_run(Path(logdir) / "run.json"), steps) if distributed.is_main() else 0.0
    if share > YOUNG_EMA:
        what = f"after all {steps:,} steps {share:.1%} of the EMA weights will still be the random start"
        print(f"{what}: train longer, or with a lower --ema_decay")


# ---- the log directory of a run


def run_file(path):
    """The run.json of the log directory that a checkpoint file lies in."""
    return (path.parent.parent if path.parent.name == "state" else path.parent) / "run.json"


def training_of(path):
    """The settings of the training that a checkpoint is of, as its log directory or exported file says them, or None.

    Settings that were changed on the way are told in "changed".
    """
    if path.suffix == EXPORTED:
        return load(path).get("flags")
    run = read_run(run_file(path))
    if run is None:
        return None
    changes = [f"{change['flag']}: {change['before']}, then {change['after']}" for change in run["changes"]]
    return run["settings"] | ({"changed": changes} if changes else {})


def read_run(path):
    """{"settings": {name: JSON value}, "changes": [...]} of a run.json, or None if it is missing or is none.

    What earlier versions did without recording it is there too: images were squeezed, and CIFAR's always mirrored.
    """
    run = read_json(path) if path.exists() else None
    if not isinstance(run, dict) or not isinstance(run.get("settings"), dict):
        return None
    settings = dict(run["settings"])
    if settings.get("script") in ("main", "main_fed") and "resize" not in settings:
        is_cifar = str(settings.get("dataset")).startswith("cifar")
        settings |= {"resize": "squeeze", "hflip": is_cifar or settings.get("hflip")}
    return {"settings": settings, "changes": [dict(change) for change in run.get("changes", [])]}


class LogDirectory:
    """The log directory of a run: locked as long as this lives, compared with the run, and written by `begin` only.

    Args:
        path: the directory, made if missing.
        settings: {name: JSON value} of what the result depends on, kept as `run.json`.
        fixed: names of those that a continued run cannot change, since what it has saved depends on them.
        flagfile: text of `flagfile.txt`, for `--flagfile`.
        subset: (N,) int64, the training images' numbers in the whole training set, kept as `subset.npy`: skip counts
            and neighbour indices count in it.
        fresh, overwrite, allow_change: the flags. `fresh` with `overwrite` removes the files of an earlier run.

    Raises:
        DataError: it cannot be made or written, another process has it, or it holds what no run of ours has written.
        UsageError: what is in it is not this run.
    """

    def __init__(self, path, settings, fixed, flagfile, subset, *, fresh=False, overwrite=False, allow_change=False):
        self.path, self.settings, self.flagfile, self.subset = Path(path), settings, flagfile, subset
        if distributed.is_main():
            self.lock = lock_directory(self.path, "logdir")
            self.take(fixed, fresh, overwrite, allow_change)
        holder, lock = distributed.from_main(str(os.getpid())), self.path / ".lock"
        if not distributed.is_main() and (not lock.exists() or lock.read_text() != holder):
            where = f"on {socket.gethostname()} not the directory that rank 0 has opened"
            raise DataError(f"--logdir={path}: {where}: choose one that all machines share")

    def take(self, fixed, fresh, overwrite, allow_change):
        """Raise an error if what is in the directory is of others or of another run; remove it if that was asked."""
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
                why = "what it has saved depends on it" if name in fixed else "--allow_change continues all the same"
                what = f"the run in {self.path} was started with {before.get(name)} ({why})"
                raise UsageError(f"{flag}={self.settings[name]}: {what}: give that, or choose another --logdir")
        self.changes += [{"flag": name, "before": before.get(name), "after": self.settings[name]} for name in changed]

    def begin(self, steps):
        """Write what the run is made of, now that all processes have what they continue from; `steps` are done."""
        distributed.barrier()
        if distributed.is_main():
            changes = [{**change, "step": min(steps, change.get("step", steps))} for change in self.changes]
            write_json(self.path / "run.json", {"settings": self.settings, "changes": changes})
            write_text(self.path / "flagfile.txt", self.flagfile)
            with atomic_write(self.path / "subset.npy") as file:
                np.save(file, self.subset.numpy())
            for file in own_files(self.path, LEFTOVERS):
                remove(file)
        distributed.barrier()


def is_ours(path):
    """Whether a checkpoint in a log directory is of this version of this program; a damaged one is taken for it."""
    try:
        return load(path, check=False).get("format") == FORMAT
    except DataError as error:
        return isinstance(error, DamagedError)


def nothing_to_continue(path):
    """The error where a new start would replace what is whole."""
    what = "what the run needs beside it to be continued is missing or damaged"
    return DataError(f"{path}: {what}: choose another --logdir, or start over with --fresh --overwrite")


def restore(learner, state, path):
    """Continue a learner from its `state_dict` in a checkpoint; raises a DataError if it does not fit the network."""
    try:
        # the optimiser goes on with the tensors that it is given, which must not be those of the file
        learner.load_state_dict({**state, "optim": deepcopy(state["optim"])})
    except (KeyError, ValueError, RuntimeError) as error:
        raise DataError(f"{path}: does not fit the network of the flags: {one_line(error)[:300]}") from error


def check_length(flag, wanted, done, logdir):
    """Raise a UsageError if the flag, which is how long a run is, asks for less than the run has done."""
    if done > wanted:
        advice = "give at least that, or choose another --logdir"
        raise UsageError(f"--{flag}={wanted}: the run in {logdir} has done {done}: {advice}")


# ---- main.py


def resume(learner, directory, total_steps):
    """Continue from the newest good checkpoint, if there is one; returns the seconds of training until then."""
    logdir, seconds = directory.path, 0.0
    path = distributed.from_main(newest_step(logdir) if distributed.is_main() else None)
    if path:
        state = load(path, check=False)  # rank 0 has checked it
        restore(learner, state, path)
        seconds = state["seconds"]
    check_length("total_steps", total_steps, learner.step, logdir)
    directory.begin(learner.step)
    if path:
        print(f"continuing from {path}: {learner.step} of {total_steps} steps done")
    return seconds


def newest_step(logdir):
    """The newest whole checkpoint of main.py, or None; a DataError if a run cannot go on from it."""
    for path in numbered(logdir, STEPS).values():
        if state := load_whole(path):
            if "optim" not in state:
                raise nothing_to_continue(path)
            return path
    return None


def save_step(logdir, state, milestone, keep):
    """Write the checkpoint of main.py. Of those older than the `keep` newest milestones stay, for evaluation only."""
    save(logdir / step_name(state["step"]), {**state, "milestone": milestone})
    until_now = [path for step, path in numbered(logdir, STEPS).items() if step <= state["step"]]
    for path in until_now[keep:]:
        with suppress(DamagedError):  # a damaged one stays as it is
            old = load(path)
            if "optim" not in old:
                break  # nor do those before it have more
            if old["milestone"]:
                save(path, {name: value for name, value in old.items() if name not in FOR_RESUMING})
            else:
                remove(path)


# ---- main_fed.py


def shard_files(logdir, shard):
    """{own step: path} of what was saved of a shard, the newest first."""
    return numbered(logdir, rf"state/shard{shard}_step(\d+)\.pt")


def newest_round(steps_per_round, logdir):
    """(rounds done, own steps of the shards, file of the average) of the newest files that fit together.

    A shard at step 0 has no file, and there is no average before round 1.

    Raises:
        DataError: nothing can be continued, but there are whole files, which a new start would replace.
    """
    averages = numbered(logdir, AVERAGES) | numbered(logdir, ROUNDS)
    shards = [shard_files(logdir, shard) for shard in range(len(steps_per_round))]
    for r in [*sorted(averages, reverse=True), 0]:
        if r and not load_whole(averages[r]):
            continue
        steps = []
        for files, n in zip(shards, steps_per_round, strict=True):
            own = (step for step, path in files.items() if r * n <= step <= (r + 1) * n and load_whole(path))
            steps.append(next(own, None if r else 0))
        if None not in steps:
            break
    files = [*averages.values(), *(path for own in shards for path in own.values())]
    if not any(steps) and (whole := next(filter(load_whole, files), None)):
        raise nothing_to_continue(whole)
    return r, steps, averages.get(r)


def resume_shards(shards, steps_per_round, directory, total_round):
    """Continue shards from the newest good files.

    Args:
        shards: those of this process.
        steps_per_round: of all K shards.
        directory: the `LogDirectory`.
        total_round: rounds that are wanted.

    Returns:
        The rounds done, the seconds of training until then, and the slots of all shards if they have been exchanged.

    Raises:
        DataError: the files do not fit the run.
        UsageError: more rounds are done than are wanted.
    """
    logdir = directory.path
    found = newest_round(steps_per_round, logdir) if distributed.is_main() else None
    r, steps, average_path = distributed.from_main(found)
    average = load(average_path, check=False) if r else {"seconds": 0.0}
    seconds = average["seconds"]
    for shard in shards:
        step = steps[shard.number]
        if step:
            path = shard_files(logdir, shard.number)[step]
            state = load(path, check=False)
            restore(shard.learner, state, path)
            shard.load_state_dict(state)
            seconds = max(seconds, state["seconds"])
        if r and step == r * steps_per_round[shard.number]:
            shard.round_counts.zero_()
            if average["averaged"]:
                shard.learner.set_weights(average["global_model"], average["global_ema_model"])
    check_length("total_round", total_round, r, logdir)
    directory.begin(sum(steps))
    if any(steps):
        print(f"continuing in {logdir}: {r} rounds and {sum(steps)} steps done")
    return r, seconds, average.get("shards")


def save_shard(logdir, number, state, end_of_round, keep):
    """Write the file of a shard. Its `keep` newest stay, and that of the last round's end until the next average."""
    save(logdir / "state" / f"shard{number}_step{state['step']}.pt", state)
    until_now = [item for item in shard_files(logdir, number).items() if item[0] <= state["step"]]
    for step, path in until_now[keep:]:
        if step != end_of_round:
            remove(path)


def save_average(logdir, state, publish, keep):
    """Write the average of a round, for the next round to start from: to stay if `publish`, else `keep` of them do."""
    r = state["round"]
    save(logdir / (round_name(r) if publish else f"state/average_round{r}.pt"), state)
    until_now = [path for s, path in numbered(logdir, AVERAGES).items() if s <= r]
    for path in until_now[keep:]:
        remove(path)

"""All files that a run continues from, and its log directory; also what IET_AGC and pytorch-ddpm have published.

main.py writes ckpt{steps}.pt. main_fed.py writes global_ckpt_round{r}.pt and, to continue from, state/: a file per
shard and save, and one per average. It stands at (rounds done, own steps of every shard), since in a round no shard
depends on another. Which process trains a shard is not in the files.
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
from safetensors import SafetensorError, safe_open

from utils import distributed
from utils.errors import DamagedError, DataError, UsageError
from utils.files import atomic_write, lock_directory, make_directory, read_json, remove, write_json
from utils.safe_files import one_line

FORMAT = 4  # of what a run needs to continue
FOR_RESUMING = ("optim", "scaler", "seconds", "milestone")  # what main.py's older checkpoints lack

# by their paths in a log directory
CHECKPOINTS = r"ckpt\d+k?\.pt|global_ckpt_round\d+\.pt|state/(shard\d+_step|average_round)\d+\.pt"
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
    *(type(np.dtype(kind)) for kind in ("bool", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")),
]


def step_name(step):
    """File name of the checkpoint after `step` steps: ckpt400k.pt, or ckpt1234.pt for no multiple of 1,000."""
    return f"ckpt{step // 1000}k.pt" if step and step % 1000 == 0 else f"ckpt{step}.pt"


def round_name(number):
    """File name of the averages after round `number`, counted from 1."""
    return f"global_ckpt_round{number}.pt"


def progress_of(path):
    """(round, step) that a checkpoint's file name stands for, or None where it is no checkpoint's name."""
    if match := re.fullmatch(r"ckpt(\d+)(k?)\.pt", path.name):
        return 0, int(match[1]) * (1000 if match[2] else 1)
    if match := re.fullmatch(r"global_ckpt_round(\d+)\.pt", path.name):
        return int(match[1]), 0
    return None


def newest_first(directory):
    """The checkpoints of a directory, the highest round or step first."""
    return sorted((path for path in Path(directory).glob("*.pt") if progress_of(path)), key=progress_of, reverse=True)


def save(path, state):
    """Write a checkpoint so that a reader, or a run killed at any instant, finds the whole file or none.

    torch.save writes a zip archive with a CRC-32 of every record, which `verify` checks.

    Raises:
        DataError: it cannot be written, e.g. for want of room; what was at `path` is still there.
    """
    with atomic_write(path) as file:
        try:
            torch.save({"format": FORMAT, **state}, file)
        except RuntimeError as error:
            # closing its archive fails after a failed write, which hides the reason
            raise error.__context__ if isinstance(error.__context__, OSError) else error  # noqa: B904


def verify(path):
    """Raise a DamagedError unless every record of a checkpoint has the checksum that it was written with."""
    try:
        with zipfile.ZipFile(path) as archive:
            compressed = any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist())
            damaged = None if compressed else archive.testzip()
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such checkpoint") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)})") from error
    except Exception as error:  # damage can make zipfile raise anything
        raise DamagedError(f"{path}: cannot be read as a checkpoint ({one_line(error)[:200]})") from error
    if compressed:
        raise DataError(
            f"{path}: cannot be read as a checkpoint (it is compressed, which no checkpoint is: refused as a zip bomb)"
        )
    if damaged:
        raise DamagedError(f"{path}: cannot be read as a checkpoint (damaged: the checksum of {damaged} is wrong)")


def is_whole(path):
    """Whether a checkpoint of a run is undamaged; a damaged one is named on stderr and left as it is."""
    try:
        verify(path)
    except DamagedError as error:
        print(f"{error}: passed over", file=sys.stderr)
        return False
    return True


def load(path, device="cpu"):
    """The dict that a checkpoint or an exported file holds, on the device; no code of the file runs.

    Raises:
        DamagedError: what was written, if it was a checkpoint, is not there any more.
        DataError: missing, unreadable, or no checkpoint.
    """
    if Path(path).suffix == ".safetensors":
        return load_exported(path, device)
    if zipfile.is_zipfile(path):
        verify(path)
    return read(path, device)


def read(path, device="cpu", mmap=False):
    """`load` without a look at the checksums; with `mmap` tensors are read from the file when they are needed."""
    try:
        mmap = mmap and zipfile.is_zipfile(path)  # torch's older format cannot be mapped
        with torch.serialization.safe_globals(NUMPY_TYPES), warnings.catch_warnings(action="ignore"):
            state = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such checkpoint") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)})") from error
    except Exception as error:  # a hostile file can make the unpickler raise anything
        reason = one_line(error)[:200]
        if isinstance(error, pickle.UnpicklingError):
            reason = "no checkpoint, or one that holds more than tensors and plain values, which could run code"
        kind = DataError
        if zipfile.is_zipfile(path):
            verify(path)
        elif not starts_as_pickle(path):
            kind = DamagedError
        raise kind(f"{path}: cannot be read as a checkpoint ({reason})") from error
    if not isinstance(state, dict):
        raise DataError(f"{path}: holds a {type(state).__name__}, not the dict of a checkpoint")
    return state


def starts_as_pickle(path):
    """Whether a file may be of torch's older format, which this program does not write."""
    with Path(path).open("rb") as file:
        return file.read(1) == b"\x80"


def load_exported(path, device):
    """What `training.export` has written, as the dict of a checkpoint: EMA or raw weights, norm_groups and flags."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such checkpoint") from error
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be read as a safetensors file ({one_line(error)[:200]})") from error
    try:
        flags = json.loads(metadata["flags"])
        kind = "ema_model" if flags["use_ema"] else "net_model"
        return {kind: tensors, "norm_groups": int(flags["norm_groups"]), "flags": flags}
    except (KeyError, TypeError, ValueError) as error:
        what = "its metadata does not say what network it is of, as that of python -m training.export does"
        raise DataError(f"{path}: {what}: export the checkpoint with that") from error


def find(name):
    """The checkpoint file that a flag names: the file itself, or the newest of a directory."""
    path = Path(name)
    if not path.is_dir():
        return path
    found = newest_first(path)
    if not found:
        raise DataError(f"{path}: holds no ckpt*.pt and no global_ckpt_round*.pt; name a checkpoint or its directory")
    return found[0]


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
    raise DataError(
        f"{path}: has neither {names[0]} nor {names[1]}; it holds {', '.join(map(str, state)) or 'nothing'}"
    )


def without_prefix(state_dict):
    """A UNet's state dict without what DataParallel, torch.compile or an outer module have put before its keys."""
    prefixes = [key.removesuffix("head.weight") for key in state_dict if re.fullmatch(r"(.*\.)?head\.weight", key)]
    if len(prefixes) != 1 or not prefixes[0]:
        return state_dict
    prefix = prefixes[0]
    return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}


def load_weights(net, state_dict, path):
    """Load a checkpoint's weights into a UNet; keys and shapes must fit, up to a prefix that all keys have.

    Raises:
        DataError: names the first key that is missing, left over or of another shape.
    """
    try:
        state_dict = without_prefix(state_dict)
        if not state_dict.keys() & net.state_dict().keys():
            raise DataError(
                f"{path}: holds no weights of this UNet: its entries are {', '.join(map(str, [*state_dict][:3]))}, ..."
            )
        net.load_state_dict(state_dict)
    except (RuntimeError, TypeError, AttributeError) as error:
        problem = str(error).splitlines()[1:] or [str(error)]
        more = f" (and {len(problem) - 1} more problems)" if len(problem) > 1 else ""
        raise DataError(
            f"{path}: does not fit the network of the flags (--ch, --ch_mult, --attn, --num_labels, ...): "
            f"{problem[0].strip()[:300]}{more}"
        ) from error


# ---- the log directory of a run


def own_files(path, pattern):
    """The files in a log directory whose paths in it match a pattern; none if there is no directory."""
    places = [path, path / "state", path / "sample", *path.glob("rank*")]
    try:
        files = [file for place in places if place.is_dir() for file in sorted(place.iterdir())]
    except OSError as error:
        raise DataError(f"--logdir={path}: cannot be read ({error.strerror}): choose another directory") from error
    return [file for file in files if re.fullmatch(pattern, str(file.relative_to(path)))]


def check_own(path, any_format):
    """Raise a DataError if a checkpoint in a log directory is none of ours; a damaged one is taken for ours."""
    try:
        state = read(path, mmap=True)
    except DamagedError:
        return
    except DataError as error:
        raise DataError(f"{error}: choose another --logdir") from error
    if "format" not in state:
        raise DataError(f"{path}: another program's checkpoint cannot be continued: choose another --logdir")
    if state["format"] != FORMAT and not any_format:
        raise DataError(
            f"{path}: written by another version of this program (format {state['format']}, known: {FORMAT}): "
            "continue with that version, or choose another --logdir"
        )


def shared_lock(path):
    """The lock that rank 0 holds, as another process of the same run sees it.

    Raises:
        DataError: it sees none: the machines do not share the directory.
    """
    holder = distributed.from_main(None)
    with suppress(OSError):
        file = (path / ".lock").open()
        if file.read().strip() == holder:
            return file
    raise DataError(
        f"--logdir={path}: on {socket.gethostname()} it is not the directory that rank 0 has opened: choose one on a "
        "file system that all machines share"
    )


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

    Rank 0 does all this; the other processes wait for it. The lock is held until `close` or the end of the process.

    Raises:
        DataError: the directory cannot be made or written, another process has it, or it holds what no run of this
            program has written.
        UsageError: what is in it is not this run.
    """

    def __init__(self, path, settings, fixed, flagfile, subset, *, fresh=False, overwrite=False, allow_change=False):
        self.path, self.settings, self.flagfile, self.subset = Path(path), settings, flagfile, subset
        if not distributed.is_main():
            self.lock = shared_lock(self.path)
            return
        files = own_files(self.path, OWN_FILES)
        if files and self.path / "run.json" not in files:
            raise DataError(
                f"{files[0]}: not of a run of this program, since there is no run.json: choose another --logdir"
            )
        make_directory(self.path, "logdir")
        self.lock = lock_directory(self.path, "logdir")
        before, self.changes = self.recorded()
        for file in own_files(self.path, CHECKPOINTS):
            check_own(file, any_format=fresh)
        if fresh:
            self.start_over(overwrite)
            before, self.changes = settings, []
        self.new_changes = [
            {"flag": name, "before": before.get(name), "after": value}
            for name, value in settings.items()
            if before.get(name) != value
        ]
        for change in sorted(self.new_changes, key=lambda change: change["flag"] not in fixed):
            name = change["flag"] if change["flag"] == "script" or " " in change["flag"] else f"--{change['flag']}"
            what = f"{name}={change['after']}: the run in {path} was started with {change['before']}"
            if change["flag"] in fixed:
                raise UsageError(f"{what}, and what it has saved depends on it: give that, or choose another --logdir")
            if not allow_change:
                raise UsageError(
                    f"{what}; give that, choose another --logdir, or continue with the change by --allow_change"
                )
        distributed.from_main(str(os.getpid()))

    def recorded(self):
        """(settings, changes) of the run that is there, as `run.json` says; this run's own if there is none."""
        path = self.path / "run.json"
        if not path.exists():
            return self.settings, []
        with suppress(DataError, KeyError, TypeError):
            run = read_json(path)
            if "script" in run["settings"]:
                return run["settings"], run["changes"]
        raise DataError(f"{path}: is damaged, or not of this program: choose another --logdir")

    def start_over(self, overwrite):
        """Remove the files of an earlier run, run.json aside: `begin` replaces it.

        Raises:
            UsageError: there are some, and they may not be removed.
        """
        files = own_files(self.path, f"{OWN_FILES}|{EVALUATIONS}")
        if files and not overwrite:
            raise UsageError(
                f"--fresh: {files[0]} is of an earlier run: add --overwrite to delete that run, or choose another "
                "--logdir"
            )
        for file in files:
            if file.name != "run.json":
                remove(file)

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
                raise UsageError(
                    f"{later[0]}: made with other settings (--allow_change), and the run would replace it, since it "
                    f"can be continued from step {steps} only: choose another --logdir, or go on without the change"
                )
            changes = self.changes + [{**change, "step": steps} for change in self.new_changes]
            write_json(self.path / "run.json", {"settings": self.settings, "changes": changes})
            with atomic_write(self.path / "flagfile.txt") as file:
                file.write(self.flagfile.encode(errors="surrogateescape"))
            with atomic_write(self.path / "subset.npy") as file:
                np.save(file, self.subset.numpy())
            for file in own_files(self.path, LEFTOVERS):
                remove(file)
        distributed.barrier()

    def close(self):
        """Let another process have the directory."""
        self.lock.close()


def numbered(directory, pattern):
    """{number: path} of the files whose names match a pattern with a group for the number; the highest first."""
    found = {int(m[1]): path for path in Path(directory).glob("*.pt") if (m := re.fullmatch(pattern, path.name))}
    return dict(sorted(found.items(), reverse=True))


def restore(learner, state, path):
    """Continue a learner from its `state_dict` in a checkpoint; raises a DataError if it does not fit the network."""
    load_weights(learner.net, state["net_model"], path)
    learner.load_state_dict(state)


# ---- main.py


def is_full(path):
    """Whether a file, if it is whole, has all that a run continues from; many times faster than `read`."""
    with suppress(Exception), zipfile.ZipFile(path) as archive:  # damage can make zipfile raise anything
        return b"milestone" in archive.read("archive/data.pkl")
    return False


def newest_step(logdir):
    """(the newest whole checkpoint that main.py can go on from, or None; files of later steps).

    Raises:
        DataError: there is none, but there are whole ones without what is needed, which a new start would replace.
    """
    files, slim = newest_first(logdir), None
    for i, path in enumerate(files):
        if is_whole(path):
            if is_full(path):
                return path, files[:i]
            slim = slim or path
    if slim:
        raise DataError(
            f"{slim}: has what evaluation needs only, and those that can be continued are missing or damaged: choose "
            "another --logdir, or start over with --fresh --overwrite"
        )
    return None, files


def save_step(logdir, state, milestone, keep):
    """Write the checkpoint of main.py after a step; returns its path.

    The `keep` newest have all that a run continues from. Of the older ones milestones stay, with what evaluation needs.
    """
    path = logdir / step_name(state["step"])
    save(path, {**state, "milestone": milestone})
    full = [old for old in newest_first(logdir) if progress_of(old) <= progress_of(path) and is_full(old)]
    for old in full[keep:]:
        if is_whole(old):
            old_state = read(old, mmap=True)
            if old_state["milestone"]:
                save(old, {name: value for name, value in old_state.items() if name not in FOR_RESUMING})
            else:
                remove(old)
    return path


# ---- main_fed.py


def shard_file(logdir, number, step):
    return logdir / "state" / f"shard{number}_step{step}.pt"


def shard_files(logdir, number):
    """{own step: path} of what was saved of a shard."""
    return numbered(logdir / "state", rf"shard{number}_step(\d+)\.pt")


def averages(logdir):
    """{round: path} of the averages, which are in one or both of two places."""
    found = numbered(logdir, r"global_ckpt_round(\d+)\.pt") | numbered(logdir / "state", r"average_round(\d+)\.pt")
    return dict(sorted(found.items(), reverse=True))


def newest_round(schedule, logdir):
    """(rounds done, own steps of the shards, file of the average, later files) of the newest files that fit together.

    A shard at step 0 has no file, and there is no average before round 1.

    Raises:
        DataError: nothing can be continued, but there are whole files, which a new start would replace.
    """
    found = averages(logdir)
    for r in [*found, 0]:
        steps = newest_steps(schedule, logdir, r) if r == 0 or is_whole(found[r]) else None
        if steps is not None:
            break
    later = [path for s, path in found.items() if s > r]
    for shard, own in enumerate(steps):
        later += [path for step, path in shard_files(logdir, shard).items() if step > own]
    if not any(steps) and (whole := next((path for path in later if is_whole(path)), None)):
        raise DataError(
            f"{whole}: what the run needs beside it to be continued is missing or damaged: choose another --logdir, or "
            "start over with --fresh --overwrite"
        )
    return r, steps, found.get(r), later


def newest_steps(schedule, logdir, r):
    """The steps of the shards' newest good files of round r + 1, or None if a shard has no file to start from."""
    steps = []
    for shard in range(len(schedule.steps)):
        first, last = schedule.end(shard, r), schedule.end(shard, r + 1)
        files = {step: path for step, path in shard_files(logdir, shard).items() if first <= step <= last}
        step = next((step for step, path in files.items() if is_whole(path)), 0)
        if step < first:
            return None
        steps.append(step)
    return steps


def restore_shards(shards, schedule, skip_counts, logdir, r, steps, average_path):
    """Continue the shards of this process from what `newest_round` has found: learners, banks, their skip counts.

    Returns:
        The seconds of training so far.

    Raises:
        DataError: a file does not fit the run.
    """
    average = load(average_path) if r else {"seconds": 0.0}
    seconds = average["seconds"]
    for shard in shards:
        step = steps[shard.number]
        if step == 0:
            continue
        path = shard_file(logdir, shard.number, step)
        state = load(path)
        restore(shard.learner, state, path)
        shard.agc.bank.copy_(state["bank"])
        skip_counts[shard.batches.index] = state["skip_counts"].to(skip_counts.device)
        if step == schedule.end(shard.number, r):
            shard.learner.set_weights(average["global_model"], average["global_ema_model"])
        seconds = max(seconds, state["seconds"])
    return max(distributed.from_main(distributed.gather(seconds)))


def save_shard(logdir, number, state, end_of_round, keep):
    """Write the file of a shard; returns its path.

    Its `keep` newest files stay, and that of the end of the last round: all shards need it until the next average.
    """
    path = shard_file(logdir, number, state["step"])
    save(path, state)
    until_now = [step for step in shard_files(logdir, number) if step <= state["step"]]
    for step in until_now[keep:]:
        if step != end_of_round:
            remove(shard_file(logdir, number, step))
    return path


def save_average(logdir, state, publish, keep):
    """Write the average of a round: for the next round to start from, of which `keep` stay, and to `publish`.

    What this run has published already stays as it is, if it is whole.
    """
    r = state["round"]
    published, path = logdir / round_name(r), logdir / "state" / f"average_round{r}.pt"
    if publish and not (published.exists() and is_whole(published)):
        save(published, state)
    save(path, state)
    until_now = [old for s, old in numbered(path.parent, r"average_round(\d+)\.pt").items() if s <= r]
    for old in until_now[keep:]:
        remove(old)

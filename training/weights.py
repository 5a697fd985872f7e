"""Checkpoint files: reading and writing them, ours and what IET_AGC and pytorch-ddpm have published."""

import json
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from utils.errors import DamagedError, DataError, one_line
from utils.files import atomic_write, read_json

EXPORTED = ".safetensors"  # the suffix of what `training.export` writes
FORMAT = 4  # of what a run needs to continue

# the files of a run by their paths in its log directory, the number in parentheses
STEPS, ROUNDS, AVERAGES = r"ckpt(\d+k?)\.pt", r"global_ckpt_round(\d+)\.pt", r"state/average_round(\d+)\.pt"
BEST = r"best_(ckpt\d+k?|global_ckpt_round\d+|shard\d+_step\d+)\.pt"  # of a watched training
CHECKPOINTS = rf"{STEPS}|{ROUNDS}|{AVERAGES}|state/shard\d+_step(\d+)\.pt"

# published global_ckpt files hold their skip counts as a NumPy array
NUMPY_TYPES = [np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in "?bhilBHILefd")]
for module in ("numpy.core", "numpy._core"):
    NUMPY_TYPES.append((np._core.multiarray._reconstruct, f"{module}.multiarray._reconstruct"))


def step_name(step):
    """File name of a checkpoint after `step` steps: ckpt400k.pt, or ckpt1234.pt."""
    return f"ckpt{step // 1000}k.pt" if step and step % 1000 == 0 else f"ckpt{step}.pt"


def round_name(number):
    """File name of the averages after round `number`, counted from 1."""
    return f"global_ckpt_round{number}.pt"


def own_files(directory, pattern):
    """{path: match} of the files in a log directory, or a level below, whose paths match."""
    paths = [path for level in ("*", "*/*") for path in sorted(Path(directory).glob(level))]
    found = {path: re.fullmatch(pattern, str(path.relative_to(directory))) for path in paths}
    return {path: match for path, match in found.items() if match}


def numbered(directory, pattern):
    """{number: path} of files in a log directory that match a pattern with a group, highest first."""
    found = {int(match[1].replace("k", "000")): path for path, match in own_files(directory, pattern).items()}
    return dict(sorted(found.items(), reverse=True))


def save_checkpoint(path, state):
    """Write a checkpoint whole or, with a DataError, not at all: what was at `path` stays then."""
    with atomic_write(path) as file:
        try:
            torch.save({"format": FORMAT, **state}, file)
        except RuntimeError as error:
            # closing its archive fails after a failed write, which hides the reason
            raise error.__context__ if isinstance(error.__context__, OSError) else error  # noqa: B904


def load_checkpoint(path, device="cpu", check=True):
    """The dict that a checkpoint or an exported file holds, on the device; no code of the file runs.

    Its tensors are mapped: read when they are needed. check: read all now, and compare the checksums.

    Raises:
        DamagedError: what was written, if it was a checkpoint, is not there any more.
        DataError: missing, unreadable, or no checkpoint."""
    path, kind = Path(path), DataError
    try:
        if path.suffix == EXPORTED:
            return load_exported(path, device)
        with path.open("rb") as file:
            is_zip = file.read(1) != b"\x80"  # of torch's older format, not ours
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
            return load_checkpoint(path, device)  # which finds out whether it is damaged
        reason = one_line(error)[:200]
        if isinstance(error, pickle.UnpicklingError):
            reason = "no checkpoint, or one that holds more than tensors and plain values"
            reason += ", which could run code"
        kind = DataError if isinstance(error, OSError) else kind
        raise kind(f"{path}: cannot be read as a checkpoint ({reason})") from error


def load_exported(path, device):
    """What `training.export` has written, as a checkpoint: EMA or raw weights, norm_groups and flags."""
    with safe_open(path, framework="pt", device=str(device)) as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    try:
        flags = json.loads(metadata["flags"])
        kind = "ema_model" if flags["use_ema"] else "net_model"
        share = {"ema_start": float(metadata["ema_start"])} if "ema_start" in metadata else {}
        return {kind: tensors, "norm_groups": int(flags["norm_groups"]), "flags": flags, **share}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError("its metadata does not say what network it is of: use python -m training.export") from error


def find_checkpoint(name):
    """The checkpoint file that a flag names: the file itself, or the newest of a directory."""
    path = Path(name)
    if not path.is_dir():
        return path
    found = numbered(path, ROUNDS) or numbered(path, STEPS)
    if not found:
        raise DataError(f"{path}: holds no ckpt*.pt and no global_ckpt_round*.pt; name a checkpoint or its directory")
    return next(iter(found.values()))


def find_best(name):
    """The file or folder that best.json in a log directory names; several of shards never averaged."""
    path = Path(name) / "best.json"
    if not path.exists():
        raise DataError(f"{path}: no such file: name a log directory whose training had --watch_step")
    record = read_json(path)
    if not isinstance(record, dict) or not isinstance(record.get("checkpoint"), str):
        what = "no measurement had MQ@30 at most two points above its floor"
        raise DataError(f"{path}: names no checkpoint, since {what}: name one")
    return [path.with_name(part) for part in record["checkpoint"].split(",")]


def weights_in(state, use_ema, path):
    """The EMA or raw weights in a checkpoint, ours or published; a bare UNet's are taken for both."""
    names = ("ema_model", "global_ema_model") if use_ema else ("net_model", "global_model")
    for name in names:
        if name in state:
            return state[name]
    if any(str(key).endswith("head.weight") for key in state):
        return state
    entries = ", ".join(map(str, state))
    raise DataError(f"{path}: has neither {names[0]} nor {names[1]}; it holds {entries}")


def load_weights(net, state_dict, path):
    """Load a checkpoint's weights into a UNet; a DataError names the first key that does not fit."""
    try:
        matches = (re.fullmatch(r"(.*\.)?head\.weight", key) for key in state_dict)
        heads = [match for match in matches if match]
        if len(heads) != 1:
            entries = ", ".join(map(str, [*state_dict][:3]))
            raise DataError(f"{path}: holds no weights of this UNet: its entries are {entries}, ...")
        prefix = heads[0][1] or ""
        net.load_state_dict({k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)})
    except (RuntimeError, TypeError, AttributeError) as error:
        problem = str(error).splitlines()[1:] or [str(error)]
        what = "does not fit the network of the flags (--ch, --ch_mult, --attn, --num_labels, ...)"
        raise DataError(f"{path}: {what}: {problem[0].strip()[:300]}") from error

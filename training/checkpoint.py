"""Checkpoints on disk: ours, and those that IET_AGC and pytorch-ddpm have published."""

import json
import pickle
import re
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from errors import DamagedError, DataError
from files import atomic_write
from safe_files import one_line

FORMAT = 3  # of what a run needs to continue; older programs refuse a higher one. 1 had no state of the logs, and 2
# one state of them for all shards

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
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise zipfile.BadZipFile("it is compressed, which no checkpoint is: refused as a zip bomb")
            damaged = archive.testzip()
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such checkpoint") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)})") from error
    except Exception as error:  # damage can make zipfile raise anything
        raise DamagedError(f"{path}: cannot be read as a checkpoint ({one_line(error)[:200]})") from error
    if damaged:
        raise DamagedError(f"{path}: cannot be read as a checkpoint (damaged: the checksum of {damaged} is wrong)")


def is_whole(path):
    """Whether a checkpoint of a run is undamaged; a damaged one is named on stderr and kept aside as `.corrupt`."""
    try:
        verify(path)
    except DamagedError as error:
        aside = path.with_name(f"{path.name}.corrupt")
        path.rename(aside)
        print(f"{error}: kept as {aside.name}, the one before it is used", file=sys.stderr)
        return False
    return True


def load(path, device="cpu"):
    """The dict that a checkpoint or an exported file holds, on the device; no code of the file runs.

    Raises:
        DataError: missing, unreadable, or no checkpoint.
    """
    if Path(path).suffix == ".safetensors":
        return load_exported(path, device)
    if zipfile.is_zipfile(path):
        verify(path)
    try:
        with torch.serialization.safe_globals(NUMPY_TYPES), warnings.catch_warnings(action="ignore"):
            state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such checkpoint") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)})") from error
    except pickle.UnpicklingError as error:
        reason = "no checkpoint, or one that holds more than tensors and plain values, which could run code"
        raise DamagedError(f"{path}: cannot be read as a checkpoint ({reason})") from error
    except Exception as error:  # a hostile file can make the unpickler raise anything
        raise DamagedError(f"{path}: cannot be read as a checkpoint ({one_line(error)[:200]})") from error
    if not isinstance(state, dict):
        raise DataError(f"{path}: holds a {type(state).__name__}, not the dict of a checkpoint")
    return state


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
    """The state dict of the EMA or raw weights in a checkpoint of main or main_fed, ours or published."""
    names = ("ema_model", "global_ema_model") if use_ema else ("net_model", "global_model")
    for name in names:
        if name in state:
            return state[name]
    raise DataError(
        f"{path}: has neither {names[0]} nor {names[1]}; it holds {', '.join(map(str, state)) or 'nothing'}"
    )


def check_format(state, path):
    """Raise a DataError unless a run can be continued from what a checkpoint holds."""
    if "format" not in state:
        raise DataError(f"{path}: another program's checkpoint cannot be continued: choose another --logdir")
    if state["format"] > FORMAT:
        raise DataError(f"{path}: written by a newer version (format {state['format']}, known: {FORMAT}): update")


def restore(learner, state, path):
    """Continue a learner from its `state_dict` in a checkpoint.

    Raises:
        DataError: the checkpoint is not of this program, of a newer one, or does not fit the network.
    """
    check_format(state, path)
    load_weights(learner.net, state["net_model"], path)
    learner.load_state_dict(state)


def load_weights(net, state_dict, path):
    """Load a checkpoint's weights into a UNet; keys and shapes must fit.

    Raises:
        DataError: names the first key that is missing, left over or of another shape.
    """
    try:
        net.load_state_dict(state_dict)
    except (RuntimeError, TypeError, AttributeError) as error:
        problem = str(error).splitlines()[1:] or [str(error)]
        more = f" (and {len(problem) - 1} more problems)" if len(problem) > 1 else ""
        raise DataError(
            f"{path}: does not fit the network of the flags (--ch, --ch_mult, --attn, --num_labels, ...): "
            f"{problem[0].strip()[:300]}{more}"
        ) from error

"""Checkpoints on disk: ours, and those that IET_AGC and pytorch-ddpm have published."""

import pickle
import re
from pathlib import Path

import numpy as np
import torch

from errors import DataError
from files import atomic_write
from safe_files import one_line

FORMAT = 1  # of what a run needs to continue; a change of it makes older programs refuse the file

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


def newest(directory):
    """The checkpoint of a directory with the highest round or step, or None."""
    found = [path for path in Path(directory).glob("*.pt") if progress_of(path)]
    return max(found, key=progress_of, default=None)


def save(path, state):
    """Write a checkpoint so that a reader, or a run killed at any instant, finds the whole file or none."""
    with atomic_write(path) as file:
        torch.save({"format": FORMAT, **state}, file)


def load(path, device="cpu"):
    """The dict that a checkpoint holds, on the device; no code of the file runs.

    Raises:
        DataError: missing, unreadable, or no checkpoint.
    """
    try:
        with torch.serialization.safe_globals(NUMPY_TYPES):
            state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such checkpoint") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise DataError(f"{path}: cannot be read as a checkpoint ({one_line(error)[:200]})") from error
    if not isinstance(state, dict):
        raise DataError(f"{path}: holds a {type(state).__name__}, not the dict of a checkpoint")
    return state


def find(name):
    """The checkpoint file that a flag names: the file itself, or the newest of a directory."""
    path = Path(name)
    if not path.is_dir():
        return path
    found = newest(path)
    if found is None:
        raise DataError(f"{path}: holds no ckpt*.pt and no global_ckpt_round*.pt; name a checkpoint or its directory")
    return found


def weights(state, use_ema, path):
    """The state dict of the EMA or raw weights in a checkpoint of main or main_fed, ours or published."""
    names = ("ema_model", "global_ema_model") if use_ema else ("net_model", "global_model")
    for name in names:
        if name in state:
            return state[name]
    raise DataError(
        f"{path}: has neither {names[0]} nor {names[1]}; it holds {', '.join(map(str, state)) or 'nothing'}"
    )


def restore(learner, state, path):
    """Continue a learner from its `state_dict` in a checkpoint.

    Raises:
        DataError: the checkpoint is not of this program, of a newer one, or does not fit the network.
    """
    if "format" not in state:
        raise DataError(f"{path}: another program's checkpoint cannot be continued: choose another --logdir")
    if state["format"] > FORMAT:
        raise DataError(f"{path}: written by a newer version (format {state['format']}, known: {FORMAT}): update")
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

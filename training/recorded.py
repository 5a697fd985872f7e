"""The flags that a training was run with, taken from its log directory for the evaluation of its checkpoints."""

import contextlib
from pathlib import Path

from absl import flags

from training.flags import DATA_FLAGS, NETWORK_FLAGS, PATH_FLAGS, check, read_flagfile
from training.logdir import read_run, run_file, training_of
from training.weights import EXPORTED
from utils.errors import DataError, UsageError, one_line
from utils.images import fingerprint


def recorded_flags(logdir):
    """{name: text} of the flags in the flagfile of a log directory, none where it has no flagfile."""
    path = logdir / "flagfile.txt"
    lines = read_flagfile(path) if path.is_file() else []
    return dict(line.removeprefix("--").split("=", 1) for line in lines if "=" in line)


def take(values, recorded, path):
    """Give NETWORK_FLAGS the values of a dict that says what a network is, unless they were given and agree.

    Args:
        recorded: {name: JSON value} of any flags; what it lacks stays as it is.
        path: of the file that says so.

    Raises:
        UsageError: a flag was given and contradicts it.
        DataError: a value is none of its flag's.
    """
    for name in NETWORK_FLAGS:
        flag, value = values[name], recorded.get(name)
        if flag.present and value not in (None, flag.value):
            raise UsageError(f"--{name}={flag.value}: {path} says {value}, leave the flag out")
        if not flag.present and value is not None:
            try:
                flag.parse(value)
                values.validate_all_flags()
            except flags.Error as error:
                raise DataError(f"{path}: {one_line(error)}") from error


def take_training(values, settings, paths, where):
    """Give the flags of network, diffusion and data the values of a training, unless they were given.

    Args:
        settings: {name: JSON value} of the training.
        paths: {name: path} of some of `PATH_FLAGS`, of the training.
        where: the file that says so.

    Raises:
        UsageError: a flag of network, diffusion or image size was given and contradicts them.
        DataError: a value is none of its flag's.
    """
    take(values, settings, where)
    if values["dataset"].present and values.dataset != settings.get("dataset"):
        return  # what is said of the other data set is not of this one
    recorded = {name: settings.get(name) for name in DATA_FLAGS} | {name: paths.get(name) for name in PATH_FLAGS}
    for name, value in recorded.items():
        if not values[name].present and value is not None:
            values[name].parse(value)
    check(values)


def take_trainings(values, paths):
    """`take_training` of checkpoints, which must agree; returns the settings of the first, or None if not all say them.

    Raises:
        UsageError: they differ in network, diffusion or data, or a flag was given and contradicts them.
    """
    settings = [training_of(path) for path in paths]
    if None in settings:
        return None
    for path, other in zip(paths, settings, strict=True):
        for name in (*NETWORK_FLAGS, *DATA_FLAGS):
            if other.get(name) != settings[0].get(name):
                values_of_both = f"{paths[0]} was trained with {settings[0].get(name)}, {path} with {other.get(name)}"
                raise UsageError(f"--{name}: {values_of_both}: evaluate them one by one")
    where = paths[0] if paths[0].suffix == EXPORTED else run_file(paths[0])
    take_training(values, settings[0], recorded_flags(where.parent), where)
    return settings[0]


def training_warning(settings, data, paths):
    """What is to be said where it is not sure that checkpoints are evaluated as they were trained, or None.

    Args:
        settings: of `take_trainings`.
        data: the `dataset.Dataset` of the flags.
        paths: of the checkpoints.
    """
    names = ", ".join(map(str, paths))
    if settings is None:
        return f"{names}: no run.json says how it was trained: network, diffusion and training images are the flags'"
    if settings.get("training images (sha256)") not in (None, fingerprint(data.train.images)):
        return f"{names}: was trained on other images than those of the flags, which are measured against here"
    return None


def default_resize(values, logdir=None):
    """Where --resize is not given, what the run in a log directory was started with, or else crop."""
    if values.resize is None:
        run = None
        with contextlib.suppress(DataError):  # damaged, which the log directory says
            run = read_run(Path(logdir) / "run.json") if logdir else None
        values["resize"].value = run["settings"].get("resize", "crop") if run else "crop"

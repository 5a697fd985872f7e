"""The flags of a training, taken from its log directory for the evaluation of its checkpoints."""

import contextlib
from pathlib import Path

from absl import flags

from training.flags import DATA_FLAGS, NETWORK_FLAGS, PATH_FLAGS, check, read_flagfile
from training.logdir import read_run, run_file, training_of
from training.weights import EXPORTED
from utils.errors import DataError, UsageError, one_line
from utils.images import fingerprint

OF_IMAGES = ("training images (sha256)", "keep_list (sha256)", "groups (sha256)")  # of settings


def recorded_flags(logdir):
    """{name: text} of the flags in the flagfile of a log directory, none where it has no flagfile."""
    path = logdir / "flagfile.txt"
    lines = read_flagfile(path) if path.is_file() else []
    return dict(line.removeprefix("--").split("=", 1) for line in lines if "=" in line)


def take(values, settings, where, paths=None):
    """Give the flags of the network the values of a training, unless they were given and agree.

    Args:
        settings: {name: JSON value} of the training; a flag that it lacks stays as it is.
        where: the file that says so.
        paths: {name: path} of some of `PATH_FLAGS`, if the flags of the data are to be taken too.

    Raises:
        UsageError: a flag of network, diffusion or image size was given and contradicts them.
        DataError: a value is none of its flag's.
    """
    for name in NETWORK_FLAGS:
        flag, value = values[name], settings.get(name)
        if flag.present and value not in (None, flag.value):
            raise UsageError(f"--{name}={flag.value}: {where} says {value}, leave the flag out")
        if not flag.present and value is not None:
            try:
                flag.parse(value)
                values.validate_all_flags()
            except flags.Error as error:
                raise DataError(f"{where}: {one_line(error)}") from error
    if paths is None:
        return
    is_its_data = not values["dataset"].present or values.dataset == settings.get("dataset")
    recorded = {name: settings.get(name) for name in DATA_FLAGS}
    recorded |= {name: paths.get(name) for name in PATH_FLAGS}
    for name, value in recorded.items() if is_its_data else ():
        if not values[name].present and value is not None:
            values[name].parse(value)
    check(values)


def take_trainings(values, paths):
    """`take` the training of checkpoints, which must agree; returns its settings, None if one has none.

    Raises:
        UsageError: they differ in network, diffusion or data, or a flag was given and contradicts them.
    """
    settings = [training_of(path) for path in paths]
    if None in settings:
        check(values)
        return None
    for path, other in zip(paths, settings, strict=True):
        for name in (*NETWORK_FLAGS, *DATA_FLAGS):
            first, own = settings[0].get(name), other.get(name)
            if own != first:
                what = f"{paths[0]} was trained with {first}, {path} with {own}"
                raise UsageError(f"--{name}: {what}: evaluate them one by one")
        for name in OF_IMAGES:
            # a file of exported weights does not say it
            if name in settings[0] and other.get(name, settings[0][name]) != settings[0][name]:
                what = f"{paths[0]} and {path} were trained with other {name.removesuffix(' (sha256)')}"
                raise UsageError(f"--unet_dir: {what}: evaluate them one by one")
    where = paths[0] if paths[0].suffix == EXPORTED else run_file(paths[0])
    take(values, settings[0], where, recorded_flags(where.parent))
    if values.guidance and settings[0].get("label_dropout") == 0:
        what = f"{paths[0]} was trained with --label_dropout=0, so it has not learned the null class"
        raise UsageError(f"--guidance={values.guidance}: {what}: leave it out")
    return settings[0]


def start_warning(values, path):
    """What to say where the checkpoint at `path` was trained with other flags of diffusion, or None."""
    settings = training_of(Path(path)) or {}
    differing = [
        f"--{name}={values[name].value}, not {settings[name]}"
        for name in ("beta_1", "beta_T", "mean_type")
        if settings.get(name) not in (None, values[name].value)
    ]
    return f"{path}: was trained otherwise: here {' and '.join(differing)}" if differing else None


def training_warning(settings, data, names):
    """What to say where it is not sure that `data` and the flags are those of the training, or None.

    names: of the checkpoints; settings: of their training, or None."""
    if settings is None:
        return f"{names}: no run.json says how it was trained: network, diffusion and training images are the flags'"
    if settings.get("training images (sha256)") not in (None, fingerprint(data.train.images)):
        return f"{names}: was trained on other images than those of the flags, which are measured against here"
    return None


def default_resize(values, logdir=None):
    """Where --resize is not given, what the run in a log directory that goes on was started with, or else crop."""
    if values.resize is None:
        run = None
        with contextlib.suppress(DataError):  # damaged, which the log directory says
            run = read_run(Path(logdir) / "run.json") if logdir and not values.fresh else None
        values["resize"].value = run["settings"].get("resize", "crop") if run else "crop"

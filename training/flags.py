"""Every flag of the three scripts, with its range, and the settings of each part read from them.

All scripts accept all flags, so that they share flagfiles; a help text says so where a flag belongs to one script.
"""

import contextlib
import inspect
import os
from pathlib import Path

import torch
from absl import flags

from dataset import DATASETS
from diffusion import MEAN_TYPES, SAMPLERS, VAR_TYPES, GaussianDiffusionSampler
from model import UNet
from score.features import COPIES, FRECHET, PREPROCESS, feature_space
from score.generate import generate_batches, grid_noise
from score.inception import find_weights
from training.agc import ANTI_GRADS, AntiGradientControl
from training.learner import PRECISIONS
from training.logdir import read_run, run_file, training_of
from training.shards import DEFAULT_SPLIT, PLACES, SPLITS
from training.weights import EXPORTED
from utils.errors import DataError, UsageError, one_line
from utils.images import RESIZES, fingerprint

STAGES = ("generate", "score", "memorise", "gap", "grid", "report")

# what to do
flags.DEFINE_bool("train", False, "train (main, main_fed)")
flags.DEFINE_bool("eval", False, "main: FID and IS of the raw and the EMA weights of a checkpoint")
flags.DEFINE_list(
    "stages",
    [stage for stage in STAGES if stage != "gap"],
    f"all_in: what to do, in this order, of {','.join(STAGES)}; gap compares losses of training and held-out images",
)

# UNet
flags.DEFINE_integer("ch", 128, "base width of the UNet, a multiple of the groups", lower_bound=4)
flags.DEFINE_multi_integer("ch_mult", [1, 2, 2, 2], "width of each level as a multiple of --ch", lower_bound=1)
flags.DEFINE_multi_integer("attn", [1], "levels with self-attention, 0-based", lower_bound=0)
flags.DEFINE_integer("num_res_blocks", 2, "residual blocks per level, >= 1", lower_bound=1)
flags.DEFINE_integer("norm_groups", 0, "groups of a GroupNorm; 0: the checkpoint's, or else min(32, ch // 4)", 0)
flags.DEFINE_float("dropout", 0.1, "dropout probability, in [0, 1)", lower_bound=0.0)
flags.DEFINE_integer("num_labels", None, "number of classes of a conditional UNet, >= 1", lower_bound=1)
flags.DEFINE_bool("use_labels", False, "condition on the class; needs --num_labels")
flags.DEFINE_float("label_dropout", 0.0, "probability in [0, 1) of training without the class", lower_bound=0.0)
flags.DEFINE_bool("legacy_labels", False, "all_in: row c for class c, for published conditional checkpoints")

# diffusion and sampling
flags.DEFINE_float("beta_1", 1e-4, "first variance of the linear schedule, in (0, 1)")
flags.DEFINE_float("beta_T", 0.02, "last variance of the linear schedule, in (0, 1)")
flags.DEFINE_integer("T", 1000, "number of timesteps, >= 2", lower_bound=2)
flags.DEFINE_enum("mean_type", "epsilon", MEAN_TYPES, "what the network predicts")
flags.DEFINE_integer("ambient_t", 0, "from this t on learn from noisy images only (ambient diffusion); 0: never", 0)
flags.DEFINE_enum("var_type", "fixedlarge", VAR_TYPES, "variance of the ancestral step (--sampler=ddpm)")
flags.DEFINE_enum("sampler", "ddim", SAMPLERS, "how images are generated")
flags.DEFINE_integer("sample_steps", 50, "network calls per image: 1 to T of ddim, 1 to T - 1 of dpmpp (20 do)", 1)
flags.DEFINE_float("eta", 0.0, "noise of --sampler=ddim, 0 (none) to 1 (as DDPM)", 0.0, 1.0)
flags.DEFINE_float("guidance", 0.0, "weight w >= 0 of classifier-free guidance, 0 for none", lower_bound=0.0)

# data
flags.DEFINE_enum("dataset", "cifar10", DATASETS, "training images; digits and mnist5k need no files")
flags.DEFINE_string("data_root", "./data", "directory of the data sets; with --dataset=folder, the folder itself")
flags.DEFINE_integer("img_size", 32, "height and width of the images, pixels; of CIFAR at most 32", lower_bound=4)
flags.DEFINE_integer("num_train", 0, "train on a fixed stratified subset of so many images; 0 for all", lower_bound=0)
flags.DEFINE_integer("subset_seed", 0, "which subset --num_train takes, >= 0", lower_bound=0)
flags.DEFINE_integer("duplicates", 0, "so many training images, of all classes, stand in the set --copies times", 0)
flags.DEFINE_integer("copies", 1, "how often each of the --duplicates stands in the training set", lower_bound=1)
flags.DEFINE_bool("hflip", None, "mirror images, all_in: find mirrored copies; default: CIFAR's only")
flags.DEFINE_enum("resize", None, RESIZES, "what becomes of images that are not square; default: crop, their centre")
flags.DEFINE_string("heldout", None, "folder of real images not trained on; default: those left by --num_train")
flags.DEFINE_bool("download", False, "fetch CIFAR into --data_root if it is missing; no effect on other data sets")
flags.DEFINE_integer("num_workers", 4, "threads that decode image files, once", lower_bound=0)

# training
flags.DEFINE_float("lr", 2e-4, "Adam's learning rate, > 0")
flags.DEFINE_float("grad_clip", 1.0, "largest norm of the gradient, > 0")
flags.DEFINE_integer("total_steps", 400_000, "main: training steps", lower_bound=1)
flags.DEFINE_integer("warmup", None, "steps of linear warm-up; default: main 5000, main_fed 15 epochs of a shard", 0)
flags.DEFINE_integer("batch_size", 128, "images per step, of all processes in main; also per call when generating", 1)
flags.DEFINE_float("ema_decay", 0.9999, "decay of the EMA weights, in [0, 1)", lower_bound=0.0)
flags.DEFINE_enum("precision", "fp32", PRECISIONS, "fp32; tf32: a GPU's faster float32; bf16; fp16 with a loss scaler")
flags.DEFINE_bool("compile", False, "run the network through torch.compile")
flags.DEFINE_bool("parallel", False, "no effect: several GPUs are used by torchrun, with a process for each")
flags.DEFINE_string("device", None, "torch device such as cpu or cuda:1; default: cuda if there is one, else cpu")
_PLACES = ("device", "cpu")
flags.DEFINE_enum("data_device", "device", _PLACES, "where training images are kept; cpu: if the GPU is too small")
flags.DEFINE_integer("seed", 12, "of everything random: shards, batches, weights, generated images", lower_bound=0)

# what main_fed adds: iterative ensemble training and anti-gradient control
flags.DEFINE_integer("client_num", 10, "main_fed: K, number of shards; 1 is AGC alone", lower_bound=1)
flags.DEFINE_enum("split", None, SPLITS, "main_fed: how images go to shards; default: the data set's in the paper")
flags.DEFINE_enum("duplicates_in", "spread", PLACES, "main_fed: copies go to all shards in turn, or to one")
flags.DEFINE_bool("reshard", False, "main_fed: make new random shards every round")
flags.DEFINE_enum("exchange", "off", ("off", "ring"), "main_fed: ring: MSR of IET-AGC+, shards pass on images")
flags.DEFINE_float("exchange_share", 0.25, "main_fed: share of a shard's images that it passes on", 0.0, 1.0)
flags.DEFINE_integer("exchange_every", 2, "main_fed: every so many rounds an exchange takes the place of an average", 2)
flags.DEFINE_integer("local_epoch", 100, "main_fed: epochs on each shard per round", lower_bound=1)
flags.DEFINE_integer("total_round", 10, "main_fed: rounds, each ends in an average of the shards", lower_bound=1)
flags.DEFINE_enum(
    "anti_grad", "skip", ANTI_GRADS, "main_fed: what to do with memorised samples; off: IET; random: a control"
)
flags.DEFINE_float("anti_grad_weight", 1.0, "main_fed: weight w >= 0 of --anti_grad=ascend", lower_bound=0.0)
flags.DEFINE_integer("bank_bins", 0, "main_fed: entries of the memory bank, at most --T; 0: one for every timestep", 0)
flags.DEFINE_bool("augment_near_threshold", False, "main_fed: TAA of IET-AGC+: augment the nearly memorised")
flags.DEFINE_float("bar", 1.5, "main_fed: nearly memorised is mem_ratio * loss < bar * running mean loss; > 1", 1.0)
flags.DEFINE_float("mem_ratio", 2.0, "main_fed: memorised is mem_ratio * loss < running mean loss; > 0")
flags.DEFINE_float("arr_ema_decay", 0.8, "main_fed: decay d of the memory bank, in [0, 1]", 0.0, 1.0)
flags.DEFINE_string("check_dir", None, "main_fed: checkpoint file that all shards start from")
flags.DEFINE_enum("shard_state", "device", _PLACES, "main_fed: where the state of shards that wait is kept")
flags.DEFINE_integer("mid_T", 500, "no effect: accepted because published commands give it")

# logs and checkpoints
flags.DEFINE_string("logdir", None, "directory of logs and checkpoints; default ./logs/default or ./logs/iet_agc")
flags.DEFINE_bool("fresh", False, "start over instead of continuing the run in --logdir, which must have none")
flags.DEFINE_bool("overwrite", False, "with --fresh: delete the run that is in --logdir")
flags.DEFINE_bool("allow_change", False, "continue a run although a flag that its result depends on has changed")
flags.DEFINE_integer("keep", 2, "newest files kept to continue from (main; main_fed: per shard)", lower_bound=1)
flags.DEFINE_integer("max_bad_steps", 20, "stop after so many steps in a row that are not finite", lower_bound=1)
flags.DEFINE_integer("log_step", 50, "steps between two lines of metrics.jsonl", lower_bound=1)
flags.DEFINE_integer("save_step", 5000, "steps between two checkpoints; 0: at the end (main_fed: of each round)", 0)
flags.DEFINE_integer("save_round", 1, "main_fed: rounds between two checkpoints (the last is always kept)", 1)
flags.DEFINE_integer("sample_step", 1000, "steps between two sample grids; 0: none", lower_bound=0)
flags.DEFINE_integer("sample_size", 64, "images in a sample grid", lower_bound=1)
flags.DEFINE_integer("eval_step", 0, "main: steps between two evaluations during training; 0: none", lower_bound=0)

# evaluation
flags.DEFINE_integer("num_images", 65_536, "images to generate", lower_bound=2)
flags.DEFINE_string("unet_dir", None, "checkpoint or its directory (all_in, main --eval); all_in: several with commas")
flags.DEFINE_bool("use_ema", True, "all_in: evaluate the EMA weights, else the raw ones")
flags.DEFINE_bool("Fed", False, "no effect: whether a checkpoint is of main or main_fed is seen in the file")
flags.DEFINE_string("samples", None, "all_in: measure these images (.npy, .npz or folder) instead of generating")
flags.DEFINE_string("generate_dir", "./results/generate", "all_in: directory of generate.npy")
flags.DEFINE_string("similar_dir", "./results/similar", "all_in: directory of memorization.npz")
flags.DEFINE_string("grid_dir", "./results/grid", "all_in: directory of the grids, result.json and result.txt")
flags.DEFINE_bool("save_png", False, "all_in: also write the generated images as PNG files into --generate_dir")
flags.DEFINE_integer("batch_A", 1024, "all_in: generated images per block of the neighbour search", lower_bound=1)
flags.DEFINE_integer("batch_B", 8192, "all_in: training images per block of the neighbour search", lower_bound=1)
flags.DEFINE_enum(
    "fid_features", "inception", tuple(FRECHET), "inception: FID and IS; pixels: fpd, which needs no weights"
)
flags.DEFINE_enum("fid_reference", "train", ("train", "heldout"), "real images that FID and fpd compare with")
flags.DEFINE_bool("holdout", None, "all_in: measure held-out real images too, the floor of MQ; default: if any")
flags.DEFINE_enum("memorise_features", None, COPIES, "all_in: search for copies in this feature space too")
flags.DEFINE_string("sscd", None, "weights of SSCD, such as sscd_disc_mixup.torchvision.pt")
flags.DEFINE_enum("preprocess", "published", tuple(PREPROCESS), "for SSCD: as published, or as its authors recommend")
flags.DEFINE_bool("allow_torchscript", False, "trust an --sscd that is TorchScript: what it holds is run")
flags.DEFINE_string("clip", None, "folder of CLIP in transformers' format, for the features and CLIP scores")
flags.DEFINE_string("fid_cache", None, ".npz of reference statistics, made if missing; default: in ./results/stats")
flags.DEFINE_bool("fid_use_torch", False, "no effect: feature statistics are always summed on --device")
flags.DEFINE_string("inception_weights", None, "Inception weights file; default: torch hub's cache, else a download")

# what the weights of a network need to make images: a file of exported weights says it
NETWORK_FLAGS = (
    "ch ch_mult attn num_res_blocks num_labels use_labels legacy_labels beta_1 beta_T T mean_type img_size use_ema"
).split()
# what else of a training its evaluation is to know
DATA_FLAGS = "dataset num_train subset_seed duplicates copies hflip resize".split()
PATH_FLAGS = ("data_root", "heldout")
# what a run's result depends on; FIXED: what it has saved depends on it too, so that --allow_change does not allow it
FIXED = {"main": "ch ch_mult attn num_res_blocks norm_groups num_labels use_labels T img_size".split()}
FIXED["main_fed"] = [
    *FIXED["main"],
    *(
        "client_num split reshard exchange exchange_share exchange_every local_epoch batch_size seed dataset num_train "
        "subset_seed duplicates copies duplicates_in bank_bins check_dir"
    ).split(),
]
CHANGEABLE = {
    "main": (
        "dropout label_dropout beta_1 beta_T mean_type dataset num_train subset_seed duplicates copies hflip "
        "resize ambient_t lr grad_clip warmup batch_size ema_decay precision seed"
    ).split()
}
CHANGEABLE["main_fed"] = [
    *CHANGEABLE["main"],
    *"anti_grad anti_grad_weight mem_ratio arr_ema_decay augment_near_threshold bar".split(),
]
ONCE = ("fresh", "overwrite", "allow_change")  # of one command only, not of the run

for _names, _test, _range in (
    (("lr", "grad_clip", "mem_ratio"), lambda value: value > 0, "> 0"),
    (("beta_1", "beta_T"), lambda value: 0 < value < 1, "in (0, 1)"),
    (("dropout", "label_dropout", "ema_decay"), lambda value: value < 1, "in [0, 1)"),
    (("stages",), lambda value: set(value) <= set(STAGES), f"some of {','.join(STAGES)}"),
):
    for _name in _names:
        flags.register_validator(_name, _test, message=f"must be {_range}")


def parse(values, argv):
    """Parse a command line, its program first, into absl's `values`; returns what is no flag.

    --flagfile is read here, since absl adds up lists. What comes later wins, of flags that repeat as a whole: those in
    a flagfile, or after it, replace those before it.

    Raises:
        UsageError, flags.Error: what cannot be parsed.
    """
    positional, lists = [], {name for name in values if isinstance(values[name], flags.MultiFlag)}
    for words in parts(argv[1:]):
        for name in lists & {word.lstrip("-").partition("=")[0] for word in words if word.startswith("-")}:
            values[name].present = 0  # absl adds to a list that is present
        positional += values([argv[0], *words])[1:]
    for name in values:
        if str(values[name].value).startswith("~"):  # an unknown user's ~ stays, as in a shell
            values[name].value = os.path.expanduser(values[name].value)  # noqa: PTH111
    return positional


def parts(words, opened=()):
    """The words of a command line up to a flagfile, those of the flagfile, and so on; `opened`: flagfiles around it."""
    part, words = [], iter(words)
    for word in words:
        name, equals, value = word.partition("=")
        if name in ("-flagfile", "--flagfile"):
            path = Path(os.path.expanduser(value if equals else next(words, "")))  # noqa: PTH111
            if path.resolve() in opened:
                raise UsageError(f"--flagfile={path}: it includes itself: remove that line from {opened[-1]}")
            yield part
            yield from parts(read_flagfile(path), (*opened, path.resolve()))
            part = []
        else:
            part.append(word)
    yield part


def read_flagfile(path):
    """The lines of a flagfile in UTF-8, without blank ones and comments."""
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").split("\n")]
    except (OSError, ValueError) as error:
        what = one_line(error)
        raise UsageError(f"--flagfile={path}: not a text file ({what}): write a flag a line, in UTF-8") from error
    return [line for line in lines if line and not line.startswith(("#", "//"))]


def recorded_flags(logdir):
    """{name: text} of the flags in the flagfile of a log directory, none where it has no flagfile."""
    path = logdir / "flagfile.txt"
    lines = read_flagfile(path) if path.is_file() else []
    return dict(line.removeprefix("--").split("=", 1) for line in lines if "=" in line)


def check(values):
    """Raise a UsageError where two flags contradict each other; `values` is absl's FLAGS."""
    norm_groups(values)
    levels = len(values.ch_mult)
    for level in values.attn:
        if level >= levels:
            default = "" if values["attn"].present else " (the default)"
            there = f"{levels} levels, 0 to {levels - 1}" if levels > 1 else "one, level 0: give --attn=0"
            raise UsageError(f"--attn={level}{default}: there is no level {level}: --ch_mult makes {there}")
    if values.img_size % 2 ** (levels - 1):
        raise UsageError(
            f"--img_size={values.img_size}: {levels} levels of --ch_mult need a multiple of {2 ** (levels - 1)}"
        )
    if values.beta_1 > values.beta_T:
        raise UsageError(f"--beta_1={values.beta_1} is above --beta_T={values.beta_T}: swap or correct them")
    most_steps = {"ddim": values.T, "dpmpp": values.T - 1}.get(values.sampler)
    if most_steps is not None and values.sample_steps > most_steps:
        raise UsageError(f"--sample_steps={values.sample_steps}: with --T={values.T} at most {most_steps}")
    if values.use_labels and values.num_labels is None:
        raise UsageError("--use_labels needs --num_labels: give the number of classes")
    for name in ("bank_bins", "ambient_t"):
        if values[name].value >= values.T + (name == "bank_bins"):
            raise UsageError(f"--{name}={values[name].value}: too large for --T={values.T}")
    if values.augment_near_threshold and (values.anti_grad != "skip" or values.bar == 1):
        raise UsageError("--augment_near_threshold needs --anti_grad=skip and a --bar above 1")
    if values.exchange != "off" and (values.client_num == 1 or values.split == "all" or values.reshard):
        raise UsageError(f"--exchange={values.exchange} needs several shards, and neither --split=all nor --reshard")
    if values.reshard and (values.split not in (None, "random") or values.client_num == 1):
        raise UsageError("--reshard makes random shards: give more than one --client_num, and no other --split")
    if values.overwrite and not values.fresh:
        raise UsageError("--overwrite does nothing without --fresh: add it, or leave both out to continue the run")
    for name in ("label_dropout", "guidance", "legacy_labels"):
        if values[name].value and not values.use_labels:
            raise UsageError(f"--{name}={values[name].value} needs --use_labels and --num_labels")
    if values.legacy_labels and values.guidance:
        raise UsageError("--guidance needs a null class, which checkpoints for --legacy_labels do not have")


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


def check_data(values, data):
    """Raise a UsageError where the flags do not fit the data set that they name."""
    if values.use_labels and values.num_labels < data.num_classes:
        raise UsageError(
            f"--num_labels={values.num_labels}: {values.dataset} has {data.num_classes} classes, give them"
        )
    if values.use_labels and values.heldout and (data.heldout.labels < 0).any():
        names = ", ".join(data.class_names or ["0"])
        raise UsageError(f"--heldout={values.heldout}: with --use_labels its sub-folders must be classes: {names}")
    reference_images(values, data)


def reference_images(values, data):
    """The real images (N, 3, H, W) that `--fid_reference` names."""
    return data.train.images if values.fid_reference == "train" else heldout_images(values, data, "fid_reference")


def holdout_images(values, data):
    """The real images (N, 3, H, W) that `--holdout` measures, or None."""
    is_wanted = values.holdout or (values.holdout is None and data.heldout)
    return heldout_images(values, data, "holdout") if is_wanted else None


def heldout_images(values, data, flag):
    """The images that are held out, which `flag` asks for; raises a UsageError if there are none."""
    if data.heldout is None:
        what = "name a folder of some with --heldout, or leave some out with --num_train"
        raise UsageError(f"--{flag}: no image of {values.dataset} is held out: {what}")
    return data.heldout.images


def norm_groups(values, checkpoint=None, path=None):
    """G of every GroupNorm: what a checkpoint says, else the flag, else min(32, ch // 4) as Karras et al. 2022 (EDM).

    Args:
        checkpoint: the dict of a checkpoint, or None where a training starts from random weights. One that records no
            number is published, with 32.
        path: of the checkpoint.

    Raises:
        UsageError: the flag contradicts the checkpoint, or --ch is no multiple of G.
    """
    groups, of = values.norm_groups or min(32, values.ch // 4), ""
    if checkpoint is not None:
        groups, of = checkpoint.get("norm_groups", 32), f" of {path}"
        if values.norm_groups not in (0, groups):
            raise UsageError(
                f"--norm_groups={values.norm_groups}: {path} was trained with {groups}, leave the flag out"
            )
    if values.ch % groups:
        raise UsageError(f"--ch={values.ch}: must be a multiple of the {groups} groups of a GroupNorm{of}")
    return groups


def arguments(values, function, first=1, **own):
    """The keyword arguments of a function that are flags of the same names, and those in `own`, which come first.

    first: so many of its parameters are passed over, which the caller gives by their place.
    """
    names = list(inspect.signature(function).parameters)[first:]
    return {name: getattr(values, name) for name in names if hasattr(values, name)} | own


def call(values, function, *args, **own):
    """Call a function with args, and with `arguments` for its other parameters."""
    return function(*args, **arguments(values, function, len(args), **own))


def data_device(values, device):
    """Where the training images are kept, `device` being where they are trained on."""
    return "cpu" if values.data_device == "cpu" else device


def split_of(values):
    """How images go to shards: the flag, else as the paper's experiments do."""
    return "random" if values.reshard else values.split or DEFAULT_SPLIT.get(values.dataset, "stratified")


def labels_of(values):
    """Number of classes of a conditional network, else None."""
    return values.num_labels if values.use_labels else None


def classes_of(values, data):
    """The classes that training images have, ascending, of a conditional network; None where these are all."""
    classes = data.train.labels.unique().tolist()
    return classes if values.use_labels and len(classes) < values.num_labels else None


def unet(values, checkpoint=None, path=None):
    """The `UNet` of the flags, with the groups that `norm_groups` finds."""
    groups = norm_groups(values, checkpoint, path)
    return call(values, UNet, groups=groups, num_labels=labels_of(values))


def agc(values, T):
    """The `AntiGradientControl` of the flags, for T timesteps."""
    bar = values.bar if values.augment_near_threshold else 1.0
    control = (values.mem_ratio, values.arr_ema_decay, values.anti_grad, values.anti_grad_weight)
    return AntiGradientControl(T, *control, values.bank_bins, bar)


def sampler(values):
    """Keyword arguments of `GaussianDiffusionSampler`, the network aside."""
    return arguments(values, GaussianDiffusionSampler, steps=values.sample_steps)


def generation(values, data):
    """Keyword arguments of `generate` and `generate_batches`, the sampler aside."""
    of_classes = {"num_labels": labels_of(values), "classes": classes_of(values, data)}
    return arguments(values, generate_batches, **of_classes, dtype=PRECISIONS[values.precision])


def sample_grid(values, data, device):
    """The `grid_noise` of a training on the data."""
    return call(values, grid_noise, device, num_labels=labels_of(values), classes=classes_of(values, data))


def embedding(values, features, device, flag):
    """The `FeatureSpace` of copies that `flag` names; a UsageError if the flag of its file is missing."""
    if features in ("sscd", "clip") and not values[features].value:
        raise UsageError(f"give --{features}, the file of its weights, or --{flag}=pixels, which needs none")
    inception = find_weights(values.inception_weights) if features == "inception" else None
    sscd = {"sscd": values.sscd, "how": values.preprocess, "torchscript": values.allow_torchscript}
    return feature_space(features, device, **sscd, inception=inception, clip=values.clip)


def logdir(values, script, data, groups):
    """Keyword arguments of `training.checkpoint.LogDirectory`, the path aside.

    Args:
        script: main or main_fed.
        data: the `dataset.Dataset` trained on.
        groups: of the UNet's GroupNorms.
    """
    fixed = {"script", *FIXED[script]}
    settings = {"script": script} | {name: values[name].value for name in FIXED[script] + CHANGEABLE[script]}
    settings |= {"norm_groups": groups, "training images (sha256)": fingerprint(data.train.images)}
    if script == "main_fed" or values.use_labels:
        settings["classes (sha256)"] = fingerprint(data.train.labels.view(torch.uint8))
    settings |= {"hflip": data.hflip, "resize": values.resize or "crop"}
    if script == "main_fed":
        settings["split"] = split_of(values)
        fixed |= {"training images (sha256)", "classes (sha256)"}
    once = {name: values[name].value for name in ONCE}
    return {"settings": settings, "fixed": fixed, "flagfile": as_flagfile(values), "subset": data.subset, **once}


def as_dict(values):
    """The values of all flags defined here, for result files."""
    return {flag.name: flag.value for flag in values.get_key_flags_for_module(__name__)}


def as_flagfile(values):
    """The same as the text of a file for `--flagfile`, without what is meant for one command only."""
    flags_here = values.get_key_flags_for_module(__name__)
    return "".join(f"{text}\n" for flag in flags_here if flag.name not in ONCE and (text := flag.serialize()))

"""What flags there are: names, ranges, help; rules between them; how command lines are read and kept.

A group is a tuple of definitions. Each half of the project registers the groups that it has. Rules stand
below the groups that they are about. `training.build` makes objects of the flags.
"""

import os
from collections import namedtuple
from pathlib import Path

from absl import flags

from dataset import DATASETS
from diffusion import MEAN_TYPES, SAMPLERS, VAR_TYPES
from score.features import COPIES, FRECHET, PREPROCESS
from training.agc import ANTI_GRADS
from training.learner import PRECISIONS
from training.shards import PLACES, SPLITS
from utils.errors import UsageError, one_line
from utils.images import RESIZES

STAGES = ("generate", "score", "memorise", "gap", "grid", "report")
DEVICES = ("device", "cpu")  # where something is kept

# ---- how flags are defined

# define: absl's function; arguments: its keyword arguments; valid: a test of a value, its words, or None
Definition = namedtuple("Definition", "define name arguments valid")
POSITIVE = (lambda value: value > 0, "> 0")
SHARE = (lambda value: 0 < value < 1, "in (0, 1)")
BELOW_ONE = (lambda value: value < 1, "in [0, 1)")


def defined(define, name, default, help, valid=None, **settings):
    return Definition(define, name, {"default": default, "help": help, **settings}, valid)


def integer(name, default, help, least=None):
    define = flags.DEFINE_multi_integer if isinstance(default, list) else flags.DEFINE_integer
    return defined(define, name, default, help, lower_bound=least)


def number(name, default, help, least=None, most=None, valid=None):
    return defined(flags.DEFINE_float, name, default, help, valid, lower_bound=least, upper_bound=most)


def switch(name, default, help):
    return defined(flags.DEFINE_bool, name, default, help)


def text(name, default, help):
    return defined(flags.DEFINE_string, name, default, help)


def choice(name, default, choices, help):
    return defined(flags.DEFINE_enum, name, default, help, enum_values=choices)


def adapted(group, defaults=(), helps=()):
    """A group in which some flags have other defaults or help texts, {name: value} each."""
    changes = [("default", dict(defaults)), ("help", dict(helps))]
    own = {d.name: {what: of[d.name] for what, of in changes if d.name in of} for d in group}
    return tuple(d._replace(arguments=d.arguments | own[d.name]) for d in group)


def register(values, groups):
    """Define the flags of some groups in absl's `values`."""
    for definition in (definition for group in groups for definition in group):
        definition.define(definition.name, flag_values=values, **definition.arguments)
        if definition.valid:
            test, words = definition.valid
            flags.register_validator(definition.name, test, f"must be {words}", flag_values=values)


RULES = []


def rule(*names):
    """Register a function of absl's values that raises a UsageError where these flags disagree."""
    return lambda function: RULES.append((names, function)) or function


def check(values, waiting=()):
    """Check that flags do not contradict each other; rules about flags not there do not count.

    waiting: flags that are still to be taken from a training; rules about them do not count either.

    Raises:
        UsageError: they do."""
    for names, function in RULES:
        if all(name in values for name in names) and not set(names) & set(waiting):
            function(values)


# ---- the groups

TRAIN = (switch("train", False, "train (main, main_fed)"),)

TASKS = (
    switch("eval", False, "main: FID and IS of the raw and the EMA weights of a checkpoint"),
    defined(
        flags.DEFINE_list, "stages", [stage for stage in STAGES if stage != "gap"],
        f"all_in: what to do, in this order, of {','.join(STAGES)}; "
        "gap compares losses of training and held-out images",
        (lambda value: set(value) <= set(STAGES), f"some of {','.join(STAGES)}"),
    ),
)  # fmt: skip

NETWORK = (
    integer("ch", 128, "base width of the UNet, a multiple of the groups", 4),
    integer("ch_mult", [1, 2, 2, 2], "width of each level as a multiple of --ch", 1),
    integer("attn", [1], "levels with self-attention, 0-based", 0),
    integer("num_res_blocks", 2, "residual blocks per level, >= 1", 1),
    integer("norm_groups", 0, "groups of a GroupNorm; 0: the checkpoint's, or else min(32, ch // 4)", 0),
    number("dropout", 0.1, "dropout probability, in [0, 1)", 0.0, valid=BELOW_ONE),
    integer("num_labels", None, "number of classes of a conditional UNet, >= 1", 1),
    switch("use_labels", False, "condition on the class; needs --num_labels"),
    number("label_dropout", 0.0, "probability in [0, 1) of training without the class", 0.0, valid=BELOW_ONE),
    switch("legacy_labels", False, "all_in: row c for class c, for published conditional checkpoints"),
)


@rule("norm_groups", "ch")
def norm_groups(values, checkpoint=None, path=None):
    """G of every GroupNorm: a checkpoint's, else the flag, else min(32, ch // 4) as Karras et al. 2022.

    checkpoint: its dict, or None where a training starts from random weights; one that records no number
    is published, with 32. path: of the checkpoint.

    Raises:
        UsageError: the flag contradicts the checkpoint, or --ch is no multiple of G.
    """
    groups, of = values.norm_groups or min(32, values.ch // 4), ""
    if checkpoint is not None:
        groups, of = checkpoint.get("norm_groups", 32), f" of {path}"
        if values.norm_groups not in (0, groups):
            what = f"{path} was trained with {groups}, leave the flag out"
            raise UsageError(f"--norm_groups={values.norm_groups}: {what}")
    if values.ch % groups:
        raise UsageError(f"--ch={values.ch}: must be a multiple of the {groups} groups of a GroupNorm{of}")
    return groups


@rule("ch_mult", "attn", "img_size")
def levels(values):
    if "duplicates_dir" in values or ("samples" in values and values.samples and not values.unet_dir):
        return  # there is no network
    number = len(values.ch_mult)
    for level in values.attn:
        if level >= number:
            default = "" if values["attn"].present else " (the default)"
            made = f"{number} levels, 0 to {number - 1}" if number > 1 else "one, level 0: give --attn=0"
            what = f"there is no level {level}: --ch_mult makes {made}"
            raise UsageError(f"--attn={level}{default}: {what}")
    if values.img_size % 2 ** (number - 1):
        what = f"{number} levels of --ch_mult need a multiple of {2 ** (number - 1)}"
        raise UsageError(f"--img_size={values.img_size}: {what}")


DIFFUSION = (
    number("beta_1", 1e-4, "first variance of the linear schedule, in (0, 1)", valid=SHARE),
    number("beta_T", 0.02, "last variance of the linear schedule, in (0, 1)", valid=SHARE),
    integer("T", 1000, "number of timesteps, >= 2", 2),
    choice("mean_type", "epsilon", MEAN_TYPES, "what the network predicts"),
    integer("ambient_t", 0, "from this t on learn from noisy images only (ambient diffusion); 0: never", 0),
    choice("var_type", "fixedlarge", VAR_TYPES, "variance of the ancestral step (--sampler=ddpm)"),
    choice("sampler", "ddim", SAMPLERS, "how images are generated"),
    integer("sample_steps", 50, "network calls per image: 1 to T of ddim, 1 to T - 1 of dpmpp (20 do)", 1),
    number("eta", 0.0, "noise of --sampler=ddim, 0 (none) to 1 (as DDPM)", 0.0, 1.0),
    number("guidance", 0.0, "weight w >= 0 of classifier-free guidance, 0 for none", 0.0),
)


@rule("beta_1", "beta_T")
def betas_rise(values):
    if values.beta_1 > values.beta_T:
        raise UsageError(f"--beta_1={values.beta_1} is above --beta_T={values.beta_T}: swap or correct them")


@rule("sample_steps", "sampler", "T")
def steps_of_sampler(values):
    most = {"ddim": values.T, "dpmpp": values.T - 1}.get(values.sampler)
    if most is not None and values.sample_steps > most:
        raise UsageError(f"--sample_steps={values.sample_steps}: with --T={values.T} at most {most}")


@rule("train", "use_labels", "num_labels", "label_dropout", "guidance", "legacy_labels")
def classes(values):
    if values.use_labels and values.num_labels is None:
        raise UsageError("--use_labels needs --num_labels: give the number of classes")
    for name in ("label_dropout", "guidance", "legacy_labels"):
        if values[name].value and not values.use_labels:
            raise UsageError(f"--{name}={values[name].value} needs --use_labels and --num_labels")
    if values.train and values.guidance and not values.label_dropout:
        what = "needs --label_dropout, by which the null class is learned: give both"
        raise UsageError(f"--guidance with --train {what}")
    if values.legacy_labels and values.guidance:
        raise UsageError("--guidance needs a null class, which checkpoints for --legacy_labels do not have")


LISTS = (
    text("keep_list", None, "train on the images named in this file only, a name a line, such as a keep.txt"),
    text("groups", None, "table of training images that are alike, such as a groups.csv"),
    switch("balance_groups", False, "draw each of --groups as often as a single image, a random member"),
)

DATA = (
    choice("dataset", "cifar10", DATASETS, "training images; digits and mnist5k need no files"),
    text("data_root", "./data", "directory of the data sets; with --dataset=folder, the folder itself"),
    integer("img_size", 32, "height and width of the images, pixels; of CIFAR at most 32", 4),
    integer("num_train", 0, "train on a fixed stratified subset of so many images; 0 for all", 0),
    integer("subset_seed", 0, "which subset --num_train takes, >= 0", 0),
    integer("duplicates", 0, "so many training images, of all classes, stand in the set --copies times", 0),
    integer("copies", 1, "how often each of the --duplicates stands in the training set", 1),
    switch("alter_copies", False, "copies differ: moved by a pixel, brighter or darker, with noise"),
    switch("hflip", None, "mirror images, all_in: find mirrored copies; default: CIFAR's only"),
    choice("resize", None, RESIZES, "what becomes of images that are not square; default: crop, their centre"),
    *LISTS,
    text("heldout", None, "folder of real images not trained on; default: those left by --num_train"),
    switch("download", False, "fetch CIFAR into --data_root if it is missing; no effect on other data sets"),
    integer("num_workers", 4, "threads that decode image files, once", 0),
)

OPTIMISATION = (
    number("lr", 2e-4, "Adam's learning rate, > 0", valid=POSITIVE),
    number("grad_clip", 1.0, "largest norm of the gradient, > 0", valid=POSITIVE),
    integer("warmup", None, "steps of linear warm-up; default: main 5000, main_fed 15 epochs of a shard", 0),
    integer("batch_size", 128, "images per step, of all processes in main; also per call when generating", 1),
    number("ema_decay", 0.9999, "decay of the EMA weights, in [0, 1)", 0.0, valid=BELOW_ONE),
    choice("precision", "fp32", PRECISIONS, "fp32; tf32: a GPU's faster float32; bf16; fp16 with a loss scaler"),
    switch("compile", False, "run the network through torch.compile"),
    text("device", None, "torch device such as cpu or cuda:1; default: cuda if there is one, else cpu"),
    integer("seed", 12, "of everything random: shards, batches, weights, generated images", 0),
)

MAIN = (
    integer("total_steps", 400_000, "main: training steps", 1),
    integer("eval_step", 0, "main: steps between two evaluations during training; 0: none", 0),
    switch("parallel", False, "no effect: several GPUs are used by torchrun, with a process for each"),
    choice("data_device", "device", DEVICES, "where training images are kept; cpu: if the GPU is too small"),
)

SHARDS = (
    integer("client_num", 10, "main_fed: K, number of shards; 1 is AGC alone", 1),
    choice("split", None, SPLITS, "main_fed: how images go to shards; default: stratified, or the paper's"),
    switch("reshard", False, "main_fed: make new random shards every round"),
    choice("exchange", "off", ("off", "ring"), "main_fed: ring: IET-AGC+'s MSR, not after the last round"),
    number("exchange_share", 0.25, "main_fed: share of a shard's images that it passes on", 0.0, 1.0),
    integer("exchange_every", 2, "main_fed: every so many rounds an exchange takes the place of an average", 2),
    integer("total_round", 10, "main_fed: rounds, each ends in an average of the shards, or an exchange", 1),
    choice("shard_state", "device", DEVICES, "main_fed: where the state of shards that wait is kept"),
)


@rule("exchange", "reshard", "client_num", "split")
def partitions(values):
    if values.exchange != "off" and (values.client_num == 1 or values.split == "all" or values.reshard):
        what = "needs several shards, and neither --split=all nor --reshard"
        raise UsageError(f"--exchange={values.exchange} {what}")
    if values.reshard and (values.split not in (None, "random", "together") or values.client_num == 1):
        what = "give more than one --client_num, and no --split but random and together"
        raise UsageError(f"--reshard makes random shards: {what}")


@rule("groups", "balance_groups", "split", "exchange")
def groups_stay_whole(values):
    if values.balance_groups and values.split not in (None, "together"):
        what = f"--split={values.split} may part a group, which is then drawn in several shards"
        raise UsageError(f"--balance_groups: {what}: give --split=together, or leave it out")
    flag = "--balance_groups" if values.balance_groups else "--split=together"
    if values.balance_groups or values.split == "together":
        if not values.groups:
            raise UsageError(f"{flag} needs --groups: name the table of images that are alike")
        if values.exchange != "off":
            raise UsageError(f"--exchange={values.exchange} parts groups: leave it or {flag} out")


CONTROL = (
    choice("anti_grad", "skip", ANTI_GRADS, "main_fed: what to do with memorised samples; off: IET; random: a control"),
    number("anti_grad_weight", 1.0, "main_fed: weight w >= 0 of --anti_grad=ascend", 0.0),
    integer("bank_bins", 0, "main_fed: entries of the memory bank, at most --T; 0: one for every timestep", 0),
    switch("augment_near_threshold", False, "main_fed: TAA of IET-AGC+: augment the nearly memorised"),
    number("bar", 1.5, "main_fed: nearly memorised is mem_ratio * loss < bar * running mean loss; > 1", 1.0),
    number("mem_ratio", 2.0, "main_fed: memorised is mem_ratio * loss < running mean loss; > 0", valid=POSITIVE),
    number("arr_ema_decay", 0.8, "main_fed: decay d of the memory bank, in [0, 1]", 0.0, 1.0),
)


@rule("augment_near_threshold", "anti_grad", "bar")
def near_threshold(values):
    if values.augment_near_threshold and (values.anti_grad != "skip" or values.bar == 1):
        raise UsageError("--augment_near_threshold needs --anti_grad=skip and a --bar above 1")


@rule("bank_bins", "ambient_t", "T")
def timesteps(values):
    for name in ("bank_bins", "ambient_t"):
        if values[name].value >= values.T + (name == "bank_bins"):
            raise UsageError(f"--{name}={values[name].value}: too large for --T={values.T}")


MAIN_FED = (
    choice("duplicates_in", "spread", PLACES, "main_fed: copies go to all shards in turn, or to one"),
    integer("local_epoch", 100, "main_fed: epochs on each shard per round", 1),
    text("check_dir", None, "main_fed: checkpoint file that all shards start from"),
    integer("mid_T", 500, "no effect: accepted because published commands give it"),
)


@rule("split", "balance_groups", "duplicates_in")
def copies_of_groups(values):
    if (values.split == "together" or values.balance_groups) and values.duplicates_in != "spread":
        what = "--groups says already what stays together: leave it out"
        raise UsageError(f"--duplicates_in={values.duplicates_in}: {what}")


LOGS = (
    text("logdir", None, "directory of logs and checkpoints; default ./logs/default or ./logs/iet_agc"),
    switch("fresh", False, "start over instead of continuing the run in --logdir, which must have none"),
    switch("overwrite", False, "with --fresh: delete the run that is in --logdir"),
    switch("allow_change", False, "continue a run although a flag that its result depends on has changed"),
    integer("keep", 2, "newest files kept to continue from (main; main_fed: per shard)", 1),
    integer("max_bad_steps", 20, "stop after so many steps in a row that are not finite", 1),
    integer("log_step", 50, "steps between two lines of metrics.jsonl", 1),
    integer("save_step", 5000, "steps between two checkpoints; 0: at the end (main_fed: of each round)", 0),
    integer("save_round", 1, "main_fed: rounds between two checkpoints (the last is always kept)", 1),
    integer("sample_step", 1000, "steps between two sample grids; 0: none", 0),
    integer("sample_size", 64, "images in a sample grid", 1),
)


WATCH = (
    integer("watch_step", 0, "steps (main_fed: of all shards, at ends of rounds) between two measurements; 0: none", 0),
    integer("watch_images", 512, "images that a measurement generates, always from the same noise", 2),
    switch("stop_when_copying", False, "end after two in a row with MQ@30 five points above its floor"),
    switch("best", False, "all_in: the checkpoint that best.json in --unet_dir, a log directory, names"),
)


@rule("watch_step", "stop_when_copying")
def something_is_watched(values):
    if values.stop_when_copying and not values.watch_step:
        raise UsageError("--stop_when_copying needs --watch_step: the steps between two measurements")


@rule("fresh", "overwrite")
def overwrites(values):
    if values.overwrite and not values.fresh:
        what = "add it, or leave both out to continue the run"
        raise UsageError(f"--overwrite does nothing without --fresh: {what}")


SCORES = (
    integer("num_images", 65_536, "images to generate", 2),
    text("samples", None, "all_in: measure these images (.npy, .npz or folder) instead of generating"),
    text("generate_dir", "./results/generate", "all_in: directory of generate.npy"),
    text("similar_dir", "./results/similar", "all_in: directory of memorization.npz"),
    text("grid_dir", "./results/grid", "all_in: directory of the grids, result.json and result.txt"),
    switch("save_png", False, "all_in: also write the generated images as PNG files into --generate_dir"),
    choice("fid_features", "inception", tuple(FRECHET), "inception: FID and IS; pixels: fpd, which needs no weights"),
    text("sscd", None, "weights of SSCD, such as sscd_disc_mixup.torchvision.pt"),
    choice("preprocess", "published", tuple(PREPROCESS), "for SSCD: as published, or as its authors recommend"),
    switch("allow_torchscript", False, "trust an --sscd that is TorchScript: what it holds is run"),
    text("clip", None, "folder of CLIP in transformers' format, for the features and CLIP scores"),
    text("fid_cache", None, ".npz of reference statistics, made if missing; default: in ./results/stats"),
    text("inception_weights", None, "Inception weights file; default: torch hub's cache, else a download"),
)

CHECKPOINTS = (
    text("unet_dir", None, "checkpoint or its directory (all_in, main --eval); all_in: several with commas"),
    switch("use_ema", True, "all_in: evaluate the EMA weights, else the raw ones"),
    switch("Fed", False, "no effect: whether a checkpoint is of main or main_fed is seen in the file"),
    number("reject_below", None, "all_in: make images with a ratio below so many % again, such as 30", 1.0, 100.0),
    integer("batch_A", 1024, "all_in: generated images per block of the neighbour search", 1),
    integer("batch_B", 8192, "all_in: training images per block of the neighbour search", 1),
    choice("fid_reference", "train", ("train", "heldout"), "real images that FID and fpd compare with"),
    switch("holdout", None, "all_in: measure held-out real images too, the floor of MQ; default: if any"),
    choice("memorise_features", None, COPIES, "all_in: search for copies in this feature space too"),
    switch("fid_use_torch", False, "no effect: feature statistics are always summed on --device"),
)


@rule("reject_below", "samples")
def rejects_what_it_makes(values):
    if values.samples and values.reject_below is not None:
        raise UsageError("--reject_below makes images again, not those of --samples: leave it out")


# main.py, main_fed.py and all_in.py accept all of them, so that they share flagfiles; by the headings of
# docs/FLAGS.md
GROUPS = {
    "what to do": (*TRAIN, *TASKS),
    "UNet": NETWORK,
    "diffusion and sampling": DIFFUSION,
    "data": DATA,
    "training": (*OPTIMISATION, *MAIN),
    "what main_fed adds: iterative ensemble training and anti-gradient control": (*SHARDS, *CONTROL, *MAIN_FED),
    "logs and checkpoints": (*LOGS, *WATCH),
    "evaluation": (*SCORES, *CHECKPOINTS),
}


def define(values):
    """Define the flags of main.py, main_fed.py and all_in.py in absl's `values`."""
    register(values, GROUPS.values())


# ---- what a result depends on

# what the weights of a network need to make images: a file of exported weights says it
NETWORK_FLAGS = (
    "ch ch_mult attn num_res_blocks num_labels use_labels legacy_labels "
    "beta_1 beta_T T mean_type img_size use_ema"
).split()  # fmt: skip
# what else of a training its evaluation is to know
DATA_FLAGS = "dataset num_train subset_seed duplicates copies alter_copies hflip resize".split()
PATH_FLAGS = ("data_root", "heldout", "keep_list", "groups")
# what a result depends on: a run goes on with the same, or, ON_REQUEST, with what --allow_change allows; what has
# been saved depends on FIXED too
FIXED = {"main": "ch ch_mult attn num_res_blocks norm_groups num_labels use_labels T img_size".split()}
FIXED["main_fed"] = FIXED["main"] + (
    "client_num split reshard exchange exchange_share exchange_every local_epoch batch_size seed "
    "dataset num_train subset_seed duplicates copies duplicates_in alter_copies balance_groups "
    "bank_bins check_dir"
).split()  # fmt: skip
ON_REQUEST = {}
ON_REQUEST["main"] = (
    "dropout label_dropout beta_1 beta_T mean_type dataset num_train subset_seed duplicates copies "
    "alter_copies balance_groups hflip resize ambient_t lr grad_clip warmup batch_size ema_decay "
    "precision seed"
).split()  # fmt: skip
ON_REQUEST["main_fed"] = ON_REQUEST["main"] + (
    "anti_grad anti_grad_weight mem_ratio arr_ema_decay augment_near_threshold bar"
).split()  # fmt: skip
ONCE = ("fresh", "overwrite", "allow_change")  # of one command only, not of the run


# ---- command lines and flagfiles


def parse(values, argv):
    """Parse a command line, its program first, into absl's `values`; returns what is no flag.

    --flagfile is read here, since absl adds up lists. What comes later wins, repeated flags as a whole:
    those in a flagfile, or after it, replace those before it.

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
    """The words of a command line up to a flagfile, of it, and so on; opened: flagfiles around it."""
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
        what = f"not a text file ({one_line(error)}): write a flag a line, in UTF-8"
        raise UsageError(f"--flagfile={path}: {what}") from error
    return [line for line in lines if line and not line.startswith(("#", "//"))]


def as_dict(values):
    """The values of all flags that were registered here, for result files."""
    return {flag.name: flag.value for flag in values.get_key_flags_for_module(__name__)}


def as_flagfile(values):
    """The same as the text of a file for `--flagfile`, without what is meant for one command only."""
    kept = [flag for flag in values.get_key_flags_for_module(__name__) if flag.name not in ONCE]
    return "".join(f"{text}\n" for flag in kept if (text := flag.serialize()))

"""The flags of the text-conditioned half: its own, and those of training/flags.py that it shares, some with another
default. --help, flagfile.txt and result files show these and no others.
"""

import math
from pathlib import Path

import torch
from absl import flags

from score.features import COPIES
from text_to_image.data import CAPTION_MODES, DUPLICATIONS, RAND_AUGS
from text_to_image.pipeline import FROZEN, LATENT_SIDE, check_steps, content_hash, settings_of
from training import flags as shared
from training.flags import agc, as_dict, as_flagfile, call, embedding, recorded_flags  # noqa: F401 - some for scripts
from utils import distributed
from utils.errors import UsageError
from utils.images import fingerprint

FLAGS = flags.FLAGS
NOT_HERE = (
    "eval", "ch", "ch_mult", "attn", "num_res_blocks", "norm_groups", "dropout", "num_labels", "use_labels",
    "label_dropout", "legacy_labels", "beta_1", "beta_T", "T", "mean_type", "var_type", "sampler", "eta", "dataset",
    "img_size", "num_train", "subset_seed", "duplicates", "copies", "duplicates_in", "ambient_t", "total_steps",
    "parallel", "data_device", "local_epoch", "check_dir", "mid_T", "eval_step", "unet_dir", "Fed",
    "fid_use_torch", "holdout", "fid_reference", "stages", "use_ema", "batch_A", "batch_B", "memorise_features",
    "resize",
)  # fmt: skip
DEFAULTS = {
    "client_num": 4, "total_round": 25, "save_round": 5, "mem_ratio": 1.25, "lr": 2.5e-6, "warmup": 5000,
    "batch_size": 8, "ema_decay": 0.0, "hflip": True, "logdir": "logs/text", "num_images": 4000,
    "guidance": 7.5, "sample_size": 4, "sample_step": 2000,
    "use_labels": True, "num_labels": 1,  # what training.flags.check wants for --guidance
    "T": 10**9,  # and for steps and bins, whose number is the scheduler's: see check_pipeline
}  # fmt: skip
for _name, _value in DEFAULTS.items():
    FLAGS.set_default(_name, _value)
FLAGS["download"].help = "fetch --pretrained from the Hugging Face hub if it is not there"
FLAGS["data_root"].help = "folder of the training images, or of its classes' sub-folders"
FLAGS["hflip"].help = "mirror training images at random"
FLAGS["split"].help += "; here contiguous"
FLAGS["logdir"].help = "directory of logs and checkpoints"
FLAGS["warmup"].help = "steps of linear warm-up"
FLAGS["sample_steps"].help = "steps of the scheduler per image"
FLAGS["batch_size"].help = "images per step; also per call when generating"
FLAGS["bank_bins"].help = "entries of the memory bank; 0: one for every timestep"
FLAGS["sample_step"].help = "steps between two grids of images of the first captions; 0: none"
FLAGS["num_images"].help = "images to generate; with --prompts=all or a file: default: one of each"
FLAGS["fid_features"].help += "; where it is not given: pixels with --features=pixels, else inception"
FLAGS["samples"].help = "all_in: measure these images (.npy, .npz or folder), image i of prompt i; do not generate"
FLAGS["similar_dir"].help = "all_in: directory of similarity.npz"
FLAGS["grid_dir"].help = "all_in: directory of the grids, result.json and report.html"
FLAGS["heldout"].help = "all_in: folder of real images that were not trained on, for floors and FID"
FLAGS["guidance"].help = "diffusers' guidance_scale; up to 1: none"
FLAGS["ema_decay"].help = "decay of the EMA weights, in [0, 1); 0: none"

# the pipeline
flags.DEFINE_string(
    "pretrained", None, "folder of Stable Diffusion 1.x or 2.x in diffusers' format, or its name in the hub"
)
flags.DEFINE_string("unet", None, "folder of a UNet for the pipeline's place, or log directory: its newest round")
flags.DEFINE_bool("unet_from_scratch", False, "start from random weights of the UNet's configuration")

# data
flags.DEFINE_string(
    "captions", None, "JSON {image: [captions]}, .csv, .tsv or .jsonl; default: metadata.jsonl in --data_root"
)
flags.DEFINE_integer("resolution", 256, "side of the images: resized, then the centre cut out", lower_bound=8)
flags.DEFINE_string("cache_dir", None, "directory of latents and text states; default: .cache in --data_root")
flags.DEFINE_enum("caption_mode", "first", CAPTION_MODES, "which captions; the last four with --caption_prob")
flags.DEFINE_float("caption_prob", 0.1, "probability of a changed caption", 0.0, 1.0)
flags.DEFINE_float("text_noise", 0.0, "standard deviation >= 0 of noise on the text states, also in all_in", 0.0)
flags.DEFINE_float("text_mixup", 0.0, "a >= 0: text states of two samples mixed by Beta(a, 1); 0: not", lower_bound=0.0)
flags.DEFINE_enum("duplication", "nodup", DUPLICATIONS, "sample some images more often, with one caption or with all")
flags.DEFINE_float("weight_pc", 0.05, "share of the images that --duplication is about", 0.0, 1.0)
flags.DEFINE_float("dup_weight", 5.0, "how many times as often they are sampled, > 0", lower_bound=1e-3)

# training
flags.DEFINE_integer("local_steps", 2000, "steps on each shard per round", lower_bound=1)
flags.DEFINE_float("weight_decay", 0.01, "of AdamW; 0: Adam", lower_bound=0.0)
flags.DEFINE_integer("accumulate", 1, "compute a batch in so many parts, for less memory", lower_bound=1)
flags.DEFINE_bool("gradient_checkpointing", False, "compute activations twice, for less memory")

# evaluation
flags.DEFINE_string("prompts", None, "all_in: random: drawn captions; all: each in turn; or a file; default: random")
flags.DEFINE_enum("scheduler", "pipeline", ("pipeline", "dpm"), "all_in: the pipeline's own, or DPM-Solver++")
flags.DEFINE_enum("rand_augs", "none", RAND_AUGS, "all_in: what is put into every prompt at random places")
flags.DEFINE_integer("rand_aug_repeats", 4, "all_in: how many of them", lower_bound=1)
flags.DEFINE_string("base_dir", None, "all_in: directory of the base model's images; default: base in --generate_dir")
flags.DEFINE_enum("features", None, COPIES, "all_in: what similarity is that of; default: sscd")

# what the result depends on, as in training/flags.py; FIXED: what the run has saved depends on it too
FIXED = (
    "client_num", "split", "reshard", "exchange", "exchange_share", "exchange_every", "local_steps", "batch_size",
    "seed", "bank_bins", "resolution", "unet_from_scratch", "duplication", "weight_pc", "dup_weight",
)  # fmt: skip
CHANGEABLE = (
    "anti_grad", "anti_grad_weight", "mem_ratio", "arr_ema_decay", "augment_near_threshold", "bar", "lr", "grad_clip",
    "warmup", "weight_decay", "ema_decay", "precision", "hflip", "caption_mode", "caption_prob", "text_noise",
    "text_mixup",
)  # fmt: skip

# the functions of training/flags.py go over the flags of that module
_module = FLAGS.flags_by_module_dict()[shared.__name__]
_module[:] = [flag for flag in _module if flag.name not in NOT_HERE] + FLAGS.flags_by_module_dict()[__name__]


def check(values):
    """Raise a UsageError for a flag that is missing, or that only the other half has."""
    for name in NOT_HERE:
        if values[name].present:
            raise UsageError(f"--{name}: has no meaning for text_to_image, leave it out; --help names all flags")
    if not values.pretrained and not values.samples and not values.unet:
        raise UsageError("give --pretrained, a Stable Diffusion folder in diffusers' format")
    if values.samples and values.prompts == "random":
        raise UsageError("--prompts=random draws captions for images to generate: name the file of --samples' prompts")
    if values.samples and values.rand_augs != "none":
        raise UsageError("--rand_augs changes prompts of images to generate, not of --samples: leave it out")
    if values.unet_from_scratch and values.unet:
        raise UsageError("--unet_from_scratch and --unet contradict each other: leave one out")


def take_flags(values, unet_folder):
    """Give the flags of the pipeline and the training images the values of a training, unless they were given.

    Args:
        unet_folder: of the UNet; where there is no flagfile in its log directory, nothing is taken.

    Raises:
        UsageError: no pipeline is known, and images are to be generated, or another resolution was given for them.
    """
    logdir, settings = unet_folder.parent.parent, settings_of(unet_folder) or {}
    recorded, resolution = recorded_flags(logdir), settings.get("resolution", values.resolution)
    if values["resolution"].present and values.resolution != resolution and not values.samples:
        what = f"the UNet of {logdir} was trained with {resolution}"
        raise UsageError(f"--resolution={values.resolution}: {what}: leave the flag out")
    names = ["data_root", "captions", "resolution", "cache_dir", "caption_mode"]
    for name in names + ([] if values.samples else ["pretrained"]):
        if not values[name].present and name in recorded:
            values[name].parse(recorded[name])
    if not values.pretrained and not values.samples:
        raise UsageError(f"give --pretrained: {logdir} does not say of which pipeline --unet={values.unet} is")


def check_pipeline_of_training(values, settings, folder, unet_folder):
    """Check that a UNet is used with the pipeline that it was trained with.

    Args:
        settings: of the training, as `settings_of` returns them.
        folder, unet_folder: of the pipeline and of the UNet.

    Raises:
        UsageError: it is another.
    """
    logdir, known = unet_folder.parent.parent, (settings or {}).get("pipeline (sha256)")
    if known not in (None, content_hash(folder, *FROZEN)):
        first = Path(recorded_flags(logdir).get("pretrained", ""))
        parts = [part for part in FROZEN if (first / part).is_dir()]
        parts = [part for part in parts if content_hash(first, part) != content_hash(folder, part)]
        what = f"{logdir}/run.json says that its UNet was trained with another {' and '.join(parts) or 'pipeline'}"
        advice = f"give the pipeline of that training, or --unet a copy of {unet_folder} that lies elsewhere"
        raise UsageError(f"--pretrained={values.pretrained}: {what}: {advice}")


def differences(values, settings, data):
    """What is to be said of an evaluation whose data may not be that of the training, a list of texts.

    Args:
        settings: as for `check_pipeline_of_training`.
        data: the `CaptionedImages`.
    """
    of_run = settings or {}
    if not {"pipeline (sha256)", "training images (sha256)"} <= of_run.keys():
        what = "no run.json beside it says which pipeline and images it was trained with: these may be others"
        return [f"--unet={values.unet}: {what}"]
    now = content_of(data)
    others = [name.partition(" (")[0] for name, sha in now.items() if of_run.get(name, sha) != sha]
    return [f"--data_root={values.data_root}: not the {' and '.join(others)} of the training"] if others else []


def prompts_are_drawn(values):
    """Whether `--prompts` asks for captions drawn at random."""
    return values.prompts in (None, "random")


def num_images(values):
    """How many images are to be generated; None: one of each prompt."""
    return values.num_images if prompts_are_drawn(values) or values["num_images"].present else None


def fid_features(values):
    """What the scores of quality are of: the flag, else inception, unless similarity is that of pixels."""
    default = "pixels" if values.features == "pixels" else "inception"
    return values.fid_features if values["fid_features"].present else default


def check_data(values, data):
    """Raise a UsageError where the flags do not fit the `CaptionedImages`."""
    images, processes = len(data.images), distributed.world_size()
    if values.client_num > images:
        raise UsageError(f"--client_num={values.client_num}: more shards than the {images} images")
    if values.client_num < processes:
        raise UsageError(
            f"--client_num={values.client_num} with {processes} processes: a shard is trained by one process, so start "
            f"at most {values.client_num}, or make more shards"
        )


def check_pipeline(values, pipeline, steps):
    """Check that flags fit a pipeline.

    steps: of `--sample_steps`, or 0 where no image is made.

    Raises:
        UsageError: they do not.
    """
    factor, T = math.lcm(pipeline.vae_scale_factor, LATENT_SIDE), pipeline.scheduler.config.num_train_timesteps
    if values.resolution % factor:
        what = f"{values.pretrained} has a VAE that makes images {pipeline.vae_scale_factor} times as small"
        raise UsageError(f"--resolution={values.resolution}: {what}, so give a multiple of {factor}")
    if values.bank_bins > T:
        raise UsageError(f"--bank_bins={values.bank_bins}: the pipeline's scheduler has {T} timesteps, give fewer")
    if steps:
        check_steps(pipeline.scheduler, steps)


def content_of(data):
    """What run.json says of the `CaptionedImages` of a training."""
    captions = torch.frombuffer(bytearray(repr(data.captions).encode()), dtype=torch.uint8)
    return {"training images (sha256)": fingerprint(data.images), "captions (sha256)": fingerprint(captions)}


def split_of(values):
    """How images go to shards: the flag, else as in the paper."""
    return "random" if values.reshard else values.split or "contiguous"


def logdir(values, data, folder, unet_folder):
    """Keyword arguments of `training.checkpoint.LogDirectory`, the path aside.

    Args:
        data: `CaptionedImages`.
        folder, unet_folder: what the run starts from.
    """
    settings = {"script": "text_to_image.main_fed"} | {name: values[name].value for name in FIXED + CHANGEABLE}
    settings["split"] = split_of(values)
    content = {
        **content_of(data),
        "pipeline (sha256)": content_hash(folder, *FROZEN),
        "unet (sha256)": content_hash(unet_folder),
    }
    once = {name: values[name].value for name in shared.ONCE}
    return {
        "settings": settings | content,
        "fixed": {"script", *FIXED, *content},
        "flagfile": as_flagfile(values),
        "subset": torch.arange(len(data.images)),
        **once,
    }

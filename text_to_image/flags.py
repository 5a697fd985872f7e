"""The flags of the text-conditioned half: its own, and training/flags.py's groups, some adapted."""

import math

from absl import flags

from score.features import COPIES
from text_to_image.data import CAPTION_MODES, DUPLICATIONS, RAND_AUGS
from text_to_image.pipeline import LATENT_SIDE, check_steps
from training import flags as shared
from training.flags import adapted, choice, defined, integer, number, register, rule, switch, text
from training.launch import check_processes
from utils.errors import UsageError

PIPELINE = (
    text("pretrained", None, "folder of Stable Diffusion 1.x or 2.x in diffusers' format, or its name in the hub"),
    text(
        "unet",
        None,
        "folder of a UNet for the pipeline's place, or log directory, its newest; all_in: a LoRA too",
    ),
    switch("unet_from_scratch", False, "start from random weights of the UNet's configuration"),
    switch("download", False, "fetch --pretrained from the Hugging Face hub if it is not there"),
    number("guidance", 7.5, "diffusers' guidance_scale; up to 1: none", 0.0),
    integer("sample_steps", 50, "steps of the scheduler per image", 1),
)

DATA = (
    text("data_root", "./data", "folder of the training images, or of its classes' sub-folders"),
    switch("hflip", True, "mirror training images at random"),
    text("heldout", None, "folder of real images not trained on, for floors, FID and --watch_step"),
    integer("num_workers", 4, "threads that decode image files, once", 0),
    text("captions", None, "JSON {image: [captions]}, .csv, .tsv or .jsonl; default: metadata.jsonl in --data_root"),
    *shared.LISTS,
    integer("resolution", 256, "side of the images: resized, then the centre cut out", 8),
    text("cache_dir", None, "directory of latents and text states; default: .cache in --data_root"),
    choice("caption_mode", "first", CAPTION_MODES, "which captions; the last four with --caption_prob"),
    number("caption_prob", 0.1, "probability of a changed caption", 0.0, 1.0),
    number("text_noise", 0.0, "standard deviation >= 0 of noise on the text states, also in all_in", 0.0),
    number("text_mixup", 0.0, "a >= 0: text states of two samples mixed by Beta(a, 1); 0: not", 0.0),
    choice("duplication", "nodup", DUPLICATIONS, "sample some images more often, with one caption or with all"),
    number("weight_pc", 0.05, "share of the images that --duplication is about", 0.0, 1.0),
    number("dup_weight", 5.0, "how many times as often they are sampled, > 0", 0.001),
)

TRAINING = (
    integer("local_steps", 2000, "steps on each shard per round", 1),
    number("weight_decay", 0.01, "of AdamW; 0: Adam", 0.0),
    integer("accumulate", 1, "compute a batch in so many parts, for less memory", 1),
    switch("gradient_checkpointing", False, "compute activations twice, for less memory"),
)

LORA = (
    integer("lora_rank", 0, "main_fed: train a LoRA of this rank, default --lr=1e-4; 0: the UNet", 0),
    number(
        "lora_alpha", None, "main_fed: > 0; alpha / rank is the weight of a LoRA; default: the rank",
        valid=(lambda value: value is None or 0 < value < math.inf, "> 0, and finite"),
    ),
    defined(
        flags.DEFINE_list, "lora_targets", ["to_k", "to_q", "to_v", "to_out.0"],
        "main_fed: what the names of the layers end in that have one",
    ),
    switch("lora_freeze_a", False, "main_fed: train B alone, as several shards do for an exact average"),
    number(
        "lora_scale", 1.0, "all_in: what the LoRA of --unet is multiplied by",
        valid=(math.isfinite, "finite"),
    ),
)  # fmt: skip

EVALUATION = (
    text("prompts", None, "all_in: random: drawn captions; all: each in turn; or a file; default: random"),
    choice("scheduler", "pipeline", ("pipeline", "dpm"), "all_in: the pipeline's own, or DPM-Solver++"),
    choice("rand_augs", "none", RAND_AUGS, "all_in: what is put into every prompt at random places"),
    integer("rand_aug_repeats", 4, "all_in: how many of them", 1),
    text("base_dir", None, "all_in: directory of the base model's images; default: base in --generate_dir"),
    choice("features", None, COPIES, "all_in: what similarity is that of; default: sscd"),
    number("reject_above", None, "all_in: make images again whose similarity is above this", -1.0, 1.0),
)

GROUPS = (
    shared.TRAIN, PIPELINE, DATA,
    adapted(
        shared.OPTIMISATION, defaults={"lr": 2.5e-6, "warmup": 5000, "batch_size": 8, "ema_decay": 0.0},
        helps={
            "warmup": "steps of linear warm-up",
            "batch_size": "images per step; also per call when generating",
            "ema_decay": "decay of the EMA weights, in [0, 1); 0: none",
        },
    ),
    TRAINING, LORA,
    adapted(
        shared.SHARDS, defaults={"client_num": 4, "total_round": 25},
        helps={"split": "main_fed: how images go to shards; default: contiguous"},
    ),
    adapted(
        shared.CONTROL, defaults={"mem_ratio": 1.25},
        helps={"bank_bins": "entries of the memory bank; 0: one for every timestep"},
    ),
    adapted(
        shared.LOGS,
        defaults={"logdir": "logs/text", "save_round": 5, "sample_step": 2000, "sample_size": 4},
        helps={
            "logdir": "directory of logs and checkpoints",
            "sample_step": "steps between two grids of images of the first captions; 0: none",
        },
    ),
    adapted(shared.WATCH, helps={"best": "all_in: what best.json in --unet, a log directory, names"}),
    adapted(
        shared.SCORES, defaults={"num_images": 4000},
        helps={
            "num_images": "images to generate; with --prompts=all or a file: default: one of each",
            "samples": "all_in: measure these images (.npy, .npz or folder), image i of prompt i; "
            "do not generate",
            "similar_dir": "all_in: directory of similarity.npz",
            "grid_dir": "all_in: directory of the grids, result.json and report.html",
            "fid_features": "inception: FID and IS; pixels: fpd, which needs no weights; "
            "where it is not given: pixels with --features=pixels, else inception",
        },
    ),
    EVALUATION,
)  # fmt: skip

# what the result depends on, as in training/flags.py; FIXED: what the run has saved depends on it too
FIXED = (
    "lora_rank",
    "client_num", "split", "reshard", "exchange", "exchange_share", "exchange_every", "local_steps", "batch_size",
    "seed", "bank_bins", "resolution", "unet_from_scratch", "duplication", "weight_pc", "dup_weight",
    "balance_groups",
)  # fmt: skip
ON_REQUEST = (
    "anti_grad", "anti_grad_weight", "mem_ratio", "arr_ema_decay", "augment_near_threshold", "bar", "lr", "grad_clip",
    "warmup", "weight_decay", "ema_decay", "precision", "hflip", "caption_mode", "caption_prob", "text_noise",
    "text_mixup",
)  # fmt: skip
LORA_FIXED = ("lora_alpha", "lora_targets", "lora_freeze_a")  # where there is one


def define(values):
    """Define the flags of text_to_image.main_fed and text_to_image.all_in in absl's `values`."""
    register(values, GROUPS)


@rule("pretrained", "samples", "unet")
def there_is_a_generator(values):
    if not values.pretrained and not values.samples and not values.unet:
        raise UsageError("give --pretrained, a Stable Diffusion folder in diffusers' format")


@rule("samples", "prompts", "rand_augs")
def prompts_of_samples(values):
    if values.samples and values.prompts == "random":
        what = "draws captions for images to generate: name the file of --samples' prompts"
        raise UsageError(f"--prompts=random {what}")
    if values.samples and values.rand_augs != "none":
        raise UsageError("--rand_augs changes prompts of images to generate, not of --samples: leave it out")


@rule("balance_groups", "duplication")
def how_often(values):
    if values.balance_groups and values.duplication != "nodup":
        what = "both say how often images are drawn: leave one out"
        raise UsageError(f"--balance_groups and --duplication={values.duplication}: {what}")


@rule("reject_above", "samples")
def rejects_what_it_makes(values):
    if values.samples and values.reject_above is not None:
        raise UsageError("--reject_above makes images again, not those of --samples: leave it out")


@rule("best", "unet")
def best_of_a_training(values):
    if values.best and not values.unet:
        raise UsageError("--best: name the log directory of the training with --unet")


@rule("unet_from_scratch", "unet")
def start(values):
    if values.unet_from_scratch and values.unet:
        raise UsageError("--unet_from_scratch and --unet contradict each other: leave one out")


@rule("train", "lora_rank", "unet_from_scratch", "unet")
def start_of_a_lora(values):
    for name in ("unet_from_scratch", "unet"):
        if values.train and values.lora_rank and values[name].value:
            what = "a LoRA starts from the UNet of --pretrained, whose images it is to change"
            raise UsageError(f"--{name}: {what}: leave it out, or --lora_rank")


@rule("lora_rank", "lora_alpha", "lora_targets", "lora_freeze_a")
def there_is_a_lora(values):
    for name in LORA_FIXED:
        if values[name].value != values[name].default and not values.lora_rank:
            raise UsageError(f"--{name} does nothing without --lora_rank: give both or none")


def default_lr(values):
    """Where --lr is not given, a LoRA's is that of diffusers' own script."""
    if values.lora_rank and not values["lr"].present:
        values["lr"].value = 1e-4


def prompts_are_drawn(values):
    """Whether `--prompts` asks for captions drawn at random."""
    return values.prompts in (None, "random")


def num_images(values):
    """How many images are to be generated; None: one of each prompt."""
    return values.num_images if prompts_are_drawn(values) or values["num_images"].present else None


def fid_features(values):
    """What quality is measured by: the flag, else inception, or pixels where similarity is of pixels."""
    default = "pixels" if values.features == "pixels" else "inception"
    return values.fid_features if values["fid_features"].present else default


def check_data(values, data):
    """Raise a UsageError where the flags do not fit the `CaptionedImages`."""
    if values.client_num > len(data.images):
        raise UsageError(f"--client_num={values.client_num}: more shards than the {len(data.images)} images")
    check_processes(values.client_num)


def check_pipeline(values, pipeline, steps):
    """Raise a UsageError where flags do not fit a pipeline; steps: to an image, 0 for no images."""
    factor, T = math.lcm(pipeline.vae_scale_factor, LATENT_SIDE), pipeline.scheduler.config.num_train_timesteps
    if values.resolution % factor:
        what = f"{values.pretrained} has a VAE that makes images {pipeline.vae_scale_factor} times as small"
        raise UsageError(f"--resolution={values.resolution}: {what}, so give a multiple of {factor}")
    if values.bank_bins > T:
        raise UsageError(f"--bank_bins={values.bank_bins}: the pipeline's scheduler has {T} timesteps, give fewer")
    if steps:
        check_steps(pipeline.scheduler, steps)

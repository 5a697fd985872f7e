"""From flags to objects in the text-conditioned half; `training.build` has what both halves share.

FLAGS: absl's values, of `text_to_image.flags.define`.
"""

import functools
import hashlib
import re
from pathlib import Path

import numpy as np
import torch

from score.generate import over_ranks
from score.measure import measure_against
from score.record import say_non_finite
from score.samples import load_samples
from text_to_image.data import CaptionBatches, encode, load_folder, load_images
from text_to_image.flags import FIXED, LORA_FIXED, ON_REQUEST, check_pipeline
from text_to_image.lora import add_lora
from text_to_image.pipeline import (
    CHECKPOINT,
    FROZEN,
    ROUND,
    LatentTrainer,
    as_scheduler,
    find_folder,
    find_unet,
    generate_numbered,
    load_pipeline,
    remove_unets,
    unets_in,
)
from text_to_image.pipeline import preview as make_preview
from text_to_image.prompts import distinct, make_prompts, not_in
from text_to_image.recorded import check_pipeline_of_training, content_of
from training.batches import Batches
from training.build import balanced_groups, copies_space, hashes_of_lists, make_watch, split_asked_for
from training.flags import ONCE, as_flagfile
from training.learner import PRECISIONS, Learner
from training.logdir import LogDirectory
from training.resume import nothing_to_continue
from training.shards import partition
from training.weights import CHECKPOINTS, own_files
from utils import distributed
from utils.errors import DataError, UsageError
from utils.files import content_hash
from utils.images import fingerprint, list_images, non_finite_images, size_of, to_uint8
from utils.seeding import derive_seed


def dataset(FLAGS):
    return load_folder(
        FLAGS.data_root, captions=FLAGS.captions, resolution=FLAGS.resolution,
        num_workers=FLAGS.num_workers, keep_list=FLAGS.keep_list, groups=FLAGS.groups,
    )  # fmt: skip


def pipeline(FLAGS):
    """The pipeline with the UNet to train, its folder and the UNet's, and the scheduler of training."""
    with distributed.main_first():
        folder = find_folder(FLAGS.pretrained, FLAGS.download)
    unet_folder = find_unet(FLAGS.unet) if FLAGS.unet else folder / "unet"
    if unet_folder.is_file():
        what = "is the file of a LoRA, from which no training starts"
        raise UsageError(f"--unet={FLAGS.unet}: {what}: leave it out, or name the folder of a UNet")
    found = load_pipeline(folder, unet_folder)
    if FLAGS.unet:
        check_pipeline_of_training(FLAGS, folder, unet_folder)
    makes_images = FLAGS.sample_step or FLAGS.watch_step
    check_pipeline(FLAGS, found, FLAGS.sample_steps if makes_images else 0)
    scheduler = as_scheduler("DDPMScheduler", found.scheduler, "training")
    if FLAGS.unet_from_scratch:
        torch.manual_seed(derive_seed(FLAGS.seed, "weights"))
        found.unet = type(found.unet).from_config(found.unet.config)
    if FLAGS.gradient_checkpointing:
        found.unet.enable_gradient_checkpointing()
    if FLAGS.lora_rank:
        lora(FLAGS, found.unet)
    return found, folder, unet_folder, scheduler


def split(FLAGS):
    """How images go to shards: the flag, else as others ask, else as in the paper."""
    return split_asked_for(FLAGS) or "contiguous"


def slots(FLAGS, data, r=1):
    """Which of the images each of the K shards has in round r, before any exchange."""
    labels = torch.zeros(len(data.images))
    if split(FLAGS) == "stratified":
        labels = torch.from_numpy(np.unique(data.classes, return_inverse=True)[1])
    return partition(
        labels, FLAGS.client_num, split(FLAGS), FLAGS.seed,
        r=r - 1 if FLAGS.reshard else 0, groups=data.groups, balance=FLAGS.balance_groups,
    )  # fmt: skip


def check_batches(FLAGS, data, slots):
    """Raise a UsageError where a shard is smaller than one batch."""
    for k, of_shard in enumerate(slots):
        Batches(of_shard, "cpu", FLAGS.batch_size, 1, FLAGS.seed, k, balanced_groups(FLAGS, data))


def batches(FLAGS, data, encoded, slots, device, *, scaling_factor, often, T, shard):
    """The `CaptionBatches` of some slots; encoded: moments, captions and states, as there."""
    moments, captions, states = encoded
    return CaptionBatches(
        data.images, moments, captions, states, slots, device, scaling_factor=scaling_factor,
        often=often, batch_size=FLAGS.batch_size, T=T, seed=FLAGS.seed, shard=shard, hflip=FLAGS.hflip,
        caption_mode=FLAGS.caption_mode, caption_prob=FLAGS.caption_prob, text_noise=FLAGS.text_noise,
        text_mixup=FLAGS.text_mixup, duplication=FLAGS.duplication, dup_weight=FLAGS.dup_weight,
        groups=balanced_groups(FLAGS, data),
    )  # fmt: skip


def encoded(FLAGS, data, pipeline, folder):
    """What `encode` makes of the images and captions, with a pipeline from a folder."""
    return encode(
        data, pipeline, directory=Path(FLAGS.cache_dir or Path(FLAGS.data_root) / ".cache"),
        vae_key=content_hash(folder, "vae"), text_key=content_hash(folder, "text_encoder", "tokenizer"),
        caption_mode=FLAGS.caption_mode,
        draws_captions=FLAGS.caption_mode in ("all", "allcaps") or FLAGS.duplication == "dup_image",
        owner=(str(Path(FLAGS.data_root).resolve()), FLAGS.keep_list),
    )  # fmt: skip


def preview(FLAGS, pipeline, net, captions):
    """Images of the first captions by a network of a `Learner`, for the sample grids."""
    # the frozen weights of a LoRA's UNet are in the dtype of autocast
    unet, precision = (net.unet, FLAGS.precision) if FLAGS.lora_rank else (net, "fp32")
    return make_preview(
        pipeline, unet, [texts[0] for texts in captions[: FLAGS.sample_size]], seed=FLAGS.seed,
        resolution=FLAGS.resolution, steps=FLAGS.sample_steps, guidance=FLAGS.guidance,
        dtype=PRECISIONS[precision],
    )  # fmt: skip


def lora_alpha(FLAGS):
    return FLAGS.lora_alpha or float(FLAGS.lora_rank)


def lora_freeze_a(FLAGS):
    """Whether only B trains: the mean of several shards is exact then."""
    return FLAGS.lora_freeze_a or FLAGS.client_num > 1


def lora(FLAGS, unet):
    """Freeze a UNet, and give it the LoRA of the flags."""
    add_lora(
        unet, rank=FLAGS.lora_rank, alpha=lora_alpha(FLAGS), targets=FLAGS.lora_targets,
        freeze_a=lora_freeze_a(FLAGS), seed=FLAGS.seed, dtype=PRECISIONS[FLAGS.precision],
    )  # fmt: skip


def learner(FLAGS, unet, scheduler):
    """The `Learner` of a UNet or `Adapter`, with the noise of diffusers' scheduler."""
    return Learner(
        unet, lambda network: LatentTrainer(network, scheduler, parts=FLAGS.accumulate), lr=FLAGS.lr,
        warmup=FLAGS.warmup, grad_clip=FLAGS.grad_clip, ema_decay=FLAGS.ema_decay or None,
        weight_decay=FLAGS.weight_decay, precision=FLAGS.precision, compile=FLAGS.compile,
        offload=FLAGS.shard_state == "cpu",
    )  # fmt: skip


def log_directory(FLAGS, data, folder, unet_folder):
    """The `LogDirectory` of a run on `CaptionedImages`, which starts from these folders' parts.

    Raises:
        UsageError: UNets are there that --fresh alone would remove; and as `LogDirectory`.
        DataError: UNets of rounds are there, and nothing to continue; and as `LogDirectory`."""
    if FLAGS.fresh and not FLAGS.overwrite and (unets := unets_in(FLAGS.logdir, CHECKPOINT)):
        what = f"{unets[0]} is of an earlier run: add --overwrite to delete that run"
        raise UsageError(f"--fresh: {what}")
    # the newest of them would be taken for this run's
    rounds = [] if FLAGS.fresh else unets_in(FLAGS.logdir, ROUND)
    if rounds and not own_files(FLAGS.logdir, CHECKPOINTS):
        raise nothing_to_continue(rounds[0])
    settings = {"script": "text_to_image.main_fed"}
    settings |= {name: FLAGS[name].value for name in (*FIXED, *ON_REQUEST)}
    settings["split"] = split(FLAGS)
    content = content_of(data)
    if FLAGS.lora_rank:
        values = lora_alpha(FLAGS), FLAGS.lora_targets, lora_freeze_a(FLAGS)
        content |= dict(zip(LORA_FIXED, values, strict=True))
    content["pipeline (sha256)"] = content_hash(folder, *FROZEN)
    content["unet (sha256)"] = content_hash(unet_folder)
    content |= hashes_of_lists(FLAGS)
    fixed, once = {"script", *FIXED, *content}, {name: FLAGS[name].value for name in ONCE}
    return LogDirectory(FLAGS.logdir, settings | content, fixed, as_flagfile(FLAGS), data.subset, **once)


def images_of(FLAGS, flag):
    """The images that a flag names, uint8 (N, 3, S, S), those of a folder by the numbers in their names.

    Raises:
        DataError: there are none.
        UsageError: an array of images of another size."""
    path, side = FLAGS[flag].value, FLAGS.resolution
    if Path(path).is_dir():
        return load_images(files_of(path), side, FLAGS.num_workers)
    if not Path(path).is_file():
        raise DataError(f"--{flag}={path}: no such file or folder")
    images = load_samples(path)
    if images.shape[2:] != (side, side):
        what = f"holds {size_of(images)} images (width x height), not {side}x{side}"
        raise UsageError(f"--{flag}={path}: {what}: give their --resolution")
    return images


def files_of(folder, quiet=False):
    """The image files in a folder, paths, by the numbers in their names; quiet: as for `list_images`."""
    files = [Path(file) for group in list_images(folder, quiet=quiet) for file in group]

    def parts(file):
        found = re.split(r"(\d+)", str(file))
        return [int(part) if part.isdecimal() else part for part in found]

    return sorted(files, key=parts)


def names_of_samples(FLAGS):
    """The names of --samples' images in their folder, in the order of `images_of`; None without one."""
    folder = FLAGS.samples
    if not folder or not Path(folder).is_dir():
        return None
    return [file.relative_to(folder).as_posix() for file in files_of(folder, quiet=True)]


def generation(FLAGS):
    """Keyword arguments of `generate_numbered`."""
    return {
        "seed": FLAGS.seed, "resolution": FLAGS.resolution, "steps": FLAGS.sample_steps,
        "guidance": FLAGS.guidance, "text_noise": FLAGS.text_noise, "dtype": PRECISIONS[FLAGS.precision],
    }  # fmt: skip


def watch(FLAGS, data, pipeline, device, save):
    """The `Watch` of a fine-tuning on `CaptionedImages`; save: a function of (weights, folder).

    Raises:
        UsageError: no held-out images, no weights of --features, or no one network is to be measured."""
    if not FLAGS.watch_step:
        return make_watch(FLAGS, None, None, FLAGS.resolution, {}, None, None)
    if FLAGS.total_round == 1 and FLAGS.client_num > 1:
        what = "shards that are never averaged make no one network to be measured"
        raise UsageError(f"--watch_step: {what}: give a --total_round above 1, or --client_num=1")
    if not FLAGS.heldout:
        raise UsageError("--watch_step: no image is held out: name a folder of some with --heldout")
    once = distinct(data)
    reference = images_of(FLAGS, "heldout")
    heldout = not_in(once.images, reference)
    if heldout is None:
        raise UsageError(f"--heldout={FLAGS.heldout}: all of these are training images: name others")
    space = copies_space(FLAGS, FLAGS.features or "sscd", device, "features")
    asked = prompts(FLAGS, once, pipeline.tokenizer, FLAGS.watch_images)[0].texts

    def make(indices):
        x = torch.empty(0, 3, FLAGS.resolution, FLAGS.resolution)
        x = generate_numbered(pipeline, asked, indices, **generation(FLAGS)) if indices else x
        return to_uint8(2 * x - 1), non_finite_images(x)

    @functools.cache
    def ruler():
        settings = {"space": space, "groups": once.groups, "device": device}
        return measure_against(once.images, heldout, reference, **settings)

    def measure(networks):
        (network,) = networks
        pipeline.unet = network.unet if FLAGS.lora_rank else network
        was_training = pipeline.unet.training
        pipeline.unet.eval()
        batches = over_ranks(0, len(asked), FLAGS.batch_size, make)
        made = [torch.cat(parts) for parts in zip(*batches, strict=True)]  # on rank 0
        pipeline.unet.train(was_training)
        empty = torch.empty(len(asked), *heldout.shape[1:], dtype=torch.uint8)
        images, bad = made or (empty, empty[:0])
        say_non_finite("images of --watch_step", int(bad.sum()), len(asked))
        return ruler()(distributed.broadcast(images, 0))

    def save_best(logdir, state):
        if "round" in state:
            name, weights = f"best_checkpoint_round{state['round']}", state["global_ema_model"]
        else:  # of an only round, of one shard
            name, weights = f"best_checkpoint_step{state['step']}", state["ema_model"]
        save(weights, Path(logdir) / name)
        return name

    def tidy(logdir, names):
        remove_unets(logdir, r"best_checkpoint_(round|step)\d+", names)

    about = {"features": space.name, "text_noise": FLAGS.text_noise}
    about["training images"] = fingerprint(once.images)
    about["groups (sha256)"] = hashes_of_lists(FLAGS)["groups (sha256)"]
    about["prompts"] = hashlib.sha256(repr(asked).encode()).hexdigest()
    return make_watch(FLAGS, measure, reference, FLAGS.resolution, about, save_best, tidy)


def prompts(FLAGS, data, tokenizer, number, names=None):
    """The `Prompts` of so many images, of None one of each text; and the texts they are taken from.

    names: of the images, where they are there already."""
    return make_prompts(
        data, tokenizer, number, prompts=FLAGS.prompts, caption_mode=FLAGS.caption_mode, seed=FLAGS.seed,
        rand_augs=FLAGS.rand_augs, rand_aug_repeats=FLAGS.rand_aug_repeats, names=names,
    )  # fmt: skip

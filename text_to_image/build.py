"""From flags to objects in the text-conditioned half; `training.build` has what both halves share.

FLAGS: absl's values, of `text_to_image.flags.define`.
"""

from pathlib import Path

import torch

from text_to_image.data import CaptionBatches, encode, load_folder
from text_to_image.flags import FIXED, LORA_FIXED, ON_REQUEST
from text_to_image.lora import add_lora
from text_to_image.pipeline import FROZEN, LatentTrainer, content_hash
from text_to_image.pipeline import preview as make_preview
from text_to_image.prompts import make_prompts
from text_to_image.recorded import content_of
from training.flags import ONCE, as_flagfile
from training.learner import PRECISIONS, Learner
from training.logdir import LogDirectory
from training.shards import partition


def dataset(FLAGS):
    return load_folder(
        FLAGS.data_root, captions=FLAGS.captions, resolution=FLAGS.resolution,
        num_workers=FLAGS.num_workers,
    )  # fmt: skip


def split(FLAGS):
    """How images go to shards: the flag, else as in the paper."""
    return "random" if FLAGS.reshard else FLAGS.split or "contiguous"


def slots(FLAGS, number, r=1):
    """Which of so many images each of the K shards has in round r, before any exchange."""
    r = r - 1 if FLAGS.reshard else 0
    return partition(torch.zeros(number), FLAGS.client_num, split(FLAGS), FLAGS.seed, r=r)


def batches(FLAGS, data, encoded, slots, device, *, scaling_factor, often, T, shard):
    """The `CaptionBatches` of some slots; encoded: moments, captions and states, as there."""
    moments, captions, states = encoded
    return CaptionBatches(
        data.images, moments, captions, states, slots, device, scaling_factor=scaling_factor,
        often=often, batch_size=FLAGS.batch_size, T=T, seed=FLAGS.seed, shard=shard, hflip=FLAGS.hflip,
        caption_mode=FLAGS.caption_mode, caption_prob=FLAGS.caption_prob, text_noise=FLAGS.text_noise,
        text_mixup=FLAGS.text_mixup, duplication=FLAGS.duplication, dup_weight=FLAGS.dup_weight,
    )  # fmt: skip


def encoded(FLAGS, data, pipeline, folder):
    """What `encode` makes of the images and captions, with a pipeline from a folder."""
    return encode(
        data, pipeline, directory=Path(FLAGS.cache_dir or Path(FLAGS.data_root) / ".cache"),
        vae_key=content_hash(folder, "vae"), text_key=content_hash(folder, "text_encoder", "tokenizer"),
        caption_mode=FLAGS.caption_mode,
        draws_captions=FLAGS.caption_mode in ("all", "allcaps") or FLAGS.duplication == "dup_image",
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
    """The `LogDirectory` of a run on `CaptionedImages`, which starts from these folders' parts."""
    settings = {"script": "text_to_image.main_fed"}
    settings |= {name: FLAGS[name].value for name in (*FIXED, *ON_REQUEST)}
    settings["split"] = split(FLAGS)
    content = content_of(data)
    if FLAGS.lora_rank:
        values = lora_alpha(FLAGS), FLAGS.lora_targets, lora_freeze_a(FLAGS)
        content |= dict(zip(LORA_FIXED, values, strict=True))
    content["pipeline (sha256)"] = content_hash(folder, *FROZEN)
    content["unet (sha256)"] = content_hash(unet_folder)
    fixed, subset = {"script", *FIXED, *content}, torch.arange(len(data.images))
    once = {name: FLAGS[name].value for name in ONCE}
    return LogDirectory(FLAGS.logdir, settings | content, fixed, as_flagfile(FLAGS), subset, **once)


def prompts(FLAGS, data, tokenizer, number):
    """The `Prompts` of so many images, of None one of each text; and the texts they are taken from."""
    return make_prompts(
        data, tokenizer, number, prompts=FLAGS.prompts, caption_mode=FLAGS.caption_mode, seed=FLAGS.seed,
        rand_augs=FLAGS.rand_augs, rand_aug_repeats=FLAGS.rand_aug_repeats,
    )  # fmt: skip

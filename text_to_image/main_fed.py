"""IET-AGC for Stable Diffusion (Liu et al. 2024): fine-tuning that does not memorise the captioned images.

    python -m text_to_image.main_fed --train --pretrained=stable-diffusion-2-1 --data_root=images --captions=texts.json
    torchrun --nproc_per_node=4 -m text_to_image.main_fed --train ...    # the shards side by side

--client_num=1 --anti_grad=off is plain fine-tuning. What diffusers loads is checkpoint_round{r}/unet in --logdir.
"""

import copy
from functools import partial
from pathlib import Path

import torch
from absl import flags as absl_flags

from score.samples import non_finite_images
from text_to_image import flags
from text_to_image.data import (
    CaptionBatches,
    TextStates,
    cached,
    captions_of_mode,
    check_length,
    duplicated,
    load_folder,
)
from text_to_image.pipeline import (
    LatentTrainer,
    as_scheduler,
    content_hash,
    encode_images,
    find_folder,
    find_unet,
    generate,
    load_pipeline,
    remove_unets,
    save_unet,
    settings_of,
)
from training.averaging import average_learners
from training.ensemble import Shard, total_of
from training.launch import Interruption, announce, check_warmup, pick_device, run
from training.learner import Learner
from training.logdir import LogDirectory, say_young_ema
from training.logger import Logger, due
from training.resume import resume_shards, save_average, save_shard
from training.shards import exchange, exchange_is_due, make_shards, number_of_step
from utils import distributed
from utils.errors import UsageError, warn
from utils.images import fingerprint, keep_apart
from utils.seeding import derive_seed, sample_noise

FLAGS = absl_flags.FLAGS


def train(data, pipeline, scheduler, folder, unet_folder, device, logdir):
    # what the run is made of
    slots = slots_of_round(len(data.images), 1)
    shards = make_shards_of_this_process(data, pipeline, scheduler, folder, slots, device)
    sizes = [len(index) for index in slots]
    steps_per_round = [FLAGS.local_steps] * len(slots)
    steps = {"shards": len(slots), "steps_in_all": FLAGS.total_round * sum(steps_per_round)}
    announce(device, shards[0].learner.net, len(data.images), FLAGS.batch_size, **steps)
    check_warmup(shards[0].learner.warmup, FLAGS.total_round * min(steps_per_round))
    directory = LogDirectory(logdir, **flags.logdir(FLAGS, data, folder, unet_folder))
    if FLAGS.fresh and distributed.is_main():
        remove_unets(logdir)
    rounds_done, seconds, exchanged = resume_shards(shards, steps_per_round, directory, FLAGS.total_round)
    say_young_ema(logdir, FLAGS.total_round * FLAGS.local_steps)
    slots = exchanged or slots
    total = FLAGS.total_round * FLAGS.local_steps * len(shards)
    logger = flags.call(FLAGS, Logger, logdir, total, sum(shard.learner.step for shard in shards), seconds=seconds)
    sample = partial(preview, pipeline, data.captions)
    pipeline.unet = shards[0].learner.ema  # what it started from is needed no more

    with Interruption() as interruption, logger:
        for r in range(rounds_done + 1, FLAGS.total_round + 1):
            if FLAGS.reshard:
                slots = slots_of_round(len(data.images), r)
            for shard in shards:
                k, learner, last = shard.number, shard.learner, r * steps_per_round[shard.number]
                shard.batches.use(slots[k])
                with learner.on_device():
                    while learner.step < last:
                        torch.manual_seed(derive_seed(FLAGS.seed, "dropout", k, learner.step))
                        batch = shard.batches(learner.step)
                        losses = learner.losses(batch)
                        near = shard.agc.near_threshold(losses, batch.t)
                        loss, keep = shard.agc(losses, batch.t)
                        numbers = learner.update(loss)
                        shard.count(batch.index, keep, near)
                        if FLAGS.augment_near_threshold:
                            shard.augment(batch.index, near, FLAGS.seed)

                        step, stop = number_of_step(steps_per_round, k, learner.step), bool(interruption)
                        round_ends = learner.step == last
                        logger.step(step, numbers, keep, now=round_ends or stop, round=r, shard=k)
                        if due(step, FLAGS.sample_step):
                            logger.images(f"shard{k}_step{step}", step, partial(sample, learner.ema))
                        if due(step, FLAGS.save_step) or round_ends or stop:
                            logger.flush()
                            state = {**shard.state_dict(), "seconds": logger.seconds}
                            save_shard(logdir, k, state, last - steps_per_round[k], FLAGS.keep)
                        if stop:
                            interruption.exit(logdir)

            interruption.wait_for_all(logdir)
            exchanges = flags.call(FLAGS, exchange_is_due, r)
            learners = {shard.number: shard.learner for shard in shards}
            average, ema_average = average_learners(learners, sizes, replace=not exchanges)
            if exchanges:
                slots = exchange(slots, total_of(shards, "round_counts"), FLAGS.exchange_share)
            all_counts = total_of(shards, "skip_counts")
            for shard in shards:
                shard.round_counts.zero_()
            logger.memorization(all_counts, {shard.number: shard.agc.bank for shard in shards}, r)
            if distributed.is_main():
                if FLAGS.sample_step and not exchanges:
                    with shards[0].learner.on_device():
                        draw = partial(sample, shards[0].learner.ema)
                        logger.images(f"average_round{r}", sum(steps_per_round) * r, draw)
                logger.flush()
                state = {"global_model": average, "global_ema_model": ema_average, "index_array": all_counts}
                state |= {"round": r, "averaged": not exchanges, "seconds": logger.seconds}
                state |= {"shards": slots} if FLAGS.exchange != "off" else {}
                if due(r, FLAGS.save_round) or r == FLAGS.total_round:
                    save_unet(shards[0].learner.net, ema_average, logdir / f"checkpoint_round{r}")
                save_average(logdir, state, publish=False, keep=FLAGS.keep)
        logger.finish(sum(steps_per_round) * FLAGS.total_round)


def slots_of_round(number, r):
    """The numbers of the images, of so many, that each of the K shards has in round r, before any exchange."""
    r = r - 1 if FLAGS.reshard else 0
    return make_shards(torch.zeros(number), FLAGS.client_num, flags.split_of(FLAGS), FLAGS.seed, r=r)


def make_shards_of_this_process(data, pipeline, scheduler, folder, slots, device):
    """Shard k is trained by process k mod P; all K sub-models start from the pipeline's UNet."""
    objective = partial(LatentTrainer, scheduler=scheduler, parts=FLAGS.accumulate)
    T = scheduler.config.num_train_timesteps
    with distributed.main_first():
        encoded = encode(data, pipeline, folder)
    often = duplicated(len(data.images), FLAGS.weight_pc, FLAGS.seed)
    own = {"scaling_factor": pipeline.vae.config.scaling_factor, "often": often, "T": T}
    shards = []
    for k, index in enumerate(slots):
        batches = flags.call(FLAGS, CaptionBatches, data.images, *encoded, index, device, shard=k, **own)
        if k % distributed.world_size() != distributed.rank():
            continue
        unet, ema_decay = copy.deepcopy(pipeline.unet).to(device), FLAGS.ema_decay or None
        offload = FLAGS.shard_state == "cpu"
        learner = flags.call(FLAGS, Learner, unet, objective, ema_decay=ema_decay, offload=offload)
        agc = flags.agc(FLAGS, T).to(device)
        counts = torch.zeros(2, len(data.images), dtype=torch.int64, device=device)
        shards.append(Shard(k, batches, learner, agc, *counts))
    return shards


def encode(data, pipeline, folder):
    """Latents, captions and text states of all images, computed once and cached: see `CaptionBatches`."""
    directory = Path(FLAGS.cache_dir or Path(FLAGS.data_root) / ".cache")
    key = f"{content_hash(folder, 'vae')[:16]}_{fingerprint(data.images)[:16]}"
    moments = cached(directory / f"latents_{key}.npy", lambda: encode_images(pipeline.vae, data.images))
    captions = captions_of_mode(data, FLAGS.caption_mode, pipeline.tokenizer)
    are_drawn = FLAGS.caption_mode in ("all", "allcaps") or FLAGS.duplication == "dup_image"
    used = [text for texts in captions for text in (texts if are_drawn else texts[:1])]
    check_length(used, pipeline.tokenizer, "captions")
    key = content_hash(folder, "text_encoder", "tokenizer")
    if getattr(pipeline.text_encoder.config, "use_attention_mask", False):
        key += " masked"  # earlier versions did not mask
    return moments, captions, TextStates(pipeline, [texts[0] for texts in captions], directory, key)


def preview(pipeline, captions, unet):
    """Images in [-1, 1] of the first captions by a UNet, from the same noise at all times of the run."""
    pipeline.unet = unet
    prompts = [texts[0] for texts in captions[: FLAGS.sample_size]]
    side = FLAGS.resolution // pipeline.vae_scale_factor
    latents = sample_noise(FLAGS.seed, range(len(prompts)), (unet.config.in_channels, side, side), "cpu")()
    x = generate(pipeline, prompts, latents, FLAGS.sample_steps, FLAGS.guidance)
    if bad := int(non_finite_images(x).sum()):
        warn(f"warning: {bad} of {len(x)} images of the first captions hold values that are not finite, black here")
    return 2 * x - 1


def main():
    if not FLAGS.train:
        raise UsageError("nothing to do: add --train (text_to_image.all_in evaluates)")
    flags.check(FLAGS)
    keep_apart([FLAGS.data_root], {}, {"logdir": FLAGS.logdir, "cache_dir": FLAGS.cache_dir})
    device = pick_device(FLAGS.device, FLAGS.precision)
    with distributed.main_first():
        folder = find_folder(FLAGS.pretrained, FLAGS.download)
    unet_folder = find_unet(FLAGS.unet) if FLAGS.unet else folder / "unet"
    pipeline = load_pipeline(folder, unet_folder)
    if FLAGS.unet:
        flags.check_pipeline_of_training(FLAGS, settings_of(unet_folder), folder, unet_folder)
    flags.check_pipeline(FLAGS, pipeline, FLAGS.sample_steps if FLAGS.sample_step else 0)
    scheduler = as_scheduler("DDPMScheduler", pipeline.scheduler, "training")
    data = flags.call(FLAGS, load_folder, FLAGS.data_root)
    flags.check_data(FLAGS, data)
    if FLAGS.unet_from_scratch:
        torch.manual_seed(derive_seed(FLAGS.seed, "weights"))
        pipeline.unet = type(pipeline.unet).from_config(pipeline.unet.config)
    if FLAGS.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    pipeline.vae.to(device)
    pipeline.text_encoder.to(device)
    train(data, pipeline, scheduler, folder, unet_folder, device, Path(FLAGS.logdir))


if __name__ == "__main__":
    run(main)

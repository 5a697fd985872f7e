"""IET-AGC for Stable Diffusion (Liu et al. 2024): fine-tuning that does not memorise the captioned images.

    python -m text_to_image.main_fed --train --pretrained=stable-diffusion-2-1 --data_root=images --captions=texts.json
    torchrun --nproc_per_node=4 -m text_to_image.main_fed --train ...    # the shards side by side

--client_num=1 --anti_grad=off is plain fine-tuning. What diffusers loads is checkpoint_round{r}/unet in --logdir.
"""

if __name__ == "__main__":  # before the imports that take seconds
    from utils import startup

    startup.prepare()

import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from absl import flags as absl_flags

from dataset import fingerprint
from text_to_image import flags
from text_to_image.data import CaptionBatches, TextStates, cached, captions_of_mode, duplicated, load_folder
from text_to_image.pipeline import (
    LatentTrainer,
    content_hash,
    encode_images,
    find_folder,
    find_unet,
    generate,
    libraries,
    load_pipeline,
    remove_unets,
    save_unet,
)
from training import checkpoint
from training.agc import AntiGradientControl
from training.averaging import average_learners
from training.launch import Interruption, announce, pick_device, run
from training.learner import Learner
from training.logger import Logger, due
from training.shards import make_shards, number_of_step
from utils import distributed
from utils.errors import UsageError
from utils.seeding import derive_seed, sample_noise

FLAGS = absl_flags.FLAGS


@dataclass(frozen=True)
class Shard:
    """A part of the training images and the sub-model that trains on it."""

    number: int
    batches: CaptionBatches
    learner: Learner
    agc: AntiGradientControl

    def state_dict(self, skip_counts):
        """What the shard needs to continue. skip_counts (N,): of all training images."""
        own = {"bank": self.agc.bank, "skip_counts": skip_counts[self.batches.index]}
        return {**self.learner.state_dict(), **own}


def train(data, pipeline, pipeline_hash, batches, device, logdir):
    # what the run is made of
    shards = make_shards_of_this_process(pipeline, batches, device)
    shard_sizes = [len(shard.index) for shard in batches]
    steps_per_round = [FLAGS.local_steps] * len(batches)
    skip_counts = torch.zeros(len(data.images), dtype=torch.int64, device=device)
    announce(device, shards[0].learner.net, len(data.images), FLAGS.batch_size, shards=len(batches))
    directory = checkpoint.LogDirectory(logdir, **flags.logdir(FLAGS, data, pipeline_hash))
    if FLAGS.fresh and distributed.is_main():
        remove_unets(logdir)
    rounds_done, seconds = resume(shards, steps_per_round, skip_counts, directory)
    total = FLAGS.total_round * FLAGS.local_steps * len(shards)
    logger = flags.call(FLAGS, Logger, logdir, total, sum(shard.learner.step for shard in shards), seconds=seconds)
    sample = partial(preview, pipeline, data.captions)
    pipeline.unet = shards[0].learner.ema  # what it started from is needed no more

    with Interruption() as interruption, logger:
        for r in range(rounds_done + 1, FLAGS.total_round + 1):
            for shard in shards:
                k, learner, last = shard.number, shard.learner, r * steps_per_round[shard.number]
                with learner.on_device():
                    while learner.step < last:
                        torch.manual_seed(derive_seed(FLAGS.seed, "dropout", k, learner.step))
                        batch = shard.batches(learner.step)
                        losses = learner.losses(batch)
                        loss, keep = shard.agc(losses, batch.t)
                        numbers = learner.update(loss)
                        skip_counts.index_add_(0, batch.index, (~keep).long())

                        step, stop = number_of_step(steps_per_round, k, learner.step), bool(interruption)
                        round_ends = learner.step == last
                        logger.step(step, numbers, keep, now=round_ends or stop, round=r, shard=k)
                        if due(step, FLAGS.sample_step):
                            logger.images(f"shard{k}_step{step}", step, sample(learner.ema))
                        if due(step, FLAGS.save_step) or round_ends or stop:
                            logger.flush()
                            state = {**shard.state_dict(skip_counts), "seconds": logger.seconds}
                            checkpoint.save_shard(logdir, k, state, last - steps_per_round[k], FLAGS.keep)
                        if stop:
                            interruption.exit(logdir)

            wait_for_all_shards(interruption, logdir)
            average, ema_average = average_learners({shard.number: shard.learner for shard in shards}, shard_sizes)
            all_counts = distributed.total(skip_counts.clone())
            logger.memorization(all_counts, {shard.number: shard.agc.bank for shard in shards}, r)
            if distributed.is_main():
                ema = shards[0].learner.ema
                if FLAGS.sample_step:
                    with shards[0].learner.on_device():
                        logger.images(f"average_round{r}", sum(steps_per_round) * r, sample(ema))
                logger.flush()
                if due(r, FLAGS.save_round) or r == FLAGS.total_round:
                    save_unet(ema, logdir / f"checkpoint_round{r}")
                state = {"global_model": average, "global_ema_model": ema_average, "index_array": all_counts.cpu()}
                state |= {"round": r, "seconds": logger.seconds}
                checkpoint.save_average(logdir, state, publish=False, keep=FLAGS.keep)
        logger.finish(sum(steps_per_round) * FLAGS.total_round)


def resume(shards, steps_per_round, skip_counts, directory):
    """Continue from the newest good files; returns the rounds done, and the seconds of training until then."""
    logdir = directory.path
    found = checkpoint.newest_round(steps_per_round, logdir) if distributed.is_main() else None
    r, steps, average, later = distributed.from_main(found)
    seconds = checkpoint.restore_shards(shards, steps_per_round, skip_counts, logdir, r, steps, average)
    if r > FLAGS.total_round:
        raise UsageError(
            f"--total_round={FLAGS.total_round}: the run in {logdir} has done {r}: give at least that, or choose "
            "another --logdir"
        )
    directory.begin(sum(steps), later)
    if any(steps):
        print(f"continuing in {logdir}: {r} rounds and {sum(steps)} steps done")
    elif later:
        print(f"{logdir}: nothing in it can be continued, starting anew")
    return r, seconds


def make_batches(data, pipeline, folder, device):
    """The batches of all K shards: latents and text states are computed here, once."""
    directory = Path(FLAGS.cache_dir or Path(FLAGS.data_root) / ".cache")
    images_key = f"{content_hash(folder, 'vae')[:16]}_{fingerprint(data.images)[:16]}"
    moments = cached(directory / f"latents_{images_key}.npy", lambda: encode_images(pipeline.vae, data.images))
    captions = captions_of_mode(data, FLAGS.caption_mode, pipeline.tokenizer)
    text_key = content_hash(folder, "text_encoder", "tokenizer")
    states = TextStates(pipeline, [texts[0] for texts in captions], directory, text_key)
    often = duplicated(len(data.images), FLAGS.weight_pc, FLAGS.seed)
    settings = {"scaling_factor": pipeline.vae.config.scaling_factor, "often": often, "T": timesteps(pipeline)}
    indices = make_shards(torch.zeros(len(data.images)), FLAGS.client_num, FLAGS.split, FLAGS.seed)
    return [
        flags.call(FLAGS, CaptionBatches, moments, captions, states, index, device, shard=k, **settings)
        for k, index in enumerate(indices)
    ]


def timesteps(pipeline):
    return pipeline.scheduler.config.num_train_timesteps


def make_shards_of_this_process(pipeline, batches, device):
    """Shard k is trained by process k mod P; all K sub-models start from the pipeline's UNet."""
    diffusers, _ = libraries()
    scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
    objective = partial(LatentTrainer, scheduler=scheduler, parts=FLAGS.accumulate)
    shards = []
    for number in range(distributed.rank(), len(batches), distributed.world_size()):
        unet = copy.deepcopy(pipeline.unet).to(device)
        own = {"ema_decay": FLAGS.ema_decay or None, "offload": FLAGS.shard_state == "cpu"}
        learner = flags.call(FLAGS, Learner, unet, objective, **own)
        agc = AntiGradientControl(
            timesteps(pipeline), FLAGS.mem_ratio, FLAGS.arr_ema_decay, FLAGS.anti_grad, FLAGS.anti_grad_weight
        ).to(device)
        shards.append(Shard(number, batches[number], learner, agc))
    return shards


def wait_for_all_shards(interruption, logdir):
    """Wait for the other processes' shards; if one was stopped meanwhile, so is this one."""
    try:
        distributed.barrier()
    except RuntimeError:  # another process has gone
        if interruption:
            interruption.exit(logdir)
        raise


def preview(pipeline, captions, unet):
    """Images in [-1, 1] of the first captions by a UNet, from the same noise at all times of the run."""
    pipeline.unet = unet
    prompts = [texts[0] for texts in captions[: FLAGS.sample_size]]
    side = FLAGS.resolution // pipeline.vae_scale_factor
    latents = sample_noise(FLAGS.seed, range(len(prompts)), (unet.config.in_channels, side, side), "cpu")()
    return 2 * generate(pipeline, prompts, latents, FLAGS.sample_steps, FLAGS.guidance) - 1


def main():
    if not FLAGS.train:
        raise UsageError("nothing to do: add --train (text_to_image.all_in evaluates)")
    flags.check(FLAGS)
    device = pick_device(FLAGS.device, FLAGS.precision)
    with distributed.main_first():
        folder = find_folder(FLAGS.pretrained, FLAGS.download)
        data = flags.call(FLAGS, load_folder, FLAGS.data_root)
        flags.check_data(FLAGS, data)
        unet_folder = find_unet(FLAGS.unet) if FLAGS.unet else folder / "unet"
        pipeline = load_pipeline(folder, unet_folder)
        if FLAGS.unet_from_scratch:
            torch.manual_seed(derive_seed(FLAGS.seed, "weights"))
            pipeline.unet = type(pipeline.unet).from_config(pipeline.unet.config)
        if FLAGS.gradient_checkpointing:
            pipeline.unet.enable_gradient_checkpointing()
        flags.check_pipeline(FLAGS, pipeline)
        pipeline.vae.to(device)
        pipeline.text_encoder.to(device)
        batches = make_batches(data, pipeline, folder, device)
    pipeline_hash = content_hash(folder, "vae", "text_encoder", "tokenizer") + content_hash(unet_folder)
    train(data, pipeline, pipeline_hash, batches, device, Path(FLAGS.logdir))


if __name__ == "__main__":
    run(main)

"""IET-AGC for Stable Diffusion (Liu et al. 2024): fine-tuning that does not memorise captioned images.

    python -m text_to_image.main_fed --train --pretrained=pipeline --data_root=images --captions=text.csv
    torchrun --nproc_per_node=4 -m text_to_image.main_fed --train ...    # the shards side by side

--client_num=1 --anti_grad=off is plain fine-tuning. What diffusers loads is checkpoint_round{r}/unet in
--logdir, or with --lora_rank the LoRA in checkpoint_round{r}. The algorithm is training/rounds.py.
"""

import copy
from pathlib import Path

import torch
from absl.flags import FLAGS

from text_to_image import build
from text_to_image.data import duplicated
from text_to_image.flags import check_data, default_lr, define
from text_to_image.lora import Adapter, save_lora
from text_to_image.pipeline import remove_unets, save_unet
from training.build import agc, logger, schedule, sizes
from training.ensemble import Shard
from training.launch import announce, check_warmup, pick_device, run
from training.logdir import say_young_ema
from training.resume import resume_shards, save_average
from training.rounds import steps_done, train
from utils import distributed
from utils.errors import UsageError
from utils.images import keep_apart


def make_shards(data, pipeline, scheduler, folder, slots, device):
    """The shards of this process, those of numbers k mod P; all start from the pipeline's UNet."""
    T, scaling_factor = scheduler.config.num_train_timesteps, pipeline.vae.config.scaling_factor
    with distributed.main_first():
        encoded = build.encoded(FLAGS, data, pipeline, folder)
    often = duplicated(len(data.images), FLAGS.weight_pc, FLAGS.seed)
    settings, shards = {"scaling_factor": scaling_factor, "often": often, "T": T}, []
    start = Adapter(pipeline.unet.to(device)) if FLAGS.lora_rank else pipeline.unet
    for k, of_shard in enumerate(slots):
        batches = build.batches(FLAGS, data, encoded, of_shard, device, shard=k, **settings)
        if k % distributed.world_size() != distributed.rank():
            continue
        learner = build.learner(FLAGS, copy.deepcopy(start).to(device), scheduler)
        counts = torch.zeros(2, len(data.images), dtype=torch.int64, device=device)
        shards.append(Shard(k, batches, learner, agc(FLAGS, T).to(device), *counts))
    return shards


def main():
    if not FLAGS.train:
        raise UsageError("nothing to do: add --train (text_to_image.all_in evaluates)")
    logdir = Path(FLAGS.logdir)
    default_lr(FLAGS)
    written = {"logdir": FLAGS.logdir, "cache_dir": FLAGS.cache_dir}
    keep_apart([FLAGS.data_root], {"heldout": FLAGS.heldout} if FLAGS.watch_step else {}, written)
    device = pick_device(FLAGS.device, FLAGS.precision)

    # whatever can be wrong shows here, before the long work
    pipeline, folder, unet_folder, scheduler = build.pipeline(FLAGS)
    data = build.dataset(FLAGS)
    check_data(FLAGS, data)
    pipeline.vae.to(device)
    pipeline.text_encoder.to(device)
    slots = build.slots(FLAGS, data)
    build.check_batches(FLAGS, data, slots)
    K, own_steps = len(slots), FLAGS.total_round * FLAGS.local_steps
    check_warmup(FLAGS.warmup, own_steps)

    def save(weights, folder):
        (save_lora if FLAGS.lora_rank else save_unet)(shards[0].learner.net, weights, folder)

    watch = build.watch(FLAGS, data, pipeline, device, save)
    directory = build.log_directory(FLAGS, data, folder, unet_folder)
    if FLAGS.fresh and FLAGS.overwrite and distributed.is_main():
        remove_unets(logdir)

    shards = make_shards(data, pipeline, scheduler, folder, slots, device)
    work = {"shards": K, "steps_in_all": K * own_steps}
    net = shards[0].learner.net
    announce(device, net, len(data.images), FLAGS.batch_size, asked_for=FLAGS.device, **work)
    steps_per_round = [FLAGS.local_steps] * K
    rounds_done, seconds, exchanged = resume_shards(shards, steps_per_round, logdir, FLAGS.total_round)
    watch.begin(logdir, steps_done(shards))
    directory.begin(steps_done(shards))
    say_young_ema(logdir, own_steps)
    if not FLAGS.lora_rank:
        pipeline.unet = shards[0].learner.ema  # what it started from is needed no more

    def publish(state, is_due):
        if is_due:
            save(state["global_ema_model"], logdir / f"checkpoint_round{state['round']}")
        save_average(logdir, state, publish=False, keep=FLAGS.keep)

    done = sum(shard.learner.step for shard in shards)
    train(
        shards, exchanged or slots, schedule(FLAGS, sizes(FLAGS, data, slots), steps_per_round),
        logger(FLAGS, logdir, own_steps * len(shards), done, seconds), first_round=rounds_done + 1, extra={},
        slots_of_round=lambda r: build.slots(FLAGS, data, r) if FLAGS.reshard else None,
        preview=lambda unet: build.preview(FLAGS, pipeline, unet, data.captions), publish=publish,
        watch=watch,
    )  # fmt: skip


if __name__ == "__main__":
    run(main, define)

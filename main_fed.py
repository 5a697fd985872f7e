"""IET-AGC (Liu et al. 2024): iterative ensemble training with anti-gradient control.

    python main_fed.py --train --flagfile=config/DIGITS.txt --client_num=4 --local_epoch=50 --total_round=10
    torchrun --nproc_per_node=4 main_fed.py --train --flagfile=config/CIFAR10.txt    # the shards side by side

The four arms of the ablation: IET-AGC as it is, IET with --anti_grad=off, AGC with --client_num=1, and neither with
both, which is default training with a memory bank looking on. IET-AGC+ is --exchange=ring --augment_near_threshold.
"""

from functools import partial
from pathlib import Path

import torch
from absl import flags as absl_flags

from dataset import image_folders, load_dataset
from diffusion import GaussianDiffusionSampler, GaussianDiffusionTrainer
from training import flags
from training.averaging import average_learners
from training.batches import ShardBatches
from training.ensemble import Shard, total_of
from training.launch import Interruption, announce, check_warmup, pick_device, run
from training.learner import Learner
from training.logdir import LogDirectory, say_young_ema
from training.logger import Logger, due
from training.resume import resume_shards, save_average, save_shard
from training.shards import exchange, exchange_is_due, make_shards, number_of_step
from training.weights import load_checkpoint, load_weights, weights_in
from utils import distributed
from utils.errors import UsageError
from utils.images import keep_apart
from utils.seeding import derive_seed

FLAGS = absl_flags.FLAGS
WARMUP = 15  # epochs of the shard


def train(data, device, logdir):
    # what the run is made of
    images = data.train.images.to(flags.data_device(FLAGS, device))
    slots = slots_of_round(data, 1)
    shards = make_shards_of_this_process(data, images, slots, device)
    sizes = [len(index) for index in slots]
    steps_per_round = [FLAGS.local_epoch * (size // FLAGS.batch_size) for size in sizes]
    net = shards[0].learner.net
    steps = {"steps_per_epoch": sum(steps_per_round) // FLAGS.local_epoch}
    steps |= {"steps_in_all": sum(steps_per_round) * FLAGS.total_round}
    announce(device, net, len(images), FLAGS.batch_size, shards=len(slots), **steps)
    check_warmup(shards[0].learner.warmup, FLAGS.total_round * min(steps_per_round))
    directory = LogDirectory(logdir, **flags.logdir(FLAGS, "main_fed", data, net.groups))
    rounds_done, seconds, exchanged = resume_shards(shards, steps_per_round, directory, FLAGS.total_round)
    say_young_ema(logdir, FLAGS.total_round * min(steps_per_round))
    slots = exchanged or slots
    total = sum(FLAGS.total_round * steps_per_round[shard.number] for shard in shards)
    done = sum(shard.learner.step for shard in shards)
    logger = flags.call(FLAGS, Logger, logdir, total, done, seconds=seconds)

    with Interruption() as interruption, logger:
        for r in range(rounds_done + 1, FLAGS.total_round + 1):
            if FLAGS.reshard:
                slots = slots_of_round(data, r)
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
                            logger.images(f"shard{k}_step{step}", step, partial(sample, learner.ema, data))
                        if due(step, FLAGS.save_step) or round_ends or stop:
                            logger.flush()
                            state = {**shard.state_dict(), "norm_groups": net.groups, "seconds": logger.seconds}
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
                        draw = partial(sample, shards[0].learner.ema, data)
                        logger.images(f"average_round{r}", sum(steps_per_round) * r, draw)
                logger.flush()
                state = {"global_model": average, "global_ema_model": ema_average, "index_array": all_counts}
                state |= {"norm_groups": net.groups, "round": r, "averaged": not exchanges, "seconds": logger.seconds}
                state |= {"shards": slots} if FLAGS.exchange != "off" else {}
                publish = due(r, FLAGS.save_round) or r == FLAGS.total_round
                save_average(logdir, state, publish, FLAGS.keep)
        logger.finish(sum(steps_per_round) * FLAGS.total_round)


def slots_of_round(data, r):
    """The slots of the training set that each of the K shards has in round r, before any exchange."""
    split, slot_image = flags.split_of(FLAGS), data.slot_image
    r = r - 1 if FLAGS.reshard else 0
    return make_shards(data.train.labels, FLAGS.client_num, split, FLAGS.seed, slot_image, FLAGS.duplicates_in, r)


def make_shards_of_this_process(data, images, slots, device):
    """Shard k is trained by process k mod P; all K sub-models start from the same weights."""
    start = load_checkpoint(FLAGS.check_dir) if FLAGS.check_dir else None
    labels = data.train.labels if FLAGS.use_labels else None
    shards = []
    for k, index in enumerate(slots):
        batches = flags.call(FLAGS, ShardBatches, images, labels, index, device, hflip=data.hflip, shard=k)
        if k % distributed.world_size() != distributed.rank():
            continue
        torch.manual_seed(derive_seed(FLAGS.seed, "weights"))
        net = flags.unet(FLAGS, start, FLAGS.check_dir).to(device)
        warmup = WARMUP * batches.steps_per_epoch if FLAGS.warmup is None else FLAGS.warmup
        objective = partial(flags.call, FLAGS, GaussianDiffusionTrainer)
        learner = flags.call(FLAGS, Learner, net, objective, warmup=warmup, offload=FLAGS.shard_state == "cpu")
        if start:
            for network, use_ema in ((learner.net, False), (learner.ema, True)):
                weights = weights_in(start, use_ema, FLAGS.check_dir)
                load_weights(network, weights, FLAGS.check_dir)
        agc = flags.agc(FLAGS, FLAGS.T).to(device)
        counts = torch.zeros(2, len(images), dtype=torch.int64, device=device)
        shards.append(Shard(k, batches, learner, agc, *counts))
    return shards


def sample(net, data):
    """A grid of images of a network trained on the data, from the same noise at all times of the run."""
    device = next(net.parameters()).device
    sampler = GaussianDiffusionSampler(net, **flags.sampler(FLAGS)).to(device)
    return sampler(*flags.sample_grid(FLAGS, data, device))


def main():
    if not FLAGS.train:
        raise UsageError("nothing to do: add --train (all_in.py evaluates)")
    logdir = Path(FLAGS.logdir or "logs/iet_agc")
    device = pick_device(FLAGS.device, FLAGS.precision)
    flags.default_resize(FLAGS, logdir)
    folders = flags.call(FLAGS, image_folders, FLAGS.dataset)
    keep_apart(folders, {"heldout": FLAGS.heldout}, {"logdir": logdir})
    with distributed.main_first():
        data = flags.call(FLAGS, load_dataset, FLAGS.dataset)
    flags.check_data(FLAGS, data)
    if FLAGS.client_num < distributed.world_size():
        raise UsageError(
            f"--client_num={FLAGS.client_num} with {distributed.world_size()} processes: a shard is trained by one "
            f"process, so start at most {FLAGS.client_num}, or make more shards"
        )
    train(data, device, logdir)


if __name__ == "__main__":
    run(main)

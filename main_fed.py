"""IET-AGC (Liu et al. 2024): iterative ensemble training with anti-gradient control.

    python main_fed.py --train --flagfile=config/DIGITS.txt --client_num=4 --local_epoch=50 --total_round=10
    torchrun --nproc_per_node=4 main_fed.py --train --flagfile=config/CIFAR10.txt    # the shards side by side

The four arms of the ablation: IET-AGC as it is, IET with --anti_grad=off, AGC with --client_num=1, and neither with
both, which is default training with a memory bank looking on.
"""

if __name__ == "__main__":  # before the imports that take seconds
    import startup

    startup.prepare()

from dataclasses import dataclass
from pathlib import Path

import torch
from absl import flags as absl_flags

import distributed
from dataset import load_dataset
from diffusion import GaussianDiffusionSampler
from errors import UsageError
from model import UNet
from score.generate import draw_labels
from seeding import derive_seed, generator
from training import checkpoint, flags
from training.agc import AntiGradientControl
from training.averaging import average_learners
from training.batches import ShardBatches
from training.command import announce, pick_device, run
from training.interruption import Interruption
from training.learner import Learner
from training.logger import Logger, due
from training.shards import Schedule, default_split, make_shards

FLAGS = absl_flags.FLAGS
WARMUP = 15  # epochs of the shard


@dataclass(frozen=True)
class Shard:
    """A part of the training images and the sub-model that trains on it."""

    number: int
    batches: ShardBatches
    learner: Learner
    agc: AntiGradientControl


def train(data, device, logdir):
    images = data.train.images.to(flags.data_device(FLAGS, device))
    batches = make_batches(data, images, device)
    shards = make_shards_of_this_process(batches, device)
    schedule = Schedule(tuple(FLAGS.local_epoch * shard.steps_per_epoch for shard in batches))
    steps = sum(shard.steps_per_epoch for shard in batches)
    announce(device, shards[0].learner.net, len(images), FLAGS.batch_size, shards=len(batches), steps_per_epoch=steps)
    groups = shards[0].learner.net.groups
    # after whatever else can be wrong
    directory = checkpoint.LogDirectory(logdir, **flags.logdir(FLAGS, "main_fed", data, groups))
    skip_counts = torch.zeros(len(images), dtype=torch.int64, device=device)
    rounds_done, earlier = resume(shards, schedule, skip_counts, directory)
    total = sum(schedule.end(shard.number, FLAGS.total_round) for shard in shards)
    done = sum(shard.learner.step for shard in shards)
    settings = {"log_step": FLAGS.log_step, "max_bad_steps": FLAGS.max_bad_steps}
    logger = Logger(logdir, total, done, **settings, **earlier)

    with Interruption() as interruption, logger:
        for r in range(rounds_done + 1, FLAGS.total_round + 1):
            for shard in shards:
                with shard.learner.on_device():
                    train_shard(shard, r, schedule, skip_counts, interruption, logger, logdir)
            wait_for_all_shards(interruption, logger)

            learners, numbers = [shard.learner for shard in shards], [shard.number for shard in shards]
            average, ema_average = average_learners(learners, numbers, [len(shard.index) for shard in batches])
            all_counts = distributed.total(skip_counts.clone())
            logger.memorization(all_counts, {shard.number: shard.agc.bank for shard in shards}, r)
            if distributed.is_main():
                if FLAGS.sample_step:
                    with shards[0].learner.on_device():
                        logger.images(f"average_round{r}", sum(schedule.steps) * r, sample(shards[0].learner.ema))
                state = {"global_model": average, "global_ema_model": ema_average, "index_array": all_counts.cpu()}
                state |= {"norm_groups": groups, "round": r, "seconds": logger.seconds}
                logger.flush()
                publish = due(r, FLAGS.save_round) or r == FLAGS.total_round
                checkpoint.save_average(logdir, state, publish, FLAGS.keep)
        logger.finish(sum(schedule.steps) * FLAGS.total_round)
    directory.close()


def resume(shards, schedule, skip_counts, directory):
    """Continue from the newest good files; returns the rounds done, and what the logger must know."""
    logdir = directory.path
    found = checkpoint.newest_round(schedule, logdir) if distributed.is_main() else None
    r, steps, average, later = distributed.from_main(found)
    seconds = checkpoint.restore_shards(shards, schedule, skip_counts, logdir, r, steps, average)
    if any(steps):
        print(f"continuing in {logdir}: {r} rounds and {sum(steps)} steps done")
    elif later:
        print(f"{logdir}: nothing in it can be continued, starting anew")
    if r > FLAGS.total_round:
        raise UsageError(
            f"--total_round={FLAGS.total_round}: the run in {logdir} has done {r}: give at least that, or choose "
            "another --logdir"
        )
    directory.begin(sum(steps), later)
    return r, {"seconds": seconds, "last_save": average}


def train_shard(shard, r, schedule, skip_counts, interruption, logger, logdir):
    """The steps of one shard in round r: the inner loop of the paper's algorithm."""
    learner, last = shard.learner, schedule.end(shard.number, r)
    while learner.step < last:
        batch = shard.batches(learner.step)
        lr = learner.lr
        losses = learner.losses(batch)
        loss, keep = shard.agc(losses, batch.t)
        loss, applied = learner.update(loss)
        skip_counts[batch.index] += ~keep

        step, where = schedule.number(shard.number, learner.step), {"round": r, "shard": shard.number}
        logger.update(step, loss, applied, lr, FLAGS.batch_size, keep=keep, **where)
        if due(step, FLAGS.sample_step):
            logger.images(f"shard{shard.number}_step{step}", step, sample(learner.ema))
        round_ends, stop = learner.step == last, bool(interruption)
        if round_ends or stop:
            logger.line(step, **where)
        if due(step, FLAGS.save_step) or round_ends or stop:
            logger.flush()
            own = {"bank": shard.agc.bank, "skip_counts": skip_counts[shard.batches.index], "seconds": logger.seconds}
            state, end_of_last_round = {**learner.state_dict(), **own}, schedule.end(shard.number, r - 1)
            logger.last_save = checkpoint.save_shard(logdir, shard.number, state, end_of_last_round, FLAGS.keep)
        if stop:
            interruption.exit(logger.last_save)


def make_batches(data, images, device):
    """The batches of all K shards."""
    labels = data.train.labels if FLAGS.use_labels else None
    split = FLAGS.split or default_split(FLAGS.dataset)
    indices = make_shards(data.train.labels, FLAGS.client_num, split, FLAGS.seed)
    settings = {**flags.batches(FLAGS), "hflip": data.hflip}
    return [ShardBatches(images, labels, index, device, **settings, shard=k) for k, index in enumerate(indices)]


def make_shards_of_this_process(batches, device):
    """Shard k is trained by process k mod P; all K sub-models start from the same weights."""
    start = checkpoint.load(FLAGS.check_dir) if FLAGS.check_dir else None
    shards = []
    for number in range(distributed.rank(), len(batches), distributed.world_size()):
        torch.manual_seed(derive_seed(FLAGS.seed, "weights"))
        net = UNet(**flags.unet(FLAGS, start, FLAGS.check_dir)).to(device)
        settings = flags.learner(FLAGS, WARMUP * batches[number].steps_per_epoch)
        learner = Learner(net, **settings, offload=FLAGS.shard_state == "cpu")
        if start:
            for network, use_ema in ((learner.net, False), (learner.ema, True)):
                weights = checkpoint.weights(start, use_ema, FLAGS.check_dir)
                checkpoint.load_weights(network, weights, FLAGS.check_dir)
        agc = AntiGradientControl(
            FLAGS.T, FLAGS.mem_ratio, FLAGS.arr_ema_decay, FLAGS.anti_grad, FLAGS.anti_grad_weight
        ).to(device)
        shards.append(Shard(number, batches[number], learner, agc))
    return shards


def wait_for_all_shards(interruption, logger):
    """Wait for the other processes' shards; if one was stopped meanwhile, so is this one."""
    try:
        distributed.barrier()
    except RuntimeError:  # another process has gone
        if interruption:
            interruption.exit(logger.last_save)
        raise


def sample(net):
    """A grid of images of a network, from the same noise at all times of the run."""
    device = next(net.parameters()).device
    shape = (FLAGS.sample_size, 3, FLAGS.img_size, FLAGS.img_size)
    x_T = torch.randn(shape, generator=generator("cpu", FLAGS.seed, "x_T")).to(device)
    labels = draw_labels(FLAGS.seed, range(len(x_T)), FLAGS.num_labels).to(device) if FLAGS.use_labels else None
    return GaussianDiffusionSampler(net, **flags.sampler(FLAGS)).to(device)(x_T, labels)


def main():
    if not FLAGS.train:
        raise UsageError("nothing to do: add --train (all_in.py evaluates)")
    logdir = Path(FLAGS.logdir or "logs/iet_agc")
    device = pick_device(FLAGS.device, FLAGS.precision)
    with distributed.main_first():
        data = load_dataset(**flags.data(FLAGS))
    flags.check_data(FLAGS, data)
    if FLAGS.client_num > len(data.train.images):
        raise UsageError(f"--client_num={FLAGS.client_num}: more shards than the {len(data.train.images)} images")
    if FLAGS.client_num < distributed.world_size():
        raise UsageError(
            f"--client_num={FLAGS.client_num} with {distributed.world_size()} processes: a shard is trained by one "
            f"process, so start at most {FLAGS.client_num}, or make more shards"
        )
    train(data, device, logdir)


if __name__ == "__main__":
    run(main)

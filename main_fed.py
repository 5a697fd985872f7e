"""IET-AGC (Liu et al. 2024): iterative ensemble training with anti-gradient control.

    python main_fed.py --train --flagfile=config/DIGITS.txt --client_num=4 --local_epoch=50 --total_round=10
    torchrun --nproc_per_node=4 main_fed.py --train --flagfile=config/CIFAR10.txt    # the shards side by side

The four arms of the ablation: IET-AGC as it is, IET with --anti_grad=off, AGC with --client_num=1, and neither with
both, which is default training with a memory bank looking on.
"""

if __name__ == "__main__":  # before the imports that take seconds
    from utils import startup

    startup.prepare()

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from absl import flags as absl_flags

from dataset import load_dataset
from diffusion import GaussianDiffusionSampler, GaussianDiffusionTrainer
from score.generate import draw_labels
from training import checkpoint, flags
from training.agc import AntiGradientControl
from training.averaging import average_learners
from training.batches import ShardBatches
from training.launch import Interruption, announce, pick_device, run
from training.learner import Learner
from training.logger import Logger, due
from training.shards import default_split, make_shards, number_of_step
from utils import distributed
from utils.errors import UsageError
from utils.seeding import derive_seed, generator

FLAGS = absl_flags.FLAGS
WARMUP = 15  # epochs of the shard


@dataclass(frozen=True)
class Shard:
    """A part of the training images and the sub-model that trains on it."""

    number: int
    batches: ShardBatches
    learner: Learner
    agc: AntiGradientControl

    def state_dict(self, skip_counts):
        """What the shard needs to continue. skip_counts (N,): of all training images."""
        own = {"norm_groups": self.learner.net.groups, "bank": self.agc.bank}
        return {**self.learner.state_dict(), **own, "skip_counts": skip_counts[self.batches.index]}


def train(data, device, logdir):
    # what the run is made of
    images = data.train.images.to(flags.data_device(FLAGS, device))
    batches = make_batches(data, images, device)
    shards = make_shards_of_this_process(batches, device)
    shard_sizes = [len(shard.index) for shard in batches]
    steps_per_round = [FLAGS.local_epoch * shard.steps_per_epoch for shard in batches]
    skip_counts = torch.zeros(len(images), dtype=torch.int64, device=device)
    steps, net = sum(shard.steps_per_epoch for shard in batches), shards[0].learner.net
    announce(device, net, len(images), FLAGS.batch_size, shards=len(batches), steps_per_epoch=steps)
    directory = checkpoint.LogDirectory(logdir, **flags.logdir(FLAGS, "main_fed", data, net.groups))
    rounds_done, seconds = resume(shards, steps_per_round, skip_counts, directory)
    total = sum(FLAGS.total_round * steps_per_round[shard.number] for shard in shards)
    done = sum(shard.learner.step for shard in shards)
    logger = flags.call(FLAGS, Logger, logdir, total, done, seconds=seconds)

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
                        skip_counts[batch.index] += ~keep

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
                if FLAGS.sample_step:
                    with shards[0].learner.on_device():
                        logger.images(f"average_round{r}", sum(steps_per_round) * r, sample(shards[0].learner.ema))
                logger.flush()
                state = {"global_model": average, "global_ema_model": ema_average, "index_array": all_counts.cpu()}
                state |= {"norm_groups": net.groups, "round": r, "seconds": logger.seconds}
                publish = due(r, FLAGS.save_round) or r == FLAGS.total_round
                checkpoint.save_average(logdir, state, publish, FLAGS.keep)
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


def make_batches(data, images, device):
    """The batches of all K shards."""
    labels = data.train.labels if FLAGS.use_labels else None
    split = FLAGS.split or default_split(FLAGS.dataset)
    indices = make_shards(data.train.labels, FLAGS.client_num, split, FLAGS.seed)
    return [
        flags.call(FLAGS, ShardBatches, images, labels, index, device, hflip=data.hflip, shard=k)
        for k, index in enumerate(indices)
    ]


def make_shards_of_this_process(batches, device):
    """Shard k is trained by process k mod P; all K sub-models start from the same weights."""
    start = checkpoint.load(FLAGS.check_dir) if FLAGS.check_dir else None
    shards = []
    for number in range(distributed.rank(), len(batches), distributed.world_size()):
        torch.manual_seed(derive_seed(FLAGS.seed, "weights"))
        net = flags.unet(FLAGS, start, FLAGS.check_dir).to(device)
        warmup = WARMUP * batches[number].steps_per_epoch if FLAGS.warmup is None else FLAGS.warmup
        objective = partial(flags.call, FLAGS, GaussianDiffusionTrainer)
        learner = flags.call(FLAGS, Learner, net, objective, warmup=warmup, offload=FLAGS.shard_state == "cpu")
        if start:
            for network, use_ema in ((learner.net, False), (learner.ema, True)):
                weights = checkpoint.weights(start, use_ema, FLAGS.check_dir)
                checkpoint.load_weights(network, weights, FLAGS.check_dir)
        agc = AntiGradientControl(
            FLAGS.T, FLAGS.mem_ratio, FLAGS.arr_ema_decay, FLAGS.anti_grad, FLAGS.anti_grad_weight
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
        data = flags.call(FLAGS, load_dataset, FLAGS.dataset)
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

"""IET-AGC (Liu et al. 2024): iterative ensemble training with anti-gradient control.

    python main_fed.py --train --flagfile=config/DIGITS.txt --client_num=4 --local_epoch=50 --total_round=10
    torchrun --nproc_per_node=4 main_fed.py --train --flagfile=config/CIFAR10.txt    # the shards side by side

The four arms of the ablation: IET-AGC as it is, IET with --anti_grad=off, AGC with --client_num=1, and neither with
both, which is default training with a memory bank looking on.
"""

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
from training import checkpoint, ensemble_state, flags
from training.agc import AntiGradientControl
from training.averaging import average_learners
from training.batches import ShardBatches
from training.command import pick_device, run
from training.interruption import Interruption
from training.learner import Learner
from training.logdir import open_logdir
from training.meter import Meter
from training.progress import Progress, due
from training.schedule import Schedule
from training.shards import default_split, make_shards

FLAGS = absl_flags.FLAGS
WARMUP = 15  # epochs of the shard


@dataclass(frozen=True)
class Shard:
    """A part of the training images and the sub-model that trains on it."""

    number: int
    batches: ShardBatches
    learner: Learner
    agc: AntiGradientControl
    meter: Meter


def train(data, device, logdir):
    images = data.train.images.to(flags.data_device(FLAGS, device))
    batches = make_batches(data, images, device)
    shards = make_shards_of_this_process(batches, device)
    schedule = Schedule(tuple(FLAGS.local_epoch * shard.steps_per_epoch for shard in batches))
    lock = open_logdir(logdir, **flags.logdir(FLAGS, "main_fed", data))  # after whatever the flags can have wrong
    skip_counts = torch.zeros(len(images), dtype=torch.int64, device=device)
    rounds_done, seconds = ensemble_state.restore(shards, schedule, skip_counts, logdir)
    total = sum(schedule.end(shard.number, FLAGS.total_round) for shard in shards)
    done = sum(shard.learner.step for shard in shards)

    with Interruption() as interruption, Progress(logdir, total, done, FLAGS.log_step, seconds) as progress:
        progress.last_save = ensemble_state.newest_file(logdir)
        for r in range(rounds_done + 1, FLAGS.total_round + 1):
            for shard in shards:
                with shard.learner.on_device():
                    train_shard(shard, r, schedule, skip_counts, interruption, progress, logdir)
            wait_for_all_shards(interruption, progress)

            learners, numbers = [shard.learner for shard in shards], [shard.number for shard in shards]
            average, ema_average = average_learners(learners, numbers, [len(shard.index) for shard in batches])
            all_counts = distributed.total(skip_counts.clone())
            progress.merge([shard.meter for shard in shards])
            progress.memorization(all_counts, {shard.number: shard.agc.bank for shard in shards}, r)
            if distributed.is_main():
                if FLAGS.sample_step:
                    with shards[0].learner.on_device():
                        progress.images(f"average_round{r}", sum(schedule.steps) * r, sample(shards[0].learner.ema))
                save_round(r, average, ema_average, all_counts, progress, logdir)
        progress.finish(sum(schedule.steps) * max(rounds_done, FLAGS.total_round))
    lock.close()


def train_shard(shard, r, schedule, skip_counts, interruption, progress, logdir):
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
        progress.update(shard.meter, step, loss, applied, lr, FLAGS.batch_size, keep=keep, **where)
        if due(step, FLAGS.sample_step):
            progress.images(f"shard{shard.number}_step{step}", step, sample(learner.ema))
        round_ends, stop = learner.step == last, bool(interruption)
        if round_ends:
            progress.line(shard.meter, step, **where)
        if due(step, FLAGS.save_step) or round_ends or stop:
            progress.last_save = save_shard(shard, schedule.end(shard.number, r - 1), skip_counts, progress, logdir)
        if stop:
            interruption.exit(progress.last_save)


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
        net = UNet(**flags.unet(FLAGS)).to(device)
        settings = flags.learner(FLAGS, WARMUP * batches[number].steps_per_epoch)
        learner = Learner(net, **settings, offload=FLAGS.shard_state == "cpu")
        if start:
            for network, use_ema in ((learner.net, False), (learner.ema, True)):
                weights = checkpoint.weights(start, use_ema, FLAGS.check_dir)
                checkpoint.load_weights(network, weights, FLAGS.check_dir)
        agc = AntiGradientControl(
            FLAGS.T, FLAGS.mem_ratio, FLAGS.arr_ema_decay, FLAGS.anti_grad, FLAGS.anti_grad_weight
        ).to(device)
        shards.append(Shard(number, batches[number], learner, agc, Meter(FLAGS.max_bad_steps)))
    return shards


def wait_for_all_shards(interruption, progress):
    """Wait for the other processes' shards; if one was stopped meanwhile, so is this one."""
    try:
        distributed.barrier()
    except RuntimeError:  # another process has gone
        if interruption:
            interruption.exit(progress.last_save)
        raise


def sample(net):
    """A grid of images of a network, from the same noise at all times of the run."""
    device = next(net.parameters()).device
    shape = (FLAGS.sample_size, 3, FLAGS.img_size, FLAGS.img_size)
    x_T = torch.randn(shape, generator=generator("cpu", FLAGS.seed, "x_T")).to(device)
    labels = draw_labels(FLAGS.seed, range(len(x_T)), FLAGS.num_labels).to(device) if FLAGS.use_labels else None
    return GaussianDiffusionSampler(net, **flags.sampler(FLAGS)).to(device)(x_T, labels)


def save_shard(shard, end_of_last_round, skip_counts, progress, logdir):
    """Write what the shard needs to continue: only the shard in work changes, so only its file is written."""
    path = ensemble_state.shard_file(logdir, shard.number, shard.learner.step)
    own = {"bank": shard.agc.bank, "skip_counts": skip_counts[shard.batches.index]}
    logs = {**progress.state(), **shard.meter.state()}
    checkpoint.save(path, {**shard.learner.state_dict(), **own, "progress": logs})
    ensemble_state.prune(shard.number, logdir, end_of_last_round, FLAGS.keep)
    return path


def save_round(r, average, ema_average, skip_counts, progress, logdir):
    """Write the averages: always for the next round to start from, and every --save_round rounds to keep."""
    state = {"global_model": average, "global_ema_model": ema_average, "index_array": skip_counts.cpu(), "round": r}
    state["progress"] = {**progress.state(), "metrics_lines": progress.metrics_lines}
    if due(r, FLAGS.save_round) or r == FLAGS.total_round:
        checkpoint.save(logdir / checkpoint.round_name(r), state)
    checkpoint.save(ensemble_state.average_file(logdir, r), state)
    ensemble_state.prune_averages(logdir, FLAGS.keep)


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

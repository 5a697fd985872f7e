"""IET-AGC (Liu et al. 2024): iterative ensemble training with anti-gradient control.

    python main_fed.py --train --flagfile=config/DIGITS.txt --client_num=4 --local_epoch=50 --total_round=10

The four arms of the ablation: IET-AGC as it is, IET with --anti_grad=off, AGC with --client_num=1, and neither with
both, which is default training with a memory bank looking on.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from absl import flags as absl_flags

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
from training.progress import Progress, due
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

    def steps(self, rounds):
        """The shard's own steps in so many rounds."""
        return rounds * FLAGS.local_epoch * self.batches.steps_per_epoch


def train(data, device, logdir):
    images = data.train.images.to(device)
    shards = make_all_shards(data, images, device)
    lock = open_logdir(logdir, **flags.logdir(FLAGS, "main_fed", data))  # after whatever the flags can have wrong
    skip_counts = torch.zeros(len(images), dtype=torch.int64, device=device)
    rounds_done, state = ensemble_state.restore(shards, skip_counts, logdir)
    total = sum(shard.steps(FLAGS.total_round) for shard in shards)
    logs = (logdir, total, FLAGS.log_step, FLAGS.max_bad_steps, state)

    with Interruption() as interruption, Progress(*logs) as progress:
        progress.last_save = state and ensemble_state.newest_file(logdir)
        for r in range(rounds_done + 1, FLAGS.total_round + 1):
            for shard in shards:
                while shard.learner.step < shard.steps(r):
                    batch = shard.batches(shard.learner.step)
                    lr = shard.learner.lr
                    losses = shard.learner.losses(batch)
                    loss, keep = shard.agc(losses, batch.t)
                    applied = shard.learner.update(loss)
                    skip_counts[batch.index] += ~keep

                    progress.update(loss, applied, lr, FLAGS.batch_size, keep=keep, round=r, shard=shard.number)
                    if due(progress.step, FLAGS.sample_step):
                        progress.images(f"shard{shard.number}_step{progress.step}", sample(shard.learner.ema))
                    round_ends, stop = shard.learner.step == shard.steps(r), bool(interruption)
                    if due(progress.step, FLAGS.save_step) or round_ends or stop:
                        progress.last_save = save_shard(shard, r - 1, skip_counts, progress, logdir)
                    if stop:
                        interruption.exit(progress.last_save)

            sizes = [len(shard.batches.index) for shard in shards]
            average, ema_average = average_learners([shard.learner for shard in shards], sizes)
            progress.memorization(skip_counts, [shard.agc.bank for shard in shards], r)
            if FLAGS.sample_step:
                progress.images(f"average_round{r}", sample(shards[0].learner.ema))
            save_round(r, average, ema_average, skip_counts, progress, logdir)
    lock.close()


def make_all_shards(data, images, device):
    """K shards of the images, with K sub-models that start from the same weights."""
    labels = data.train.labels.to(device) if FLAGS.use_labels else None
    split = FLAGS.split or default_split(FLAGS.dataset)
    indices = make_shards(data.train.labels, FLAGS.client_num, split, FLAGS.seed)
    shards = []
    for number, index in enumerate(indices):
        batches = ShardBatches(images, labels, index, **flags.batches(FLAGS), shard=number, hflip=data.hflip)
        torch.manual_seed(derive_seed(FLAGS.seed, "weights"))
        net = UNet(**flags.unet(FLAGS)).to(device)
        learner = Learner(net, **flags.learner(FLAGS, WARMUP * batches.steps_per_epoch))
        agc = AntiGradientControl(
            FLAGS.T, FLAGS.mem_ratio, FLAGS.arr_ema_decay, FLAGS.anti_grad, FLAGS.anti_grad_weight
        ).to(device)
        shards.append(Shard(number, batches, learner, agc))
    if FLAGS.check_dir:
        state = checkpoint.load(FLAGS.check_dir, device)
        for shard in shards:
            checkpoint.load_weights(
                shard.learner.net, checkpoint.weights(state, False, FLAGS.check_dir), FLAGS.check_dir
            )
            checkpoint.load_weights(
                shard.learner.ema, checkpoint.weights(state, True, FLAGS.check_dir), FLAGS.check_dir
            )
    return shards


def sample(net):
    """A grid of images of a network, from the same noise at all times of the run."""
    device = next(net.parameters()).device
    shape = (FLAGS.sample_size, 3, FLAGS.img_size, FLAGS.img_size)
    x_T = torch.randn(shape, generator=generator("cpu", FLAGS.seed, "x_T")).to(device)
    labels = draw_labels(FLAGS.seed, range(len(x_T)), FLAGS.num_labels).to(device) if FLAGS.use_labels else None
    return GaussianDiffusionSampler(net, **flags.sampler(FLAGS)).to(device)(x_T, labels)


def save_shard(shard, rounds_done, skip_counts, progress, logdir):
    """Write what the shard needs to continue: only the shard in work changes, so only its file is written."""
    path = ensemble_state.shard_file(logdir, shard.number, shard.learner.step)
    own = {"bank": shard.agc.bank, "skip_counts": skip_counts[shard.batches.index], "progress": progress.state()}
    checkpoint.save(path, {**shard.learner.state_dict(), **own})
    ensemble_state.prune(shard, logdir, rounds_done, FLAGS.keep)
    return path


def save_round(r, average, ema_average, skip_counts, progress, logdir):
    """Write the averages: always for the next round to start from, and every --save_round rounds to keep."""
    state = {"global_model": average, "global_ema_model": ema_average, "index_array": skip_counts.cpu(), "round": r}
    state["progress"] = progress.state()
    if due(r, FLAGS.save_round) or r == FLAGS.total_round:
        checkpoint.save(logdir / checkpoint.round_name(r), state)
    checkpoint.save(ensemble_state.average_file(logdir, r), state)
    ensemble_state.prune_averages(logdir, FLAGS.keep)


def main():
    if not FLAGS.train:
        raise UsageError("nothing to do: add --train (all_in.py evaluates)")
    logdir = Path(FLAGS.logdir or "logs/iet_agc")
    device = pick_device(FLAGS.device)
    data = load_dataset(**flags.data(FLAGS))
    flags.check_data(FLAGS, data)
    if FLAGS.client_num > len(data.train.images):
        raise UsageError(f"--client_num={FLAGS.client_num}: more shards than the {len(data.train.images)} images")
    train(data, device, logdir)


if __name__ == "__main__":
    run(main)

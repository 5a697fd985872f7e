"""Default training of a diffusion model (Ho et al. 2020): the baseline that IET-AGC is compared with.

python main.py --train --flagfile=config/DIGITS.txt --logdir=logs/digits
python main.py --eval  --flagfile=config/DIGITS.txt --logdir=logs/digits
"""

if __name__ == "__main__":  # before the imports that take seconds
    from utils import startup

    startup.prepare()

from functools import partial
from pathlib import Path

import torch
from absl import flags as absl_flags

from dataset import load_dataset
from diffusion import GaussianDiffusionSampler, GaussianDiffusionTrainer
from score.evaluate import Quality
from score.generate import draw_labels, generate
from score.inception import find_weights
from training import checkpoint, flags
from training.batches import ShardBatches
from training.launch import Interruption, announce, pick_device, run
from training.learner import Learner
from training.logger import Logger, due
from utils import distributed
from utils.errors import UsageError
from utils.files import make_directory, write_json
from utils.seeding import derive_seed, generator

FLAGS = absl_flags.FLAGS
WARMUP = 5000  # steps


def train(data, quality, device, logdir):
    # what the run is made of
    images = data.train.images.to(flags.data_device(FLAGS, device))
    labels = data.train.labels if FLAGS.use_labels else None
    whole, part = torch.arange(len(images)), distributed.share(FLAGS.batch_size)
    batches = flags.call(FLAGS, ShardBatches, images, labels, whole, device, hflip=data.hflip, part=part)
    torch.manual_seed(derive_seed(FLAGS.seed, "weights"))
    net = flags.unet(FLAGS).to(device)
    warmup = WARMUP if FLAGS.warmup is None else FLAGS.warmup
    objective = partial(flags.call, FLAGS, GaussianDiffusionTrainer)
    learner = flags.call(FLAGS, Learner, net, objective, warmup=warmup, share_batches=True)
    x_T, x_T_labels = sample_noise(device)
    sampler = GaussianDiffusionSampler(learner.ema, **flags.sampler(FLAGS)).to(device)
    announce(device, net, len(images), FLAGS.batch_size, steps_per_epoch=batches.steps_per_epoch)
    directory = checkpoint.LogDirectory(logdir, **flags.logdir(FLAGS, "main", data, net.groups))
    seconds = resume(learner, directory)
    writes = distributed.is_main()
    steps = FLAGS.total_steps, learner.step
    logger = flags.call(FLAGS, Logger, logdir, *steps, seconds=seconds, writes=writes)

    with Interruption() as interruption, logger:
        while learner.step < FLAGS.total_steps:
            torch.manual_seed(derive_seed(FLAGS.seed, "dropout", distributed.rank(), learner.step))
            batch = batches(learner.step)
            losses = learner.losses(batch)
            numbers = learner.update(losses.mean())

            step, stop = learner.step, interruption.of_any()
            last = step == FLAGS.total_steps
            logger.step(step, numbers, now=last or stop)
            if due(step, FLAGS.sample_step) and writes:
                logger.images(f"ema_step{step}", step, sampler(x_T, x_T_labels))
            if due(step, FLAGS.eval_step):
                for name, network in (("net", learner.net), ("ema", learner.ema)):
                    logger.write({"step": step, "weights": name, **score(network, quality)})
            milestone = due(step, FLAGS.save_step) or last
            if (milestone or stop) and writes:
                logger.flush()
                state = {**learner.state_dict(), "norm_groups": net.groups, "x_T": x_T, "seconds": logger.seconds}
                checkpoint.save_step(logdir, state, milestone, FLAGS.keep)
            if stop:
                distributed.barrier()  # rank 0 has saved
                interruption.exit(logdir)
        logger.finish(learner.step)


def resume(learner, directory):
    """Continue from the newest good checkpoint, if there is one; returns the seconds of training until then."""
    logdir, seconds = directory.path, 0.0
    path, later = distributed.from_main(checkpoint.newest_step(logdir) if distributed.is_main() else None)
    if path:
        state = checkpoint.load(path, check=False)  # rank 0 has checked it
        checkpoint.restore(learner, state, path)
        seconds = state["seconds"]
    if learner.step > FLAGS.total_steps:
        raise UsageError(
            f"--total_steps={FLAGS.total_steps}: the run in {logdir} has done {learner.step}: give at least that, or "
            "choose another --logdir"
        )
    directory.begin(learner.step, later)
    if path:
        print(f"continuing from {path}: {learner.step} of {FLAGS.total_steps} steps done")
    elif later:
        print(f"{logdir}: no checkpoint in it can be continued, starting anew")
    return seconds


def sample_noise(device):
    """x_T and classes (None without) of the sample grids, the same at all times of the run."""
    shape = (FLAGS.sample_size, 3, FLAGS.img_size, FLAGS.img_size)
    x_T = torch.randn(shape, generator=generator("cpu", FLAGS.seed, "x_T")).to(device)
    labels = draw_labels(FLAGS.seed, range(len(x_T)), FLAGS.num_labels).to(device) if FLAGS.use_labels else None
    return x_T, labels


def score(net, quality):
    """IS and FID (or fpd) of images generated by a network."""
    sampler = GaussianDiffusionSampler(net, **flags.sampler(FLAGS)).to(next(net.parameters()).device)
    return quality(generate(sampler, **flags.generation(FLAGS)))


def evaluate(data, quality, device, logdir):
    path = checkpoint.find(FLAGS.unet_dir or logdir)
    state = checkpoint.load(path, device)
    net = flags.unet(FLAGS, state, path).to(device)
    if not FLAGS.train:
        announce(device, net, len(data.train.images), FLAGS.batch_size)
    results = {"checkpoint": str(path), "num_images": FLAGS.num_images}
    for name, use_ema in (("net", False), ("ema", True)):
        checkpoint.load_weights(net, checkpoint.weights(state, use_ema, path), path)
        results[name] = score(net, quality)
        print(f"{path} {name}: " + ", ".join(f"{key} {value:.4f}" for key, value in results[name].items()))
    if distributed.is_main():
        write_json(logdir / f"eval_{path.stem}.json", results)


def main():
    if not (FLAGS.train or FLAGS.eval):
        raise UsageError("nothing to do: add --train and/or --eval")
    logdir = Path(FLAGS.logdir or "logs/default")
    device = pick_device(FLAGS.device, FLAGS.precision)
    if FLAGS.train and FLAGS.batch_size % distributed.world_size():
        raise UsageError(
            f"--batch_size={FLAGS.batch_size} is of all processes together: it must be a multiple of the "
            f"{distributed.world_size()} that were started"
        )
    weights = None
    if (FLAGS.eval or FLAGS.eval_step) and FLAGS.fid_features == "inception":
        weights = find_weights(FLAGS.inception_weights)
    if FLAGS.eval and not FLAGS.train:
        checkpoint.find(FLAGS.unet_dir or logdir)
    with distributed.main_first():
        data = flags.call(FLAGS, load_dataset, FLAGS.dataset)
    flags.check_data(FLAGS, data)
    quality = None
    if FLAGS.eval or FLAGS.eval_step:
        reference = flags.reference_images(FLAGS, data)
        quality = flags.call(FLAGS, Quality, reference, FLAGS.num_images, weights, device)
    if FLAGS.train:
        train(data, quality, device, logdir)
    if FLAGS.eval:
        make_directory(logdir, "logdir")
        evaluate(data, quality, device, logdir)


if __name__ == "__main__":
    run(main)

"""Default training of a diffusion model (Ho et al. 2020): the baseline that IET-AGC is compared with.

python main.py --train --flagfile=config/DIGITS.txt --logdir=logs/digits
python main.py --eval  --flagfile=config/DIGITS.txt --logdir=logs/digits
"""

from pathlib import Path

import torch
from absl import flags as absl_flags

import distributed
from dataset import load_dataset
from diffusion import GaussianDiffusionSampler
from errors import UsageError
from files import make_directory, write_json
from model import UNet
from score.generate import draw_labels, generate
from score.inception import find_weights
from score.quality import Quality
from seeding import derive_seed, generator
from training import checkpoint, flags
from training.batches import ShardBatches
from training.command import pick_device, run
from training.interruption import Interruption
from training.learner import Learner
from training.logdir import open_logdir
from training.meter import Meter
from training.progress import Progress, due, restore_lines
from training.saves import Saves

FLAGS = absl_flags.FLAGS
WARMUP = 5000  # steps


def train(data, quality, device, logdir):
    images = data.train.images.to(flags.data_device(FLAGS, device))
    labels = data.train.labels if FLAGS.use_labels else None
    whole, part = torch.arange(len(images)), distributed.share(FLAGS.batch_size)
    batches = ShardBatches(images, labels, whole, device, **flags.batches(FLAGS), hflip=data.hflip, part=part)

    torch.manual_seed(derive_seed(FLAGS.seed, "weights"))
    net = UNet(**flags.unet(FLAGS)).to(device)
    learner = Learner(net, **flags.learner(FLAGS, WARMUP), share_batches=True)
    lock = open_logdir(logdir, **flags.logdir(FLAGS, "main", data))  # after whatever the flags can have wrong
    shape = (FLAGS.sample_size, 3, FLAGS.img_size, FLAGS.img_size)
    x_T = torch.randn(shape, generator=generator("cpu", FLAGS.seed, "x_T")).to(device)
    state, meter = resume(learner, logdir), Meter(FLAGS.max_bad_steps)
    x_T = state.get("x_T", x_T).to(device)
    progress_state = state.get("progress", {"seconds": 0.0})
    meter.restore(progress_state)

    sampler = GaussianDiffusionSampler(learner.ema, **flags.sampler(FLAGS)).to(device)
    x_T_labels = draw_labels(FLAGS.seed, range(len(x_T)), FLAGS.num_labels).to(device) if FLAGS.use_labels else None
    saves = Saves(logdir, FLAGS.keep, state.get("rolling", []))
    logs = (logdir, FLAGS.total_steps, learner.step, FLAGS.log_step, progress_state["seconds"])

    with Interruption() as interruption, Progress(*logs) as progress:
        agreed = distributed.Agreement()
        progress.last_save = state.get("path")
        while learner.step < FLAGS.total_steps:
            batch = batches(learner.step)
            lr = learner.lr
            loss = learner.losses(batch).mean()
            loss, applied = learner.update(loss)

            step = learner.step
            progress.update(meter, step, loss, applied, lr, FLAGS.batch_size)
            if due(step, FLAGS.sample_step) and distributed.is_main():
                progress.images(f"ema_step{step}", step, sampler(x_T, x_T_labels))
            if due(step, FLAGS.eval_step):
                for name, net in (("net", learner.net), ("ema", learner.ema)):
                    progress.write({"step": step, "weights": name, **score(net, quality)}, prefix=f"{name}/")
            milestone, stop = due(step, FLAGS.save_step) or step == FLAGS.total_steps, agreed(bool(interruption))
            if (milestone or stop) and distributed.is_main():
                logs = {**progress.state(), **meter.state(), "metrics_lines": progress.metrics_lines}
                state = {**learner.state_dict(), "x_T": x_T, "progress": logs}
                progress.last_save = saves.save(checkpoint.step_name(step), state, milestone)
            if stop:
                distributed.barrier()  # rank 0 has saved
                interruption.exit(progress.last_save)
        progress.line(meter, learner.step)
        progress.finish(learner.step)
    lock.close()


def resume(learner, logdir):
    """Continue from the newest good checkpoint of the log directory, if there is one; returns what it holds, or {}."""
    path = distributed.from_main(newest_whole_checkpoint(logdir) if distributed.is_main() else None)
    state = {}
    if path:
        state = checkpoint.load(path)
        checkpoint.restore(learner, state, path)
        state["path"] = path
        print(f"continuing from {path}: {learner.step} of {FLAGS.total_steps} steps done")
    if distributed.is_main():
        logs = state.get("progress", {})
        # a run that was longer would not have written the line that its last step is in
        last = learner.step - (logs.get("steps", 0) > 0)
        is_of_the_past = lambda line: line["step"] <= (learner.step if "weights" in line else last)  # noqa: E731
        restore_lines(logdir, is_of_the_past, logs.get("metrics_lines", 0))
    return state


def newest_whole_checkpoint(logdir):
    """The path of the newest checkpoint that is not damaged, or None."""
    paths = checkpoint.newest_first(logdir)
    path = next((path for path in paths if checkpoint.is_whole(path)), None)
    if paths and not path:
        print(f"{logdir}: no checkpoint in it can be continued, starting anew")
    return path


def score(net, quality):
    """IS and FID (or fpd) of images generated by a network."""
    sampler = GaussianDiffusionSampler(net, **flags.sampler(FLAGS)).to(next(net.parameters()).device)
    return quality(generate(sampler, **flags.generation(FLAGS)))


def evaluate(quality, device, logdir):
    path = checkpoint.find(FLAGS.unet_dir or logdir)
    state = checkpoint.load(path, device)
    net = UNet(**flags.unet(FLAGS)).to(device)
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
        data = load_dataset(**flags.data(FLAGS))
    flags.check_data(FLAGS, data)
    quality = None
    if FLAGS.eval or FLAGS.eval_step:
        reference = flags.reference_images(FLAGS, data)
        quality = Quality(reference, FLAGS.num_images, weights, **flags.quality(FLAGS), device=device)
    if FLAGS.train:
        train(data, quality, device, logdir)
    if FLAGS.eval:
        make_directory(logdir, "logdir")
        evaluate(quality, device, logdir)


if __name__ == "__main__":
    run(main)

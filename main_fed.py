"""IET-AGC (Liu et al. 2024): iterative ensemble training with anti-gradient control.

    python main_fed.py --train --flagfile=config/DIGITS.txt --client_num=4 --local_epoch=50 --total_round=10
    torchrun --nproc_per_node=4 main_fed.py --train --flagfile=config/CIFAR10.txt    # the shards side by side

The four arms of the ablation: IET-AGC as it is, IET with --anti_grad=off, AGC with --client_num=1, and
neither with both, which is default training with a memory bank looking on. IET-AGC+ is --exchange=ring
--augment_near_threshold. The algorithm is training/rounds.py.
"""

from pathlib import Path

import torch
from absl.flags import FLAGS

from dataset import image_folders
from score.record import say
from training import build
from training.ensemble import Shard
from training.flags import define
from training.launch import announce, check_processes, check_warmup, pick_device, run
from training.logdir import say_young_ema
from training.recorded import default_resize, start_warning
from training.resume import resume_shards, save_average
from training.rounds import steps_done, train
from training.weights import load_checkpoint, load_weights, weights_in
from utils import distributed
from utils.errors import UsageError
from utils.images import keep_apart
from utils.seeding import derive_seed

WARMUP = 15  # epochs of the shard


def make_shards(data, images, slots, device):
    """The shards of this process: shard k is process k mod P's. All start from the same weights."""
    start = load_checkpoint(FLAGS.check_dir) if FLAGS.check_dir else None
    say(start_warning(FLAGS, FLAGS.check_dir) if start else None)
    shards = []
    for k, of_shard in enumerate(slots):
        batches = build.batches(FLAGS, data, images, of_shard, device, shard=k)
        if k % distributed.world_size() != distributed.rank():
            continue
        torch.manual_seed(derive_seed(FLAGS.seed, "weights"))
        net = build.unet(FLAGS, start, FLAGS.check_dir).to(device)
        warmup = WARMUP * batches.steps_per_epoch if FLAGS.warmup is None else FLAGS.warmup
        learner = build.learner(FLAGS, net, warmup)
        for network, use_ema in ((learner.net, False), (learner.ema, True)) if start else ():
            load_weights(network, weights_in(start, use_ema, FLAGS.check_dir), FLAGS.check_dir)
        counts = torch.zeros(2, len(images), dtype=torch.int64, device=device)
        shards.append(Shard(k, batches, learner, build.agc(FLAGS, FLAGS.T).to(device), *counts))
    return shards


def main():
    if not FLAGS.train:
        raise UsageError("nothing to do: add --train (all_in.py evaluates)")
    logdir = Path(FLAGS.logdir or "logs/iet_agc")
    device = pick_device(FLAGS.device, FLAGS.precision)
    default_resize(FLAGS, logdir)
    folders = image_folders(FLAGS.dataset, FLAGS.data_root)
    keep_apart(folders, {"heldout": FLAGS.heldout}, {"logdir": logdir})
    with distributed.main_first():
        data = build.dataset(FLAGS)
    check_processes(FLAGS.client_num)

    images = data.train.images.to(build.data_device(FLAGS, device))
    slots = build.slots(FLAGS, data)
    build.check_sizes(FLAGS, lambda r: build.sizes(FLAGS, data, build.slots(FLAGS, data, r)))
    shards = make_shards(data, images, slots, device)
    net, warmup = shards[0].learner.net, shards[0].learner.warmup

    R, B, sizes = FLAGS.total_round, FLAGS.batch_size, build.sizes(FLAGS, data, slots)
    steps_per_round = [FLAGS.local_epoch * (size // B) for size in sizes]
    steps = {"steps_per_epoch": sum(steps_per_round) // FLAGS.local_epoch}
    steps |= {"steps_in_all": R * sum(steps_per_round)}
    announce(device, net, len(images), B, asked_for=FLAGS.device, shards=len(slots), **steps)
    check_warmup(warmup, R * min(steps_per_round))
    watch = build.watch(FLAGS, data, device)
    directory = build.log_directory(FLAGS, logdir, "main_fed", data, net.groups)
    rounds_done, seconds, exchanged = resume_shards(shards, steps_per_round, logdir, R)
    watch.begin(logdir, steps_done(shards))
    directory.begin(steps_done(shards))
    say_young_ema(logdir, R * min(steps_per_round))

    total = sum(R * steps_per_round[shard.number] for shard in shards)
    done = sum(shard.learner.step for shard in shards)
    x_T, labels = build.sample_grid(FLAGS, data, device)  # the same at all times of the run
    train(
        shards, exchanged or slots, build.schedule(FLAGS, sizes, steps_per_round),
        build.logger(FLAGS, logdir, total, done, seconds), first_round=rounds_done + 1,
        extra={"norm_groups": net.groups, "steps_per_round": steps_per_round},
        slots_of_round=lambda r: build.slots(FLAGS, data, r) if FLAGS.reshard else None,
        preview=lambda net: build.sampler(FLAGS, net)(x_T, labels),
        publish=lambda state, is_due: save_average(logdir, state, is_due, FLAGS.keep), watch=watch,
    )  # fmt: skip


if __name__ == "__main__":
    run(main, define)

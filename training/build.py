"""From flags to objects: the only place that turns flags into settings, every one by its name.

FLAGS: absl's values, of `training.flags.define`; what both halves have takes those of text_to_image too.
"""

import functools

import torch

from dataset import load_dataset
from diffusion import AmbientTrainer, GaussianDiffusionSampler, GaussianDiffusionTrainer
from model import UNet
from score.evaluate import Quality, floor_warning
from score.features import FRECHET, feature_space
from score.generate import MeanPrediction, generate, grid_noise
from score.inception import find_weights
from score.measure import measure_against
from score.record import say
from score.swd import level_sides
from training.agc import AntiGradientControl
from training.batches import ShardBatches, epoch_size
from training.flags import FIXED, ON_REQUEST, ONCE, as_flagfile, norm_groups
from training.learner import PRECISIONS, Learner
from training.logdir import LogDirectory
from training.logger import Logger
from training.resume import remove_other_bests, save_best
from training.rounds import Schedule
from training.shards import DEFAULT_SPLIT, partition
from training.watch import ABOVE, Watch
from utils import distributed
from utils.errors import UsageError, warn
from utils.files import file_hash
from utils.images import fingerprint

# ---- data


def dataset(FLAGS):
    """The `dataset.Dataset` to train on. Raises a UsageError where other flags do not fit it."""
    data = load_dataset(
        FLAGS.dataset, FLAGS.data_root, img_size=FLAGS.img_size, num_train=FLAGS.num_train,
        subset_seed=FLAGS.subset_seed, duplicates=FLAGS.duplicates, copies=FLAGS.copies,
        hflip=FLAGS.hflip, num_workers=FLAGS.num_workers, download=FLAGS.download, resize=FLAGS.resize,
        heldout=FLAGS.heldout, keep_list=FLAGS.keep_list, groups=FLAGS.groups,
        alter_copies=FLAGS.alter_copies,
    )  # fmt: skip
    if FLAGS.use_labels and FLAGS.num_labels < data.num_classes:
        what = f"{FLAGS.dataset} has {data.num_classes} classes, give them"
        raise UsageError(f"--num_labels={FLAGS.num_labels}: {what}")
    if FLAGS.use_labels and FLAGS.heldout and (data.heldout.labels < 0).any():
        names = ", ".join(data.class_names or map(str, range(data.num_classes)))
        what = f"with --use_labels its sub-folders must be classes: {names}"
        raise UsageError(f"--heldout={FLAGS.heldout}: {what}")
    return data


def reference_images(FLAGS, data):
    """The real images (N, 3, H, W) that `--fid_reference` names."""
    is_train = FLAGS.fid_reference == "train"
    return data.train.images if is_train else heldout_images(FLAGS, data, "fid_reference")


def holdout_images(FLAGS, data):
    """The real images (N, 3, H, W) that `--holdout` measures, or None."""
    is_wanted = FLAGS.holdout or (FLAGS.holdout is None and data.heldout)
    return heldout_images(FLAGS, data, "holdout") if is_wanted else None


def heldout_images(FLAGS, data, flag):
    """The images that are held out, which `flag` asks for; raises a UsageError if there are none."""
    if data.heldout is None:
        what = f"no image of {FLAGS.dataset} is held out"
        advice = "name a folder of some with --heldout, or leave some out with --num_train"
        if FLAGS.heldout:
            what, advice = f"all images in --heldout={FLAGS.heldout} equal training images", "name others"
        raise UsageError(f"--{flag}: {what}: {advice}")
    return data.heldout.images


def split(FLAGS):
    """How images go to shards: the flag, else as others ask, else as the paper's experiments do."""
    return split_asked_for(FLAGS) or DEFAULT_SPLIT.get(FLAGS.dataset, "stratified")


def slots(FLAGS, data, r=1):
    """The slots of the training set that each of the K shards has in round r, before any exchange."""
    return partition(
        data.train.labels, FLAGS.client_num, split(FLAGS), FLAGS.seed, slot_image=data.slot_image,
        duplicates_in=FLAGS.duplicates_in, r=r - 1 if FLAGS.reshard else 0, groups=data.groups,
        balance=FLAGS.balance_groups,
    )  # fmt: skip


def check_sizes(FLAGS, sizes_of_round):
    """Check that `--reshard` leaves every shard its size, on which its steps and its weight depend.

    sizes_of_round: a function of r, from 1; the sizes come again every K rounds.

    Raises:
        UsageError: it does not."""
    last = min(FLAGS.total_round, FLAGS.client_num) if FLAGS.reshard else 0
    if len({tuple(sizes_of_round(r)) for r in range(1, last + 1)}) > 1:
        what = "shards would change their sizes, since the repeated images go round"
        raise UsageError(f"--reshard: {what}: make --duplicates a multiple of --client_num, or leave one out")


def batches(FLAGS, data, images, slots, device, shard=0, part=slice(None)):
    """The `ShardBatches` of some slots; images: those of the data, where they are to be kept."""
    return ShardBatches(
        images, data.train.labels if FLAGS.use_labels else None, slots, device,
        batch_size=FLAGS.batch_size, T=FLAGS.T, seed=FLAGS.seed, shard=shard, hflip=data.hflip,
        label_dropout=FLAGS.label_dropout, part=part, groups=balanced_groups(FLAGS, data),
    )  # fmt: skip


def data_device(FLAGS, device):
    """Where the training images are kept, `device` being where they are trained on."""
    return "cpu" if FLAGS.data_device == "cpu" else device


# ---- networks and diffusion


def unet(FLAGS, checkpoint=None, path=None):
    """The `UNet` of the flags, with the groups that `norm_groups` finds."""
    return UNet(
        T=FLAGS.T, ch=FLAGS.ch, ch_mult=FLAGS.ch_mult, attn=FLAGS.attn,
        num_res_blocks=FLAGS.num_res_blocks, dropout=FLAGS.dropout, num_labels=num_labels(FLAGS),
        groups=norm_groups(FLAGS, checkpoint, path),
    )  # fmt: skip


def num_labels(FLAGS):
    """Number of classes of a conditional network, else None."""
    return FLAGS.num_labels if FLAGS.use_labels else None


def classes(FLAGS, data):
    """The classes that training images have, ascending, of a conditional network; None where all."""
    found = data.train.labels.unique().tolist()
    return found if FLAGS.use_labels and len(found) < FLAGS.num_labels else None


def diffusion_settings(FLAGS):
    """What training and sampling have in common."""
    return {"beta_1": FLAGS.beta_1, "beta_T": FLAGS.beta_T, "T": FLAGS.T, "mean_type": FLAGS.mean_type}


def trainer(FLAGS, net):
    """The objective of a network."""
    if FLAGS.ambient_t:
        return AmbientTrainer(net, **diffusion_settings(FLAGS), ambient_t=FLAGS.ambient_t, seed=FLAGS.seed)
    return GaussianDiffusionTrainer(net, **diffusion_settings(FLAGS))


def sampler_settings(FLAGS):
    """How images are made of a network, which decides them together with its weights and their seed."""
    return {
        "beta_1": FLAGS.beta_1, "beta_T": FLAGS.beta_T, "T": FLAGS.T, "img_size": FLAGS.img_size,
        "mean_type": FLAGS.mean_type, "var_type": FLAGS.var_type, "sampler": FLAGS.sampler,
        "eta": FLAGS.eta, "guidance": FLAGS.guidance, "steps": FLAGS.sample_steps,
    }  # fmt: skip


def sampler(FLAGS, net):
    """The `GaussianDiffusionSampler` of a network, where that is."""
    return GaussianDiffusionSampler(net, **sampler_settings(FLAGS)).to(next(net.parameters()).device)


def generation(FLAGS, data):
    """Keyword arguments of `generate` and `generate_batches`, the sampler aside."""
    return {
        "num_images": FLAGS.num_images, "batch_size": FLAGS.batch_size, "seed": FLAGS.seed,
        "num_labels": num_labels(FLAGS), "classes": classes(FLAGS, data),
        "legacy_labels": FLAGS.legacy_labels, "dtype": PRECISIONS[FLAGS.precision],
    }  # fmt: skip


def sample_grid(FLAGS, data, device):
    """x_T and classes of the sample grids of a training: `grid_noise`."""
    return grid_noise(
        device, sample_size=FLAGS.sample_size, img_size=FLAGS.img_size, seed=FLAGS.seed,
        num_labels=num_labels(FLAGS), classes=classes(FLAGS, data),
    )  # fmt: skip


def learner(FLAGS, net, warmup, share_batches=False):
    """The `Learner` of a UNet; warmup: steps; share_batches: main.py's, whose processes train one."""
    return Learner(
        net, lambda network: trainer(FLAGS, network), lr=FLAGS.lr, warmup=warmup,
        grad_clip=FLAGS.grad_clip, ema_decay=FLAGS.ema_decay, precision=FLAGS.precision,
        compile=FLAGS.compile, share_batches=share_batches,
        offload=FLAGS.shard_state == "cpu" and not share_batches,
    )  # fmt: skip


def watch(FLAGS, data, device):
    """The `Watch` of a training on a `Dataset`; raises a UsageError where nothing is held out."""
    if not FLAGS.watch_step:
        return make_watch(FLAGS, None, None, FLAGS.img_size, {}, None, None)
    once = data.without_copies()
    distinct = once.distinct()
    reference, heldout = (heldout_images(FLAGS, part, "watch_step") for part in (once, distinct))
    settings = generation(FLAGS, data) | {"num_images": FLAGS.watch_images}
    about = {name: FLAGS[name].value for name in ("sampler", "eta", "var_type")}
    about["training images"] = fingerprint(distinct.train.images)
    about["groups (sha256)"] = hashes_of_lists(FLAGS)["groups (sha256)"]

    def make_images(networks):
        net = networks[0] if len(networks) == 1 else MeanPrediction(networks)
        return generate(sampler(FLAGS, net), **settings)

    @functools.cache
    def ruler():
        images, groups = distinct.train.images, distinct.groups
        return measure_against(images, heldout, reference, groups=groups, device=device)

    return make_watch(
        FLAGS, lambda networks: ruler()(make_images(networks)), reference, FLAGS.img_size, about,
        save_best, remove_other_bests,
    )  # fmt: skip


# ---- what both halves have


def split_asked_for(FLAGS):
    """How images go to shards by `--split`, `--balance_groups` or `--reshard`, or None."""
    if FLAGS.balance_groups:
        return "together"
    return FLAGS.split or ("random" if FLAGS.reshard else None)


def hashes_of_lists(FLAGS):
    """What a run is known by of the files that name training images, or None where none is given."""
    paths = {name: FLAGS[name].value for name in ("keep_list", "groups")}
    return {f"{name} (sha256)": file_hash(path) if path else None for name, path in paths.items()}


def balanced_groups(FLAGS, data):
    """The groups (N,) of which an epoch draws an image each, or None: it draws all images."""
    return data.groups if FLAGS.balance_groups else None


def sizes(FLAGS, data, slots):
    """What weighs each shard in the average: its images; with `--balance_groups` its groups."""
    return [epoch_size(of_shard, balanced_groups(FLAGS, data)) for of_shard in slots]


def make_watch(FLAGS, measure, heldout, side, about, save, tidy):
    """The `Watch` of the flags, which of what measure(networks) finds takes what a training is to show.

    heldout: (L, 3, H, W), the reference of distances, or None where nothing is watched; side: of images.

    Raises:
        UsageError: too few images are held out."""

    def watched(networks):
        numbers = measure(networks)
        shown = {name: numbers[name] for name in ("f_mem", "fpd", "swd") if name in numbers}
        return {ABOVE: numbers["mq_above_floor"]["30"], **shown}

    criterion = "swd" if level_sides(side) else "fpd"
    if heldout is not None:
        if len(heldout) < 2:
            raise UsageError("--watch_step: one image is held out: at least two are needed")
        if criterion == "fpd" and distributed.is_main():
            what = f"SWD is not defined for images of {side} pixels"
            warn(f"warning: {what}: best.json is by fpd, which sees no detail")
        say(floor_warning(heldout))
        names = ("watch_images", "seed", "precision", "sample_steps", "guidance")
        about |= {name: FLAGS[name].value for name in names}
        about["heldout images"] = fingerprint(heldout)
    return Watch(
        watched, every=FLAGS.watch_step, stops=FLAGS.stop_when_copying, criterion=criterion, about=about,
        save=save, tidy=tidy,
    )  # fmt: skip


def agc(FLAGS, T):
    """The `AntiGradientControl` of the flags, for T timesteps."""
    return AntiGradientControl(
        T, mem_ratio=FLAGS.mem_ratio, ema_decay=FLAGS.arr_ema_decay, anti_grad=FLAGS.anti_grad,
        ascend_weight=FLAGS.anti_grad_weight, bins=FLAGS.bank_bins,
        bar=FLAGS.bar if FLAGS.augment_near_threshold else 1.0,
    )  # fmt: skip


def schedule(FLAGS, sizes, steps_per_round):
    """The `Schedule` of rounds; sizes, steps_per_round: of each of the K shards."""
    return Schedule(
        total_round=FLAGS.total_round, sizes=sizes, steps_per_round=steps_per_round,
        exchange=FLAGS.exchange, exchange_every=FLAGS.exchange_every,
        exchange_share=FLAGS.exchange_share, augments=FLAGS.augment_near_threshold, seed=FLAGS.seed,
        sample_step=FLAGS.sample_step, save_step=FLAGS.save_step, save_round=FLAGS.save_round,
        keep=FLAGS.keep,
    )  # fmt: skip


def logger(FLAGS, logdir, total, done, seconds, writes=True):
    """The `Logger` of a run in which this process makes `total` steps, of which `done` are made."""
    return Logger(
        logdir, total, done, log_step=FLAGS.log_step, max_bad_steps=FLAGS.max_bad_steps,
        batch_size=FLAGS.batch_size, seconds=seconds, writes=writes,
    )  # fmt: skip


def copies_space(FLAGS, name, device, flag):
    """The `FeatureSpace` to search for copies in, of `flag`. UsageError if its weights are not named."""
    if name in ("sscd", "clip") and not FLAGS[name].value:
        what = f"the file of its weights, or --{flag}=pixels, which needs none"
        raise UsageError(f"give --{name}, {what}")
    return feature_space(
        name, device, inception=find_weights(FLAGS.inception_weights) if name == "inception" else None,
        clip=FLAGS.clip, sscd=FLAGS.sscd, how=FLAGS.preprocess, torchscript=FLAGS.allow_torchscript,
    )  # fmt: skip


def distance_space(FLAGS, name, device, batch_size):
    """The `FeatureSpace` of Frechet distances, by a value of `--fid_features`."""
    inception = find_weights(FLAGS.inception_weights) if name == "inception" else None
    return feature_space(FRECHET[name], device, batch_size, inception=inception)


def quality(FLAGS, space, reference, number, device, heldout=None, fid_cache=None):
    """The `Quality` of so many images; those of --samples in the order of their contents."""
    return Quality(
        reference, number, space, device, fid_cache=fid_cache, heldout=heldout,
        by_content=bool(FLAGS.samples),
    )  # fmt: skip


# ---- the log directory


def log_directory(FLAGS, logdir, script, data, groups):
    """The `LogDirectory` of a run; script: main or main_fed; groups: of the UNet's GroupNorms."""
    names, images = (*FIXED[script], *ON_REQUEST[script]), fingerprint(data.train.images)
    settings = {"script": script} | {name: FLAGS[name].value for name in names}
    settings |= {"norm_groups": groups, "training images (sha256)": images}
    if script == "main_fed" or FLAGS.use_labels:
        settings["classes (sha256)"] = fingerprint(data.train.labels.view(torch.uint8))
    settings |= {"hflip": data.hflip, "resize": FLAGS.resize or "crop"} | hashes_of_lists(FLAGS)
    fixed = {"script", *FIXED[script]}
    if script == "main_fed":
        fixed |= hashes_of_lists(FLAGS).keys()
        settings["split"] = split(FLAGS)
        fixed |= {"training images (sha256)", "classes (sha256)"}
    once = {name: FLAGS[name].value for name in ONCE}
    return LogDirectory(logdir, settings, fixed, as_flagfile(FLAGS), data.subset, **once)

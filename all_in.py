"""Evaluation from end to end: generate images, score their quality, measure memorisation, show it.

python all_in.py --flagfile=config/DIGITS.txt --unet_dir=logs/digits --num_images=512
torchrun --nproc_per_node=4 all_in.py --flagfile=config/CIFAR10.txt --unet_dir=logs/iet_agc
python all_in.py --dataset=folder --data_root=my/training/images --samples=my/generated/images
"""

import time
from pathlib import Path

import numpy as np
import torch
from absl.flags import FLAGS

from dataset import image_folders
from diffusion import GaussianDiffusionSampler, GaussianDiffusionTrainer
from score.columns import is_old, summary
from score.evaluate import SAMPLES_ORDER, count_repeats, evaluate, identity, known_neighbors
from score.fid import CACHE
from score.gap import denoising_gap
from score.generate import MeanPrediction, draw_labels, generate_batches, generate_into
from score.grids import save_grids
from score.memorization import memorization_ratio
from score.report import training_seconds, write_report
from score.samples import evenly_spaced, load_samples, png_names, sample_names, save_pngs, warn_of_odd_values
from score.similarity import evaluate_similarity
from training import build
from training.flags import STAGES, as_dict, define
from training.launch import announce, pick_device, run
from training.logdir import ema_start, young_ema
from training.recorded import default_resize, take_training, take_trainings, training_warning
from training.weights import find_checkpoint, load_checkpoint, load_weights, weights_in
from utils import distributed
from utils.errors import DataError, UsageError, printable, warn
from utils.files import atomic_write, file_hash, lock_directory, read_json, write_json
from utils.images import equal_images, keep_apart

ROUGH = 500  # held-out images, below which a floor is rough
# what a stage finds with some flags only: it goes when the stage is run with others
OPTIONAL = {
    "score": ("fid", "is", "is_std", "fpd", "precision", "recall", "precision_floor", "recall_floor", "swd_floor"),
    "memorise": ("holdout", "similarity"),
}


def earlier_result():
    """What an earlier call has left in result.json, or {}."""
    path = Path(FLAGS.grid_dir) / "result.json"
    result = read_json(path) if path.exists() else {"images_sha256": None}
    if not isinstance(result, dict) or "images_sha256" not in result:
        raise DataError(f"{path}: not written by all_in.py: move it, or choose another --grid_dir")
    if is_old(result):
        warn(f"{path}: of an earlier version, which had other names: it is begun anew")
        return {"images_sha256": None}
    return result


def forget_old_scores(result):
    """Leave out scores of --samples that an earlier version has made, since they depended on the names of the files."""
    if result.get("scored_with", {}).get("samples_order") != SAMPLES_ORDER:
        gone = [result.pop(key) for key in (*OPTIONAL["score"], "scored_with") if key in result]
        result["seconds"].pop("score", None)
        if gone and distributed.is_main():
            warn(f"{FLAGS.grid_dir}: scores of an earlier version are left out: run the score stage for new ones")


def add(result, stage, find):
    """Put what a stage finds into result.json, with its seconds; returns whether it was not there yet."""
    start = time.perf_counter()
    numbers = find()
    earlier = {key: result.pop(key) for key in {*numbers, *OPTIONAL.get(stage, ())} if key in result}
    result |= numbers
    is_new = numbers != earlier or stage not in result["seconds"]
    if is_new:
        result["seconds"][stage] = round(time.perf_counter() - start, 3)
        if stage in ("score", "memorise", "gap"):  # those of the last call that made numbers
            result["flags"] = as_dict(FLAGS)
    if distributed.is_main():
        write_json(Path(FLAGS.grid_dir) / "result.json", result)
    return is_new


def directories(stages):
    """{flag: directory} of those that the stages write."""
    written = {"generate_dir": "generate" in stages, "similar_dir": "memorise" in stages, "grid_dir": True}
    return {flag: FLAGS[flag].value for flag, writes in written.items() if writes}


def take_directories(stages):
    """Make the directories that the stages write, and take them until the files that are returned are closed."""
    paths = {Path(path).resolve(): flag for flag, path in directories(stages).items()}  # some may be the same
    return [lock_directory(path, flag) for path, flag in paths.items()]


def load_network(device):
    """The network that the flags name, its files, and the settings of its training or None.

    Of several checkpoints it is the mean of their predictions.
    """
    names = FLAGS.unet_dir.split(",")
    paths = [find_checkpoint(name) for name in ([FLAGS.unet_dir] if Path(FLAGS.unet_dir).exists() else names)]
    states = [load_checkpoint(path, device) for path in paths]
    settings, nets = take_trainings(FLAGS, paths), []
    for path, state in zip(paths, states, strict=True):
        nets.append(build.unet(FLAGS, state, path).to(device))
        load_weights(nets[-1], weights_in(state, FLAGS.use_ema, path), path)
    return nets[0] if len(nets) == 1 else MeanPrediction(nets), paths, settings


def take_earlier_training():
    """Take the flags of the data from the training of the images in --generate_dir, if it is known."""
    path = Path(FLAGS.generate_dir) / "generate.json"
    record = read_json(path) if path.exists() else {}
    if record.get("training"):
        take_training(FLAGS, record["training"], record["flags"], path)


def weights_of(paths):
    """What says which weights are evaluated."""
    return {"checkpoint_sha256": " ".join(map(file_hash, paths)), "weights": "ema" if FLAGS.use_ema else "raw"}


def ema_warning(paths):
    """What is to be said of the EMA weights of these checkpoints, or None; of raw weights nothing is."""
    found = [young_ema(path, ema_start(path)) for path in paths if FLAGS.use_ema]
    texts = list(filter(None, found))
    return f"{'; '.join(texts)}; raw weights are measured with --use_ema=False" if texts else None


def names_of(paths):
    """Checkpoint files as --unet_dir takes them."""
    return ",".join(map(str, paths))


def generate_images(net, paths, settings, young, data, device):
    """Images of a network, of classes that training images have, kept in --generate_dir with what made them.

    settings: of the training of the network, or None; young: of `ema_warning`.

    Images that an earlier call has made of the same weights with the same seed and sampler are not made again.
    """
    origin = {**weights_of(paths), **build.sampler_settings(FLAGS), "precision": FLAGS.precision, "seed": FLAGS.seed}
    origin |= {"num_labels": build.labels(FLAGS), "legacy_labels": FLAGS.legacy_labels}
    classes = build.classes(FLAGS, data)
    origin |= {"classes": classes} if classes else {}
    sampler = GaussianDiffusionSampler(
        torch.compile(net) if FLAGS.compile else net, **build.sampler_settings(FLAGS)
    ).to(device)

    def batches(first):
        return generate_batches(sampler, **build.generation(FLAGS, data), first=first)

    about = {"checkpoint": names_of(paths), "training": settings, "flags": as_dict(FLAGS), "ema_warning": young}
    if FLAGS.use_labels:
        labels = draw_labels(FLAGS.seed, range(FLAGS.num_images), FLAGS.num_labels, classes)
        about |= {"labels": labels.tolist(), "class_names": data.class_names}
    images = generate_into(FLAGS.generate_dir, origin, batches, FLAGS.num_images, FLAGS.img_size, about)
    if FLAGS.save_png and distributed.is_main():
        save_pngs(FLAGS.generate_dir, images)
    return images


def existing_images(needed):
    """The images of --samples, or of an earlier generate stage; where there are none, and they are not needed, none."""
    images = None
    if distributed.is_main():
        path = Path(FLAGS.generate_dir) / "generate.npy"
        is_there = FLAGS.samples or path.exists()
        if needed and not is_there:
            raise DataError(f"{path}: no such file: run the generate stage first, or name images with --samples")
        size = FLAGS.img_size
        images = (
            load_samples(FLAGS.samples or path, size, FLAGS.resize)
            if is_there
            else torch.empty(0, 3, size, size).byte()
        )
        is_ours = is_there and not FLAGS.samples
        if is_ours and read_json(path.with_name("generate.json")).get("file_sha256") != file_hash(path):
            raise DataError(f"{path}: not the images that generate.json beside it describes: generate them again")
    shape = distributed.from_main(None if images is None else images.shape)
    return distributed.broadcast(torch.empty(shape, dtype=torch.uint8) if images is None else images, 0)


def about_images(images, paths, settings, young):
    """What result.json says of the images, or of the network in `paths` if there are none, besides what is measured.

    settings: of the training of that network, or None; young: `ema_warning` of it.
    """
    if FLAGS.samples:
        nothing = dict.fromkeys(("checkpoint", "weights", "training", "origin", "ema_warning"))
        return {**nothing, "samples": FLAGS.samples}
    if not len(images):
        about = {"training": settings, "origin": None, "ema_warning": young}
        return {"checkpoint": names_of(paths), **weights_of(paths), **about}
    record = read_json(Path(FLAGS.generate_dir) / "generate.json")
    names = ("checkpoint", "training", "non_finite_images", "seconds", "flags", "origin")
    weights = {name: record["origin"][name] for name in ("weights", "checkpoint_sha256")}
    return {name: record[name] for name in names} | weights | {"ema_warning": record.get("ema_warning")}


def find_gap(net, paths, data, device):
    """The `denoising_gap` of the network on --num_images training and as many held-out images, evenly spaced."""
    sets = []
    for part in (data.train, data.heldout):
        rows = evenly_spaced(len(part.images), FLAGS.num_images)
        labels = part.labels[rows] - int(FLAGS.legacy_labels) if FLAGS.use_labels else None
        sets.append((part.images[rows], labels))
    trainer = GaussianDiffusionTrainer(net, **build.diffusion_settings(FLAGS)).to(device)
    return {"gap": {"checkpoint": names_of(paths), **denoising_gap(trainer, *sets, FLAGS.seed, FLAGS.batch_size)}}


def memorise(images, training, heldout, space, **search):
    """What the memorise stage finds, in pixels and, unless it is None, in a feature space."""
    numbers, _ = evaluate(images, training, heldout, **search)
    if space:
        floors = {} if heldout is None else {"holdout": (heldout, None)}
        numbers["similarity"], floors, _ = evaluate_similarity(space, images, training, floors=floors)
        for name, floor in floors.items():
            numbers[name]["similarity"] = floor
    return numbers


def numbers(images):
    """The numbers of images in the place of names: str (N,)."""
    return np.arange(len(images)).astype(str)


def neighbors_to_show(result, sets):
    """The nearest training images (N,) and the ratios (N,) that --similar_dir has of the images of these sets."""
    path = Path(FLAGS.similar_dir) / "memorization.npz"
    known = known_neighbors(path, sets)
    if known is None or "pixels" not in result:
        raise DataError(f"{path}: no neighbours of these images: run the memorise stage first")
    return known[1][:, 0], memorization_ratio(known[0])


def skip_counts(path, slot_group):
    """How often training left out each of M images, (M,) int64, or None where the checkpoint does not say.

    slot_group: (N,) int64, which of the M is in each slot of the training set.
    """
    counts = load_checkpoint(path).get("index_array") if path and Path(path).exists() else None
    if not isinstance(counts, torch.Tensor) or counts.shape != slot_group.shape:
        return None
    return torch.zeros(int(slot_group.max()) + 1, dtype=torch.int64).index_add(0, slot_group, counts)


def append_published_format(result):
    """Append the evaluation to result.txt: a line of scores and a line per MQ threshold, as the published code does."""
    path = Path(FLAGS.grid_dir) / "result.txt"
    name = "fpd" if "fpd" in result else "FID"
    inception_score = f"({result.get('is', 'nan')}, {result.get('is_std', 'nan')})"
    distance = f"{name}: ({result.get(name.lower(), 'nan')}, {result.get('fid_reference')})"
    lines = [f"{inception_score}, {distance}, N: {result['N']}, checkpoint: {printable(result['checkpoint'])}"]
    lines += [f"v_{p}:{count}" for p, count in result.get("pixels", {}).get("mq", {}).items()]
    before = path.read_bytes() if path.exists() else b""
    with atomic_write(path) as file:
        file.write(before + "".join(f"{line}\n" for line in lines).encode())


def print_summary(result):
    """What a person wants to know first."""
    print(f"{result['N']} images against {result['training_set_size']} training images")
    if result.get("non_finite_images"):
        print(f"  {result['non_finite_images']} images held NaN or infinity: they are measured, with 0 in those pixels")
    print("  " + ", ".join(f"{name} {text}" for name, text in summary(result).items()))
    print(f"  written to {FLAGS.grid_dir}")


def main():
    stages = set(FLAGS.stages) - ({"generate"} if FLAGS.samples else set())
    if not stages:
        raise UsageError("--stages: nothing to do, choose some of " + ",".join(STAGES))
    device = pick_device(FLAGS.device, FLAGS.precision)

    # whatever can be wrong shows here, the cheapest first and all of it before the long work
    shows_earlier = stages & {"grid", "report"} and "memorise" not in stages
    if shows_earlier and "generate" in stages:
        raise UsageError("--stages: grid and report show what the memorise stage finds: add it, or leave out generate")
    if shows_earlier and not (Path(FLAGS.similar_dir) / "memorization.npz").exists():
        raise DataError(f"--similar_dir={FLAGS.similar_dir}: no memorization.npz in it: run the memorise stage first")
    net = paths = settings = space = None
    if "score" in stages:
        distances = build.distance_space(FLAGS, FLAGS.fid_features, device, FLAGS.batch_size)
    if "memorise" in stages and FLAGS.memorise_features:
        space = build.copies_space(FLAGS, FLAGS.memorise_features, device, "memorise_features")
    if stages & {"generate", "gap"}:
        if not FLAGS.unet_dir:
            raise UsageError("--unet_dir: name a checkpoint, or measure existing images with --samples, without gap")
        net, paths, settings = load_network(device)
    elif not FLAGS.samples:
        take_earlier_training()
    default_resize(FLAGS)
    young = ema_warning(paths or [])
    if young and distributed.is_main():
        warn(f"warning: {young}")
    written = directories(stages) | ({"fid_cache": FLAGS.fid_cache or CACHE} if "score" in stages else {})
    folders = image_folders(FLAGS.dataset, FLAGS.data_root)
    keep_apart(folders, {"samples": FLAGS.samples, "heldout": FLAGS.heldout}, written)
    if "generate" not in stages:
        images = existing_images(needed=stages != {"gap"})
    elif FLAGS.save_png:
        png_names(FLAGS.generate_dir, FLAGS.num_images)
    with distributed.main_first():
        data = build.dataset(FLAGS)
    about_settings = training_warning(settings, data, paths) if paths else None
    slot_group, data = equal_images(data.train.images), data.without_copies()
    reference, given, data = build.reference_images(FLAGS, data), data, data.distinct()
    training, heldout = data.train.images, build.holdout_images(FLAGS, data)
    before, after = ([len(part.images) if part else 0 for part in (d.train, d.heldout)] for d in (given, data))
    repeats = count_repeats(*before, *after)
    if "gap" in stages:
        build.heldout_images(FLAGS, data, "stages=gap")
    odd = warn_of_odd_values(FLAGS.samples, images, training) if FLAGS.samples else None
    notes = {"settings_warning": about_settings, "repeats_warning": repeats.pop("repeats_warning")}
    notes["floor_warning"] = None
    if heldout is not None and len(heldout) < ROUGH:
        notes["floor_warning"] = f"{len(heldout)} held-out images: with less than {ROUGH} the floors are rough"
    for note in filter(None, notes.values() if distributed.is_main() else ()):
        warn(f"warning: {note}")
    notes["samples_warning"] = odd
    locks = take_directories(stages) if distributed.is_main() else []
    result = distributed.from_main(earlier_result() if distributed.is_main() else None)
    if "score" in stages:
        number = FLAGS.num_images if "generate" in stages else len(images)
        quality = build.quality(FLAGS, distances, reference, number, device, heldout, by_content=bool(FLAGS.samples))
    announce(device, net, len(training), FLAGS.batch_size, asked_for=FLAGS.device)

    if "generate" in stages:
        images = generate_images(net, paths, settings, young, data, device)
    about = distributed.from_main(about_images(images, paths, settings, young) if distributed.is_main() else None)
    if about["ema_warning"] and not young and distributed.is_main():
        warn(f"warning: {about['ema_warning']}")
    if "gap" in stages and not FLAGS.samples and not weights_of(paths).items() <= about.items():
        raise UsageError(
            f"--unet_dir={FLAGS.unet_dir}: not the weights of the images in --generate_dir={FLAGS.generate_dir}: "
            "name those, or other directories"
        )
    sets = identity(images, training)
    names = sample_names(FLAGS.samples, len(images)) if FLAGS.samples else numbers(images)
    names = names, numbers(training) if data.train.names is None else data.train.names
    if not sets.items() <= result.items():  # else stages that are run one by one fill it
        result = {"seconds": {}, **sets}
    used = result.get("flags", about.get("flags", {}))  # an earlier call's, until this one makes numbers
    result |= about | {"flags": used, "seconds": result["seconds"] | about.get("seconds", {})}
    result |= {"N": len(images), "training_set_size": len(training), **repeats, **notes}
    result["training_seconds"] = training_seconds(result["checkpoint"])
    is_new = False
    if FLAGS.samples and "score" not in stages:
        forget_old_scores(result)

    if "score" in stages and result.get("scored_with") != quality.scored_with:
        about = {"scored_with": quality.scored_with, "warning": quality.warning, "fid_reference": FLAGS.fid_reference}
        is_new |= add(result, "score", lambda: {**quality(images), **about})
    if "memorise" in stages:
        on_device = training.to(build.data_device(FLAGS, device))
        search = {"batch_generated": FLAGS.batch_A, "batch_training": FLAGS.batch_B, "device": device, "progress": True}
        search |= {"folder": FLAGS.similar_dir, "sets": sets, "hflip": data.hflip, "names": names}
        is_new |= add(result, "memorise", lambda: memorise(images, on_device, heldout, space, **search))
    if "gap" in stages:
        add(result, "gap", lambda: find_gap(net, paths, data, device))
    if distributed.is_main():
        if stages & {"grid", "report"}:
            shown = images, training, *neighbors_to_show(result, sets)
        if "grid" in stages:
            add(result, "grid", lambda: {"grids": [str(path) for path in save_grids(FLAGS.grid_dir, *shown)]})
        if "report" in stages:
            page = Path(FLAGS.grid_dir) / "report.html"
            skips = skip_counts(result["checkpoint"], slot_group)
            add(result, "report", lambda: {"report": write_report(page, result, *shown, skips, names)})
        if is_new:
            append_published_format(result)
        print_summary(result)
    for lock in locks:
        lock.close()


if __name__ == "__main__":
    run(main, define)

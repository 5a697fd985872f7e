"""Evaluation from end to end: generate images, score their quality, measure memorisation, show it.

python all_in.py --flagfile=config/DIGITS.txt --unet_dir=logs/digits --num_images=512
torchrun --nproc_per_node=4 all_in.py --flagfile=config/CIFAR10.txt --unet_dir=logs/iet_agc
python all_in.py --dataset=folder --data_root=my/training/images --samples=my/generated/images
"""

import math
from collections import namedtuple
from functools import partial
from pathlib import Path

import numpy as np
import torch
from absl.flags import FLAGS

from dataset import image_folders
from diffusion import GaussianDiffusionSampler, GaussianDiffusionTrainer
from score.duplicates import count_near
from score.evaluate import (
    SAMPLES_ORDER,
    count_groups,
    count_repeats,
    evaluate,
    floor_warning,
    identity,
    known_neighbors,
)
from score.fid import CACHE
from score.gap import denoising_gap
from score.generate import MeanPrediction, draw_labels, generate_batches, generate_into
from score.grids import save_grids
from score.memorization import memorization_ratio
from score.record import add_stage, earlier_result, print_summary, say, say_non_finite, take_directories
from score.reject import held_back, ratio_margin
from score.report import training_seconds, watched, write_report
from score.samples import (
    content_order,
    evenly_spaced,
    load_samples,
    png_names,
    sample_names,
    save_pngs,
    warn_of_odd_values,
)
from score.similarity import evaluate_similarity
from training import build
from training.flags import STAGES, as_dict, define
from training.launch import announce, pick_device, run
from training.logdir import ema_start, young_ema
from training.recorded import default_resize, take, take_trainings, training_warning
from training.weights import find_best, find_checkpoint, load_checkpoint, load_weights, weights_in
from utils import distributed
from utils.errors import DataError, UsageError, printable, warn
from utils.files import atomic_write, file_hash, read_json
from utils.images import fingerprint, keep_apart

# flags that images depend on beside the network's
GENERATION_FLAGS = ("use_ema", "legacy_labels", "seed", "precision", "reject_below")
GENERATION_FLAGS += ("sampler", "sample_steps", "eta", "var_type", "guidance")
# what a stage finds with some flags only: it goes when the stage is run with others
OPTIONAL = {"memorise": ("holdout", "similarity", "groups", "near_duplicates")}
OPTIONAL["score"] = (
    "fid", "is", "is_std", "fpd", "precision", "recall", "precision_floor", "recall_floor", "swd_floor"
)  # fmt: skip


def forget_old_scores(result):
    """Leave out scores of --samples by an earlier version, which depended on the names of the files."""
    if result.get("scored_with", {}).get("samples_order") != SAMPLES_ORDER:
        gone = [result.pop(key) for key in (*OPTIONAL["score"], "scored_with") if key in result]
        result["seconds"].pop("score", None)
        if gone and distributed.is_main():
            warn(f"{FLAGS.grid_dir}: scores of an earlier version are left out: run the score stage for new ones")


def directories(stages):
    """{flag: directory} of those that the stages write."""
    written = {"generate_dir": "generate" in stages, "similar_dir": "memorise" in stages, "grid_dir": True}
    return {flag: FLAGS[flag].value for flag, writes in written.items() if writes}


def chosen_stages():
    """The stages to run, a set; raises an error if they cannot be."""
    stages = set(FLAGS.stages) - ({"generate"} if FLAGS.samples else set())
    if not stages:
        raise UsageError("--stages: nothing to do, choose some of " + ",".join(STAGES))
    shows_earlier = stages & {"grid", "report"} and "memorise" not in stages
    if shows_earlier and "generate" in stages:
        what = "grid and report show what the memorise stage finds: add it, or leave out generate"
        raise UsageError(f"--stages: {what}")
    if shows_earlier and not (Path(FLAGS.similar_dir) / "memorization.npz").exists():
        what = "no memorization.npz in it: run the memorise stage first"
        raise DataError(f"--similar_dir={FLAGS.similar_dir}: {what}")
    if stages & {"generate", "gap"} and not FLAGS.unet_dir:
        what = "name a checkpoint, or measure existing images with --samples, without gap"
        raise UsageError(f"--unet_dir: {what}")
    return stages


def load_spaces(stages, device):
    """The feature spaces of scores and of copies, None where the stages need none."""
    distances = copies = None
    if "score" in stages:
        distances = build.distance_space(FLAGS, FLAGS.fid_features, device, FLAGS.batch_size)
    if "memorise" in stages and FLAGS.memorise_features:
        copies = build.copies_space(FLAGS, FLAGS.memorise_features, device, "memorise_features")
    return distances, copies


def check_places(stages):
    """Raise an error if images would be taken for others, or are there that would be."""
    written = directories(stages)
    if "score" in stages:
        written["fid_cache"] = FLAGS.fid_cache or CACHE
    folders = image_folders(FLAGS.dataset, FLAGS.data_root)
    keep_apart(folders, {"samples": FLAGS.samples, "heldout": FLAGS.heldout}, written)
    if "generate" in stages and FLAGS.save_png:
        png_names(FLAGS.generate_dir, FLAGS.num_images)


def find_checkpoints():
    """The checkpoint files that --unet_dir names."""
    names = [FLAGS.unet_dir] if Path(FLAGS.unet_dir).exists() else FLAGS.unet_dir.split(",")
    found = [find_best(name) if FLAGS.best else [find_checkpoint(name)] for name in names]
    return [path for of_name in found for path in of_name]


def load_network(stages, device):
    """The network that generate and gap use, its files, and its training's settings or None.

    Of several checkpoints it is the mean of their predictions. Flags not given are the training's.
    Other stages use none: None, no file and None.
    """
    if not stages & {"generate", "gap"}:
        return None, [], None
    paths, nets = find_checkpoints(), []
    states = [load_checkpoint(path, device) for path in paths]
    settings = take_trainings(FLAGS, paths)
    for path, state in zip(paths, states, strict=True):
        nets.append(build.unet(FLAGS, state, path).to(device))
        load_weights(nets[-1], weights_in(state, FLAGS.use_ema, path), path)
    return nets[0] if len(nets) == 1 else MeanPrediction(nets), paths, settings


def origin_of_images():
    """(checkpoint, settings): what has made the images to measure, and of its training; None if unknown.

    Flags not given are the training's."""
    if FLAGS.samples:
        paths = find_checkpoints() if FLAGS.unet_dir else []
        return names_of(paths), take_trainings(FLAGS, paths) if paths else None
    path = Path(FLAGS.generate_dir) / "generate.json"
    record = read_json(path) if path.exists() else {}
    if record.get("training"):
        take(FLAGS, record["training"], path, record["flags"])
    if record:
        check_images(record)
    return record.get("checkpoint"), record.get("training")


def check_images(record):
    """Raise a UsageError if flags ask for other images than those that a generate.json describes."""
    given = as_dict(FLAGS)
    known = given | record["flags"]
    others = [name for name in GENERATION_FLAGS if FLAGS[name].present and given[name] != known[name]]
    paths = find_checkpoints() if FLAGS.unet_dir else []
    is_elsewhere = paths and names_of(paths) != record["checkpoint"]
    if is_elsewhere and weights_of(paths)["checkpoint_sha256"] != record["origin"]["checkpoint_sha256"]:
        others.insert(0, "unet_dir")
    if others:
        said = ", ".join(f"--{name}={given[name]}" for name in others)
        what = f"not of the images in --generate_dir={FLAGS.generate_dir}"
        raise UsageError(f"{said}: {what}: leave it out, or add the generate stage")


# What images are compared with: a `dataset.Dataset` of distinct images; the scores' reference, and real
# images for the floor, (N, 3, H, W), and their `hash_of_set`, or None twice; each slot's distinct image,
# (N,); what to say of them
Real = namedtuple("Real", "data reference heldout heldout_sha256 slot_group notes")


def load_real(stages, images, checkpoint, settings):
    """The `Real` images, with notes; images: those to measure, None if they are to be made.

    checkpoint, settings: what makes or made them, and of its training; both may be None."""
    with distributed.main_first():
        given = build.dataset(FLAGS)
    notes = {"settings_warning": checkpoint and training_warning(settings, given, checkpoint)}
    once = given.without_copies()
    data = once.distinct()
    if "gap" in stages:
        build.heldout_images(FLAGS, data, "stages=gap")
    heldout = build.holdout_images(FLAGS, data)
    notes |= count_repeats(once.equal, len(once.train.images))
    notes["floor_warning"] = floor_warning(heldout)
    say(*(note for name, note in notes.items() if name.endswith("warning")))
    notes["samples_warning"] = None
    if FLAGS.samples:
        notes["samples_warning"] = warn_of_odd_values(FLAGS.samples, images, data.train.images)
    slot_group = once.equal[given.slot_image]
    known_by = None if heldout is None else hash_of_set(heldout)
    return Real(data, build.reference_images(FLAGS, once), heldout, known_by, slot_group, notes)


def hash_of_set(images):
    """What images (N, 3, H, W) are known by, in any order."""
    return fingerprint(images[content_order(images)])


def weights_of(paths):
    """Which weights are evaluated, for the record."""
    return {"checkpoint_sha256": " ".join(map(file_hash, paths)), "weights": "ema" if FLAGS.use_ema else "raw"}


def ema_warning(paths):
    """What is to be said of the EMA weights of these checkpoints, or None."""
    texts = [text for path in paths if FLAGS.use_ema and (text := young_ema(path, ema_start(path)))]
    return f"{'; '.join(texts)}; raw weights are measured with --use_ema=False" if texts else None


def names_of(paths):
    """Checkpoint files as --unet_dir takes them, or None of none."""
    return ",".join(map(str, paths)) or None


def generate_images(net, paths, settings, young, data, device):
    """Images of a network, of the training images' classes, kept in --generate_dir with their origin.

    settings: of the network's training, or None; young: of `ema_warning`. Images that an earlier call
    has made of the same weights with the same seed and sampler are not made again.
    """
    origin = weights_of(paths) | build.sampler_settings(FLAGS)
    origin |= {"precision": FLAGS.precision, "seed": FLAGS.seed}
    origin |= {"num_labels": build.num_labels(FLAGS), "legacy_labels": FLAGS.legacy_labels}
    if classes := build.classes(FLAGS, data):
        origin["classes"] = classes
    margin = None
    if FLAGS.reject_below is not None:
        training = data.train.images.to(build.data_device(FLAGS, device))
        below, search = FLAGS.reject_below, {"batch_training": FLAGS.batch_B, "device": device}
        margin = partial(ratio_margin, training=training, groups=data.groups, below=below, **search)
        origin |= {"reject_below": below, "training_sha256": fingerprint(training)}
        origin["groups_sha256"] = file_hash(FLAGS.groups) if FLAGS.groups else "none"
    network = torch.compile(net) if FLAGS.compile else net
    sampler = GaussianDiffusionSampler(network, **build.sampler_settings(FLAGS)).to(device)

    def batches(first):
        return generate_batches(sampler, **build.generation(FLAGS, data), first=first, margin=margin)

    about = {"checkpoint": names_of(paths), "training": settings}
    about |= {"flags": as_dict(FLAGS), "ema_warning": young}
    if FLAGS.use_labels:
        labels = draw_labels(FLAGS.seed, range(FLAGS.num_images), FLAGS.num_labels, classes)
        about |= {"labels": labels.tolist(), "class_names": data.class_names}
    images = generate_into(FLAGS.generate_dir, origin, batches, FLAGS.num_images, FLAGS.img_size, about)
    if FLAGS.save_png and distributed.is_main():
        save_pngs(FLAGS.generate_dir, images)
    return images


def existing_images(needed):
    """The images of --samples or an earlier generate stage; none where there are none, none needed."""
    images = None
    if distributed.is_main():
        path, size = Path(FLAGS.generate_dir) / "generate.npy", FLAGS.img_size
        if FLAGS.samples:
            images = load_samples(FLAGS.samples, size, FLAGS.resize)
        elif path.exists():
            images = load_samples(path, size, FLAGS.resize)
            if read_json(path.with_name("generate.json")).get("file_sha256") != file_hash(path):
                what = "not the images that generate.json beside it describes: generate them again"
                raise DataError(f"{path}: {what}")
        elif needed:
            what = "no such file: run the generate stage first, or name images with --samples"
            raise DataError(f"{path}: {what}")
        else:
            images = torch.empty(0, 3, size, size).byte()
    shape = distributed.from_main(None if images is None else images.shape)
    return distributed.broadcast(torch.empty(shape, dtype=torch.uint8) if images is None else images, 0)


def describe(images, paths, settings, young):
    """What result.json says of the images, or of the network if there are none, besides its numbers."""
    if FLAGS.samples:
        nothing = dict.fromkeys(("checkpoint", "weights", "training", "origin", "ema_warning"))
        return {**nothing, "samples": FLAGS.samples}
    if not len(images):
        of_training = {"training": settings, "origin": None, "ema_warning": young}
        return {"checkpoint": names_of(paths), **weights_of(paths), **of_training}
    record = read_json(Path(FLAGS.generate_dir) / "generate.json")
    names = ("checkpoint", "training", "non_finite_images", "seconds", "flags", "origin")
    weights = {name: record["origin"][name] for name in ("weights", "checkpoint_sha256")}
    known = {name: record[name] for name in names} | weights | held_back(record)
    return known | {"ema_warning": record.get("ema_warning")}


def begin_result(result, stages, images, real, paths, settings, young):
    """The result of these images, with what an earlier call has found of them: its `result`."""
    description = describe(images, paths, settings, young) if distributed.is_main() else None
    description = distributed.from_main(description)
    if description["ema_warning"] != young:
        say(description["ema_warning"])
    if "gap" in stages and not FLAGS.samples:  # the gap and the numbers of images stand in one result
        is_theirs = weights_of(paths).items() <= description.items()
        if not is_theirs:
            what = f"not the weights of the images in --generate_dir={FLAGS.generate_dir}"
            raise UsageError(f"--unet_dir={FLAGS.unet_dir}: {what}: name those, or other directories")
    sets = identity(images, real.data.train.images)
    if not sets.items() <= result.items():  # else stages that are run one by one fill it
        result = {"seconds": {}, **sets, **gap_of(result, description | sets)}
    staying = check_floors(result, stages, real.heldout_sha256)
    notes = {name: note for name, note in real.notes.items() if name != "floor_warning" or not staying}
    result.pop("samples", None)
    used = result.get("flags", description.get("flags", {}))  # an earlier call's, until numbers are made
    result.pop("held_back", None)
    seconds = result["seconds"] | description.get("seconds", {})
    result |= description | {"flags": used, "seconds": seconds, **notes}
    result |= {"N": len(images), "training_set_size": len(real.data.train.images)}
    bad = result.get("non_finite_images")
    result["non_finite_warning"] = say_non_finite("generated images", bad, len(images))
    result["training_seconds"] = training_seconds(result["checkpoint"])
    result["watched"] = watched(result["checkpoint"])
    if FLAGS.samples and "score" not in stages:
        forget_old_scores(result)
    return result


def gap_of(result, known):
    """The gap of a result, if that is of the known network and training images, else {}."""
    names = ("checkpoint_sha256", "weights", "training_sha256")
    is_its = "gap" in result and all(result.get(name) == known.get(name) for name in names)
    return {"gap": result["gap"], "seconds": {"gap": result["seconds"]["gap"]}} if is_its else {}


def check_floors(result, stages, given):
    """Whether a result has floors that stay as they are, since no held-out images are given.

    given: what those given are known by, or None.

    Raises:
        UsageError: they are not those given, or of several sets."""
    of_stage = {"memorise": result.get("holdout"), "score": result, "gap": result.get("gap")}
    sets = {stage: (of_stage[stage] or {}).get("heldout_sha256") for stage in of_stage.keys() - stages}
    staying = {stage: known for stage, known in sets.items() if known}
    own = {given} - {None}
    if len(own | set(staying.values())) > 1:
        others = " and ".join(sorted(stage for stage, known in staying.items() if known not in own))
        what = f"has floors of other held-out images, by the {others} stage: run it too"
        raise UsageError(f"--grid_dir={FLAGS.grid_dir}: {what}, or choose other directories")
    return bool(staying) and given is None


def find_gap(net, paths, real, device):
    """The `denoising_gap` on --num_images training and as many held-out images, evenly spaced."""
    sets = []
    for part in (real.data.train, real.data.heldout):
        rows = evenly_spaced(len(part.images), FLAGS.num_images)
        labels = part.labels[rows] - int(FLAGS.legacy_labels) if FLAGS.use_labels else None
        sets.append((part.images[rows], labels))
    trainer = GaussianDiffusionTrainer(net, **build.diffusion_settings(FLAGS)).to(device)
    gap = denoising_gap(trainer, *sets, FLAGS.seed, FLAGS.batch_size)
    if math.isnan(gap["auc"]):
        what = "its losses are not finite, so they tell nothing: leave gap out of --stages"
        raise DataError(f"{names_of(paths)}: {what}")
    about = {"checkpoint": names_of(paths)}
    about["heldout_sha256"] = real.heldout_sha256 or hash_of_set(real.data.heldout.images)
    return {"gap": about | gap}


def known_identity(result):
    """The `identity` of a result's images, which takes long to hash, and of the groups of the flags."""
    of_groups = {"groups_sha256": file_hash(FLAGS.groups)} if FLAGS.groups else {}
    return {name: result[name] for name in ("images_sha256", "training_sha256")} | of_groups


def memorise(images, real, space, names, sets, device, were_held_back):
    """What the memorise stage finds, in pixels and, unless it is None, in a feature space.

    were_held_back: of the images, so that the finder looks for those that are near all the same."""
    training, heldout, groups = real.data.train.images, real.heldout, real.data.groups
    numbers, _ = evaluate(
        images, training.to(build.data_device(FLAGS, device)), heldout, folder=FLAGS.similar_dir,
        sets=sets, hflip=real.data.hflip, names=names, groups=groups,
        batch_generated=FLAGS.batch_A, batch_training=FLAGS.batch_B, device=device, progress=True,
    )  # fmt: skip
    if heldout is not None:
        numbers["holdout"]["heldout_sha256"] = real.heldout_sha256
    if were_held_back:
        numbers["near_duplicates"] = count_near(images, training)
    if space:
        floors = {} if heldout is None else {"holdout": (heldout, None)}
        found = evaluate_similarity(space, images, training, floors=floors, groups=groups)
        numbers["similarity"], floors, _ = found
        for name, floor in floors.items():
            numbers[name]["similarity"] = floor
    return numbers | count_groups(groups, FLAGS.groups)


def show(stages, result, images, real, names):
    """The grid and the report stage."""
    training = real.data.train.images
    path = Path(FLAGS.similar_dir) / "memorization.npz"
    known = known_neighbors(path, known_identity(result))
    if result.get("groups") != count_groups(real.data.groups, FLAGS.groups).get("groups"):
        what = "made with other --groups, or none"
        raise DataError(f"{path}: {what}: give those, or run the memorise stage")
    if known is None or "pixels" not in result:
        raise DataError(f"{path}: no neighbours of these images: run the memorise stage first")
    shown = images, training, known[1][:, 0], memorization_ratio(known[0])
    if "grid" in stages:
        grids = partial(save_grids, FLAGS.grid_dir, *shown)
        add_stage(result, FLAGS.grid_dir, "grid", lambda: {"grids": [str(path) for path in grids()]})
    if "report" in stages:
        page = Path(FLAGS.grid_dir) / "report.html"
        skips = skip_counts(result["checkpoint"], real.slot_group)
        report = partial(write_report, page, result, *shown, skips, names, real.data.groups)
        add_stage(result, FLAGS.grid_dir, "report", lambda: {"report": report()})


def names_of_images(images, training):
    """What images and training images are called, by name or number: str (N,) and (M,)."""
    numbers = np.arange(len(images)).astype(str)
    return sample_names(FLAGS.samples, len(images)) if FLAGS.samples else numbers, training.names


def skip_counts(path, slot_group):
    """How often training left out each of M images, (M,) int64, or None; slot_group: (N,), slots'."""
    counts = load_checkpoint(path).get("index_array") if path and Path(path).exists() else None
    if not isinstance(counts, torch.Tensor) or counts.shape != slot_group.shape:
        return None
    return torch.zeros(int(slot_group.max()) + 1, dtype=torch.int64).index_add(0, slot_group, counts)


def append_published_format(result):
    """Append scores and MQ to result.txt, in the format of the published code."""
    path = Path(FLAGS.grid_dir) / "result.txt"
    name = "fpd" if "fpd" in result else "FID"
    inception_score = f"({result.get('is', 'nan')}, {result.get('is_std', 'nan')})"
    distance = f"{name}: ({result.get(name.lower(), 'nan')}, {result.get('fid_reference')})"
    lines = [f"{inception_score}, {distance}, N: {result['N']}, checkpoint: {printable(result['checkpoint'])}"]
    lines += [f"v_{p}:{count}" for p, count in result.get("pixels", {}).get("mq", {}).items()]
    before = path.read_bytes() if path.exists() else b""
    with atomic_write(path) as file:
        file.write(before + "".join(f"{line}\n" for line in lines).encode())


def main():
    stages = chosen_stages()
    device = pick_device(FLAGS.device, FLAGS.precision)

    # whatever can be wrong shows here, the cheapest first and all of it before the long work
    distances, copies = load_spaces(stages, device)
    net, paths, settings = load_network(stages, device)
    checkpoint, settings = (names_of(paths), settings) if net else origin_of_images()
    default_resize(FLAGS)
    young = ema_warning(paths)
    say(young)
    check_places(stages)
    images = None if "generate" in stages else existing_images(needed=stages != {"gap"})
    real = load_real(stages, images, checkpoint, settings)

    with take_directories(directories(stages)):
        result = earlier_result(FLAGS.grid_dir)
        if "score" in stages:
            number = FLAGS.num_images if images is None else len(images)
            quality = build.quality(FLAGS, distances, real.reference, number, device, real.heldout, FLAGS.fid_cache)
        announce(device, net, len(real.data.train.images), FLAGS.batch_size, asked_for=FLAGS.device)

        if "generate" in stages:
            images = generate_images(net, paths, settings, young, real.data, device)
        result = begin_result(result, stages, images, real, paths, settings, young)
        names, is_new = names_of_images(images, real.data.train), False

        def add(stage, find):
            return add_stage(result, FLAGS.grid_dir, stage, find, OPTIONAL.get(stage, ()), as_dict(FLAGS))

        if "score" in stages and result.get("scored_with") != quality.scored_with:
            of_scores = {"scored_with": quality.scored_with, "fid_reference": FLAGS.fid_reference}
            of_scores |= {"warning": quality.warning, "heldout_sha256": real.heldout_sha256}
            is_new |= add("score", lambda: {**quality(images), **of_scores})
        if "memorise" in stages:
            of_result = known_identity(result), device, "held_back" in result
            is_new |= add("memorise", lambda: memorise(images, real, copies, names, *of_result))
        if "gap" in stages:
            add("gap", lambda: find_gap(net, paths, real, device))
        if distributed.is_main():
            if stages & {"grid", "report"}:
                show(stages, result, images, real, names)
            if is_new:
                append_published_format(result)
            print_summary(result, FLAGS.grid_dir)


if __name__ == "__main__":
    run(main, define)

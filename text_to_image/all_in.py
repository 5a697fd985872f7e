"""Evaluation of a text-conditioned generator: images of prompts, whether they are copies, their quality.

    python -m text_to_image.all_in --pretrained=stable-diffusion-2-1 --unet=logs/laion --sscd=sscd.pt
    python -m text_to_image.all_in --pretrained=pipeline --unet=logs/text --features=pixels --prompts=all
    python -m text_to_image.all_in --pretrained=pipeline --unet=lora.safetensors --lora_scale=0.8 ...
    python -m text_to_image.all_in --samples=made --prompts=texts.txt --data_root=photos --sscd=sscd.pt

Images and captions of the training are those of --unet's log directory, unless flags name others.
"""

import hashlib
import re
import time
from collections import namedtuple
from functools import partial
from pathlib import Path

import numpy as np
import torch
from absl.flags import FLAGS

from score.evaluate import count_groups, count_repeats, floor_warning, identity, write_nearest
from score.features import load_clip
from score.fid import CACHE
from score.generate import generate_into, over_ranks
from score.grids import save_grids
from score.record import print_summary, say, say_non_finite, take_directories
from score.reject import held_back, hold_back, similarity_margin
from score.report import training_seconds, watched, write_similarity_report
from score.samples import evenly_spaced, png_names, save_pngs, warn_of_odd_values
from score.similarity import (
    clip_scores,
    detection,
    embed,
    evaluate_similarity,
    memorized,
    squared_distance,
)
from text_to_image import build
from text_to_image.data import check_length
from text_to_image.flags import check_pipeline, define, fid_features, num_images, prompts_are_drawn
from text_to_image.lora import load_lora
from text_to_image.pipeline import (
    CHECKPOINT,
    FROZEN,
    LORA_FILE,
    as_scheduler,
    find_folder,
    find_unet,
    generate_numbered,
    latent_moments,
    load_pipeline,
    load_unet,
    settings_of_run,
    vae_batch,
)
from text_to_image.prompts import Prompts, distinct, not_in
from text_to_image.recorded import check_pipeline_of_training, differences, take_flags
from training.build import copies_space, distance_space, quality
from training.flags import as_dict
from training.launch import announce, pick_device, run
from training.learner import PRECISIONS
from training.logdir import random_start, read_run, young_ema
from training.weights import find_best
from utils import distributed
from utils.bar import progress_bar
from utils.errors import UsageError
from utils.files import atomic_write, content_hash, read_json, remove, write_json
from utils.images import equal_images, fingerprint, keep_apart, non_finite_images, to_uint8
from utils.seeding import seed_of_try

DETECTOR_STEPS = 10  # the first steps of the sampler, whose norms the detector averages


def generate_images(pipeline, folder, unet_folder, prompts, source, directory, rejection=None):
    """Images of all prompts, and the detector's norms (N,), None without guidance.

    They are kept in a directory, where a killed generation goes on. Image i depends on its prompt, the
    networks, the settings, the seed and i, and not on the batch or the number of processes.

    rejection: of `rejection_of`, or None."""
    names = "rand_augs rand_aug_repeats seed guidance sample_steps scheduler text_noise precision resolution"
    origin = {name: FLAGS[name].value for name in names.split()}
    origin["prompts"] = "drawn" if prompts_are_drawn(FLAGS) else "in turn"
    origin["texts_sha256"] = hashlib.sha256(repr(source).encode()).hexdigest()
    origin["pipeline_sha256"] = content_hash(folder, *FROZEN)
    origin["checkpoint_sha256"] = content_hash(unet_folder)
    if unet_folder.is_file():
        origin |= {"lora_scale": FLAGS.lora_scale, "unet_sha256": content_hash(folder / "unet")}
    if PRECISIONS[FLAGS.precision] != torch.float32:
        origin["autocast"] = "unet"  # earlier versions had it around all of the pipeline
    margin, of_margin = rejection or (None, {})
    origin |= of_margin
    kept = Path(directory) / f"detector.{hashlib.sha256(repr(origin).encode()).hexdigest()[:8]}.json"
    batches = partial(generate_batches, pipeline, prompts, kept, margin)
    checkpoint = unet_folder.parent if unet_folder.name in ("unet", LORA_FILE) else unet_folder
    about = {"checkpoint": str(checkpoint), "ema_warning": ema_warning(unet_folder)}
    about["training"], number = settings_of_run(unet_folder) if FLAGS.unet else None, len(prompts.texts)
    images = generate_into(directory, origin, batches, number, FLAGS.resolution, about)
    norms = read_json(kept)[:number] if distributed.is_main() else None
    if distributed.is_main():
        for other in {*kept.parent.glob("detector.????????.json")} - {kept}:  # of images that were here
            remove(other)
        asked = zip(prompts.texts, prompts.captions, prompts.own.tolist(), strict=True)
        asked = [dict(zip(("prompt", "caption", "image"), row, strict=True)) for row in asked]
        write_json(Path(directory) / "prompts.json", asked)
        if FLAGS.save_png:
            save_pngs(directory, images)
    return images, torch.tensor(distributed.from_main(norms)) if FLAGS.guidance > 1 else None


def rejection_of(space, training):
    """The margin of `--reject_above`, for `hold_back`, and what else images depend on with it, or None.

    space: the `FeatureSpace` of similarity; training: (M, 3, H, W) uint8. All processes take part."""
    if FLAGS.reject_above is None:
        return None
    above, features = FLAGS.reject_above, embed(space, training)
    margin = partial(similarity_margin, space=space, training=features, above=above)
    about = {"reject_above": above, "features": space.name, "preprocess": space.preprocess}
    about["features_sha256"] = space.weights_hash
    return margin, about | {"training_sha256": fingerprint(training)}


def generate_batches(pipeline, prompts, kept, margin, first):
    """As `score.generate.generate_batches`; the detector's norms of all images so far are in `kept`.

    margin: of `hold_back`, or None."""
    shown, settings = FLAGS.resolution, build.generation(FLAGS)
    norms = read_json(kept)[:first] if first and distributed.is_main() else []
    steps = []

    def watch(unet, inputs, output):
        if FLAGS.guidance > 1 and len(steps) < DETECTOR_STEPS:
            without, given = output[0].float().chunk(2)
            steps.append((given - without).flatten(1).norm(dim=1))

    def make(indices, t=0):
        x, norm = torch.empty(0, 3, shown, shown), torch.zeros(len(indices))
        if indices:
            steps.clear()
            settings["seed"] = seed_of_try(FLAGS.seed, t)
            x = generate_numbered(pipeline, prompts.texts, indices, **settings)
            norm = torch.stack(steps).mean(dim=0) if steps else norm
        return to_uint8(2 * x - 1), non_finite_images(x), norm

    hook = pipeline.unet.register_forward_hook(watch)
    made = hold_back(make, margin) if margin else make
    batches = over_ranks(first, len(prompts.texts), FLAGS.batch_size, made)
    for images, not_finite, norm, *of_tries in batches:
        norms += norm.tolist()
        write_json(kept, norms)
        yield images, not_finite, *of_tries
    hook.remove()


@torch.no_grad()
def round_trip(pipeline, images):
    """Images (N, 3, H, W) uint8 as the VAE gives them back, and how many of them are not finite."""
    decoded, bad = [], 0
    for block in progress_bar(images.split(vae_batch(images)), "VAE", unit="batch", delay=1):
        latents = latent_moments(pipeline.vae, block)[:, 0]
        x = pipeline.vae.decode(latents, return_dict=False)[0]
        decoded.append(to_uint8(x).cpu())
        bad += int(non_finite_images(x).sum())
    return torch.cat(decoded), bad


def ema_warning(unet_folder):
    """What is to be said of the EMA weights of a training; None without --unet_from_scratch."""
    run = read_run(unet_folder.parent.parent / "run.json")
    found = re.fullmatch(CHECKPOINT, unet_folder.parent.name)
    if not run or not found or not run["settings"].get("unet_from_scratch"):
        return None
    kind, number = found.groups()
    steps = int(number) * (run["settings"]["local_steps"] if kind == "round" else 1)
    share = random_start(run, steps)
    return young_ema(unet_folder.parent, share)


def generated():
    """What result.json says of the images in --generate_dir, on rank 0."""
    record = read_json(Path(FLAGS.generate_dir) / "generate.json")
    names = ("checkpoint", "training", "ema_warning", "origin", "non_finite_images", "seconds")
    said = say_non_finite("generated images", record["non_finite_images"], record["done"])
    return {name: record[name] for name in names} | held_back(record) | {"non_finite_warning": said}


def score(images, prompts, scorers, clip):
    """The scores of images of `Prompts` or None; scorers: {prefix of the scores' names: `Quality`}."""
    scores = {prefix: scorer(images).items() for prefix, scorer in scorers.items()}
    scores = {prefix + name: value for prefix, found in scores.items() for name, value in found}
    if clip and prompts:
        scores["clip_score"] = clip_scores(clip, images, prompts.captions).mean().item()
    return scores


def directories():
    """{flag: directory} of those that are written."""
    written = {"similar_dir": FLAGS.similar_dir, "grid_dir": FLAGS.grid_dir}
    if not FLAGS.samples:
        written["generate_dir"] = FLAGS.generate_dir
        if FLAGS.unet:
            written["base_dir"] = FLAGS.base_dir or str(Path(FLAGS.generate_dir) / "base")
    return written


def write_results(result, images, data, neighbors, prompts):
    """Write all files but the images, and print a summary; neighbors: of `evaluate_similarity`."""
    grid_dir, similarity, index = Path(FLAGS.grid_dir), *(values.cpu() for values in neighbors)
    sets = {name: result[name] for name in ("images_sha256", "training_sha256")}
    with atomic_write(Path(FLAGS.similar_dir) / "similarity.npz") as file:
        np.savez(file, similarity=similarity.numpy(), index=index.numpy(), paths=data.paths, **sets)
    names = build.names_of_samples(FLAGS) or [str(i) for i in range(len(images))]
    found = squared_distance(similarity), index, names, data.paths, similarity[:, 0]
    write_nearest(Path(FLAGS.similar_dir) / "nearest.csv", *found)
    shown, captions = (images, data.images, index[:, 0]), [texts[0] for texts in data.captions]
    grids = [str(path) for path in save_grids(grid_dir, *shown, 1 - similarity[:, 0])]
    texts, page = (similarity[:, 0], prompts, captions), grid_dir / "report.html"
    page = write_similarity_report(page, result, *shown, *texts)
    write_json(grid_dir / "result.json", result | {"grids": grids, "report": page})
    print_summary(result, grid_dir)


def find_places():
    """The folders of the UNet and the pipeline, or None; flags that are not given are the training's."""
    if FLAGS["logdir"].present and not FLAGS.unet and not FLAGS.samples:
        what = "is where training writes: give --unet to evaluate what it has trained, else leave it out"
        raise UsageError(f"--logdir={FLAGS.logdir}: {what}")
    folder = unet_folder = None
    if FLAGS.unet:
        unet_folder = find_unet(find_best(FLAGS.unet)[0] if FLAGS.best else FLAGS.unet)
        take_flags(FLAGS, unet_folder)
        say(None if FLAGS.samples else ema_warning(unet_folder))
    written = {**directories(), "fid_cache": FLAGS.fid_cache or CACHE}
    keep_apart([FLAGS.data_root], {"samples": FLAGS.samples, "heldout": FLAGS.heldout}, written)
    if FLAGS.pretrained:
        with distributed.main_first():
            folder = find_folder(FLAGS.pretrained, FLAGS.download)
        unet_folder = unet_folder or folder / "unet"
    return unet_folder, folder


def load_network(folder, unet_folder, device):
    """The pipeline with the UNet, or None without a folder of one."""
    if not folder:
        return None
    is_lora = unet_folder.is_file()
    pipeline = load_pipeline(folder, folder / "unet" if is_lora else unet_folder)
    if FLAGS.unet:
        check_pipeline_of_training(FLAGS, folder, unet_folder)
    if is_lora:
        load_lora(pipeline, unet_folder, FLAGS.lora_scale)
    elif FLAGS.lora_scale != 1:
        what = "it is of a LoRA, and --unet names none"
        raise UsageError(f"--lora_scale={FLAGS.lora_scale}: {what}: leave it out")
    if FLAGS.scheduler == "dpm":
        kind = "DPMSolverMultistepScheduler"
        pipeline.scheduler = as_scheduler(kind, pipeline.scheduler, "--scheduler=dpm")
    check_pipeline(FLAGS, pipeline, 0 if FLAGS.samples else FLAGS.sample_steps)
    return pipeline.to(device)


# What images are compared with: distances to all training and held-out images, uint8 (N, 3, H, W), or None;
# copies to each once, `CaptionedImages` and held-out images that equal none of them; what is said of them
Real = namedtuple("Real", "reference all_heldout data heldout notes")


def load_real(unet_folder):
    """The `Real` images of the flags, and of the training of a UNet; says what they lack."""
    given = build.dataset(FLAGS)
    data, all_heldout = distinct(given), build.images_of(FLAGS, "heldout") if FLAGS.heldout else None
    heldout = None if all_heldout is None else not_in(data.images, all_heldout)
    parts = [given.images] if all_heldout is None else [given.images, all_heldout]
    notes = count_repeats(equal_images(torch.cat(parts)), len(given.images))
    notes["settings_warning"] = differences(FLAGS, unet_folder, given) if FLAGS.unet else None
    notes["floor_warning"] = floor_warning(heldout)
    say(*(note for name, note in notes.items() if name.endswith("warning")))
    return Real(given.images, all_heldout, data, heldout, notes)


def load_prompts(data, pipeline, images, clip):
    """The prompts and the texts they are taken from, or None twice.

    images: of --samples, or None; clip: of `load_clip`, which reads the prompts too, or None."""
    if FLAGS.samples and not FLAGS.prompts:
        return None, None
    number = len(images) if FLAGS.samples else num_images(FLAGS)
    names, tokenizer = build.names_of_samples(FLAGS), pipeline and pipeline.tokenizer
    prompts, source = build.prompts(FLAGS, data, tokenizer, number, names)
    in_turn = FLAGS.prompts == "all"  # several times, maybe
    if FLAGS.samples and (len(images) % len(source) if in_turn else len(images) != len(source)):
        kind = "captions, a distinct image each," if in_turn else "prompts"
        advice = "give as many images of each, or a file with a prompt" if in_turn else "give one"
        what = f"{len(source)} {kind} for the {len(images)} images of --samples"
        raise UsageError(f"--prompts={FLAGS.prompts}: {what}: {advice} for each")
    if pipeline:
        check_length(prompts.texts, pipeline.tokenizer, "prompts")
    elif clip:
        limit = clip[0].config.text_config.max_position_embeddings
        check_length(prompts.texts, clip[1], "prompts", limit)
    return prompts, source


def make_floors(pipeline, folder, data, heldout, prompts, source, number, device):
    """What is measured in place of the images, {name: (images, prompts or None)}, and notes on it."""
    floors, notes, directory = {}, [], directories().get("base_dir")
    if directory:
        pipeline.unload_lora_weights()
        pipeline.unet = load_unet(folder / "unet").to(device)
        images, _ = generate_images(pipeline, folder, folder / "unet", prompts, source, directory)
        floors["base"] = images, prompts
        if distributed.is_main():
            bad = read_json(Path(directory) / "generate.json")["non_finite_images"]
            notes.append(say_non_finite("images of the base model", bad, number))
    if heldout is not None:
        floors["holdout"] = heldout, None
    if pipeline:
        rows = evenly_spaced(len(data.images), number)
        captions = [data.captions[row][0] for row in rows]
        decoded, bad = round_trip(pipeline, data.images[rows])
        notes.append(say_non_finite("training images after the VAE's round trip", bad, len(rows)))
        floors["round_trip"] = decoded, Prompts(captions, captions, rows)
    return floors, notes


def measure(images, norms, training, prompts, space, scorers, clip, floors, groups):
    """All numbers of images and floors, and nearest training images.

    norms: of the detector, or None; groups: of the training images, or None."""
    own = prompts and prompts.own
    with_own = {name: (others, theirs and theirs.own) for name, (others, theirs) in floors.items()}
    numbers, similar, neighbors = evaluate_similarity(space, images, training, own, with_own, groups)
    numbers = {"similarity": numbers, **score(images, prompts, scorers, clip)}
    for name, (others, theirs) in floors.items():
        fitting = {"": scorers[""]} if name == "holdout" else scorers
        numbers[name] = {"N": len(others), "images_sha256": fingerprint(others)}
        numbers[name] |= {"similarity": similar[name], **score(others, theirs, fitting, clip)}
    if norms is not None:
        copies = {"f_mem": memorized(neighbors[0])}
        if space.threshold is not None:
            copies = {"above_05": neighbors[0][:, 0] > space.threshold, **copies}
        numbers["detector"] = {name: detection(norms, rows.cpu()) for name, rows in copies.items()}
    return numbers, neighbors


def main():
    device = pick_device(FLAGS.device, FLAGS.precision)

    # whatever can be wrong shows here, before the long work
    unet_folder, folder = find_places()
    space = copies_space(FLAGS, FLAGS.features or "sscd", device, "features")
    distances = distance_space(FLAGS, fid_features(FLAGS), device, batch_size=50)
    clip = load_clip(FLAGS.clip, device) if FLAGS.clip else None
    pipeline = load_network(folder, unet_folder, device)
    real, images = load_real(unet_folder), build.images_of(FLAGS, "samples") if FLAGS.samples else None
    data, heldout, training = real.data, real.heldout, real.data.images
    odd = warn_of_odd_values(FLAGS.samples, images, training) if FLAGS.samples else None
    prompts, source = load_prompts(data, pipeline, images, clip)
    number = len(images if FLAGS.samples else prompts.texts)
    for flag, place in directories().items():
        if FLAGS.save_png and flag in ("generate_dir", "base_dir"):
            png_names(place, number)
    scorers = {"": quality(FLAGS, distances, real.reference, number, device, heldout, FLAGS.fid_cache)}
    if heldout is not None:
        scorers["heldout_"] = quality(FLAGS, distances, real.all_heldout, number, device, heldout)

    with take_directories(directories()):
        announce(device, pipeline and pipeline.unet, len(training), FLAGS.batch_size, asked_for=FLAGS.device)
        nothing, norms = dict.fromkeys(("checkpoint", "training", "origin", "ema_warning")), None
        result = {"samples": FLAGS.samples, **nothing, "seconds": {}}
        if not FLAGS.samples:
            made_of = pipeline, folder, unet_folder, prompts, source, FLAGS.generate_dir
            images, norms = generate_images(*made_of, rejection_of(space, training))
            result |= distributed.from_main(generated() if distributed.is_main() else None)
        floors, notes = make_floors(pipeline, folder, data, heldout, prompts, source, number, device)

        begin, scorer = time.perf_counter(), scorers[""]
        notes = [note for note in (*notes, scorer.warning) if note]
        result |= identity(images, training) | {"N": number, "training_set_size": len(training)}
        result |= {"training_seconds": training_seconds(result["checkpoint"])}
        result |= {"watched": watched(result["checkpoint"])}
        result |= {"warning": "; ".join(notes) or None, "samples_warning": odd, **real.notes}
        of_clip = {"clip": content_hash(FLAGS.clip)} if clip else {}
        result |= {"scored_with": scorer.scored_with | of_clip, **count_groups(data.groups, FLAGS.groups)}
        found = measure(images, norms, training, prompts, space, scorers, clip, floors, data.groups)
        numbers, neighbors = found
        result |= {**numbers, "flags": as_dict(FLAGS)}
        result["seconds"]["measure"] = round(time.perf_counter() - begin, 3)
        if distributed.is_main():
            write_results(result, images, data, neighbors, prompts and prompts.texts)


if __name__ == "__main__":
    run(main, define)

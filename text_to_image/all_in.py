"""Evaluation of a text-conditioned generator: images of prompts, whether they are copies, and how good they are.

    python -m text_to_image.all_in --pretrained=stable-diffusion-2-1 --unet=logs/laion --sscd=sscd.pt --clip=clip
    python -m text_to_image.all_in --pretrained=pipeline --unet=logs/text --prompts=all --features=pixels
    python -m text_to_image.all_in --samples=their/images --prompts=their/prompts.txt --data_root=images --sscd=sscd.pt

Images and captions of the training are those of --unet's log directory, unless flags name others.
"""

import hashlib
import re
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from absl.flags import FLAGS

from score.columns import summary
from score.evaluate import Quality, count_repeats, identity
from score.features import load_clip
from score.fid import CACHE
from score.generate import generate_into
from score.grids import save_grids
from score.report import training_seconds, write_similarity_report
from score.samples import evenly_spaced, load_samples, non_finite_images, save_pngs, warn_of_odd_values
from score.similarity import clip_scores, detection, evaluate_similarity, memorized
from text_to_image import build
from text_to_image.data import check_length, load_images
from text_to_image.flags import check_pipeline, define, fid_features, num_images, prompts_are_drawn
from text_to_image.pipeline import (
    FROZEN,
    ROUND,
    as_scheduler,
    content_hash,
    find_folder,
    find_unet,
    generate,
    latent_moments,
    load_pipeline,
    load_unet,
    settings_of,
)
from text_to_image.prompts import Prompts, distinct
from text_to_image.recorded import check_pipeline_of_training, differences, take_flags
from training.build import copies_space, distance_space
from training.flags import as_dict
from training.launch import announce, pick_device, run
from training.learner import PRECISIONS
from training.logdir import random_start, read_run, young_ema
from utils import distributed
from utils.bar import progress_bar
from utils.errors import DataError, UsageError, warn
from utils.files import atomic_write, lock_directory, read_json, write_json
from utils.images import equal_images, fingerprint, keep_apart, list_images, size_of, to_uint8
from utils.seeding import generator

DETECTOR_STEPS = 10  # the first steps of the sampler, whose norms the detector averages


def generate_images(pipeline, folder, unet_folder, prompts, source, directory):
    """Images of all prompts, and the detector's norms (N,), None without guidance.

    They are kept in a directory, where a killed generation goes on. Image i depends on its prompt, the networks, the
    settings, the seed and i, and not on the batch or the number of processes.

    Args:
        folder, unet_folder: of the pipeline and of its UNet.
        source: of `make_prompts`.
    """
    names = ("rand_augs", "rand_aug_repeats", "seed", "guidance", "sample_steps", "scheduler", "text_noise")
    origin = {name: FLAGS[name].value for name in (*names, "precision", "resolution")}
    origin |= {"prompts": "drawn" if prompts_are_drawn(FLAGS) else "in turn"}
    origin |= {"texts_sha256": hashlib.sha256(repr(source).encode()).hexdigest()}
    origin |= {"pipeline_sha256": content_hash(folder, *FROZEN)}
    origin |= {"checkpoint_sha256": content_hash(unet_folder)}
    if PRECISIONS[FLAGS.precision] != torch.float32:
        origin |= {"autocast": "unet"}  # earlier versions had it around all of the pipeline
    kept = Path(directory) / f"detector.{hashlib.sha256(repr(origin).encode()).hexdigest()[:8]}.json"
    batches = partial(generate_batches, pipeline, prompts, kept)
    number = len(prompts.texts)
    images = generate_into(directory, origin, batches, number, FLAGS.resolution, about_training(unet_folder))
    norms = read_json(kept)[:number] if distributed.is_main() else None
    if distributed.is_main():
        write_prompts(Path(directory) / "prompts.json", prompts)
        if FLAGS.save_png:
            save_pngs(directory, images)
    return images, torch.tensor(distributed.from_main(norms)) if FLAGS.guidance > 1 else None


def write_prompts(path, prompts):
    """A list of what every image was asked for: prompt, caption, and the number of the caption's training image."""
    rows = zip(prompts.texts, prompts.captions, prompts.own.tolist(), strict=True)
    write_json(path, [dict(zip(("prompt", "caption", "image"), row, strict=True)) for row in rows])


def generate_batches(pipeline, prompts, kept, first):
    """As `score.generate.generate_batches`; writes the detector's norms of all images so far into the file `kept`."""
    side, number = FLAGS.resolution // pipeline.vae_scale_factor, len(prompts.texts)
    norms = read_json(kept)[:first] if first and distributed.is_main() else []
    dtype, block = PRECISIONS[FLAGS.precision], FLAGS.batch_size * distributed.world_size()
    watched = []

    def watch(unet, inputs, output):
        if FLAGS.guidance > 1 and len(watched) < DETECTOR_STEPS:
            without, given = output[0].float().chunk(2)
            watched.append((given - without).flatten(1).norm(dim=1))

    hook = pipeline.unet.register_forward_hook(watch)
    with progress_bar(total=number, initial=first, desc="generate", unit="image") as bar:
        for start in range(first, number, block):
            batch = range(start, min(start + block, number))
            indices = batch[distributed.share(len(batch))]
            x, found = torch.empty(0, 3, FLAGS.resolution, FLAGS.resolution), torch.zeros(len(indices))
            if indices:
                watched.clear()
                streams = [generator("cpu", FLAGS.seed, "image", i) for i in indices]
                shape = (pipeline.unet.config.in_channels, side, side)
                latents = torch.stack([torch.randn(shape, generator=stream) for stream in streams])
                texts = prompts.texts[indices.start : indices.stop]
                noise, steps = FLAGS.text_noise, FLAGS.sample_steps
                x = generate(pipeline, texts, latents, steps, FLAGS.guidance, streams, noise, dtype)
                found = torch.stack(watched).mean(dim=0).cpu() if watched else found
            made = distributed.gather((to_uint8(2 * x - 1).cpu(), non_finite_images(x).cpu(), found))
            if distributed.is_main():
                images, not_finite, found = map(torch.cat, zip(*made, strict=True))
                norms += found.tolist()
                write_json(kept, norms)
                yield images, not_finite
            bar.update(len(batch))
    hook.remove()


@torch.no_grad()
def round_trip(pipeline, images, batch_size=16):
    """Images (N, 3, H, W) uint8 as the VAE gives them back: what a perfect copy of their latents looks like.

    Returns:
        The images, uint8, and how many of them are not finite.
    """
    decoded, bad = [], 0
    for block in progress_bar(images.split(batch_size), "VAE", unit="batch", delay=1):
        latents = latent_moments(pipeline.vae, block)[:, 0]
        x = pipeline.vae.decode(latents, return_dict=False)[0]
        decoded.append(to_uint8(x).cpu())
        bad += int(non_finite_images(x).sum())
    return torch.cat(decoded), bad


def read_images(flag):
    """The images that a flag names, uint8; those of a folder resized, in the order of the numbers in their names.

    Raises:
        DataError, UsageError: no images, or an array of images of another size.
    """
    path, side = FLAGS[flag].value, FLAGS.resolution
    if Path(path).is_dir():
        files = [Path(file) for group in list_images(path) for file in group]
        files.sort(key=lambda file: [int(part) if part.isdigit() else part for part in re.split("([0-9]+)", str(file))])
        return load_images(files, side, FLAGS.num_workers)
    if not Path(path).is_file():
        raise DataError(f"--{flag}={path}: no such file or folder")
    images = load_samples(path)
    if images.shape[2:] != (side, side):
        what = f"holds {size_of(images)} images (width x height), not {side}x{side}"
        raise UsageError(f"--{flag}={path}: {what}: give their --resolution")
    return images


def about_training(unet_folder):
    """What result.json says of the training that a UNet comes from."""
    folder = unet_folder.parent if unet_folder.name == "unet" else unet_folder
    about = {"checkpoint": str(folder), "training": settings_of(unet_folder) if FLAGS.unet else None}
    return about | {"ema_warning": ema_warning(unet_folder)}


def ema_warning(unet_folder):
    """What is to be said of the EMA weights of a round, or None; without --unet_from_scratch nothing is."""
    run = read_run(unet_folder.parent.parent / "run.json")
    found = re.fullmatch(ROUND, unet_folder.parent.name)
    if not run or not found or not run["settings"].get("unet_from_scratch"):
        return None
    share = random_start(run, int(found[1]) * run["settings"]["local_steps"])
    return young_ema(unet_folder.parent, share)


def score(images, prompts, scorers, clip):
    """The scores of one set of images.

    Args:
        prompts: `Prompts`, or None.
        scorers: {prefix of their scores' names: `Quality`}.
        clip: of `load_clip`, or None.
    """
    scores = {prefix + name: value for prefix, scorer in scorers.items() for name, value in scorer(images).items()}
    if clip and prompts:
        scores["clip_score"] = clip_scores(clip, images, prompts.captions).mean().item()
    return scores


def note(notes, text):
    """Add to what is to be said of an evaluation, and say it."""
    notes.append(text)
    if distributed.is_main():
        warn(f"warning: {text}")


def note_non_finite(notes, what, bad, number):
    """`note` that so many of a number of images are not finite, if any are."""
    if bad:
        note(notes, f"{bad:,} of {number:,} {what} hold values that are not finite, black here")


def directories(base_dir):
    """{flag: directory} of those that are written."""
    written = {"similar_dir": FLAGS.similar_dir, "grid_dir": FLAGS.grid_dir}
    if not FLAGS.samples:
        written |= {"generate_dir": FLAGS.generate_dir} | ({"base_dir": base_dir} if base_dir else {})
    return written


def take_directories(base_dir):
    """Make the directories that are written, and take them until the files that are returned are closed."""
    paths = {Path(path).resolve(): flag for flag, path in directories(base_dir).items()}  # some may be the same
    return [lock_directory(path, flag) for path, flag in paths.items()]


def write_results(result, images, data, neighbors, prompts):
    """Write all files but the images, and print what a person wants to know first.

    Args:
        data: the `CaptionedImages` that the numbers of training images count in.
        neighbors: of `evaluate_similarity`.
        prompts: texts, or None.
    """
    grid_dir, similarity, index = Path(FLAGS.grid_dir), *(values.cpu() for values in neighbors)
    sets = {name: result[name] for name in ("images_sha256", "training_sha256")}
    with atomic_write(Path(FLAGS.similar_dir) / "similarity.npz") as file:
        np.savez(file, similarity=similarity.numpy(), index=index.numpy(), paths=data.paths, **sets)
    shown, captions = (images, data.images, index[:, 0]), [texts[0] for texts in data.captions]
    paths = save_grids(grid_dir, *shown, 1 - similarity[:, 0])
    page = write_similarity_report(grid_dir / "report.html", result, *shown, similarity[:, 0], prompts, captions)
    write_json(grid_dir / "result.json", result | {"grids": [str(path) for path in paths], "report": page})
    print(f"{len(images)} images against {len(data.images)} training images")
    print("  " + ", ".join(f"{name} {text}" for name, text in summary(result).items()))
    print(f"  written to {grid_dir}")


def without_repeats(given, training, heldout):
    """What is to be said of repeats, and the held-out images that equal no training image, None if none are left.

    Args:
        given: how many training images there are, of which `training` (N, 3, H, W) are distinct.
        heldout: (L, 3, H, W), or None.
    """
    if heldout is None:
        repeats = count_repeats(given, 0, len(training), 0)
    else:
        others = heldout[equal_images(torch.cat([training, heldout]))[len(training) :] >= len(training)]
        repeats = count_repeats(given, len(heldout), len(training), len(others))
        heldout = others if len(others) else None
    if repeats["repeats_warning"] and distributed.is_main():
        warn(f"warning: {repeats['repeats_warning']}")
    return repeats, heldout


def main():
    device = pick_device(FLAGS.device, FLAGS.precision)

    notes = []  # what the page and result.json say, too
    # whatever can be wrong shows here, before the long work
    folder = unet_folder = pipeline = images = norms = prompts = source = heldout = odd = None
    if FLAGS["logdir"].present and not FLAGS.unet and not FLAGS.samples:
        what = "is where training writes: give --unet to evaluate what it has trained, else leave it out"
        raise UsageError(f"--logdir={FLAGS.logdir}: {what}")
    if FLAGS.unet:
        unet_folder = find_unet(FLAGS.unet)
        take_flags(FLAGS, unet_folder)
        young = ema_warning(unet_folder)
        if young and distributed.is_main() and not FLAGS.samples:
            warn(f"warning: {young}")
    base_dir = FLAGS.base_dir or str(Path(FLAGS.generate_dir) / "base")
    base_dir = base_dir if FLAGS.unet and not FLAGS.samples else None
    written = {**directories(base_dir), "fid_cache": FLAGS.fid_cache or CACHE}
    keep_apart([FLAGS.data_root], {"samples": FLAGS.samples, "heldout": FLAGS.heldout}, written)
    if FLAGS.pretrained:
        with distributed.main_first():
            folder = find_folder(FLAGS.pretrained, FLAGS.download)
        unet_folder = unet_folder or folder / "unet"
    features = FLAGS.features or "sscd"
    space = copies_space(FLAGS, features, device, "features")
    distances = distance_space(FLAGS, fid_features(FLAGS), device, 50)
    clip = load_clip(FLAGS.clip, device) if FLAGS.clip else None
    if folder:
        pipeline = load_pipeline(folder, unet_folder)
        if FLAGS.unet:
            check_pipeline_of_training(FLAGS, settings_of(unet_folder), folder, unet_folder)
        if FLAGS.scheduler == "dpm":
            pipeline.scheduler = as_scheduler("DPMSolverMultistepScheduler", pipeline.scheduler, "--scheduler=dpm")
        check_pipeline(FLAGS, pipeline, 0 if FLAGS.samples else FLAGS.sample_steps)
        pipeline.to(device)
    data = build.dataset(FLAGS)
    for text in differences(FLAGS, settings_of(unet_folder), data) if FLAGS.unet else ():
        note(notes, text)
    given, data = len(data.images), distinct(data)
    training = data.images
    if FLAGS.heldout:
        heldout = read_images("heldout")
    repeats, heldout = without_repeats(given, training, heldout)
    if FLAGS.samples:
        images = read_images("samples")
        odd = warn_of_odd_values(FLAGS.samples, images, training)
    if FLAGS.prompts or not FLAGS.samples:
        number = len(images) if FLAGS.samples else num_images(FLAGS)
        prompts, source = build.prompts(FLAGS, data, pipeline and pipeline.tokenizer, number)
        in_turn = FLAGS.prompts == "all"  # several times, maybe
        if FLAGS.samples and (len(images) % len(source) if in_turn else len(images) != len(source)):
            kind = "captions, a distinct image each," if in_turn else "prompts"
            what = f"{len(source)} {kind} for the {len(images)} images of --samples"
            advice = "give as many images of each, or a file with a prompt for each" if in_turn else "give one for each"
            raise UsageError(f"--prompts={FLAGS.prompts}: {what}: {advice}")
        if pipeline:
            check_length(prompts.texts, pipeline.tokenizer, "prompts")
    number = len(images if FLAGS.samples else prompts.texts)
    by_content = bool(FLAGS.samples)
    scorer = partial(Quality, number=number, space=distances, device=device, heldout=heldout, by_content=by_content)
    scorers = {"": scorer(training, fid_cache=FLAGS.fid_cache)}
    if heldout is not None:
        scorers["heldout_"] = scorer(heldout)
    locks = take_directories(base_dir) if distributed.is_main() else []
    announce(device, pipeline and pipeline.unet, len(training), FLAGS.batch_size, asked_for=FLAGS.device)

    nothing = dict.fromkeys(("checkpoint", "training", "origin", "ema_warning"))
    result = {"samples": FLAGS.samples, **nothing, "seconds": {}}
    if not FLAGS.samples:
        generated = partial(generate_images, prompts=prompts, source=source)
        images, norms = generated(pipeline, folder, unet_folder, directory=FLAGS.generate_dir)
        if distributed.is_main():
            record = read_json(Path(FLAGS.generate_dir) / "generate.json")
            names = ("checkpoint", "training", "ema_warning", "origin", "non_finite_images", "seconds")
            result |= {name: record[name] for name in names}
            note_non_finite(notes, "generated images", result["non_finite_images"], len(images))
    floors = {}
    if base_dir:
        pipeline.unet = load_unet(folder / "unet").to(device)
        floors["base"] = generated(pipeline, folder, folder / "unet", directory=base_dir)[0], prompts
        if distributed.is_main():
            bad = read_json(Path(base_dir) / "generate.json")["non_finite_images"]
            note_non_finite(notes, "images of the base model", bad, len(images))
    if heldout is not None:
        floors["holdout"] = heldout, None
    if pipeline:
        rows = evenly_spaced(len(training), len(images))
        own = [data.captions[row][0] for row in rows]
        decoded, bad = round_trip(pipeline, training[rows])
        note_non_finite(notes, "training images after the VAE's round trip", bad, len(rows))
        floors["round_trip"] = decoded, Prompts(own, own, rows)

    begin = time.perf_counter()
    result |= identity(images, training) | {"N": len(images), "training_set_size": len(training)}
    result["training_seconds"] = training_seconds(result["checkpoint"])
    notes += [scorers[""].warning] if scorers[""].warning else []
    result |= {
        "warning": "; ".join(notes) or None,
        "samples_warning": odd,
        **repeats,
        "scored_with": scorers[""].scored_with,
    }
    own = prompts and prompts.own
    with_own = {name: (others, theirs and theirs.own) for name, (others, theirs) in floors.items()}
    numbers, similar, neighbors = evaluate_similarity(space, images, training, own, with_own)
    result |= {"similarity": numbers, **score(images, prompts, scorers, clip)}
    for name, (others, theirs) in floors.items():
        fitting = {"": scorers[""]} if name == "holdout" else scorers
        result[name] = {"N": len(others), "images_sha256": fingerprint(others), "similarity": similar[name]}
        result[name] |= score(others, theirs, fitting, clip)
    if norms is not None:
        copies = {"f_mem": memorized(neighbors[0])}
        if space.threshold is not None:
            copies = {"above_05": neighbors[0][:, 0] > space.threshold, **copies}
        result["detector"] = {name: detection(norms, rows.cpu()) for name, rows in copies.items()}
    result["seconds"]["measure"] = round(time.perf_counter() - begin, 3)
    result["flags"] = as_dict(FLAGS)
    if distributed.is_main():
        write_results(result, images, data, neighbors, prompts and prompts.texts)
    for lock in locks:
        lock.close()


if __name__ == "__main__":
    run(main, define)

"""Evaluation from end to end: generate images, score their quality, measure memorisation, show it.

python all_in.py --flagfile=config/DIGITS.txt --unet_dir=logs/digits --num_images=512
torchrun --nproc_per_node=4 all_in.py --flagfile=config/CIFAR10.txt --unet_dir=logs/iet_agc
python all_in.py --dataset=folder --data_root=my/training/images --samples=my/generated/images
"""

import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from absl import flags as absl_flags

import distributed
from dataset import fingerprint, load_dataset
from diffusion import GaussianDiffusionSampler
from errors import DataError, UsageError
from files import atomic_write, file_hash, make_directory, read_json, write_json
from model import UNet
from safe_files import one_line
from score.generate import generate_batches
from score.grids import save_grids
from score.inception import find_weights
from score.memorization import above_floor, measures, memorization_ratio, neighbors_by_all
from score.quality import Quality
from score.report import write_report
from score.samples import load_samples, save_pngs
from score.unfinished import GeneratedImages
from training import checkpoint, flags
from training.command import pick_device, run
from training.learner import wrap_network

FLAGS = absl_flags.FLAGS


class Evaluation:
    """What is known of one set of images: the contents of result.json, written after every stage.

    What an earlier call found for the same images and training set stays, so stages can be run one by one.
    """

    def __init__(self, images, training, identity, provenance):
        self.path = Path(FLAGS.grid_dir) / "result.json"
        self.result = {"seconds": {}, **identity}
        found = distributed.is_main() and self.path.exists()
        earlier = distributed.from_main(read_json(self.path) if found else {})
        if all(earlier.get(key) == value for key, value in identity.items()):
            self.result = earlier
        seconds = self.result["seconds"] | provenance.get("seconds", {})
        self.result |= {"N": len(images), "training_set_size": len(training), **provenance, "seconds": seconds}
        self.result["flags"] = flags.as_dict(FLAGS)

    @contextmanager
    def stage(self, name):
        """Time a stage and keep the numbers that it puts into the dict."""
        start = time.perf_counter()
        numbers = {}
        yield numbers
        self.result |= numbers
        self.result["seconds"][name] = round(time.perf_counter() - start, 3)
        if distributed.is_main():
            write_json(self.path, self.result)


def hashes(images, training):
    """What identifies the two sets of images that a result is about."""
    return {"images_sha256": fingerprint(images), "training_sha256": fingerprint(training)}


def load_network(device):
    """The network of the checkpoint that the flags name, its file, and which of its weights are used."""
    path = checkpoint.find(FLAGS.unet_dir)
    state = checkpoint.load(path, device)
    if "flags" in state:
        flags.take(FLAGS, state["flags"], path)
        flags.check(FLAGS)
    net = UNet(**flags.unet(FLAGS, state, path)).to(device)
    checkpoint.load_weights(net, checkpoint.weights(state, FLAGS.use_ema, path), path)
    return net, path


def generate_images(net, path, device):
    """Images of a network, kept in --generate_dir with what they were made from; returns (images, provenance).

    Images that an earlier call has made of the same weights with the same seed and sampler are not made again.
    """
    settings = flags.generation(FLAGS)
    provenance = {
        "checkpoint": str(path),
        "checkpoint_sha256": file_hash(path),
        "weights": "ema" if FLAGS.use_ema else "raw",
    }
    origin = {**provenance, "sampler": flags.sampler(FLAGS), "precision": FLAGS.precision}
    origin |= {key: settings[key] for key in ("seed", "num_labels", "legacy_labels")}
    del origin["checkpoint"]
    generated = GeneratedImages(FLAGS.generate_dir, origin, FLAGS.img_size)
    found = (generated.load(FLAGS.num_images), generated.done) if distributed.is_main() else None
    complete, done = distributed.from_main(found)
    if done:
        print(f"{FLAGS.generate_dir}: {done} of {FLAGS.num_images} images are there already")
    if not complete:
        network = wrap_network(net, FLAGS.compile, FLAGS.parallel)
        sampler = GaussianDiffusionSampler(network, **flags.sampler(FLAGS)).to(device)
        batches = generate_batches(sampler, **settings, first=done)
        if distributed.is_main():
            generated.extend(batches)
            generated.finish(provenance)
        else:
            list(batches)
    if FLAGS.save_png and distributed.is_main():
        save_pngs(FLAGS.generate_dir, generated.images)
    record = generated.record()
    provenance |= {key: record[key] for key in ("non_finite_images", "seconds")}
    return distributed.from_main((generated.images, provenance))


def existing_images():
    """(images, provenance) of --samples, or of an earlier generate stage."""
    if FLAGS.samples:
        return load_samples(FLAGS.samples, FLAGS.img_size), {
            "checkpoint": None,
            "weights": None,
            "samples": FLAGS.samples,
        }
    path = Path(FLAGS.generate_dir) / "generate.npy"
    if not path.exists():
        raise DataError(f"{path}: no such file: run the generate stage first, or name images with --samples")
    images = load_samples(path, FLAGS.img_size)
    record = read_json(path.with_name("generate.json"))
    if record.get("file_sha256") != file_hash(path):
        raise DataError(f"{path}: not the images that generate.json beside it describes: generate them again")
    names = ("checkpoint", "checkpoint_sha256", "weights", "non_finite_images", "seconds")
    return images, {name: record[name] for name in names}


def memorise(images, training, holdout, identity, device):
    """How many images copy the training set; their nearest training images are kept in --similar_dir.

    The same figures of held-out real images, if there are any, are the floor.
    """
    training_on_device = training.to(device)
    result = measures(*neighbors(images, training_on_device, "memorization", identity, device), training_on_device)
    if holdout is not None:
        of_holdout = {**identity, "images_sha256": fingerprint(holdout)}
        found = neighbors(holdout, training_on_device, "holdout", of_holdout, device)
        floor = {"N": len(holdout), "images_sha256": of_holdout["images_sha256"]}
        floor |= measures(*found, training_on_device)
        result |= {"holdout": floor, "mq_above_floor": above_floor(result, floor)}
    return result


def neighbors(images, training, name, identity, device):
    """(sq_distance, index) of the nearest training images, read from --similar_dir or searched and kept there."""
    found = distributed.from_main(known_neighbors(name, identity) if distributed.is_main() else None)
    if not found:
        blocks = {"batch_generated": FLAGS.batch_A, "batch_training": FLAGS.batch_B}
        found = neighbors_by_all(images, training, **blocks, progress=True)
        if distributed.is_main():
            save_neighbors(name, *found, identity)
    return tuple(array.to(device) for array in found)


def save_neighbors(name, sq_distance, index, identity):
    arrays = {"ratio": memorization_ratio(sq_distance), "index": index, "sq_distance": sq_distance}
    with atomic_write(neighbors_path(name)) as file:
        np.savez(file, **{key: array.cpu().numpy() for key, array in arrays.items()}, **identity)


def neighbors_path(name):
    return Path(FLAGS.similar_dir) / f"{name}.npz"


def known_neighbors(name, identity):
    """(sq_distance, index) in --similar_dir if they are of these images and this training set, else None."""
    path = neighbors_path(name)
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as saved:
            if any(str(saved[key]) != value for key, value in identity.items()):
                return None
            return torch.from_numpy(saved["sq_distance"]), torch.from_numpy(saved["index"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)}): remove it") from error


def kept_neighbors(name, identity):
    """(sq_distance, index) that the memorise stage has kept of these images."""
    found = known_neighbors(name, identity)
    if not found:
        raise DataError(f"{neighbors_path(name)}: no neighbours of these images: run the memorise stage first")
    return found


def draw_grids(images, training, identity):
    """Pictures of the most memorised pairs, from the neighbours in --similar_dir; returns the paths written."""
    sq_distance, index = kept_neighbors("memorization", identity)
    ratio = memorization_ratio(sq_distance)
    return [str(picture) for picture in save_grids(FLAGS.grid_dir, images, training, index[:, 0], ratio)]


def report(result, images, training, identity):
    """Write the HTML page of all that result.json holds; returns its path."""
    sq_distance, index = kept_neighbors("memorization", identity)
    if "mq_curve" not in result:
        raise DataError(f"{FLAGS.grid_dir}/result.json: lacks what a report shows: run the memorise stage again")
    holdout_ratio = None
    if "holdout" in result:
        of_holdout = {**identity, "images_sha256": result["holdout"]["images_sha256"]}
        holdout_ratio = memorization_ratio(kept_neighbors("holdout", of_holdout)[0])
    path = Path(FLAGS.grid_dir) / "report.html"
    ratio = memorization_ratio(sq_distance)
    skips = skip_counts(result["checkpoint"], len(training))
    write_report(path, result, images, training, index[:, 0], ratio, holdout_ratio, skips)
    return str(path)


def skip_counts(path, size):
    """How often training left out each of `size` images, (size,) int64, or None where the checkpoint does not say."""
    if path is None or not Path(path).exists():
        return None
    counts = checkpoint.load(path).get("index_array")
    return counts if isinstance(counts, torch.Tensor) and counts.shape == (size,) else None


def append_published_format(result):
    """Append the evaluation to result.txt: a line of scores and a line per MQ threshold, as the published code does."""
    inception_score = f"({result.get('is', 'nan')}, {result.get('is_std', 'nan')})"
    name = "fpd" if "fpd" in result else "FID"
    distance = f"({result.get(name.lower(), 'nan')}, {FLAGS.fid_reference})"
    lines = [f"{inception_score}, {name}: {distance}, N: {result['N']}, checkpoint: {result['checkpoint']}"]
    lines += [f"v_{p}:{count}" for p, count in result.get("mq", {}).items()]
    with (Path(FLAGS.grid_dir) / "result.txt").open("a") as file:
        file.write("\n".join(lines) + "\n")


def print_summary(result):
    """What a person wants to know first."""
    scores = {name: result[name] for name in ("fid", "is", "is_std", "fpd") if name in result}
    print(f"{result['N']} images against {result['training_set_size']} training images")
    if result.get("non_finite_images"):
        print(f"  {result['non_finite_images']} images held NaN or infinity: they are measured, with 0 in those pixels")
    print("  " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()) if scores else "  not scored")
    if "mq" in result:
        print("  MQ " + ", ".join(f"@{p} {n} ({n / result['N']:.1%})" for p, n in result["mq"].items()))
        if "mq_above_floor" in result:
            above = ", ".join(f"@{p} {share:+.1%}" for p, share in result["mq_above_floor"].items())
            print(f"  above the floor of {result['holdout']['N']} held-out images: {above}")
        print(f"  sqrt(d1/d2) < 1/3: {result['share_sqrt_d1_d2_below_third']:.1%}, AuthPct {result['auth_pct']:.1f}")
    print(f"  written to {FLAGS.grid_dir}")


def main():
    stages = set(FLAGS.stages) - ({"generate"} if FLAGS.samples else set())
    if not stages:
        raise UsageError("--stages: nothing to do, choose some of " + ",".join(flags.STAGES))
    device = pick_device(FLAGS.device)
    # whatever can be wrong shows here, the cheapest first and all of it before the long work
    weights = None
    if "score" in stages and FLAGS.fid_features == "inception":
        weights = find_weights(FLAGS.inception_weights)
    if "generate" in stages:
        if not FLAGS.unet_dir:
            raise UsageError("--unet_dir: name a checkpoint, or measure existing images with --samples")
        net, path = load_network(device)
    else:
        images, provenance = distributed.from_main(existing_images() if distributed.is_main() else None)
    with distributed.main_first():
        data = load_dataset(**flags.data(FLAGS))
    flags.check_data(FLAGS, data)
    training = data.train.images
    holdout = flags.holdout_images(FLAGS, data)
    for flag in ("generate_dir", "similar_dir", "grid_dir"):
        make_directory(FLAGS[flag].value, flag)
    if "score" in stages:
        number = FLAGS.num_images if "generate" in stages else len(images)
        quality = Quality(flags.reference_images(FLAGS, data), number, weights, **flags.quality(FLAGS), device=device)

    if "generate" in stages:
        images, provenance = generate_images(net, path, device)
    identity = hashes(images, training)
    evaluation = Evaluation(images, training, identity, provenance)
    if "score" in stages:
        scored_with = quality.identity()
        if evaluation.result.get("scored_with") != scored_with:
            with evaluation.stage("score") as numbers:
                numbers |= {**quality(images), "scored_with": scored_with}
    if "memorise" in stages:
        with evaluation.stage("memorise") as numbers:
            numbers |= memorise(images, training, holdout, identity, device)
    if "grid" in stages and distributed.is_main():
        with evaluation.stage("grid") as numbers:
            numbers["grids"] = draw_grids(images, training, identity)
    if "report" in stages and distributed.is_main():
        with evaluation.stage("report") as numbers:
            numbers["report"] = report(evaluation.result, images, training, identity)
    if distributed.is_main():
        append_published_format(evaluation.result)
        print_summary(evaluation.result)


if __name__ == "__main__":
    run(main)

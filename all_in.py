"""Evaluation from end to end: generate images, score their quality, measure memorisation, show it.

python all_in.py --flagfile=config/DIGITS.txt --unet_dir=logs/digits --num_images=512
torchrun --nproc_per_node=4 all_in.py --flagfile=config/CIFAR10.txt --unet_dir=logs/iet_agc
python all_in.py --dataset=folder --data_root=my/training/images --samples=my/generated/images
"""

if __name__ == "__main__":  # before the imports that take seconds
    from utils import startup

    startup.prepare()

import sys
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from absl import flags as absl_flags

from dataset import fingerprint, load_dataset
from diffusion import GaussianDiffusionSampler
from score.generate import generate_batches
from score.grids import save_grids
from score.inception import find_weights
from score.memorization import above_floor, measures, memorization_ratio, neighbors_by_all
from score.quality import Quality
from score.report import write_report
from score.samples import load_samples, png_names, save_pngs
from score.unfinished import GeneratedImages
from training import checkpoint, flags
from training.launch import announce, pick_device, run
from utils import distributed
from utils.errors import DataError, UsageError, printable
from utils.files import atomic_write, file_hash, lock_directory, make_directory, read_json, write_json
from utils.safe_files import one_line

FLAGS = absl_flags.FLAGS
# what a stage finds with some flags only: it goes when the stage is run with others
OPTIONAL = {"score": ("fid", "is", "is_std", "fpd"), "memorise": ("holdout", "mq_above_floor")}


class Evaluation:
    """What is known of one set of images: the contents of result.json, written after every stage.

    What an earlier call found for the same images and training set stays, so stages can be run one by one.

    Args:
        earlier: what result.json holds.
        identity: `hashes` of images and training set.
        about: what else is known of them; its "flags" are those of the call that generated the images.
    """

    def __init__(self, earlier, identity, about):
        same = all(earlier.get(key) == value for key, value in identity.items())
        self.result = earlier if same else {"seconds": {}, "flags": {}, **identity}
        for key in ("seconds", "flags"):
            self.result[key] |= about.get(key, {})
        self.result |= {key: value for key, value in about.items() if key not in ("seconds", "flags")}
        self.made = set()

    @contextmanager
    def stage(self, name):
        """Time a stage and keep the numbers that it puts into the dict, unless they are known already."""
        start = time.perf_counter()
        numbers = {}
        yield numbers
        earlier = {key: self.result[key] for key in {*numbers, *OPTIONAL.get(name, ())} if key in self.result}
        known = numbers == earlier
        if not known and name in flags.STAGE_FLAGS:
            self.made.add(name)
            of_others = {flag for stage, names in flags.STAGE_FLAGS.items() if stage not in self.made for flag in names}
            kept = {flag: value for flag, value in self.result["flags"].items() if flag in of_others}
            self.result["flags"] = flags.as_dict(FLAGS) | kept
        if not known or name not in self.result["seconds"]:
            self.result = {key: value for key, value in self.result.items() if key not in earlier} | numbers
            self.result["seconds"][name] = round(time.perf_counter() - start, 3)
        if distributed.is_main():
            write_json(result_path(), self.result)


def result_path():
    return Path(FLAGS.grid_dir) / "result.json"


def earlier_result():
    """What an earlier call has left in result.json, or {}."""
    if not result_path().exists():
        return {}
    result = read_json(result_path())
    if not isinstance(result, dict) or not result.keys() >= {"seconds", "flags", "images_sha256"}:
        raise DataError(f"{result_path()}: not written by all_in.py: move it, or choose another --grid_dir")
    return result


def take_directories(stages):
    """Make the directories that the stages write, and take them until the files that are returned are closed.

    Raises DataError if one cannot be written, or another process has taken it.
    """
    written = {"generate_dir": "generate" in stages, "similar_dir": "memorise" in stages, "grid_dir": True}
    locks = {}
    for flag in (flag for flag, writes in written.items() if writes):
        path = FLAGS[flag].value
        make_directory(path, flag)
        found = Path(path).stat()
        if (found.st_dev, found.st_ino) not in locks:  # the flags may name one directory
            locks[found.st_dev, found.st_ino] = lock_directory(path, flag)
    return list(locks.values())


def hashes(images, training):
    """What identifies the two sets of images that a result is about."""
    return {"images_sha256": fingerprint(images), "training_sha256": fingerprint(training)}


def load_network(device):
    """The network of the checkpoint that the flags name, and its file."""
    path = checkpoint.find(FLAGS.unet_dir)
    state = checkpoint.load(path, device)
    if "flags" in state:
        flags.take(FLAGS, state["flags"], path)
        flags.check(FLAGS)
    net = flags.unet(FLAGS, state, path).to(device)
    checkpoint.load_weights(net, checkpoint.weights(state, FLAGS.use_ema, path), path)
    return net, path


def training_settings(path):
    """What run.json beside a checkpoint says of its training, or None; JSON values."""
    path = path.with_name("run.json")
    run = read_json(path) if path.exists() else None
    if not isinstance(run, dict) or "settings" not in run:
        return None
    changes = [f"{change['flag']}: {change['before']}, then {change['after']}" for change in run.get("changes", [])]
    return run["settings"] | ({"changed": changes} if changes else {})


def generate_images(net, path, device):
    """Images of a network, kept in --generate_dir with what they were made from; returns (images, about).

    Images that an earlier call has made of the same weights with the same seed and sampler are not made again.
    """
    settings = flags.generation(FLAGS)
    origin = {"checkpoint_sha256": file_hash(path), "weights": "ema" if FLAGS.use_ema else "raw"}
    origin |= {**flags.sampler(FLAGS), "precision": FLAGS.precision}
    origin |= {key: settings[key] for key in ("seed", "num_labels", "legacy_labels")}
    generated, found = None, None
    if distributed.is_main():
        generated = GeneratedImages(FLAGS.generate_dir, origin, FLAGS.num_images, FLAGS.img_size)
        found = generated.load(), generated.done
    complete, done = distributed.from_main(found)
    if done:
        print(f"{FLAGS.generate_dir}: {done} of {FLAGS.num_images} images are there already")
    if not complete:
        network = torch.compile(net) if FLAGS.compile else net
        sampler = GaussianDiffusionSampler(network, **flags.sampler(FLAGS)).to(device)
        batches = generate_batches(sampler, **settings, first=done)
        if distributed.is_main():
            names = flags.STAGE_FLAGS["generate"]
            used = {name: value for name, value in flags.as_dict(FLAGS).items() if name in names}
            generated.complete(batches, {"checkpoint": str(path), "training": training_settings(path), "flags": used})
        else:
            list(batches)
    if FLAGS.save_png and distributed.is_main():
        save_pngs(FLAGS.generate_dir, generated.images)
    return distributed.from_main((generated.images, about_generated()) if distributed.is_main() else None)


def about_generated():
    """What generate.json says of the images that result.json says too."""
    record = read_json(Path(FLAGS.generate_dir) / "generate.json")
    about = {name: record[name] for name in ("checkpoint", "training", "non_finite_images", "seconds", "flags")}
    origin = record["origin"]
    return about | {"weights": origin["weights"], "checkpoint_sha256": origin["checkpoint_sha256"], "origin": origin}


def existing_images():
    """(images, about) of --samples, or of an earlier generate stage."""
    if FLAGS.samples:
        about = {"checkpoint": None, "weights": None, "training": None, "origin": None, "samples": FLAGS.samples}
        return load_samples(FLAGS.samples, FLAGS.img_size), about
    path = Path(FLAGS.generate_dir) / "generate.npy"
    if not path.exists():
        raise DataError(f"{path}: no such file: run the generate stage first, or name images with --samples")
    images = load_samples(path, FLAGS.img_size)
    record = read_json(path.with_name("generate.json"))
    if "flags" not in record or record["file_sha256"] != file_hash(path):
        raise DataError(f"{path}: not the images that generate.json beside it describes: generate them again")
    return images, about_generated()


def memorise(images, training, holdout, identity, device):
    """How many images copy the training set; their nearest training images are kept in --similar_dir.

    The same figures of held-out real images, if there are any, are the floor.
    """
    training = training.to(flags.data_device(FLAGS, device))
    result = measures(*neighbors(images, training, "memorization", identity, device), training)
    if holdout is not None:
        of_holdout = {**identity, "images_sha256": fingerprint(holdout)}
        found = neighbors(holdout, training, "holdout", of_holdout, device)
        floor = {"N": len(holdout), "images_sha256": of_holdout["images_sha256"]}
        floor |= measures(*found, training)
        result |= {"holdout": floor, "mq_above_floor": above_floor(result, floor)}
    return result


def neighbors(images, training, name, identity, device):
    """(sq_distance, index) of the nearest training images, read from --similar_dir or searched and kept there."""
    found = distributed.from_main(known_neighbors(name, identity) if distributed.is_main() else None)
    if not found:
        blocks = {"batch_generated": FLAGS.batch_A, "batch_training": FLAGS.batch_B}
        found = neighbors_by_all(images, training, **blocks, device=device, progress=True)
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
        print(f"warning: {path}: cannot be read ({one_line(error)}): the neighbours are not known", file=sys.stderr)
        return None


def kept_neighbors(name, identity):
    """(sq_distance, index) that the memorise stage has kept of these images."""
    found = known_neighbors(name, identity)
    if not found:
        raise DataError(f"{neighbors_path(name)}: no neighbours of these images: run the memorise stage first")
    return found


def neighbors_to_show(stages, result, identity):
    """What the stages grid and report show of the neighbours in --similar_dir.

    Returns the nearest training images (N,), the ratios (N,), and those of held-out images (L,) or None.
    """
    sq_distance, index = kept_neighbors("memorization", identity)
    holdout_ratio = None
    if "report" in stages:
        if "mq_curve" not in result:
            raise DataError(f"{result_path()}: lacks what a report shows: run the memorise stage again")
        if "holdout" in result:
            of_holdout = {**identity, "images_sha256": result["holdout"]["images_sha256"]}
            holdout_ratio = memorization_ratio(kept_neighbors("holdout", of_holdout)[0])
    return index[:, 0], memorization_ratio(sq_distance), holdout_ratio


def skip_counts(path, size):
    """How often training left out each of `size` images, (size,) int64, or None where the checkpoint does not say."""
    if path is None or not Path(path).exists():
        return None
    counts = checkpoint.load(path).get("index_array")
    return counts if isinstance(counts, torch.Tensor) and counts.shape == (size,) else None


def append_published_format(result):
    """Append the evaluation to result.txt: a line of scores and a line per MQ threshold, as the published code does."""
    path = result_path().with_name("result.txt")
    inception_score = f"({result.get('is', 'nan')}, {result.get('is_std', 'nan')})"
    name = "fpd" if "fpd" in result else "FID"
    distance = f"({result.get(name.lower(), 'nan')}, {result['flags']['fid_reference']})"
    lines = [f"{inception_score}, {name}: {distance}, N: {result['N']}"]
    lines[0] += f", checkpoint: {printable(result['checkpoint'])}"
    lines += [f"v_{p}:{count}" for p, count in result.get("mq", {}).items()]
    before = path.read_bytes() if path.exists() else b""
    with atomic_write(path) as file:
        file.write(before + "".join(f"{line}\n" for line in lines).encode())


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
    device = pick_device(FLAGS.device, FLAGS.precision)
    # whatever can be wrong shows here, the cheapest first and all of it before the long work
    shows_earlier = stages & {"grid", "report"} and "memorise" not in stages
    if shows_earlier and "generate" in stages:
        raise UsageError("--stages: grid and report show what the memorise stage finds: add it, or leave out generate")
    if shows_earlier and not neighbors_path("memorization").exists():
        raise DataError(f"{neighbors_path('memorization')}: no such file: run the memorise stage first")
    net = weights = None
    if "score" in stages and FLAGS.fid_features == "inception":
        weights = find_weights(FLAGS.inception_weights)
    if "generate" in stages:
        if not FLAGS.unet_dir:
            raise UsageError("--unet_dir: name a checkpoint, or measure existing images with --samples")
        net, path = load_network(device)
    else:
        images, about = distributed.from_main(existing_images() if distributed.is_main() else None)
    with distributed.main_first():
        data = flags.call(FLAGS, load_dataset, FLAGS.dataset)
    flags.check_data(FLAGS, data)
    training = data.train.images
    holdout = flags.holdout_images(FLAGS, data)
    if "generate" in stages and FLAGS.save_png:
        png_names(FLAGS.generate_dir, FLAGS.num_images)
    locks = take_directories(stages) if distributed.is_main() else []
    earlier = distributed.from_main(earlier_result() if distributed.is_main() else None)
    if "score" in stages:
        number = FLAGS.num_images if "generate" in stages else len(images)
        reference = flags.reference_images(FLAGS, data)
        features = FLAGS.fid_features
        quality = Quality(reference, number, weights, features, FLAGS.fid_cache, device, FLAGS.batch_size)

    announce(device, net, len(training), FLAGS.batch_size)

    if "generate" in stages:
        images, about = generate_images(net, path, device)
    identity = hashes(images, training)
    about |= {"N": len(images), "training_set_size": len(training)}
    evaluation = Evaluation(earlier, identity, about)
    if shows_earlier and distributed.is_main():
        neighbors_to_show(stages, evaluation.result, identity)  # raises before the long work
    if "score" in stages:
        scored_with = quality.identity()
        if evaluation.result.get("scored_with") != scored_with:
            with evaluation.stage("score") as numbers:
                numbers |= {**quality(images), "scored_with": scored_with, "warning": quality.warning}
    if "memorise" in stages:
        with evaluation.stage("memorise") as numbers:
            numbers |= memorise(images, training, holdout, identity, device)
    if distributed.is_main():
        if stages & {"grid", "report"}:
            nearest, ratio, holdout_ratio = neighbors_to_show(stages, evaluation.result, identity)
        if "grid" in stages:
            with evaluation.stage("grid") as numbers:
                pictures = save_grids(FLAGS.grid_dir, images, training, nearest, ratio)
                numbers["grids"] = [str(picture) for picture in pictures]
        if "report" in stages:
            with evaluation.stage("report") as numbers:
                path = result_path().with_name("report.html")
                skips = skip_counts(evaluation.result["checkpoint"], len(training))
                write_report(path, evaluation.result, images, training, nearest, ratio, holdout_ratio, skips)
                numbers["report"] = str(path)
        if evaluation.made:
            append_published_format(evaluation.result)
        print_summary(evaluation.result)
    for lock in locks:
        lock.close()


if __name__ == "__main__":
    run(main)

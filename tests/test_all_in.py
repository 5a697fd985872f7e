"""all_in.py: as users run it where processes matter, else its main() called here, which saves the start."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image

import all_in
from dataset import load_dataset
from diffusion import GaussianDiffusionSampler
from score import evaluate, fid, generate
from score.generate import generate_into
from score.samples import save_pngs
from tests.commands import ROOT, environment, eval_flags, run, run_module, values_of
from tests.inception_weights import write_weights
from tests.networks import TINY_FLAGS, tiny_unet, visible
from training import build
from training.flags import check
from training.logdir import UNRECORDED
from utils.errors import DataError, UsageError
from utils.files import file_hash, lock_directory
from utils.name_lists import GROUP_COLUMNS, write_table
from utils.seeding import derive_seed, sample_noise

PIXELS = [*TINY_FLAGS, "--fid_features=pixels", "--num_images=24"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint in the format of main.py whose raw and EMA weights differ."""
    path = tmp_path_factory.mktemp("checkpoint") / "ckpt7.pt"
    raw, ema = (visible(tiny_unet(seed, T=20)).state_dict() for seed in (0, 1))
    torch.save({"net_model": raw, "ema_model": ema, "step": 7}, path)
    changes = [{"flag": "lr", "before": 0.1, "after": 0.2}]
    path.with_name("run.json").write_text(json.dumps({"settings": {"lr": 0.2, "seed": 5}, "changes": changes}))
    return path


def call(*words):
    """all_in.py in this process. Raises what it would say."""
    values = values_of("all_in.py", *words)
    check(values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(all_in, "FLAGS", values)
        all_in.main()


@pytest.fixture(scope="module")
def evaluated(checkpoint, tmp_path_factory):
    directory = tmp_path_factory.mktemp("eval")
    flags = [*PIXELS, f"--unet_dir={checkpoint}", "--save_png", "--fid_reference=heldout", *eval_flags(directory)]
    result = run("all_in.py", *flags, cwd=directory)
    assert "24 images against 48 training images" in result.stdout
    return directory


def result_of(directory):
    return json.loads((directory / "grid/result.json").read_text())


def brute_force(images, training):
    a, b = images.reshape(len(images), -1) / 255.0, training.reshape(len(training), -1) / 255.0
    return ((a[:, None] - b[None]) ** 2).sum(-1)


def test_images_and_pictures(evaluated):
    images = np.load(evaluated / "generate/generate.npy")
    assert images.dtype == np.uint8 and images.shape == (24, 3, 8, 8) and images.std() > 0
    assert len(list((evaluated / "generate").glob("*.png"))) == 24
    picture = Image.open(evaluated / "grid/grid_image0.png")
    assert picture.size == (16 * 10 + 2, 3 * 10 + 2)


def test_memorisation_against_brute_force(evaluated):
    images = np.load(evaluated / "generate/generate.npy")
    training = load_dataset("digits", ".", 8, num_train=48).train.images.numpy()
    distances = brute_force(images, training)
    ordered = np.sort(distances, axis=1)
    ratio = ordered[:, 0] / ordered.mean(axis=1)
    saved = np.load(evaluated / "similar/memorization.npz")
    np.testing.assert_allclose(saved["sq_distance"], ordered, rtol=1e-6)
    np.testing.assert_allclose(saved["ratio"], ratio, rtol=1e-6)
    np.testing.assert_array_equal(saved["index"][:, 0], distances.argmin(axis=1))
    result = result_of(evaluated)["pixels"]
    assert result["mq"] == {str(p): int((100 * ratio < p).sum()) for p in (15, 20, 30, 40, 50, 60, 70, 80, 90)}
    assert result["mq_fraction"]["90"] == result["mq"]["90"] / 24
    assert result["f_mem"] == np.mean(9 * ordered[:, 0] < ordered[:, 1])
    nearest = distances.argmin(axis=1)
    assert result["extracted"] == len(set(nearest[9 * ordered[:, 0] < ordered[:, 1]]))
    assert "mirrored" not in result, "digits are trained without flips"
    own = brute_force(training, training)
    np.fill_diagonal(own, np.inf)
    authentic = ordered[:, 0] > own.min(axis=1)[distances.argmin(axis=1)]
    assert result["auth_pct"] == pytest.approx(100 * authentic.mean())


def test_the_floor_against_brute_force(evaluated):
    """The same figures for the held-out digits in the place of generated images."""
    data = load_dataset("digits", ".", 8, num_train=48)
    training, heldout = data.train.images.numpy(), data.heldout.images.numpy()
    ordered = np.sort(np.concatenate([brute_force(part, training) for part in np.array_split(heldout, 9)]), axis=1)
    ratio = ordered[:, 0] / ordered.mean(axis=1)
    result = result_of(evaluated)
    floor, pixels = result["holdout"], result["pixels"]
    assert floor["N"] == len(heldout) == 1797 - 48
    assert floor["pixels"]["mq"] == {p: int((100 * ratio < int(p)).sum()) for p in pixels["mq"]}
    for p, difference in pixels["mq_above_floor"].items():
        assert difference == pytest.approx(pixels["mq"][p] / 24 - np.mean(100 * ratio < int(p)))
    np.testing.assert_allclose(np.load(evaluated / "similar/holdout.npz")["ratio"], ratio, rtol=1e-6)
    # the 24 images make one cell of all
    of_images = brute_force(np.load(evaluated / "generate/generate.npy"), training).min(axis=1)
    U = scipy.stats.mannwhitneyu(of_images, ordered[:, 0]).statistic
    N, L = 24, len(heldout)
    expected = {"c_t": pytest.approx((U - N * L / 2) / np.sqrt(N * L * (N + L + 1) / 12)), "c_t_cells": 1}
    assert {key: pixels[key] for key in expected} == expected


def test_precision_and_recall_of_pooled_pixels(evaluated):
    """Of 8x8 images pooled pixels are pixels."""
    data = load_dataset("digits", ".", 8, num_train=48)
    generated, heldout = np.load(evaluated / "generate/generate.npy"), data.heldout.images.numpy()
    between = np.concatenate([brute_force(part, generated) for part in np.array_split(heldout, 9)])
    of_generated = np.sort(brute_force(generated, generated), axis=1)[:, 3]
    of_heldout = [np.sort(brute_force(image[None], heldout)[0])[3] for image in heldout]
    result = result_of(evaluated)
    assert result["recall"] == pytest.approx((between <= of_generated).any(axis=1).mean())
    assert result["precision"] == pytest.approx((of_heldout >= between.T).any(axis=1).mean())


def test_result_says_everything(evaluated, checkpoint):
    result = result_of(evaluated)
    assert result["N"] == 24 and result["training_set_size"] == 48
    assert result["checkpoint"] == str(checkpoint) and result["weights"] == "ema"
    assert result["seconds"].keys() == {"generate", "score", "memorise", "grid", "report"}
    page = (evaluated / "grid/report.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and f"{result['fpd']:.3f}" in page and "held-out real images" in page
    assert result["fpd"] > 0 and "fid" not in result and result["non_finite_images"] == 0
    assert result["flags"]["ch_mult"] == [2] and result["warning"] is None
    assert result["training"] == UNRECORDED | {"lr": 0.2, "seed": 5, "changed": ["lr: 0.1, then 0.2"]}
    assert result["origin"]["steps"] == 4 and result["origin"]["seed"] == 12 and result["origin"]["weights"] == "ema"
    lines = (evaluated / "grid/result.txt").read_text().splitlines()
    assert lines[0].startswith("(nan, nan), fpd: (")
    assert lines[1:] == [f"v_{p}:{count}" for p, count in result["pixels"]["mq"].items()]


def test_images_do_not_depend_on_the_batch_size_and_raw_weights_differ(evaluated, checkpoint, tmp_path):
    whole = np.load(evaluated / "generate/generate.npy").astype(int)
    flags = [*PIXELS, "--stages=generate", f"--unet_dir={checkpoint}", *eval_flags(tmp_path)]
    call(*flags, "--batch_size=5", "--num_images=13")
    part = np.load(tmp_path / "generate/generate.npy").astype(int)
    assert np.abs(part - whole[:13]).max() <= 1 and np.mean(part != whole[:13]) < 1e-3
    call(*flags, "--use_ema=False")
    raw = np.load(tmp_path / "generate/generate.npy").astype(int)
    assert np.mean(raw != whole) > 0.1


def test_stages_one_by_one_fill_the_same_result(evaluated, checkpoint, tmp_path):
    flags = [*PIXELS, f"--unet_dir={checkpoint}", "--fid_reference=heldout", *eval_flags(tmp_path)]
    misleading = {
        "memorise": ["--batch_A=7"],
        "score": ["--fid_reference=train", "--fid_features=inception"],
    }
    for stage in ("generate", "memorise", "grid", "score", "report"):
        of_others = [flag for other, names in misleading.items() if other != stage for flag in names]
        call(*flags, f"--stages={stage}", *of_others)
    ours, reference = result_of(tmp_path), result_of(evaluated)
    call(*flags, "--stages=report", "--batch_A=9")
    used = ours["flags"]
    assert used == result_of(tmp_path)["flags"], "those of a call that only shows what is there do not count"
    assert used["fid_features"] == "pixels" and used["batch_A"] == 7 and ours["fid_reference"] == "heldout"
    text = (tmp_path / "grid/result.txt").read_text()
    assert text.count("v_15:") == 2 and len(text.splitlines()) == 20, "of the two calls that made numbers"
    assert text.splitlines()[10:] == (evaluated / "grid/result.txt").read_text().splitlines()
    for key in ("pixels", "fpd", "N", "checkpoint_sha256", "images_sha256"):
        assert ours[key] == reference[key], key
    assert ours["seconds"].keys() == reference["seconds"].keys()


def test_flags_of_other_images_than_those_that_are_there_are_refused(evaluated, checkpoint, tmp_path):
    """They would be recorded as those of the images, and change nothing."""
    shutil.copytree(evaluated, tmp_path / "eval")
    before = result_of(tmp_path / "eval")
    other = tmp_path / "ckpt8.pt"
    torch.save({**torch.load(checkpoint, weights_only=True), "step": 8}, other)
    flags = [*PIXELS, "--fid_reference=heldout", "--stages=memorise,report", *eval_flags(tmp_path / "eval")]
    wrong = {f"--unet_dir={other}": "unet_dir", "--seed=77": "seed", "--sample_steps=3": "sample_steps"}
    for flag, name in (wrong | {"--use_ema=False": "use_ema", "--reject_below=50": "reject_below"}).items():
        with pytest.raises(UsageError, match=f"--{name}=.*: not of the images in --generate_dir"):
            call(*flags, flag)
    assert result_of(tmp_path / "eval") == before
    shutil.copy(checkpoint, tmp_path / "moved.pt")
    call(*flags, f"--unet_dir={tmp_path / 'moved.pt'}", "--seed=12", "--use_ema=True")


def test_what_was_measured_of_held_out_images_is_of_one_set(checkpoint, tmp_path):
    """Floors, losses and what is said of few images: of those that a result has, whichever stages are run."""
    for name, rows in (("a", slice(60)), ("b", slice(700, 760))):
        save_pngs(tmp_path / name, load_dataset("digits", ".", 8, num_train=48).heldout.images[rows])
    flags = [*PIXELS, f"--unet_dir={checkpoint}", *eval_flags(tmp_path)]
    call(*flags, "--stages=gap", f"--heldout={tmp_path / 'a'}")
    gap = result_of(tmp_path)["gap"]
    call(*flags, "--stages=generate,score,memorise,report", f"--heldout={tmp_path / 'a'}")
    assert result_of(tmp_path)["gap"] == gap, "it is of the same network and training images"
    for stages, other in (("score,memorise", "gap"), ("gap", "memorise and score"), ("score,gap", "memorise")):
        with pytest.raises(UsageError, match=f"floors of other held-out images, by the {other} stage"):
            call(*flags, f"--stages={stages}", f"--heldout={tmp_path / 'b'}")
    call(*flags, "--stages=report", "--noholdout")
    result = result_of(tmp_path)
    assert result["floor_warning"].startswith("60 held-out images") and result["holdout"]["N"] == 60
    result["heldout_sha256"] = "of others"  # killed between two stages
    (tmp_path / "grid/result.json").write_text(json.dumps(result))
    with pytest.raises(UsageError, match="floors of other held-out images, by the gap and memorise and score stage"):
        call(*flags, "--stages=report", "--noholdout")


def test_losses_of_a_network_that_makes_nothing_are_refused_in_a_line(checkpoint, tmp_path):
    state = torch.load(checkpoint, weights_only=True)
    state["ema_model"] = {name: value * torch.nan for name, value in state["ema_model"].items()}
    torch.save(state, tmp_path / "ckpt7.pt")
    with pytest.raises(DataError, match=r"ckpt7\.pt: its losses are not finite"):
        call(*PIXELS, f"--unet_dir={tmp_path / 'ckpt7.pt'}", "--stages=gap", *eval_flags(tmp_path))


def test_groups_of_training_images(tmp_path):
    """Numbers with and without them, in one place: those of the other kind are not taken for them."""
    training = load_dataset("digits", ".", 8, num_train=48).train
    groups = np.array([0] * 4 + [1] * 2 + [*range(2, 6)] + [6] * 30 + [*range(7, 15)])
    sizes = np.bincount(groups)
    rows = [[group, name, 1, "", ""] for group, name in zip(groups, training.names, strict=True)]
    write_table(tmp_path / "groups.csv", GROUP_COLUMNS, [row for row in rows if sizes[row[0]] > 1])
    rows = [[i, name, 1, "", ""] for i, name in enumerate(training.names)]
    write_table(tmp_path / "single.csv", GROUP_COLUMNS, rows)
    np.save(tmp_path / "samples.npy", training.images[::2].numpy() ^ 1)
    flags = [*PIXELS, f"--samples={tmp_path}/samples.npy", "--stages=memorise,report", "--hflip"]
    flags += ["--memorise_features=pixels", *eval_flags(tmp_path)]

    results, kept = {}, {}
    for name in ("none", "groups", "none", "single", "groups"):
        call(*flags, *([f"--groups={tmp_path}/{name}.csv"] if name != "none" else []))
        results.setdefault(name, result_of(tmp_path))
        for key in ("pixels", "similarity", "holdout", "groups"):
            assert results[name].get(key) == result_of(tmp_path).get(key)
        kept[name] = dict(np.load(tmp_path / "similar/memorization.npz"))
    (tmp_path / "compared").mkdir()
    for name, result in results.items():
        (tmp_path / f"compared/{name}.json").write_text(json.dumps(result))

    found, sha = results["groups"], file_hash(tmp_path / "groups.csv")
    assert found["groups"] == {"sha256": sha, "number": 3, "largest": 30}
    assert "groups" not in results["none"]
    distances = brute_force(training.images[::2].numpy() ^ 1, training.images.numpy())
    for row, d in zip(kept["groups"]["sq_distance"], distances, strict=True):
        first = d.argmin()
        expected = np.append(d[first], np.sort(d[groups != groups[first]]))
        np.testing.assert_allclose(row[: len(expected)], expected, rtol=1e-6)
        assert np.isnan(row[len(expected) :]).all()
    assert found["pixels"]["f_mem"] == 1 and found["pixels"]["extracted"] == len(set(groups[::2]))
    assert found["pixels"]["mirrored"]["extracted"] == len(set(groups[::2]))
    page = (tmp_path / "grid/report.html").read_text()
    assert f"training {training.names[10]} and 29 of its group: copied 15×" in page
    assert "3 of several images, the largest of 30" in page and "of 15 groups are copied" in page
    for key in ("pixels", "similarity", "holdout"):
        assert results["single"][key] == results["none"][key] != found[key]
    assert all((kept["single"][name] == kept["none"][name]).all() for name in ("index", "sq_distance"))
    assert "groups_sha256" not in kept["none"]

    with pytest.raises(DataError, match="npz: made with other --groups, or none: give those, or run"):
        call(*flags, "--stages=report")
    paths = [f"{name}={tmp_path}/compared/{name}.json" for name in ("none", "groups")]
    said = run_module("score.compare", *paths, cwd=tmp_path).stderr
    assert f"differ in groups of training images: none: none; groups: {sha[:8]}" in said


def test_a_stage_without_the_one_before_says_so(tmp_path):
    with pytest.raises(DataError, match=r"generate.npy: no such file: run the generate stage first"):
        call(*PIXELS, "--stages=memorise", *eval_flags(tmp_path))


@pytest.mark.parametrize("kind", ["npy_nhwc_float", "npz", "folder"])
def test_measures_images_made_by_anything(kind, tmp_path):
    """Training images handed in as generated ones are all copies."""
    images = load_dataset("digits", ".", 8, num_train=48).train.images[:20].numpy()
    path = tmp_path / "samples"
    if kind == "npy_nhwc_float":
        path = path.with_suffix(".npy")
        np.save(path, (images.transpose(0, 2, 3, 1) / 255).astype("f4"))
    elif kind == "npz":
        path = path.with_suffix(".npz")
        np.savez(path, images=images)
    else:
        path.mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image.transpose(1, 2, 0)).save(path / f"{i:03d}.png")
    call(*PIXELS, f"--samples={path}", *eval_flags(tmp_path))
    result = result_of(tmp_path)
    assert result["pixels"]["mq"]["15"] == 20 == result["N"] and result["pixels"]["f_mem"] == 1
    assert result["checkpoint"] is None and result["pixels"]["auth_pct"] == 0
    assert np.load(tmp_path / "similar/memorization.npz")["sq_distance"][:, 0].max() == 0


def test_iet_checkpoint_conditional_guided_and_legacy(tmp_path):
    net = visible(tiny_unet(3, T=20, num_labels=10))
    with torch.no_grad():
        net.cond_embedding.timembedding[0].weight.mul_(30)
    published = {
        "global_model": net.state_dict(),
        "global_ema_model": net.state_dict(),
        "index_array": np.zeros(150_000),
    }
    torch.save(published, tmp_path / "global_ckpt_round3.pt")
    flags = [*PIXELS, "-Fed=True", "--use_labels", "--num_labels=10", "--stages=generate", f"--unet_dir={tmp_path}"]
    flags += ["--beta_1=0.05", "--beta_T=0.5"]  # so much noise that the network decides what the image is
    images = {}
    for name, extra in (("plain", []), ("guided", ["--guidance=2"]), ("legacy", ["--legacy_labels"])):
        out = tmp_path / name
        call(*flags, *extra, *eval_flags(out))
        images[name] = np.load(out / "generate/generate.npy")
    assert (images["plain"] != images["guided"]).mean() > 0.05
    assert (images["plain"] != images["legacy"]).mean() > 0.05


def test_only_classes_of_training_images_are_drawn(checkpoint, tmp_path, monkeypatch):
    """Of more labels than classes, and of classes without an image; where all have images, as ever."""
    drawn, plain = [], [derive_seed(12, "label", i) % 10 for i in range(24)]
    draw = generate.draw_labels
    monkeypatch.setattr(generate, "draw_labels", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    for name in ("a", "b", "c"):
        save_pngs(tmp_path / "images" / name, torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8))
    net = visible(tiny_unet(3, T=20, num_labels=10)).state_dict()
    torch.save({"net_model": net, "ema_model": net, "step": 1}, tmp_path / "ckpt1.pt")
    sub_folders = ["--dataset=folder", f"--data_root={tmp_path / 'images'}", "--num_train=0"]
    digits = load_dataset("digits", ".", 8, num_train=3, subset_seed=4).train.labels.tolist()
    for flags, classes in ((sub_folders, {0, 1, 2}), (["--num_train=3", "--subset_seed=4"], set(digits)), ([], None)):
        out = eval_flags(tmp_path / str(classes))
        conditional = ["--use_labels", "--num_labels=10", f"--unet_dir={tmp_path}/ckpt1.pt"]
        drawn.clear()
        call(*PIXELS, "--batch_size=24", *flags, *conditional, "--stages=generate", *out)
        (labels,) = drawn
        origin = json.loads((tmp_path / str(classes) / "generate/generate.json").read_text())["origin"]
        if classes is None:
            assert labels.tolist() == plain and "classes" not in origin, "what was made before is not made again"
        else:
            assert set(labels.tolist()) == classes == set(origin["classes"])


def test_sample_grids_show_classes_of_training_images(tmp_path):
    values = values_of("main.py", *TINY_FLAGS, "--num_train=3", "--use_labels", "--num_labels=10")
    few, all_classes = (load_dataset("digits", ".", 8, num_train=number) for number in (3, 48))
    labels = build.sample_grid(values, few, "cpu")[1].tolist()
    assert len(labels) == 64 and set(labels) == set(few.train.labels.tolist())
    before = [derive_seed(12, "label", i) % 10 for i in range(64)]
    assert build.sample_grid(values, all_classes, "cpu")[1].tolist() == before


def test_fid_and_inception_score(checkpoint, tmp_path, capsys):
    """On random Inception weights; what they give is compared with pytorch-fid in test_inception.py."""
    weights = write_weights(tmp_path / "inception.pth")
    flags = [*TINY_FLAGS, "--num_train=10", "--num_images=11", f"--unet_dir={checkpoint}", *eval_flags(tmp_path)]
    cache = tmp_path / "reference.npz"
    with pytest.warns(UserWarning, match="not the published"):
        call(*flags, "--stages=generate,score", f"--inception_weights={weights}", f"--fid_cache={cache}")
    result = result_of(tmp_path)
    assert result["warning"].startswith("11 generated and 10 real images: FID needs 2,048 of each and IS needs 5,000")
    assert capsys.readouterr().err.count("warning: " + result["warning"]) == 1
    assert result["fid"] > 0 and 1 <= result["is"] <= 1008 and result["is_std"] >= 0
    assert np.load(cache)["sigma"].shape == (2048, 2048)


def test_missing_inception_weights_are_told_before_any_image_is_made(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    ways = r"pt_inception-2015-12-05-6726825d\.pth.*copy the file.*--inception_weights.*--fid_features=pixels"
    with pytest.raises(DataError, match=ways):
        call(*TINY_FLAGS, f"--unet_dir={checkpoint}", "--num_images=24", *eval_flags(tmp_path))
    assert not (tmp_path / "generate").exists()


def test_compare_prints_mean_and_spread(evaluated, tmp_path):
    path = evaluated / "grid/result.json"
    other = tmp_path / "result.json"
    changed = {**result_of(evaluated), "fpd": result_of(evaluated)["fpd"] + 2}
    other.write_text(json.dumps(changed))
    arguments = [f"a={path}", f"b={path}", f"b={other}", "--json=table.json", "--picture=picture.png"]
    table = run_module("score.compare", *arguments, cwd=tmp_path).stdout
    fpd = result_of(evaluated)["fpd"]
    assert f"{fpd + 1:.3f} ± {2**0.5:.3f}" in table and f"| {fpd:.3f} " in table
    numbers = json.loads((tmp_path / "table.json").read_text())
    assert numbers["b"]["fpd"] == pytest.approx({"mean": fpd + 1, "std": 2**0.5})
    assert Image.open(tmp_path / "picture.png").width == 4 * 162


def test_a_killed_generation_continues_where_it_was(checkpoint, tmp_path, capsys):
    flags = [*TINY_FLAGS, "--num_images=60", "--batch_size=4", f"--unet_dir={checkpoint}", "--stages=generate"]
    call(*flags, *eval_flags(tmp_path / "whole"))
    command = [sys.executable, str(ROOT / "all_in.py"), *flags, *eval_flags(tmp_path / "killed")]
    part = tmp_path / "killed/generate/generate.part.json"
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL)
    while not (part.exists() and json.loads(part.read_text())["done"] >= 8):
        assert process.poll() is None
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(DataError, match=f"--generate_dir=.*/killed/generate: process {process.pid} is writing there"):
        call(*flags, "--seed=3", *eval_flags(tmp_path / "killed"))
    process.kill()
    process.wait()
    done = json.loads(part.read_text())["done"]
    assert 8 <= done < 60
    call(*flags, *eval_flags(tmp_path / "killed"))
    assert f"{done} of 60 images are there already" in capsys.readouterr().out
    whole, killed = (np.load(tmp_path / name / "generate/generate.npy") for name in ("whole", "killed"))
    np.testing.assert_array_equal(whole, killed)
    assert sorted(path.name for path in part.parent.iterdir()) == [".lock", "generate.json", "generate.npy"]


def test_what_is_wrong_with_the_directories_shows_before_the_work(checkpoint, tmp_path):
    flags = [*PIXELS, f"--unet_dir={checkpoint}", *eval_flags(tmp_path)]
    (tmp_path / "grid").mkdir()
    with lock_directory(tmp_path / "grid", "grid_dir"), pytest.raises(DataError, match="is writing there"):
        call(*flags)
    (tmp_path / "generate/other.png").touch()
    with pytest.raises(DataError, match=r"other\.png: an image of another run"):
        call(*flags, "--save_png")
    for content in ("{}", "[1]"):
        (tmp_path / "grid/result.json").write_text(content)
        with pytest.raises(DataError, match=r"result\.json: not written by all_in\.py"):
            call(*flags)
    assert not (tmp_path / "generate/generate.npy").exists()


def test_one_directory_for_everything(checkpoint, tmp_path):
    call(
        *PIXELS,
        f"--unet_dir={checkpoint}",
        *(f"--{name}_dir={tmp_path}/one" for name in ("generate", "similar", "grid")),
    )
    assert {"generate.npy", "memorization.npz", "report.html"} <= {path.name for path in (tmp_path / "one").iterdir()}


def keep(directory, seed, value, number, stop=None):
    """`number` images of 8x8 with these pixels, by 4, the second of each 4 not finite; killed before batch `stop`."""
    return generate_into(directory, {"seed": seed}, lambda first: batches(first, value, number, stop), number, 8, {})


def batches(first, value, number, stop=None):
    for start in range(first, number, 4):
        if stop is not None and start >= 4 * stop:
            raise KeyboardInterrupt
        size = min(4, number - start)
        yield torch.full((size, 3, 8, 8), value, dtype=torch.uint8), torch.arange(start, start + size) % 4 == 1


def test_two_generations_without_locks_never_mix(tmp_path, capsys):
    """A second one starts, is stopped, and the first is killed: what it continues from is its own."""

    def first_batches(first):
        for j, batch in enumerate(batches(first, 1, 20, stop=4)):
            if j == 2:
                with pytest.raises(KeyboardInterrupt):
                    keep(tmp_path, 2, 2, 20, stop=3)
            yield batch

    with pytest.raises(KeyboardInterrupt):
        generate_into(tmp_path, {"seed": 1}, first_batches, 20, 8, {})
    assert json.loads((tmp_path / "generate.part.json").read_text())["done"] == 16
    assert (keep(tmp_path, 1, 1, 20) == 1).all() and "16 of 20 images are there" in capsys.readouterr().out
    assert (np.load(tmp_path / "generate.npy") == 1).all()
    record = json.loads((tmp_path / "generate.json").read_text())
    assert record["non_finite_images"] == 5 and record["non_finite"] == list(range(1, 20, 4))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["generate.json", "generate.npy"]
    keep(tmp_path, 1, 3, 20)
    assert (np.load(tmp_path / "generate.npy") == 1).all(), "nothing is made again"
    keep(tmp_path, 1, 3, 6)
    record = json.loads((tmp_path / "generate.json").read_text())
    assert len(np.load(tmp_path / "generate.npy")) == 6 and record["non_finite"] == [1, 5]


def test_a_kill_between_the_last_image_and_the_name_of_its_file(tmp_path, monkeypatch):
    rename = Path.replace

    def killed(path, target):
        if Path(target).name == "generate.npy":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        keep(tmp_path, 1, 1, 8)
    monkeypatch.undo()
    keep(tmp_path, 1, 3, 8)
    assert (np.load(tmp_path / "generate.npy") == 1).all()


def test_unfinished_images_that_are_gone_are_made_again(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        keep(tmp_path, 1, 1, 8, stop=1)
    (part,) = tmp_path.glob("generate.part.????????")
    part.write_bytes(part.read_bytes()[:200])
    assert (keep(tmp_path, 1, 3, 8) == 3).all() and "its images are made again" in capsys.readouterr().err


def test_fewer_images_are_the_first_and_more_are_added(checkpoint, tmp_path, capsys):
    flags = [*TINY_FLAGS, "--batch_size=8", f"--unet_dir={checkpoint}", "--stages=generate", *eval_flags(tmp_path)]
    images = []
    for number, there in ((24, ""), (10, "10 of 10"), (32, "10 of 32"), (32, "32 of 32")):
        call(*flags, f"--num_images={number}")
        assert there in capsys.readouterr().out
        images.append(np.load(tmp_path / "generate/generate.npy").astype(int))
        assert len(images[-1]) == number
    np.testing.assert_array_equal(images[1], images[0][:10])
    assert np.abs(images[2][:24] - images[0]).max() <= 1, "other batches round otherwise"
    np.testing.assert_array_equal(images[2], images[3])


def test_images_of_another_origin_are_not_reused(checkpoint, tmp_path, capsys):
    flags = [*TINY_FLAGS, "--num_images=8", "--stages=generate", *eval_flags(tmp_path)]
    other = tmp_path / "ckpt7.pt"
    state = torch.load(checkpoint, weights_only=True)
    torch.save({"net_model": state["ema_model"], "ema_model": state["net_model"], "step": 7}, other)
    kinds = [[], ["--seed=3"], ["--sampler=dpmpp"], ["--use_ema=False"], ["--eta=0.5"], [f"--unet_dir={other}"]]
    seen = []
    for change in kinds:
        call(*flags, f"--unet_dir={checkpoint}", *change)
        assert "there already" not in capsys.readouterr().out
        seen.append(np.load(tmp_path / "generate/generate.npy").tobytes())
    assert len(set(seen)) == 5 and seen[3] == seen[5], "the other file has the raw weights in the place of the EMA's"


def test_a_report_without_the_neighbours_of_its_images_says_so(evaluated, checkpoint, tmp_path):
    shutil.copytree(evaluated, tmp_path / "eval")
    flags = [*PIXELS, f"--unet_dir={checkpoint}", "--stages=report", *eval_flags(tmp_path / "eval")]
    with pytest.raises(DataError, match=r"memorization.npz: no neighbours of these images: run the memorise stage"):
        call(*flags, "--num_train=40")
    (tmp_path / "eval/similar/memorization.npz").unlink()
    with pytest.raises(DataError, match=r"no memorization.npz in it: run the memorise stage"):
        call(*flags)


def test_damaged_neighbours_are_searched_again(evaluated, checkpoint, tmp_path, capsys):
    shutil.copytree(evaluated, tmp_path / "eval")
    path = tmp_path / "eval/similar/memorization.npz"
    path.write_bytes(path.read_bytes()[:500])
    call(*PIXELS, f"--unet_dir={checkpoint}", "--stages=memorise,report", *eval_flags(tmp_path / "eval"))
    assert "memorization.npz: not a readable .npz" in capsys.readouterr().err
    assert result_of(tmp_path / "eval")["pixels"] == result_of(evaluated)["pixels"]
    assert len(np.load(path)["ratio"]) == 24


def test_scores_and_neighbours_are_reused_for_the_same_images_only(evaluated, checkpoint, tmp_path):
    shutil.copytree(evaluated, tmp_path / "eval")
    flags = [*PIXELS, f"--unet_dir={checkpoint}", "--fid_reference=heldout", *eval_flags(tmp_path / "eval")]
    neighbors = tmp_path / "eval/similar/memorization.npz"
    before = result_of(tmp_path / "eval"), neighbors.stat().st_mtime_ns
    call(*flags)
    after = result_of(tmp_path / "eval")
    assert all(after[key] == before[0][key] for key in ("fpd", "pixels"))
    assert neighbors.stat().st_mtime_ns == before[1]
    assert all(after["seconds"][stage] == before[0]["seconds"][stage] for stage in ("score", "memorise"))
    call(*flags, "--num_train=40")
    changed = result_of(tmp_path / "eval")
    assert neighbors.stat().st_mtime_ns != before[1] and changed["training_set_size"] == 40


def test_a_result_of_an_earlier_version_is_begun_anew(evaluated, checkpoint, tmp_path, capsys):
    shutil.copytree(evaluated, tmp_path / "eval")
    path, new = tmp_path / "eval/grid/result.json", result_of(evaluated)
    old = {key: value for key, value in new.items() if key != "pixels"} | new["pixels"] | {"fpd": 1e9}
    path.write_text(json.dumps(old))
    call(*PIXELS, f"--unet_dir={checkpoint}", "--stages=memorise", *eval_flags(tmp_path / "eval"))
    said = capsys.readouterr().err
    assert said.count(f"{path}: of an earlier version, which had other names: it is begun anew\n") == 1
    result = result_of(tmp_path / "eval")
    assert result["pixels"] == new["pixels"] and not {"mq", "fpd", "score"} & {*result, *result["seconds"]}


def test_what_is_found_with_some_flags_only_goes_with_them(evaluated, checkpoint, tmp_path):
    shutil.copytree(evaluated, tmp_path / "eval")
    flags = [*PIXELS, f"--unet_dir={checkpoint}", "--stages=memorise", *eval_flags(tmp_path / "eval")]
    call(*flags, "--noholdout")
    result = result_of(tmp_path / "eval")
    assert "holdout" not in result and "mq_above_floor" not in result["pixels"] and "fpd" in result


def test_images_that_are_not_finite_are_counted_and_said(tmp_path, capsys):
    state = visible(tiny_unet(T=20)).state_dict()
    state["tail.2.bias"] = torch.tensor([0.0, float("nan"), 0.0])
    torch.save({"net_model": state, "ema_model": state, "step": 1}, tmp_path / "ckpt1.pt")
    call(*PIXELS, f"--unet_dir={tmp_path}/ckpt1.pt", *eval_flags(tmp_path))
    said = "24 of 24 generated images hold values that are not finite, black here"
    assert f"warning: {said}" in capsys.readouterr().err and said in (tmp_path / "grid/report.html").read_text()
    assert result_of(tmp_path)["non_finite_images"] == 24 == result_of(tmp_path)["N"]


def test_mirror_images_of_training_images_are_copies_where_training_flips(tmp_path):
    images = torch.randint(0, 256, (30, 3, 8, 8), dtype=torch.uint8)
    save_pngs(tmp_path / "training", images[:20])
    save_pngs(tmp_path / "samples", torch.cat([images[:8].flip(-1), images[5:7], images[20:]]))
    own = ["--dataset=folder", f"--data_root={tmp_path}/training", "--num_train=0", f"--samples={tmp_path}/samples"]
    for flip, expected in (("--hflip", {"f_mem": 0.5, "extracted": 8}), ("--nohflip", None)):
        call(*PIXELS, *own, flip, *eval_flags(tmp_path))
        pixels = result_of(tmp_path)["pixels"]
        assert (pixels["f_mem"], pixels["extracted"]) == (0.1, 2)
        assert pixels.get("mirrored") == expected
        assert ("mirrored too" in (tmp_path / "grid/report.html").read_text()) == (flip == "--hflip")
    assert len(np.load(tmp_path / "similar/memorization_mirrored.npz")["index"]) == 20


def test_copies_in_feature_space(tmp_path, capsys):
    """Correlations of pixels: a copy with other contrast is one there, and not for distances of pixels.

    They have no threshold: nothing is said of a share above 0.5.
    """
    data = load_dataset("digits", ".", 8, num_train=48)
    training = data.train.images.numpy()
    images = np.concatenate([training[:5] // 2, data.heldout.images.numpy()[:7]])
    np.save(tmp_path / "images.npy", images)
    flags = [*TINY_FLAGS, f"--samples={tmp_path / 'images.npy'}", "--stages=memorise,report", *eval_flags(tmp_path)]
    capsys.readouterr()
    call(*flags, "--memorise_features=pixels")
    result = result_of(tmp_path)
    found = result["similarity"]
    page, said = (tmp_path / "grid/report.html").read_text(), capsys.readouterr().out
    assert "similarity" in said and "Similarity of features" in page
    assert not any(words in text for words in ("bove 0.5", "gt_05pc") for text in (said, page, json.dumps(result)))
    products = np.corrcoef(images.reshape(12, -1), training.reshape(48, -1))[:12, 12:]
    assert found["sim_mean"] == pytest.approx(products.max(axis=1).mean(), abs=1e-5)
    assert found["f_mem"] >= 5 / 12 > result["pixels"]["f_mem"]
    assert found["features"] == "pixels" == result["holdout"]["similarity"]["features"]
    assert result["holdout"]["N"] == len(data.heldout.images)
    call(*flags)
    assert "similarity" not in result_of(tmp_path)
    with pytest.raises(UsageError, match=r"give --sscd, .* --memorise_features=pixels"):
        call(*flags, "--memorise_features=sscd")


def test_the_gap_of_a_network_with_and_without_images(evaluated, checkpoint, tmp_path, capsys):
    flags = [*PIXELS, f"--unet_dir={checkpoint}", "--fid_reference=heldout"]
    call(*flags, "--stages=gap", *eval_flags(tmp_path / "none"))
    alone = result_of(tmp_path / "none")
    assert alone["N"] == 0 and alone["checkpoint"] == str(checkpoint) and "gap" in alone["seconds"]
    assert alone["gap"]["images"] == [24, 24] and alone["gap"]["t"] == list(range(20))
    assert f"AUC of losses {alone['gap']['auc']:.3f}" in capsys.readouterr().out

    shutil.copytree(evaluated, tmp_path / "eval")
    call(*flags, "--stages=gap,report", *eval_flags(tmp_path / "eval"))
    result = result_of(tmp_path / "eval")
    assert result["gap"] == alone["gap"] and result["pixels"] == result_of(evaluated)["pixels"]
    assert f"At t = {alone['gap']['best_t']} they tell" in (tmp_path / "eval/grid/report.html").read_text()
    with pytest.raises(UsageError, match=r"--unet_dir=.*: not the weights of the images in --generate_dir"):
        call(*flags, "--stages=gap", "--use_ema=False", *eval_flags(tmp_path / "eval"))
    with pytest.raises(UsageError, match=r"--stages=gap: no image of digits is held out"):
        call(*flags, "--stages=gap", "--num_train=0", "--fid_reference=train", *eval_flags(tmp_path / "none"))
    with pytest.raises(UsageError, match=r"--unet_dir: name a checkpoint"):
        call(*PIXELS, "--stages=gap", *eval_flags(tmp_path / "none"))


def test_several_checkpoints_and_repeated_images(tmp_path):
    """An ensemble of scores of shards that were never averaged; measures and skips are of distinct images."""
    data = ["--num_train=30", "--duplicates=3", "--copies=7"]
    training = ["--client_num=2", "--local_epoch=1", "--total_round=1", "--arr_ema_decay=0.2", "--mem_ratio=0.9"]
    run("main_fed.py", "--train", *TINY_FLAGS, *data, *training, "--logdir=log", cwd=tmp_path)
    shards = sorted(str(path) for path in (tmp_path / "log/state").glob("shard*.pt"))
    flags = [*TINY_FLAGS, *data, "--num_images=6", "--fid_features=pixels", *eval_flags(tmp_path)]
    run("all_in.py", *flags, f"--unet_dir={','.join(shards)}", cwd=tmp_path)
    result = json.loads((tmp_path / "grid/result.json").read_text())
    assert result["training_set_size"] == 30 and result["checkpoint"] == ",".join(shards)
    assert result["training"]["copies"] == 7
    index = np.load(tmp_path / "similar/memorization.npz")["index"]
    assert index.shape == (6, 30) and all(sorted(row) == list(range(30)) for row in index)

    nets = [tiny_unet(T=20, groups=8).eval() for _ in shards]
    for net, path in zip(nets, shards, strict=True):
        net.load_state_dict(torch.load(path, weights_only=True)["ema_model"])

    def mean(x, t, labels):
        return (nets[0](x, t, labels) + nets[1](x, t, labels)) / 2

    sampler = GaussianDiffusionSampler(mean, 1e-4, 0.02, 20, 8, steps=4)
    with torch.no_grad():
        x_0 = sampler(sample_noise(12, range(6), (3, 8, 8), "cpu")())
    expected = x_0.add(1).mul(127.5).clamp(0, 255).round()
    generated = torch.from_numpy(np.load(tmp_path / "generate/generate.npy"))
    assert (generated.float() - expected).abs().max() <= 1

    run("all_in.py", *flags, "--unet_dir=log", cwd=tmp_path)
    counts = torch.load(tmp_path / "log/global_ckpt_round1.pt", weights_only=True)["index_array"]
    assert counts.shape == (48,) and counts.sum() > 0
    assert "skipped most in training" in (tmp_path / "grid/report.html").read_text()


SCORES = ("fid", "is", "is_std", "fpd", "precision", "recall")


def scores_of(directory):
    return {key: value for key, value in result_of(directory).items() if key in SCORES}


def test_scores_of_samples_do_not_depend_on_names_or_order(tmp_path, monkeypatch):
    """The same images by class, shuffled, and as files with other names; of training images too."""
    monkeypatch.setattr(evaluate, "COVER_IMAGES", 6)
    rng = np.random.default_rng(0)
    dark, bright = (rng.integers(low, low + 60, (6, 3, 8, 8), dtype=np.uint8) for low in (0, 190))
    by_class, shuffle = np.concatenate([dark, bright]), rng.permutation(12)
    np.save(tmp_path / "by_class.npy", by_class)
    np.save(tmp_path / "shuffled.npy", by_class[shuffle])
    save_pngs(tmp_path / "renamed", torch.from_numpy(by_class[shuffle[::-1]]))
    training = torch.from_numpy(np.concatenate([dark[:5] + 3, bright[:5] - 3]))
    save_pngs(tmp_path / "training", training)
    save_pngs(tmp_path / "training2", training.flip(0))
    weights = write_weights(tmp_path / "inception.pth")
    features = {"pixels": ["--fid_features=pixels"], "inception": [f"--inception_weights={weights}"]}
    for kind, flags in features.items():
        found = []
        for samples, root in (("by_class.npy", "training"), ("shuffled.npy", "training"), ("renamed", "training2")):
            data = ["--dataset=folder", f"--data_root={tmp_path / root}", "--num_train=0"]
            out = tmp_path / kind / samples
            call(*TINY_FLAGS, *data, *flags, f"--samples={tmp_path / samples}", "--stages=score", *eval_flags(out))
            found.append(scores_of(out))
        assert found[0] == found[1]
        assert found[0] == pytest.approx(found[2], rel=1e-6), "training images of other names are summed otherwise"

    def first(images):
        hashes = [hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest() for image in images]
        return images[np.argsort(hashes)[:6]].reshape(6, -1) / 255.0

    real, generated = first(training.numpy()), first(by_class)
    between = ((real[:, None] - generated) ** 2).sum(-1)
    radius = np.sort(((generated[:, None] - generated) ** 2).sum(-1), axis=1)[:, 3]
    assert scores_of(tmp_path / "pixels/by_class.npy")["recall"] == (between <= radius).any(axis=1).mean()


def test_scores_that_an_earlier_version_made_of_samples_are_not_shown(evaluated, tmp_path, capsys):
    np.save(tmp_path / "images.npy", np.load(evaluated / "generate/generate.npy"))
    flags = [*PIXELS, f"--samples={tmp_path / 'images.npy'}", *eval_flags(tmp_path)]
    call(*flags)
    new = result_of(tmp_path)
    assert new["scored_with"]["samples_order"] == 1
    assert "samples_order" not in result_of(evaluated)["scored_with"], "scores of generated images stay"
    old = {**new, "recall": 0.12345, "scored_with": result_of(evaluated)["scored_with"]}
    (tmp_path / "grid/result.json").write_text(json.dumps(old))
    call(*flags, "--stages=report")
    assert scores_of(tmp_path) == {} and "12.3%" not in (tmp_path / "grid/report.html").read_text()
    assert "scores of an earlier version are left out: run the score stage" in capsys.readouterr().err
    call(*flags, "--stages=score")
    assert scores_of(tmp_path) == {key: new[key] for key in SCORES if key in new}


def test_odd_samples_are_said_on_terminal_and_page(tmp_path):
    images = load_dataset("digits", ".", 8, num_train=0).train.images[48:98]
    np.save(tmp_path / "images.npy", (images > 127).to(torch.uint8).numpy())
    flags = [*PIXELS, "--num_train=48", "--samples=images.npy", *eval_flags(tmp_path)]
    printed = run("all_in.py", *flags, cwd=tmp_path)
    result, page = result_of(tmp_path), (tmp_path / "grid/report.html").read_text()
    said = "--samples=images.npy: odd, are they what is meant? 98% of the values lie between 0 and 1, of the training"
    assert result["samples_warning"].startswith(said) and result["warning"] is None
    assert printed.stderr.count("warning: ") == 1 and f"warning: {result['samples_warning']}\n" in printed.stderr
    assert "98% of the values lie between 0 and 1, of the training images" in page
    np.save(tmp_path / "images.npy", images.numpy())
    assert "warning" not in run("all_in.py", *flags, cwd=tmp_path).stderr
    assert result_of(tmp_path)["samples_warning"] is None
    assert "of the values lie" not in (tmp_path / "grid/report.html").read_text()


def test_long_scores_have_a_bar(tmp_path, monkeypatch, capsys):
    images = np.random.default_rng(0).integers(0, 256, (200, 3, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    flags = [*PIXELS, f"--samples={tmp_path / 'images.npy'}", "--stages=score"]
    call(*flags, *eval_flags(tmp_path / "short"))
    assert "precision" not in capsys.readouterr().err
    monkeypatch.setattr(fid, "LONG_COVER", 400)
    monkeypatch.setattr(fid, "LONG_POOLING", 200 * 3 * 8 * 8)
    call(*flags, *eval_flags(tmp_path / "long"))
    bars = capsys.readouterr().err
    assert "precision, recall: 100%|##########| 496/496" in bars and "pooled pixels: 100%|##########| 200/200" in bars

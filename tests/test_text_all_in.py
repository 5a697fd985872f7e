"""text_to_image.all_in as users run it, its images against a plain loop of diffusers, its numbers against numpy."""

import csv
import html
import json
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from score.features import inception_space
from score.fid import compute_statistics, frechet_distance
from tests.commands import ROOT, environment, forking_python, run_module, run_with
from tests.inception_weights import write_weights
from tests.test_features import clip as clip
from tests.test_report import Tags
from tests.text_files import CAPTIONS, copy_pipeline, save_captions, save_images, saved_pipeline
from text_to_image.pipeline import load_pipeline
from utils.files import file_hash
from utils.name_lists import GROUP_COLUMNS, write_table
from utils.seeding import derive_seed, generator

MODULE = "text_to_image.all_in"
STEPS = 3
FLAGS = ["--pretrained=pipeline", f"--sample_steps={STEPS}", "--device=cpu"]
DATA = ["--data_root=images", "--captions=captions.json", "--resolution=16"]


def directories(name):
    return [f"--{kind}_dir={name}/{kind}" for kind in ("generate", "similar", "grid")]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A pipeline, its UNet with other weights in a log directory, training images of which one is there twice."""
    directory = tmp_path_factory.mktemp("all_in")
    saved_pipeline(directory)
    save_images(directory / "images")
    save_images(directory / "heldout", [f"other{i}.png" for i in range(20)])
    (directory / "images" / "16.png").write_bytes((directory / "images" / "03.png").read_bytes())
    save_captions(directory / "captions.json", CAPTIONS | {"16.png": ["picture number 16"]})
    unet = copy_pipeline(directory / "pipeline", directory / "copy") / "unet"
    weights = load_file(unet / "diffusion_pytorch_model.safetensors")
    torch.manual_seed(1)
    weights["conv_out.weight"] = torch.randn_like(weights["conv_out.weight"])
    save_file(weights, unet / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    (directory / "log" / "checkpoint_round2").mkdir(parents=True)
    unet.rename(directory / "log" / "checkpoint_round2" / "unet")
    lines = ["--pretrained=pipeline", "--heldout=heldout", *DATA, "--lr=0.1", ""]
    (directory / "log" / "flagfile.txt").write_text("\n".join(lines))
    (directory / "log" / "run.json").write_text('{"settings": {"lr": 0.1}}')
    return directory


@pytest.fixture(scope="module")
def result(directory):
    flags = ["--unet=log", "--prompts=all", "--num_images=20", "--features=pixels", "--save_png"]
    # pipeline, training images and held-out ones are those of the training
    said = run_module(MODULE, *FLAGS[1:], *flags, *directories("all"), cwd=directory).stderr
    result = json.loads((directory / "all/grid/result.json").read_text())
    assert result["floor_warning"].endswith(" held-out images: with less than 500 the floors are rough")
    assert result["floor_warning"] in said
    return result


def read_folder(folder):
    return np.stack([np.asarray(Image.open(path)).transpose(2, 0, 1) for path in sorted(folder.glob("*.png"))])


@pytest.mark.parametrize("name", ["generate", "generate/base"])
def test_images_are_those_of_a_plain_loop(directory, result, name):
    """And the detector's norms are of the differences of its predictions."""
    folder = directory / "all" / name
    images = np.load(folder / "generate.npy")
    (norms,) = [json.loads(path.read_text()) for path in folder.glob("detector.*.json")]
    assert images.shape == (20, 3, 16, 16) and len(norms) == 20
    unet = directory / ("pipeline/unet" if "base" in name else "log/checkpoint_round2/unet")
    pipeline = load_pipeline(directory / "pipeline", unet)
    for i in (0, 17):
        expected, norm = plain_loop(pipeline, i)
        assert np.abs(images[i] - expected).max() <= 1
        assert norms[i] == pytest.approx(norm, rel=1e-3)


@torch.no_grad()
def plain_loop(pipeline, i, seed=12):
    """Image i, (3, 16, 16), and its norm."""
    x = torch.randn(4, 8, 8, generator=generator("cpu", seed, "image", i))[None]
    tokens = pipeline.tokenizer(["", f"picture number {i % 16}"], padding="max_length", max_length=77)
    text, differences = pipeline.text_encoder(torch.tensor(tokens.input_ids))[0], []
    pipeline.scheduler.set_timesteps(STEPS)
    for t in pipeline.scheduler.timesteps:
        without, given = pipeline.unet(x.repeat(2, 1, 1, 1), t, text).sample
        differences.append((given - without).norm().item())
        x = pipeline.scheduler.step(without + 7.5 * (given - without), t, x).prev_sample
    image = pipeline.vae.decode(x / pipeline.vae.config.scaling_factor).sample[0]
    return ((image / 2 + 0.5).clamp(0, 1) * 255).round().numpy(), np.mean(differences)


def test_images_above_a_similarity_are_made_again(directory):
    """Every try of every image by itself; the base model's are not held back."""
    pipeline = load_pipeline(directory / "pipeline", directory / "log/checkpoint_round2/unet")
    training = read_folder(directory / "images").reshape(17, -1)

    def similarity(image):
        return np.corrcoef(image.reshape(1, -1), training)[0, 1:].max()

    seeds = [12, *(derive_seed(12, "try", t) for t in (1, 2))]
    tries = [[plain_loop(pipeline, i, seed) for seed in seeds] for i in range(5)]
    similar = np.array([[similarity(image) for image, _ in row] for row in tries])
    above = round(float(similar.min(axis=1).max()) + 1e-3, 4)  # so that three tries are enough
    delivered = (similar <= above).argmax(axis=1)
    flags = ["--unet=log", "--prompts=all", "--num_images=5", "--features=pixels", "--batch_size=3"]
    flags += [f"--reject_above={above}", *directories("held")]
    run_module(MODULE, *FLAGS[1:], *flags, cwd=directory)
    images = np.load(directory / "held/generate/generate.npy")
    (path,) = (directory / "held/generate").glob("detector.*.json")
    norms = json.loads(path.read_text())
    for i, t in enumerate(delivered):
        expected, norm = tries[i][t]
        assert np.abs(images[i] - expected).max() <= 1 and norms[i] == pytest.approx(norm, rel=1e-3)
    result = json.loads((directory / "held/grid/result.json").read_text())
    assert delivered.max() > 0 and result["held_back"]["share"] == np.mean(delivered > 0)
    assert result["held_back"]["made"] == (delivered + 1).sum()
    page = (directory / "held/grid/report.html").read_text()
    assert f"Images with a similarity above {above} were held back" in page
    base = json.loads((directory / "held/generate/base/generate.json").read_text())
    assert "held_back" not in base and "reject_above" not in base["origin"]


def test_numbers_against_numpy(directory, result):
    """Image 16 is a copy of image 3: the 16 others are the training set, their first captions the prompts in turn."""
    training, heldout = read_folder(directory / "images")[:16], read_folder(directory / "heldout")
    in_training = np.array([(image == training).all(axis=(1, 2, 3)).any() for image in heldout])
    assert result["heldout_in_training"] == in_training.sum() > 0 and result["repeated_training_images"] == 1
    assert result["floor_warning"].startswith(f"{(~in_training).sum()} ")
    all_real = {"fpd": read_folder(directory / "images"), "heldout_fpd": heldout}  # with repeats
    heldout = heldout[~in_training]
    images = np.load(directory / "all/generate/generate.npy")
    assert np.array_equal(images, read_folder(directory / "all/generate"))
    assert result["N"] == 20 and result["training_set_size"] == 16

    def similarities(images):
        return np.corrcoef(images.reshape(len(images), -1), training.reshape(16, -1))[: len(images), len(images) :]

    for numbers, these in (
        (result, images),
        (result["base"], np.load(directory / "all/generate/base/generate.npy")),
        (result["holdout"], heldout),
    ):
        largest, similarity = similarities(these).max(axis=1), numbers["similarity"]
        assert similarity["sim_mean"] == pytest.approx(largest.mean(), abs=1e-5)
        assert similarity["sim_90pc"] == pytest.approx(np.percentile(largest, 90), abs=1e-5)
    own = np.arange(20) % 16
    assert result["similarity"]["own_image"] == pytest.approx((similarities(images).argmax(axis=1) == own).mean())
    others = similarities(training)
    np.fill_diagonal(others, -1)
    assert result["similarity"]["bg_mean"] == pytest.approx(others.max(axis=1).mean(), abs=1e-5)
    assert result["round_trip"]["similarity"].keys() >= {"own_image", "f_mem"} and result["round_trip"]["fpd"] >= 0
    assert "own_image" not in result["holdout"]["similarity"]
    for name, real in all_real.items():
        sets = map(torch.from_numpy, (images, real))
        expected = frechet_distance(*(values for x in sets for values in compute_statistics(x)))
        assert result[name] == pytest.approx(expected)
    assert result["fpd"] > 0 and result["heldout_fpd"] > 0 and result["base"]["heldout_fpd"] > 0
    assert result["checkpoint"] == "log/checkpoint_round2" and result["training"] == {"lr": 0.1}
    saved = np.load(directory / "all/similar/similarity.npz")
    assert np.array_equal(saved["index"][:, 0], similarities(images).argmax(axis=1))
    assert saved["paths"].tolist() == list(CAPTIONS)
    closest = similarities(images).max(axis=1)
    rows = list(csv.DictReader((directory / "all/similar/nearest.csv").open()))
    assert [int(row["image"]) for row in rows] == (-closest).argsort().tolist()
    for row in rows:
        similar = np.sort(similarities(images)[int(row["image"])])[::-1]
        distances = 2 - 2 * similar
        assert row["nearest training image"] == f"{saved['index'][int(row['image']), 0]:02}.png"
        assert float(row["similarity"]) == pytest.approx(similar[0], abs=1e-5)
        assert float(row["ratio"]) == pytest.approx(distances[0] / distances.mean(), abs=1e-5)
        assert float(row["d_1 / d_2"]) == pytest.approx(distances[0] / distances[1], abs=1e-5)
    prompts = json.loads((directory / "all/generate/prompts.json").read_text())
    assert prompts[17] == {"prompt": "picture number 1", "caption": "picture number 1", "image": 1}


def test_page_and_comparison(directory, result):
    text = (directory / "all/grid/report.html").read_text()
    tags = Tags(text)
    assert all(image["alt"] for image in tags.images) and len(tags.images) == 2 + 2 * 20
    for words in ("picture number 11", "base model", "round trip", "95pc", "Detector of copies", "own image"):
        assert words in text
    numbers = (directory / "all/grid/result.json").read_text()
    assert not any(words in text + numbers for words in ("bove 0.5", "above_05", "gt_05pc")), "they are of pixels"
    found = run_module("score.compare", "ours=all/grid", "twice=all/grid", "--html=both.html", cwd=directory)
    header = found.stdout.splitlines()[0]
    assert {"own image", "similarity", "fpd to held-out"} <= {cell.strip() for cell in header.split("|")}
    page = (directory / "both.html").read_text()
    assert "Similarity to training images" in page and "generated image of pair 8 of twice" in page
    doubt = "--unet=log: no run.json beside it says which pipeline and images it was trained with"
    lines = [f"warning: {label}: {doubt}: these may be others" for label in ("ours", "twice")]
    assert found.stderr.splitlines() == lines
    other = result | {"holdout": result["holdout"] | {"images_sha256": "0" * 64}}
    (directory / "other").mkdir()
    (directory / "other/result.json").write_text(json.dumps(other))
    found = run_module("score.compare", "ours=all/grid", "other=other", "--floors", cwd=directory)
    assert found.stderr.count("\n") == 3 and "differ in held-out images: ours: " in found.stderr


def test_a_killed_generation_goes_on_whatever_the_batch_and_the_processes(directory, result):
    """With Gaussian noise on the text; the reference is a run at one go."""
    flags = [*FLAGS, *DATA, "--features=pixels", "--num_images=9", "--text_noise=0.1"]
    run_module(MODULE, *flags, *directories("straight"), "--batch_size=4", cwd=directory)
    command = [forking_python(), "-m", MODULE, *flags, *directories("killed"), "--batch_size=1"]
    process = subprocess.Popen(
        command, cwd=directory, env=environment(PYTHONPATH=str(ROOT)), stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    while not (directory / "killed/generate/generate.part.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = run_with(2, MODULE, *flags, *directories("killed"), "--batch_size=2", cwd=directory)
    assert "of 9 images are there already" in done.stdout
    ours, theirs = (np.load(directory / name / "generate/generate.npy") for name in ("killed", "straight"))
    assert np.abs(ours.astype(int) - theirs).max() <= 1
    norms = [json.loads(next((directory / name).glob("*/detector.*")).read_text()) for name in ("killed", "straight")]
    np.testing.assert_allclose(*norms, rtol=1e-4)
    assert len(norms[0]) == 9 and len(set(np.round(norms[0], 4))) == 9


def test_images_of_others(directory, tmp_path_factory):
    """Copies of training images 0 to 11, numbered as their makers do, with prompts in a text file, and no pipeline."""
    folder = tmp_path_factory.mktemp("theirs")
    for i in range(12):
        (folder / f"image {i}.png").write_bytes((directory / "images" / f"{i:02}.png").read_bytes())
    (directory / "prompts.txt").write_text("".join(f"{CAPTIONS[f'{i:02}.png'][1]}\n" for i in range(11)) + "a cat\n")
    flags = [f"--samples={folder}", "--prompts=prompts.txt", *DATA, "--features=pixels", *directories("theirs")]
    run_module(MODULE, *flags, cwd=directory)
    result = json.loads((directory / "theirs/grid/result.json").read_text())
    similarity = result["similarity"]
    assert similarity["sim_mean"] == pytest.approx(1, abs=1e-5) and similarity["f_mem"] == 1
    assert similarity["own_image"] == 1  # of the 11 whose prompt is a caption
    assert "base" not in result and "detector" not in result and result["samples"] == str(folder)
    rows = [[1, f"{i:02}.png", i == 3, 1, "exact" if i == 16 else "near"] for i in (0, 3, 16)]
    write_table(directory / "groups.csv", GROUP_COLUMNS, rows)
    run_module(MODULE, *flags, "--groups=groups.csv", cwd=directory)
    again = json.loads((directory / "theirs/grid/result.json").read_text())
    assert again["groups"] == {"sha256": file_hash(directory / "groups.csv"), "number": 1, "largest": 2}
    index = np.load(directory / "theirs/similar/similarity.npz")["index"]
    assert not (index[0] == 3).any() and not (index[3] == 0).any() and (index[1:3] >= 0).all()
    assert again["similarity"]["sim_mean"] == similarity["sim_mean"]
    assert not (directory / "theirs/generate").exists()


def test_prompts_that_clip_alone_does_not_read_to_the_end(directory, clip, tmp_path):
    (tmp_path / "prompts.txt").write_text("word " * 76 + "\n" + "a cat\n" * 16)
    flags = ["--samples=images", f"--prompts={tmp_path / 'prompts.txt'}", f"--clip={clip}"]
    flags += ["--features=pixels", *DATA, *directories(tmp_path)]
    said = run_module(MODULE, *flags, cwd=directory).stderr
    assert said.count("warning: 1 of 17 prompts have more than 77 tokens: the text encoder reads 77") == 1


@pytest.mark.parametrize("place", ["generate", "generate/base"])
def test_other_images_in_the_way_of_png_show_before_the_work(directory, tmp_path, place):
    save_images(tmp_path / place, ["other.png"])
    flags = [*FLAGS, *DATA, "--unet=log", "--features=pixels", "--num_images=2", "--save_png"]
    result = run_module(MODULE, *flags, *directories(tmp_path), cwd=directory, code=1)
    what = "an image of another run is in the folder; empty it or name another one"
    assert f"{place}/other.png: {what}" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "grid").exists() and not list(tmp_path.glob("generate/*.npy"))


def test_images_and_prompts_are_paired_by_name(directory, tmp_path):
    """Copies of training images with their names, and a file of captions in the opposite order."""
    save_images(tmp_path / "theirs")
    captions = save_captions(tmp_path / "captions.json", dict(reversed(CAPTIONS.items())))
    flags = [f"--samples={tmp_path / 'theirs'}", f"--prompts={captions}", *DATA, "--features=pixels"]
    run_module(MODULE, *flags, *directories(tmp_path), cwd=directory)
    result = json.loads((tmp_path / "grid/result.json").read_text())
    assert result["similarity"]["own_image"] == 1
    table = csv.DictReader((tmp_path / "similar/nearest.csv").open())
    assert all(row["image"] == row["nearest training image"] for row in table)


def test_images_that_are_not_finite_are_named(directory, tmp_path):
    """Wherever they come from; here the VAE makes nothing else. That no run.json says what a UNet is, is said, too."""
    folder = copy_pipeline(directory / "pipeline", tmp_path)
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["decoder.conv_out.bias"].fill_(float("nan"))
    save_file(weights, path, metadata={"format": "pt"})
    flags = [f"--pretrained={folder}", f"--unet={folder / 'unet'}", "--sample_steps=2", "--device=cpu", *DATA]
    flags += ["--num_images=3", "--features=pixels", *directories(tmp_path)]
    for seed in (1, 1, 2):  # the second takes the images of the first
        said = run_module(MODULE, *flags, f"--seed={seed}", cwd=directory).stderr
        assert len(list((tmp_path / "generate").glob("detector.*"))) == 1
        result = json.loads((tmp_path / "grid/result.json").read_text())
        assert result["non_finite_images"] == 3
        for text in (
            "3 of 3 generated images hold values that are not finite, black here",
            "3 of 3 images of the base model hold values that are not finite, black here",
            "3 of 3 training images after the VAE's round trip hold values that are not finite, black here",
            f"--unet={folder / 'unet'}: no run.json beside it says which pipeline and images it was trained with",
        ):
            name = {"g": "non_finite_warning", "-": "settings_warning"}.get(text.removeprefix("3 of 3 ")[0], "warning")
            assert said.count(f"warning: {text}") == 1 and text in result[name]
            assert html.escape(text) in (tmp_path / "grid/report.html").read_text()


def test_similarity_and_fid_of_inception(directory, tmp_path):
    """FID of few images by singular values: with centred features A and B, the trace is the nuclear norm of A B^T.

    One image is in two files, and counts twice."""
    files = [directory / "images" / f"{i:02}.png" for i in range(17)]
    training = np.stack([np.asarray(Image.open(path)) for path in files])
    images = 255 - training[:10]
    np.save(tmp_path / "images.npy", images)
    weights = write_weights(tmp_path / "weights.pth")
    flags = [f"--samples={tmp_path / 'images.npy'}", "--features=inception", f"--inception_weights={weights}", *DATA]
    run_module(MODULE, *flags, *(f"--{kind}_dir={tmp_path / kind}" for kind in ("similar", "grid")), cwd=directory)
    result = json.loads((tmp_path / "grid/result.json").read_text())

    with torch.no_grad(), pytest.warns(UserWarning, match="not the published"):
        features_of = inception_space(weights).features
        A, B = (features_of(torch.from_numpy(x).permute(0, 3, 1, 2)).double().numpy() for x in (images, training))
    cosines = A @ B.T / np.linalg.norm(A, axis=1)[:, None] / np.linalg.norm(B, axis=1)
    similarity = result["similarity"]
    assert similarity["features"] == "inception"
    assert similarity["sim_mean"] == pytest.approx(cosines.max(axis=1).mean(), 1e-4)
    mean = A.mean(axis=0) - B.mean(axis=0)
    A, B = ((x - x.mean(axis=0)) / np.sqrt(len(x) - 1) for x in (A, B))
    fid = (mean**2).sum() + (A**2).sum() + (B**2).sum() - 2 * np.linalg.norm(A @ B.T, "nuc")
    assert result["fid"] == pytest.approx(fid, 1e-3) and "fpd" not in result


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ([], 2, "give --sscd, the file of its weights, or --features=pixels, which needs none"),
        (["--features=clip"], 2, "give --clip, the file"),
        (["--features=pixels", "--stages=score"], 2, "Unknown command line flag 'stages'"),
        (["--features=pixels", "--prompts=nothing.txt"], 1, "--prompts=nothing.txt: cannot be read"),
        (["--features=pixels", "--heldout=nothing"], 1, "--heldout=nothing: no such file or folder"),
        (["--features=pixels", "--unet=images"], 1, "--unet=images: no UNet in diffusers' format in it"),
        (["--features=pixels", "--samples=images", "--rand_augs=rand_word_add"], 2, "--rand_augs changes prompts of"),
        (
            ["--features=pixels", "--samples=images", "--prompts=random"],
            2,
            "--prompts=random draws captions for images",
        ),
        (["--features=pixels", "--logdir=log"], 2, "--logdir=log: is where training writes: give --unet"),
        (
            ["--features=pixels", "--sample_steps=1500"],
            2,
            "--sample_steps=1500: the pipeline's DDIMScheduler has 1000 timesteps and steps_offset 1: give at",
        ),
        (
            ["--features=pixels", "--resolution=12"],
            2,
            "--resolution=12: pipeline has a VAE that makes images 2 times as",
        ),
        (
            ["--features=pixels", "--samples=images", "--prompts=all"],
            2,
            "--prompts=all: 16 captions, a distinct image each, for the 17 images of --samples: give as many images",
        ),
    ],
)
def test_what_a_person_can_correct_is_one_line(directory, flags, code, message):
    result = run_module(MODULE, *FLAGS, *DATA, *directories("bad"), *flags, cwd=directory, code=code)
    line = result.stderr.splitlines()[-1]
    assert line.startswith(f"{MODULE}: error: {message}") and "Traceback" not in result.stderr
    assert not (directory / "bad").exists()

"""all_in.py as users run it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import load_dataset
from tests.commands import eval_flags, run, run_module
from tests.inception_weights import write_weights
from tests.networks import TINY_FLAGS, tiny_unet, visible

PIXELS = [*TINY_FLAGS, "--fid_features=pixels", "--num_images=24"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint in the format of main.py whose raw and EMA weights differ."""
    path = tmp_path_factory.mktemp("checkpoint") / "ckpt7.pt"
    raw, ema = (visible(tiny_unet(seed, T=20)).state_dict() for seed in (0, 1))
    torch.save({"net_model": raw, "ema_model": ema, "step": 7}, path)
    return path


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
    result = result_of(evaluated)
    assert result["mq"] == {str(p): int((100 * ratio < p).sum()) for p in (15, 20, 30, 40, 50, 60, 70, 80, 90)}
    assert result["mq_fraction"]["90"] == result["mq"]["90"] / 24
    assert result["share_sqrt_d1_d2_below_third"] == np.mean(9 * ordered[:, 0] < ordered[:, 1])
    own = brute_force(training, training)
    np.fill_diagonal(own, np.inf)
    authentic = ordered[:, 0] > own.min(axis=1)[distances.argmin(axis=1)]
    assert result["auth_pct"] == pytest.approx(100 * authentic.mean())


def test_result_says_everything(evaluated, checkpoint):
    result = result_of(evaluated)
    assert result["N"] == 24 and result["training_set_size"] == 48
    assert result["checkpoint"] == str(checkpoint) and result["weights"] == "ema"
    assert result["seconds"].keys() == {"generate", "score", "memorise", "grid"}
    assert result["fpd"] > 0 and "fid" not in result and result["non_finite_images"] == 0
    assert result["flags"]["ch_mult"] == [2] and result["flags"]["seed"] == 12
    lines = (evaluated / "grid/result.txt").read_text().splitlines()
    assert lines[0].startswith("(nan, nan), fpd: (")
    assert lines[1:] == [f"v_{p}:{count}" for p, count in result["mq"].items()]


def test_images_do_not_depend_on_the_batch_size_and_raw_weights_differ(evaluated, checkpoint, tmp_path):
    whole = np.load(evaluated / "generate/generate.npy").astype(int)
    flags = [*PIXELS, "--stages=generate", f"--unet_dir={checkpoint}", *eval_flags(tmp_path)]
    run("all_in.py", *flags, "--batch_size=5", "--num_images=13", cwd=tmp_path)
    part = np.load(tmp_path / "generate/generate.npy").astype(int)
    assert np.abs(part - whole[:13]).max() <= 1 and np.mean(part != whole[:13]) < 1e-3
    run("all_in.py", *flags, "--use_ema=False", cwd=tmp_path)
    raw = np.load(tmp_path / "generate/generate.npy").astype(int)
    assert np.mean(raw != whole) > 0.1


def test_stages_one_by_one_fill_the_same_result(evaluated, checkpoint, tmp_path):
    flags = [*PIXELS, f"--unet_dir={checkpoint}", "--fid_reference=heldout", *eval_flags(tmp_path)]
    for stage in ("generate", "memorise", "grid", "score"):
        run("all_in.py", *flags, f"--stages={stage}", cwd=tmp_path)
    ours, reference = result_of(tmp_path), result_of(evaluated)
    for key in ("mq", "fpd", "auth_pct", "N", "checkpoint_sha256", "images_sha256"):
        assert ours[key] == reference[key], key
    assert ours["seconds"].keys() == reference["seconds"].keys()


def test_a_stage_without_the_one_before_says_so(tmp_path):
    result = run("all_in.py", *PIXELS, "--stages=memorise", *eval_flags(tmp_path), cwd=tmp_path, code=1)
    assert "generate.npy: no such file: run the generate stage first" in result.stderr


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
    run("all_in.py", *PIXELS, f"--samples={path}", *eval_flags(tmp_path), cwd=tmp_path)
    result = result_of(tmp_path)
    assert result["mq"]["15"] == 20 == result["N"] and result["share_sqrt_d1_d2_below_third"] == 1
    assert result["checkpoint"] is None and result["auth_pct"] == 0
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
        run("all_in.py", *flags, *extra, *eval_flags(out), cwd=tmp_path)
        images[name] = np.load(out / "generate/generate.npy")
    assert (images["plain"] != images["guided"]).mean() > 0.05
    assert (images["plain"] != images["legacy"]).mean() > 0.05


def test_fid_and_inception_score(checkpoint, tmp_path):
    """On random Inception weights; what they give is compared with pytorch-fid in test_inception.py."""
    weights = tmp_path / "inception.pth"
    write_weights(weights)
    flags = [*TINY_FLAGS, "--num_train=20", "--num_images=12", f"--unet_dir={checkpoint}", *eval_flags(tmp_path)]
    cache = tmp_path / "reference.npz"
    run(
        "all_in.py", *flags, "--stages=generate,score", f"--inception_weights={weights}", f"--fid_cache={cache}",
        cwd=tmp_path,
    )  # fmt: skip
    result = result_of(tmp_path)
    assert result["fid"] > 0 and 1 <= result["is"] <= 1008 and result["is_std"] >= 0
    assert np.load(cache)["sigma"].shape == (2048, 2048)


def test_missing_inception_weights_are_told_before_any_image_is_made(checkpoint, tmp_path):
    flags = [*TINY_FLAGS, f"--unet_dir={checkpoint}", "--num_images=24", *eval_flags(tmp_path)]
    result = run("all_in.py", *flags, cwd=tmp_path, code=1, TORCH_HOME=str(tmp_path), https_proxy="http://127.0.0.1:9")
    assert "pt_inception-2015-12-05-6726825d.pth" in result.stderr
    assert all(way in result.stderr for way in ("copy the file", "--inception_weights", "--fid_features=pixels"))
    assert not (tmp_path / "generate/generate.npy").exists()


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

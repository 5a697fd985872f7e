"""Measuring with one's own images as they come: repeated, not square, held out in a folder, by other flags."""

import csv
import json
import re

import numpy as np
import pytest
from PIL import Image

from dataset import load_dataset
from score.features import pooled
from score.fid import precision_recall
from score.samples import content_order
from tests.commands import eval_flags, run, run_module, values_of
from training.logdir import UNRECORDED, read_run
from training.recorded import default_resize

SIZE = 8
NETWORK = ["--ch=8", "--ch_mult=1", "--attn=0", "--num_res_blocks=1", f"--img_size={SIZE}"]
TRAINING = ["--batch_size=8", "--warmup=1", "--sample_step=0", "--total_steps=4", "--ema_decay=0.5"]
MEASURING = ["--fid_features=pixels", "--num_images=12", "--sample_steps=4", "--device=cpu"]


def write_images(folder, pixels, names=None):
    """PNG files of pixels (N, H, W, 3), uint8."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(pixels):
        path = folder / (names[i] if names else f"{i:03d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def noise(n, height=SIZE, width=SIZE, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3)).astype(np.uint8)


def result_in(directory):
    return json.loads((directory / "grid/result.json").read_text())


def measure(tmp_path, out, *flags, code=0):
    """`all_in.py` with own images; returns the process and result.json."""
    found = run(
        "all_in.py", *MEASURING, f"--img_size={SIZE}", *flags, *eval_flags(tmp_path / out), cwd=tmp_path, code=code
    )
    return found, result_in(tmp_path / out) if not code else None


def in_order(images):
    """The images in the order in which those of --samples are scored."""
    return images[content_order(images)]


def test_training_images_in_two_files_count_once(tmp_path):
    training, heldout = noise(60), noise(40, seed=1)
    write_images(tmp_path / "once", training)
    write_images(tmp_path / "twice", np.concatenate([training, training]))
    write_images(tmp_path / "heldout", np.concatenate([heldout, training[:5]]))
    write_images(tmp_path / "clean", heldout)
    copies = (training.astype(int) + np.random.default_rng(2).integers(-3, 4, training.shape)).clip(0, 255)
    np.save(tmp_path / "samples.npy", copies.astype(np.uint8))
    flags = ["--dataset=folder", "--samples=samples.npy"]
    _, once = measure(tmp_path, "a", *flags, "--data_root=once", "--heldout=clean")
    said, twice = measure(tmp_path, "b", *flags, "--data_root=twice", "--heldout=heldout")
    pixels = once["pixels"]
    assert pixels["f_mem"] == 1 and pixels["auth_pct"] == 0 and pixels["extracted"] == 60
    same = ("pixels", "holdout", "training_set_size")
    assert {name: once.get(name) for name in same} == {name: twice.get(name) for name in same}
    assert (once["repeated_training_images"], once["heldout_in_training"]) == (0, 0)
    assert (twice["repeated_training_images"], twice["heldout_in_training"]) == (60, 5)
    line = "60 of 120 training images equal others, and count once; 5 of 45 held-out images equal training images"
    assert said.stderr.count(line) == 1 and line in (tmp_path / "b/grid/report.html").read_text()
    assert twice["fpd"] != once["fpd"]  # the reference has them twice


def test_repeats_change_no_measure_of_single_images(tmp_path):
    """Balls of precision and recall, and halves of the held-out images, of which each half would have all."""
    colours = np.random.default_rng(0).integers(0, 256, (100, 1, 1, 3)) + noise(100, 16, 16).astype(int) // 8
    colours = colours.clip(0, 255).astype(np.uint8)
    training, heldout, samples = colours[:40], colours[40:70], colours[70:]
    write_images(tmp_path / "once", training)
    write_images(tmp_path / "often", np.repeat(training, 5, axis=0))
    write_images(tmp_path / "single", heldout)
    write_images(tmp_path / "double", np.repeat(heldout, 2, axis=0))
    np.save(tmp_path / "samples.npy", samples)
    flags = ["--dataset=folder", "--samples=samples.npy", "--img_size=16", "--stages=score,memorise"]
    names = [f"{name}{kind}" for name in ("precision", "recall") for kind in ("", "_floor")]
    names += ["swd_floor", "holdout", "pixels"]
    for more in ([], ["--fid_reference=heldout"]):
        _, expected = measure(tmp_path, "a", *flags, *more, "--data_root=once", "--heldout=single")
        said, found = measure(tmp_path, "b", *flags, *more, "--data_root=often", "--heldout=double")
        assert expected["precision_floor"] > 0 and expected["recall"] > 0
        assert {name: found[name] for name in names} == {name: expected[name] for name in names}
        assert found["repeated_heldout_images"] == 30 and found["heldout_in_training"] == 0
        assert "30 of 60 held-out images equal other held-out ones, and count once" in said.stderr


def test_other_statistics_are_other_scores(tmp_path):
    """Those of a file that does not say what it is of, which is taken at its word."""
    write_images(tmp_path / "my", noise(20))
    np.save(tmp_path / "samples.npy", noise(20, seed=2))
    flags = ["--dataset=folder", "--data_root=my", "--samples=samples.npy", "--stages=score,memorise"]
    for name, mean in (("a", 0), ("b", 5)):
        np.savez(tmp_path / f"{name}.npz", mu=np.full(192, mean, np.float64), sigma=np.eye(192))
    alone = measure(tmp_path, "alone", *flags, "--fid_cache=b.npz")[1]["fpd"]
    caches = ["--fid_cache=a.npz"], ["--fid_cache=b.npz"], []
    found = [measure(tmp_path, "out", *flags, *more)[1]["fpd"] for more in caches]
    assert len(set(found)) == 3 and found[1] == alone


def test_floors_of_two_held_out_sets_do_not_meet_in_a_result(tmp_path):
    for i, folder in enumerate(("my", "held", "other")):
        write_images(tmp_path / folder, noise(20, seed=i))
    np.save(tmp_path / "samples.npy", noise(20, seed=3))
    flags = ["--dataset=folder", "--data_root=my", "--samples=samples.npy"]
    measure(tmp_path, "out", *flags, "--heldout=held", "--stages=score,memorise")
    for first, second in (("memorise", "score"), ("score", "memorise")):
        said, _ = measure(tmp_path, "out", *flags, "--heldout=other", f"--stages={first}", code=2)
        assert f"has floors of other held-out images, by the {second} stage" in said.stderr
    measure(tmp_path, "out", *flags, "--heldout=held", "--stages=memorise")
    measure(tmp_path, "out", *flags, "--heldout=other", "--stages=score,memorise")


def test_what_was_copied_is_named_by_its_file(tmp_path):
    training = noise(30)
    names = [f'{kind}/photo, "{i}".png' for kind in ("cat", "dog") for i in range(15)]
    write_images(tmp_path / "training", training, names)
    write_images(tmp_path / "samples", np.stack([noise(1, seed=5)[0], training[17]]), ["a.png", "mine.png"])
    measure(tmp_path, "out", "--dataset=folder", "--data_root=training", "--samples=samples")
    with (tmp_path / "out/similar/nearest.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["image", "nearest training image", "ratio", "d_1 / d_2"]
    assert [row[0] for row in rows] == ["mine.png", "a.png"] and rows[0][1] == names[17]
    assert float(rows[0][2]) == float(rows[0][3]) == 0 < float(rows[1][2]) <= float(rows[1][3]) <= 1
    saved = np.load(tmp_path / "out/similar/memorization.npz")
    assert saved["image_names"].tolist() == ["a.png", "mine.png"]
    assert set(saved["training_names"].tolist()) == set(names)
    page = (tmp_path / "out/grid/report.html").read_text()
    assert "mine.png" in page and "dog/photo, &quot;2&quot;.png" in page
    (tmp_path / "samples/mine.png").rename(tmp_path / "samples/yours.png")  # the same images in the same order
    measure(tmp_path, "out", "--dataset=folder", "--data_root=training", "--samples=samples")
    assert np.load(tmp_path / "out/similar/memorization.npz")["image_names"].tolist() == ["a.png", "yours.png"]


def test_images_that_are_not_square_are_cut_to_their_middle(tmp_path):
    wide = noise(20, 16, 40)
    write_images(tmp_path / "training", wide)
    np.save(tmp_path / "samples.npy", wide)

    def by_pil(image, box):
        return np.asarray(Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BILINEAR, box))

    for flag, box, word in (
        ("--resize=crop", (12, 0, 28, 16), "central"),
        ("--resize=squeeze", (0, 0, 40, 16), "squeezed"),
    ):
        for samples in ("samples.npy", "training"):
            found, result = measure(
                tmp_path, word, flag, "--dataset=folder", "--data_root=training", f"--samples={samples}"
            )
            assert result["pixels"]["mq"]["15"] == 20 == result["pixels"]["extracted"]  # each is its own training image
            assert word in found.stderr
        cache = max((tmp_path / "training/.cache").glob("*.npy"), key=lambda path: path.stat().st_mtime_ns)
        expected = np.stack([by_pil(image, box) for image in wide]).transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(np.load(cache), expected)
    found, default = measure(tmp_path, "default", "--dataset=folder", "--data_root=training", "--samples=training")
    assert default["pixels"]["extracted"] == 20 and "20 of 20 images are not square" in found.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A log directory of main.py: own images, a subset, another diffusion."""
    tmp_path = tmp_path_factory.mktemp("trained")
    write_images(tmp_path / "my", noise(40))
    flags = ["--dataset=folder", "--data_root=my", "--num_train=30", "--mean_type=xstart", "--beta_T=0.05", "--hflip"]
    run("main.py", "--train", *NETWORK, *TRAINING, *flags, "--logdir=log", cwd=tmp_path)
    return tmp_path


def test_a_checkpoint_is_evaluated_as_it_was_trained(trained, tmp_path):
    given = ["--mean_type=xstart", "--beta_T=0.05", "--num_train=30", "--dataset=folder", "--data_root=my", "--hflip"]
    out = [*MEASURING, "--unet_dir=log"]
    run("all_in.py", *out, *NETWORK, *given, *eval_flags(tmp_path / "given"), cwd=trained)
    found = run("all_in.py", *out, *eval_flags(tmp_path / "taken"), cwd=trained)
    expected, result = (result_in(tmp_path / name) for name in ("given", "taken"))
    same = ("images_sha256", "training_sha256", "pixels", "fpd", "holdout", "training_set_size", "training")
    assert {name: result[name] for name in same} == {name: expected[name] for name in same}
    assert result["settings_warning"] is None and "no run.json" not in found.stderr
    # the stages that find the images there
    run("all_in.py", *MEASURING, "--stages=score,memorise", *eval_flags(tmp_path / "taken"), cwd=trained)
    assert {name: result_in(tmp_path / "taken")[name] for name in same} == {name: expected[name] for name in same}
    run("main.py", "--eval", *MEASURING, "--logdir=log", cwd=trained)
    assert json.loads((trained / "log/eval_ckpt4.json").read_text())["settings_warning"] is None
    run("all_in.py", *out, "--stages=gap", *eval_flags(tmp_path / "gap"), cwd=trained)
    assert result_in(tmp_path / "gap")["gap"]["images"] == [12, 10]


@pytest.mark.parametrize("wrong", ["--mean_type=epsilon", "--beta_T=0.02", "--T=500", "--img_size=16", "--ch=16"])
def test_flags_that_contradict_the_training_are_refused(trained, tmp_path, wrong):
    for script in (["all_in.py", *eval_flags(tmp_path)], ["main.py", "--eval", "--logdir=log"]):
        said = run(script[0], *MEASURING, "--unet_dir=log", wrong, *script[1:], cwd=trained, code=2).stderr
        assert re.search(rf"{wrong}: log/run\.json says .*, leave the flag out", said) and said.count("\n") == 1


def test_other_training_images_are_said(trained, tmp_path):
    for flag in ("--subset_seed=1", "--num_train=20"):
        said = run("all_in.py", *MEASURING, "--unet_dir=log", flag, *eval_flags(tmp_path), cwd=trained).stderr
        note = result_in(tmp_path)["settings_warning"]
        assert "other images" in note and note in said and note in (tmp_path / "grid/report.html").read_text()
        run("all_in.py", *MEASURING, "--unet_dir=log", "--stages=generate", *eval_flags(tmp_path), cwd=trained)
        by_stage = [*MEASURING, "--stages=score,memorise", flag, *eval_flags(tmp_path)]
        assert note in run("all_in.py", *by_stage, cwd=trained).stderr
        assert result_in(tmp_path)["settings_warning"] == note
    lone = trained / "lone"
    lone.mkdir(exist_ok=True)
    (lone / "ckpt4.pt").write_bytes((trained / "log/ckpt4.pt").read_bytes())
    given = [*NETWORK, "--mean_type=xstart", "--beta_T=0.05", "--dataset=folder", "--data_root=my"]
    said = run("all_in.py", *MEASURING, *given, "--unet_dir=lone", *eval_flags(tmp_path), cwd=trained).stderr
    assert "no run.json says how it was trained" in said


def test_samples_said_to_be_of_a_training_are_measured_by_its_flags(trained, tmp_path):
    np.save(tmp_path / "samples.npy", noise(20, seed=2))
    flags = [*MEASURING, f"--samples={tmp_path / 'samples.npy'}", "--unet_dir=log", "--stages=score,memorise"]
    said = run("all_in.py", *flags, *eval_flags(tmp_path), cwd=trained).stderr
    settings = json.loads((trained / "log/run.json").read_text())["settings"]
    result = result_in(tmp_path)
    assert result["training_sha256"] == settings["training images (sha256)"] and "other images" not in said
    assert result["checkpoint"] is None and result["training"] is None, "who made them is not known"
    said = run("all_in.py", *flags, "--num_train=20", *eval_flags(tmp_path / "20"), cwd=trained).stderr
    assert "log/ckpt4.pt: was trained on other images" in said


def test_main_evaluates_no_other_training_than_its_own(trained, tmp_path):
    flags = ["--train", "--eval", *NETWORK, *TRAINING, "--dataset=folder", "--data_root=my", *MEASURING]
    said = run("main.py", *flags, "--unet_dir=log", f"--logdir={tmp_path / 'log'}", cwd=trained, code=2).stderr
    assert "--unet_dir=log: with --train, --eval is of the run in --logdir" in said and said.count("\n") == 1
    assert not (tmp_path / "log").exists()


def test_several_checkpoints_must_agree(trained, tmp_path):
    flags = ["--dataset=folder", "--data_root=my", "--num_train=30", "--mean_type=xstart", "--beta_T=0.04"]
    run("main.py", "--train", *NETWORK, *TRAINING, *flags, f"--logdir={tmp_path / 'b'}", cwd=trained)
    both = f"--unet_dir=log,{tmp_path / 'b'}"
    said = run("all_in.py", *MEASURING, both, *eval_flags(tmp_path), cwd=trained, code=2).stderr
    assert "--beta_T: log/ckpt4.pt was trained with 0.05" in said
    write_images(tmp_path / "my", noise(40, seed=7))
    flags = ["--dataset=folder", "--data_root=my", "--num_train=30", "--mean_type=xstart", "--beta_T=0.05", "--hflip"]
    run("main.py", "--train", *NETWORK, *TRAINING, *flags, "--logdir=c", cwd=tmp_path)
    both = f"--unet_dir=log,{tmp_path / 'c'}"
    said = run("all_in.py", *MEASURING, both, *eval_flags(tmp_path), cwd=trained, code=2).stderr
    assert "were trained with other training images: evaluate them one by one" in said


def test_main_measures_as_all_in_does(tmp_path):
    """Repeated training images and held-out ones among them; a file of one kind of weights is refused at once."""
    training, heldout = noise(40), noise(30, seed=1)
    write_images(tmp_path / "my", training)
    write_images(tmp_path / "other", np.concatenate([heldout, training[:10]]))
    flags = ["--dataset=folder", "--data_root=my", "--heldout=other", "--duplicates=10", "--copies=3"]
    run("main.py", "--train", *NETWORK, *TRAINING, *flags, "--logdir=log", cwd=tmp_path)
    said = run("main.py", "--eval", *MEASURING, "--logdir=log", cwd=tmp_path).stderr
    run("all_in.py", *MEASURING, "--unet_dir=log", *eval_flags(tmp_path / "out"), cwd=tmp_path)
    expected, record = result_in(tmp_path / "out"), json.loads((tmp_path / "log/eval_ckpt4.json").read_text())
    found = record["ema"]
    for name in ("repeated_training_images", "heldout_in_training", "repeats_warning", "floor_warning"):
        assert record[name] == expected[name]
    assert "10 of 40 held-out images equal training images" in said and "30 held-out images: with less" in said
    assert found == {name: expected[name] for name in found} and {"fpd", "precision_floor"} <= found.keys()
    run_module("training.export", "log", "ema.safetensors", cwd=tmp_path)
    flags = ["--unet_dir=ema.safetensors", "--logdir=e", *flags[:2]]
    result = run("main.py", "--eval", *MEASURING, *flags, cwd=tmp_path, code=1)
    assert "ema.safetensors" in result.stderr and "generate" not in result.stderr


def test_runs_of_earlier_versions_go_on_as_they_were(tmp_path):
    """They squeezed images, mirrored CIFAR's whatever --hflip said, and recorded neither."""
    write_images(tmp_path / "my", noise(20, 16, 40))
    flags = [*NETWORK, *TRAINING, "--dataset=folder", "--data_root=my", "--logdir=log"]
    run("main.py", "--train", *flags, "--resize=squeeze", cwd=tmp_path)
    path = tmp_path / "log/run.json"
    record = json.loads(path.read_text())
    del record["settings"]["resize"]
    path.write_text(json.dumps(record))
    run("main.py", "--train", *flags, "--total_steps=6", cwd=tmp_path)
    assert json.loads(path.read_text())["settings"]["resize"] == "squeeze"
    for words, resize in ((["--nofresh"], "squeeze"), (["--fresh"], "crop")):
        values = values_of("main.py", *words)
        default_resize(values, path.parent)
        assert values.resize == resize, "a new start has nothing of the run that it replaces"
    said = run("main.py", "--train", *flags, "--resize=crop", "--total_steps=8", cwd=tmp_path, code=2).stderr
    assert "--resize=crop" in said
    old = {"script": "main", "dataset": "cifar10", "hflip": False}
    path.write_text(json.dumps({"settings": old, "changes": []}))
    assert read_run(path)["settings"] == UNRECORDED | old | {"resize": "squeeze", "hflip": True}
    path.write_text(json.dumps({"settings": old | {"resize": "crop"}, "changes": []}))
    assert read_run(path)["settings"]["hflip"] is False


def test_floors_from_a_folder_of_held_out_images(tmp_path):
    training, heldout = noise(40), noise(30, seed=1)
    write_images(tmp_path / "my", training, [f"{i % 2}/{i}.png" for i in range(40)])
    write_images(tmp_path / "other", heldout, [f"{i % 2}/{i}.png" for i in range(30)])
    np.save(tmp_path / "samples.npy", noise(20, seed=2))
    flags = ["--dataset=folder", "--data_root=my", "--samples=samples.npy", "--num_train=20"]
    loaded = load_dataset("folder", tmp_path / "my", SIZE, num_train=20, heldout=tmp_path / "other")
    for extra in ([], ["--fid_reference=heldout"]):
        found, result = measure(tmp_path, "out", *flags, "--heldout=other", *extra)
        assert result["holdout"]["N"] == 30 and "with less than 500 the floors are rough" in found.stderr
        others = in_order(loaded.heldout.images)
        sets = (
            (others[::2], others[1::2]) if extra else (in_order(loaded.train.images), others[np.arange(20) * 30 // 20])
        )
        expected = precision_recall(*map(pooled, sets))
        assert {name: result[f"{name}_floor"] for name in expected} == expected  # never the reference against itself
    assert measure(tmp_path, "out", *flags)[1]["holdout"]["N"] == 20
    said, _ = measure(tmp_path, "out", *flags, "--heldout=nowhere", code=1)
    assert "no directory nowhere" in said.stderr and "--heldout" in said.stderr
    labels = ["--use_labels", "--num_labels=2", *NETWORK, *TRAINING]
    run("main.py", "--train", *labels, *flags[:2], "--logdir=log", cwd=tmp_path)
    gap = ["--unet_dir=log", "--stages=gap", *eval_flags(tmp_path / "gap")]
    run("all_in.py", *MEASURING, *gap, "--heldout=other", cwd=tmp_path)
    write_images(tmp_path / "flat", heldout)
    said = run("all_in.py", *MEASURING, *gap, "--heldout=flat", cwd=tmp_path, code=2).stderr
    assert "--heldout=flat: with --use_labels its sub-folders must be classes: 0, 1" in said
    write_images(tmp_path / "same", training)
    said, _ = measure(tmp_path, "out", *flags[:3], "--heldout=same", "--holdout", code=2)
    assert "--holdout: all images in --heldout=same equal training images: name others" in said.stderr


def test_held_out_images_of_classes_that_are_numbers(tmp_path):
    """Digits and CIFAR have no names of classes."""
    write_images(tmp_path / "other", noise(4), ["0/a.png", "3/b.png", "9/c.png", "thing/d.png"])
    loaded = load_dataset("digits", tmp_path, SIZE, heldout=tmp_path / "other")
    assert loaded.heldout.labels.tolist() == [0, 3, 9, -1]


def test_who_is_not_square_is_said_of_the_folder_that_all_are_in(tmp_path, capsys):
    write_images(tmp_path / "a", noise(2))
    write_images(tmp_path / "b", noise(3, 16, 40))
    load_dataset("folder", tmp_path, SIZE)
    assert f"{tmp_path}: 3 of 5 images are not square" in capsys.readouterr().err

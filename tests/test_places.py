"""Outputs never become training images, and what is measured lies apart from them."""

import json
import shutil

import pytest
import torch

from tests.commands import run, run_module
from tests.networks import TINY_FLAGS
from tests.test_bad_input import directory_of, picture, refuse, tree, weights
from tests.text_files import CAPTIONS, save_captions, save_images, saved_pipeline
from utils.errors import UsageError
from utils.images import is_within, keep_apart, list_images

FOLDER = "--dataset=folder --num_train=0 --batch_size=2 --data_root"
AMONG = "would be among the images in"
SAMPLES = "--fid_features=pixels --samples=s --similar_dir=r --grid_dir=r"
GENERATE = "--fid_features=pixels --unet_dir=w.pt --num_images=4 --generate_dir=r --similar_dir=r --grid_dir=r"


def images(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    directory_of(picture(), picture())(path)


def images_of_classes(path):
    path.mkdir()
    for name in "ab":
        images(path / name)


def link(target):
    return lambda path: path.symlink_to(target, target_is_directory=True)


MY, S = {"my": images}, {"s": images}
# (script, flags, {file: how it is made}, what the line on stderr says)
REFUSED = [
    ("main.py", f"--train {FOLDER}=my --logdir=my/logs", MY, f"--logdir=my/logs: what is written there {AMONG} my"),
    ("main.py", f"--train {FOLDER}=my --logdir=my/a/b/logs", {"my": images_of_classes}, f"{AMONG} my"),
    ("main.py", f"--train {FOLDER}=my --logdir=my", MY, f"{AMONG} my"),
    ("main.py", f"--train {FOLDER}=my --logdir=other/../my/logs", MY, f"{AMONG} my"),
    ("main.py", f"--train {FOLDER}=my --logdir=link/logs", MY | {"link": link("my")}, f"{AMONG} my"),
    ("main.py", f"--train {FOLDER}=link --logdir=my/logs", MY | {"link": link("my")}, f"{AMONG} link"),
    ("main.py", f"--train {FOLDER}=log/sample --logdir=log", {"log/sample": images}, f"{AMONG} log/sample"),
    (
        "main.py",
        f"--eval --fid_features=pixels {FOLDER}=my --logdir=my/logs --unet_dir=w.pt",
        MY | {"w.pt": weights()},
        f"{AMONG} my",
    ),
    (
        "main.py",
        f"--train --eval_step=1 --fid_features=pixels {FOLDER}=my --logdir=log --fid_cache=my/a.npz",
        MY,
        f"--fid_cache=my/a.npz: what is written there {AMONG} my",
    ),
    ("main_fed.py", f"--train {FOLDER}=my --logdir=my/logs", MY, f"{AMONG} my"),
    (
        "main.py",
        "--train --dataset=afhq --data_root=. --logdir=afhq/train/dog/logs",
        {"afhq/train/dog": images},
        f"{AMONG} afhq/train/dog",
    ),
    (
        "main.py",
        "--train --dataset=afhq --data_root=. --logdir=afhq/val/dog/logs",
        {"afhq/train/dog": images, "afhq/val/dog": images},
        f"{AMONG} afhq/val/dog",
    ),
    *(
        ("all_in.py", f"{FOLDER}=my {GENERATE} --{flag}=my/out", MY | {"w.pt": weights()}, f"--{flag}=my/out: what")
        for flag in ("generate_dir", "similar_dir", "grid_dir", "fid_cache")
    ),
    ("all_in.py", f"{FOLDER}=my {SAMPLES} --grid_dir=s", MY | S, f"--grid_dir=s: what is written there {AMONG} s"),
    (
        "all_in.py",
        f"{FOLDER}=my {SAMPLES} --samples=my/s",
        {"my": images, "my/s": images},
        "--samples=my/s: lies in my",
    ),
    ("all_in.py", f"{FOLDER}=s/my {SAMPLES}", S | {"s/my": images}, "--samples=s: has s/my in it"),
]


@pytest.mark.parametrize(("script", "flags", "files", "message"), REFUSED)
def test_refused_before_anything_is_written(script, flags, files, message, tmp_path):
    refuse(script, flags, files, 2, message, tmp_path)


def test_an_exported_file_too(tmp_path):
    images(tmp_path / "my")
    weights()(tmp_path / "w.pt")
    before, flags = tree(tmp_path), ["--dataset=folder", "--data_root=my"]
    result = run_module("training.export", *flags, "w.pt", "my/w.safetensors", cwd=tmp_path, code=2)
    assert f"error: my/w.safetensors: what is written there {AMONG} my" in result.stderr
    assert tree(tmp_path) == before


def test_a_picture_of_images_too(tmp_path):
    images(tmp_path / "my")
    result = run_module("score.grids", "my/all.png", "a=my", cwd=tmp_path, code=2)
    assert f"error: my/all.png: what is written there {AMONG} my" in result.stderr
    run_module("score.grids", "all.png", "a=my", cwd=tmp_path)
    assert (tmp_path / "all.png").exists() and not (tmp_path / "my/all.png").exists()
    result = {"N": 4, "flags": {"dataset": "folder", "data_root": "my"}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    result = run_module("score.compare", "result.json", "--picture=my/all.png", cwd=tmp_path, code=2)
    assert f"error: --picture=my/all.png: what is written there {AMONG} my" in result.stderr


def test_hidden_folders_and_those_beside_the_images_are_fine(tmp_path):
    images_of_classes(tmp_path / "my")
    train = ["--train", *TINY_FLAGS, *f"{FOLDER}=my".split(), "--sample_step=1", "--sample_size=2", "--total_steps=1"]
    for logdir in ("my/a/.logs", "mylog"):
        run("main.py", *train, f"--logdir={logdir}", cwd=tmp_path)
        assert (tmp_path / logdir / "sample/ema_step1.png").exists()
    assert sum(len(group) for group in list_images(tmp_path / "my", classes=True)) == 4
    samples = f"{SAMPLES} --samples=my --grid_dir=my/.r --similar_dir=my/.r --stages=score".split()
    run("all_in.py", *TINY_FLAGS, *f"{FOLDER}=my".split(), *samples, cwd=tmp_path)


def test_cifar_and_digits_list_no_folder(tmp_path):
    run("main.py", "--train", *TINY_FLAGS, "--data_root=.", "--total_steps=1", "--logdir=log", cwd=tmp_path)


def test_heldout_images_lie_apart_and_are_others(tmp_path):
    for name in ("my", "my/.hidden", "other"):
        images(tmp_path / name)
    my, other, hidden = (tmp_path / name for name in ("my", "other", "my/.hidden"))
    keep_apart([my], {"heldout": other, "samples": None}, {})
    keep_apart([my], {"heldout": hidden, "samples": my}, {"logdir": tmp_path / "mylogs"})
    for heldout, message in ((my, "these are the training images"), (my / "../my", "these"), (tmp_path, "has")):
        with pytest.raises(UsageError, match=f"--heldout={heldout}: {message}"):
            keep_apart([my], {"heldout": heldout}, {})
    with pytest.raises(UsageError, match="--logdir"):
        keep_apart([my], {"heldout": other}, {"logdir": other / "logs"})


def test_links_may_form_a_loop(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert not is_within(tmp_path / "a" / "log", tmp_path / "my")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    directory = tmp_path_factory.mktemp("text")
    saved_pipeline(directory)
    save_images(directory / "my")
    save_images(directory / "s", ["0.png", "1.png"])
    save_captions(directory / "captions.json", CAPTIONS)
    return directory


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        ("main_fed", "--train --logdir=my/logs", f"--logdir=my/logs: what is written there {AMONG} my"),
        ("main_fed", "--train --logdir=l --cache_dir=my/cache", f"--cache_dir=my/cache: what is written there {AMONG}"),
        ("all_in", "--generate_dir=my/r", f"--generate_dir=my/r: what is written there {AMONG} my"),
        ("all_in", "--grid_dir=my/r", f"--grid_dir=my/r: what is written there {AMONG} my"),
        ("all_in", "--similar_dir=my/r", f"--similar_dir=my/r: what is written there {AMONG} my"),
        ("all_in", "--fid_cache=my/r.npz", f"--fid_cache=my/r.npz: what is written there {AMONG} my"),
        ("all_in", "--unet=pipeline/unet --base_dir=my/r", f"--base_dir=my/r: what is written there {AMONG} my"),
        ("all_in", "--heldout=s --grid_dir=s", f"--grid_dir=s: what is written there {AMONG} s"),
        ("all_in", "--heldout=my", "--heldout=my: these are the training images"),
        ("all_in", "--heldout=.", "--heldout=.: has my in it"),
        ("all_in", "--heldout=my/s", "--heldout=my/s: lies in my"),
        ("all_in", "--samples=my/s --prompts=all", "--samples=my/s: lies in my"),
    ],
)
def test_text_to_image_too(text, module, flags, message):
    shutil.copytree(text / "s", text / "my" / "s", dirs_exist_ok=True)
    before = tree(text)
    shared = "--pretrained=pipeline --data_root=my --captions=captions.json --resolution=16 --features=pixels".split()
    where = [f"--{flag}_dir=r" for flag in ("generate", "similar", "grid")] if module == "all_in" else []
    result = run_module(f"text_to_image.{module}", *shared, *where, *flags.split(), cwd=text, code=2)
    assert f"error: {message}" in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr
    assert tree(text) == before


def test_text_to_image_writes_beside_and_into_hidden_folders(tmp_path):
    saved_pipeline(tmp_path)
    save_images(tmp_path / "my")
    save_captions(tmp_path / "captions.json", CAPTIONS)
    flags = "--pretrained=pipeline --data_root=my --captions=captions.json --resolution=16 --batch_size=4".split()
    once = "--train --client_num=1 --local_steps=1 --total_round=1 --sample_step=0 --warmup=0".split()
    run_module("text_to_image.main_fed", *flags, *once, "--logdir=my/.log", "--cache_dir=my/.cache", cwd=tmp_path)
    assert torch.load(tmp_path / "my/.log/state/average_round1.pt", weights_only=True)["round"] == 1

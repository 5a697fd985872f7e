"""What can be wrong with flags and files: each is one line that names it, and nothing is written or harmed."""

import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from tests.commands import run
from tests.dataset_files import write_cifar10
from tests.networks import TINY_FLAGS, tiny_unet

FED = "--train --client_num=3 --local_epoch=1 --total_round=1"
FOLDER = "--dataset=folder --data_root=images"
SAMPLES = "--fid_features=pixels --samples="
EVAL = "--fid_features=pixels --num_images=4 --unet_dir="


class Exploit:
    def __reduce__(self):
        return open, ("marker", "w")


def picture(mode="RGB", size=(8, 8)):
    return Image.new(mode, size)


def npy(array):
    return lambda path: np.save(path, array, allow_pickle=True)


def npz(**arrays):
    return lambda path: np.savez(path, **arrays)


def content(data):
    return lambda path: path.write_bytes(data)


def checkpoint(**parts):
    return lambda path: torch.save(parts, path)


def compressed_checkpoint(path):
    """A checkpoint of zeros, packed so that a few KiB would become 256 MiB."""
    torch.save({"net_model": {"x": torch.zeros(2**26)}}, path)
    with zipfile.ZipFile(path) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def flipped(path):
    torch.save({"net_model": {"x": torch.zeros(1000)}, "ema_model": {}}, path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def directory_of(*pictures, suffix="png"):
    def write(path):
        path.mkdir()
        for i, image in enumerate(pictures):
            image.save(path / f"{i}.{suffix}")

    return write


def directory_with(name, write):
    def make(path):
        directory_of(picture(), picture())(path)
        write(path / name)

    return make


def loop(path):
    directory_of(picture())(path)
    (path / "again").symlink_to(path, target_is_directory=True)


def decompression_bomb(path):
    directory_of(picture())(path)
    Image.new("1", (20_000, 20_000)).save(path / "bomb.png")


def cifar_with_code(path):
    write_cifar10(path)
    (path / "cifar-10-batches-py/data_batch_3").write_bytes(pickle.dumps({"data": Exploit()}, protocol=2))


def cifar_of_one_channel(path):
    write_cifar10(path)
    batch = {b"data": np.zeros((4, 1024), np.uint8), b"labels": [0, 1, 2, 3]}
    (path / "cifar-10-batches-py/data_batch_2").write_bytes(pickle.dumps(batch, protocol=2))


def cifar_with_label(label):
    def write(path):
        write_cifar10(path)
        batch = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, label]}
        (path / "cifar-10-batches-py/test_batch").write_bytes(pickle.dumps(batch, protocol=2))

    return write


def read_only(path):
    path.mkdir()
    (path / "log").write_text("a file, not a directory")


def weights(**changes):
    state = tiny_unet(T=20, **changes).state_dict()
    return checkpoint(net_model=state, ema_model=state, step=1)


# (script, flags, {file: how it is made}, exit code, what the line on stderr says)
USAGE = [
    ("main.py", "", "nothing to do: add --train and/or --eval"),
    ("main_fed.py", "", "nothing to do: add --train"),
    ("main.py", "--train stray", "'stray' is no flag"),
    ("main.py", "--train --nonsense", "nonsense"),
    ("main.py", "--train --flagfile=missing.txt", "missing.txt"),
    ("main.py", "--train --lr=0", "--lr=0.0: must be > 0"),
    ("main.py", "--train --lr=fast", "--lr=fast"),
    ("main.py", "--train --lr=nan", "--lr=nan"),
    ("main.py", "--train --dropout=1", "--dropout=1.0: must be in [0, 1)"),
    ("main.py", "--train --ema_decay=1", "--ema_decay=1.0"),
    ("main.py", "--train --grad_clip=-1", "--grad_clip=-1.0"),
    ("main.py", "--train --T=1", "--T=1"),
    ("main.py", "--train --beta_1=0.5", "--beta_1=0.5 is above --beta_T=0.02"),
    ("main.py", "--train --sample_steps=21", "--sample_steps=21: with --T=20 at most 20"),
    ("main.py", "--train --ch_mult=2 --attn=5", "--attn=5: there is no level 5: --ch_mult makes 2 levels, 0 to 1"),
    ("main.py", "--train --attn=1", "--attn=1: there is no level 1: --ch_mult makes one, level 0: give --attn=0"),
    ("main.py", "--train --ch=136", "--ch=136: must be a multiple of the 32 groups of a GroupNorm"),
    ("main.py", "--train --ch_mult=1 --ch_mult=2 --ch_mult=2 --img_size=10", "--img_size=10"),
    ("main.py", "--train --mean_type=noise", "--mean_type=noise"),
    ("main.py", "--train --use_labels", "--use_labels needs --num_labels"),
    ("main.py", "--train --use_labels --num_labels=3", "--num_labels=3: digits has 10 classes"),
    ("main.py", "--train --guidance=1", "--guidance=1.0 needs --use_labels"),
    ("main.py", "--train --label_dropout=0.1", "--label_dropout=0.1 needs --use_labels"),
    ("main.py", "--train --overwrite", "--overwrite does nothing without --fresh"),
    ("main.py", "--train --device=tpu", "--device=tpu is not available"),
    ("main.py", "--train --num_train=5000", "--num_train=5000"),
    ("main.py", "--train --batch_size=49", "--batch_size=49 is larger than the 48 images"),
    ("main.py", "--train --keep=0", "--keep=0"),
    ("main.py", "--train --max_bad_steps=0", "--max_bad_steps=0"),
    ("main_fed.py", "--train --client_num=6 --batch_size=9", "--batch_size=9 is larger than the 8 images of shard 0"),
    ("main_fed.py", "--train --mem_ratio=0", "--mem_ratio=0.0: must be > 0"),
    ("main_fed.py", "--train --arr_ema_decay=1.5", "--arr_ema_decay=1.5"),
    ("main_fed.py", "--train --anti_grad=climb", "--anti_grad=climb"),
    ("all_in.py", "--fid_features=pixels", "--unet_dir: name a checkpoint"),
    ("all_in.py", "--stages=", "--stages"),
    ("all_in.py", "--stages=generate,paint", "--stages"),
    ("all_in.py", f"{EVAL}x.pt --num_images=1", "--num_images=1"),
    ("all_in.py", f"{EVAL}x.pt --use_labels --num_labels=10 --legacy_labels --guidance=1", "--guidance needs a null"),
]
FILES = [
    ("main.py", "--train --dataset=cifar10 --img_size=32", {}, "data"),
    ("main.py", "--train --dataset=cifar10 --img_size=32", {"data": cifar_with_code}, "data_batch_3"),
    ("main.py", "--train --dataset=cifar10 --img_size=32", {"data": cifar_of_one_channel}, "data_batch_2"),
    ("main.py", "--train --dataset=cifar10 --img_size=32", {"data": cifar_with_label(10)}, "test_batch"),
    ("main.py", f"--train {FOLDER}", {}, "images"),
    ("main.py", f"--train {FOLDER}", {"images": directory_of()}, "images: no images in it"),
    ("main.py", f"--train {FOLDER}", {"images": loop}, "again: a symbolic link to a directory"),
    ("main.py", f"--train {FOLDER}", {"images": decompression_bomb}, "bomb.png: cannot be read as an image"),
    (
        "main.py",
        f"--train {FOLDER}",
        {"images": directory_with("x.png", content(b"text"))},
        "x.png: cannot be read as an image",
    ),
    ("main.py", f"--train {FOLDER}", {"images": directory_with("x.png", content(b""))}, "x.png"),
    ("main.py", f"--train {FOLDER}", {"images": directory_with("x.png", os.mkfifo)}, "x.png: neither a file"),
    ("main.py", f"--train {FOLDER}", {"images": directory_of(picture("F"), suffix="tiff")}, "0.tiff"),
    ("main.py", "--train --logdir=place/log", {"place": read_only}, "--logdir=place/log: cannot be written"),
    ("main.py", "--eval --fid_features=pixels", {"log": os.mkdir}, "holds no ckpt*.pt"),
    ("main_fed.py", f"{FED} --check_dir=a.pt", {}, "a.pt: cannot be read as a checkpoint (No such file"),
    ("main_fed.py", f"{FED} --check_dir=a.pt", {"a.pt": checkpoint(net_model=Exploit())}, "a.pt: cannot be read"),
    ("main_fed.py", f"{FED} --check_dir=a.pt", {"a.pt": weights(ch=64)}, "a.pt: does not fit the network"),
    ("all_in.py", f"{EVAL}a.pt", {}, "a.pt: cannot be read as a checkpoint (No such file"),
    ("all_in.py", f"{EVAL}a.pt", {"a.pt": content(b"")}, "a.pt: cannot be read as a checkpoint"),
    ("all_in.py", f"{EVAL}a.pt", {"a.pt": content(pickle.dumps(Exploit()))}, "a.pt: cannot be read as a checkpoint"),
    ("all_in.py", f"{EVAL}a.pt", {"a.pt": checkpoint(epoch=3)}, "a.pt: has neither ema_model nor"),
    ("all_in.py", f"{EVAL}a.pt", {"a.pt": flipped}, "a.pt: cannot be read as a checkpoint (damaged"),
    ("all_in.py", f"{EVAL}a.pt", {"a.pt": compressed_checkpoint}, "a.pt: cannot be read as a checkpoint (it is compr"),
    ("all_in.py", f"{EVAL}a.pt", {"a.pt": weights(ch_mult=[1])}, "a.pt: does not fit the network"),
    ("all_in.py", f"{SAMPLES}a.npy", {}, "a.npy: no such file"),
    ("all_in.py", f"{SAMPLES}a.npy", {"a.npy": content(b"")}, "a.npy"),
    ("all_in.py", f"{SAMPLES}a.npy", {"a.npy": npy(np.array([Exploit()], object))}, "a.npy"),
    ("all_in.py", f"{SAMPLES}a.npy", {"a.npy": npy(np.zeros((4, 3, 8, 8), np.int64))}, "a.npy: an array of int64"),
    ("all_in.py", f"{SAMPLES}a.npy", {"a.npy": npy(np.zeros((4, 2, 8, 8), np.uint8))}, "a.npy: shape"),
    ("all_in.py", f"{SAMPLES}a.npy", {"a.npy": npy(np.zeros((4, 64), np.uint8))}, "a.npy: an array of shape"),
    ("all_in.py", f"{SAMPLES}a.npy", {"a.npy": npy(np.full((4, 3, 8, 8), np.nan))}, "a.npy: values from nan"),
    ("all_in.py", f"{SAMPLES}a.npy", {"a.npy": npy(np.full((4, 3, 8, 8), 255.0))}, "a.npy: values from 255"),
    ("all_in.py", f"{SAMPLES}a.npy", {"a.npy": npy(np.zeros((4, 3, 9, 9), np.uint8))}, "a.npy: holds 9x9 images"),
    ("all_in.py", f"{SAMPLES}a.npz", {"a.npz": npz(a=np.zeros(1), b=np.zeros(1))}, "a.npz: holds ['a', 'b']"),
    (
        "all_in.py",
        f"{SAMPLES}a",
        {"a": directory_of(picture(), picture(size=(9, 9)))},
        "1.png: is 9x9, 0.png is 8x8 (width x height)",
    ),
    ("all_in.py", f"{SAMPLES}a", {"a": directory_of()}, "a: no images in it"),
    ("all_in.py", "--fid_features=inception --inception_weights=w.pth --samples=a.npy", {}, "w.pth"),
    ("all_in.py", f"{SAMPLES}a.npy --stages=grid", {"a.npy": npy(np.zeros((4, 3, 8, 8), np.uint8))}, "memorise stage"),
]


def tree(directory):
    """{path: content} of everything below a directory but empty directories."""
    paths = [path for path in directory.rglob("*") if not path.is_dir()]
    return {path: None if path.is_fifo() else path.read_bytes() for path in paths}


def refuse(script, flags, files, code, message, directory):
    for name, make in files.items():
        make(directory / name)
    before = tree(directory)
    log = [] if "--logdir" in flags else ["--logdir=log"]
    result = run(script, *TINY_FLAGS, *log, *flags.split(), cwd=directory, code=code)
    lines = [line for line in result.stderr.splitlines() if line and "image/s" not in line]  # bars aside
    assert len(lines) == 1 and lines[0].startswith(f"{script}: error: "), result.stderr
    assert message in lines[0]
    assert tree(directory) == before, "nothing written, nothing harmed, no marker of code that ran"


@pytest.mark.parametrize(("script", "flags", "message"), USAGE)
def test_wrong_flags(script, flags, message, tmp_path):
    refuse(script, flags, {}, 2, message, tmp_path)


@pytest.mark.parametrize(("script", "flags", "files", "message"), FILES)
def test_wrong_files(script, flags, files, message, tmp_path):
    refuse(script, flags, files, 1, message, tmp_path)


def test_one_level_without_attn_says_what_to_give(tmp_path):
    result = run("main.py", "--train", "--dataset=digits", "--ch_mult=1", cwd=tmp_path, code=2)
    said = "--attn=1 (the default): there is no level 1: --ch_mult makes one, level 0: give --attn=0"
    assert result.stderr == f"main.py: error: {said}\n"


@pytest.mark.parametrize("kind", ["zip", "pt", "old pt", "npz"])
def test_archives_of_many_files_are_refused_in_a_short_line(kind, tmp_path):
    path, many = tmp_path / "samples", 2000
    if kind == "zip":  # as of StyleGAN and EDM
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("dataset.json", "{}")
            for i in range(many):
                archive.writestr(f"00000/img{i:08d}.PNG", b"pixels")
    elif kind == "npz":
        with path.open("wb") as file:
            np.savez(file, **{f"image{i}" + 200 * "_": np.zeros(1, np.uint8) for i in range(many)})
    else:
        torch.save(torch.zeros(3, 3, 8, 8), path, _use_new_zipfile_serialization=kind == "pt")
    result = run("all_in.py", *TINY_FLAGS, "--fid_features=pixels", f"--samples={path}", cwd=tmp_path, code=1)
    (line,) = [line for line in result.stderr.splitlines() if "image/s" not in line]
    said = {
        "zip": "a zip of 2,000 image files: unpack it, and name the folder",
        "pt": "written by torch.save: write the images by numpy.save",
        "old pt": "no .npy or .npz of numbers",
        "npz": "and 1,995 more, none is called images or arr_0",
    }
    assert said[kind] in line and str(path) in line and len(line) < 500 + len(str(path))


def test_odd_kinds_of_images_are_trained_on_in_silence(tmp_path):
    images = {
        "grey.png": picture("L"),
        "alpha.png": picture("RGBA"),
        "16-bit.png": Image.fromarray(np.full((8, 8), 40_000, np.uint16)),
        "CMYK.jpg": picture("CMYK"),
        "palette.png": picture("P"),
        "animated.gif": picture(),
    }
    (tmp_path / "images").mkdir()
    for name, image in images.items():
        image.save(tmp_path / "images" / name)
    cut_off = b"Exif\0\0MM\0*\0\0\0\x08\0\5\1\x12\0\3"  # PIL warns of it
    picture().save(tmp_path / "images/metadata.jpg", exif=cut_off)
    (tmp_path / "images/._side.jpg").touch()
    flags = "--num_train=0 --batch_size=7 --total_steps=1 --logdir=log".split()
    result = run("main.py", "--train", *TINY_FLAGS, *flags, *FOLDER.split(), cwd=tmp_path)
    assert "arning" not in result.stderr and "passed over" not in result.stderr
    assert (tmp_path / "log/ckpt1.pt").exists()

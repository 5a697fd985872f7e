"""score/samples.py and score/grids.py: what is written is read back, by other readers too; what is wrong is refused."""

import os
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from score.grids import save_grids
from score.samples import load_samples, odd_values, save_pngs
from tests.commands import run_module
from utils import safe_files
from utils.errors import DataError
from utils.images import non_finite_images, to_uint8


def random_images(N=5, height=6, width=7, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (N, 3, height, width), dtype=np.uint8)


def test_to_uint8_clips_and_rounds_to_the_nearest_level():
    levels = torch.arange(256)
    x = levels / 255 * 2 - 1
    assert torch.equal(to_uint8(x), levels.to(torch.uint8))
    assert torch.equal(to_uint8(x + 0.9 / 255), levels.to(torch.uint8))
    assert torch.equal(to_uint8(x[1:] - 0.9 / 255), levels[1:].to(torch.uint8))
    special = torch.tensor([-1.5, 1.5, torch.inf, -torch.inf, torch.nan])
    assert to_uint8(special).tolist() == [0, 255, 255, 0, 0]


def test_non_finite_images_are_counted():
    x = torch.zeros(4, 3, 2, 2)
    x[1, 0, 0, 0], x[1, 1, 0, 0], x[3, 2, 1, 1] = torch.nan, torch.nan, torch.inf
    assert non_finite_images(x).sum() == 2


def test_unwritable_directory_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file"):
        save_pngs(tmp_path / "file", torch.from_numpy(random_images()))


def test_pngs_are_lossless_and_in_order(tmp_path):
    images = random_images(N=12)
    save_pngs(tmp_path, torch.from_numpy(images))
    assert sorted(p.name for p in tmp_path.iterdir())[:2] == ["00000.png", "00001.png"]
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "00011.png")).transpose(2, 0, 1), images[11])
    np.testing.assert_array_equal(load_samples(tmp_path), images)
    save_pngs(tmp_path, torch.from_numpy(images))
    with pytest.raises(DataError, match=r"00005\.png"):
        save_pngs(tmp_path, torch.from_numpy(images[:5]))


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32", "float64", ">f4"])
@pytest.mark.parametrize("last", [False, True])
def test_every_published_layout_is_read(tmp_path, suffix, dtype, last):
    images = random_images(N=1003)
    array = images if dtype == "uint8" else (images / 255).astype(dtype)
    array = array.transpose(0, 2, 3, 1) if last else array
    path = tmp_path / f"images.{suffix}"
    if suffix == "npy":
        np.save(path, array)
    else:
        np.savez_compressed(path, labels=np.arange(1003), images=array)
    loaded = load_samples(path)
    assert loaded.dtype == torch.uint8
    np.testing.assert_array_equal(loaded, images)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_floats_a_rounding_outside_are_clipped(tmp_path, dtype):
    array = np.full((2, 3, 8, 8), 0.5, dtype)
    array[0, 0, 0, :3] = 1 + 9e-4, -9e-4, 1.0000001
    np.save(tmp_path / "images.npy", array)
    assert load_samples(tmp_path / "images.npy")[0, 0, 0, :4].tolist() == [255, 0, 255, 128]
    array[0, 0, 0, 0] = 1 + 2e-3
    np.save(tmp_path / "images.npy", array)
    with pytest.raises(DataError, match=r"to 1\.00[12]\d* in images 0 .* at most 0\.001 beyond"):
        load_samples(tmp_path / "images.npy")


def test_fortran_order_and_unnamed_arrays_are_read(tmp_path):
    images = random_images()
    np.save(tmp_path / "fortran.npy", np.asfortranarray(images))
    np.savez(tmp_path / "positional.npz", images)
    np.savez(tmp_path / "single.npz", whatever=images)
    for path in tmp_path.iterdir():
        np.testing.assert_array_equal(load_samples(path), images)


def test_grey_images_become_rgb(tmp_path):
    grey = random_images()[:, :1]
    np.save(tmp_path / "first.npy", grey)
    np.save(tmp_path / "last.npy", grey.transpose(0, 2, 3, 1))
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, image in enumerate(grey):
        Image.fromarray(image[0]).save(folder / f"{i}.png")
    for path in tmp_path.iterdir():
        np.testing.assert_array_equal(load_samples(path), grey.repeat(3, axis=1))


def test_img_size_is_checked(tmp_path):
    np.save(tmp_path / "images.npy", random_images(height=8, width=8))
    assert load_samples(tmp_path / "images.npy", img_size=8).shape == (5, 3, 8, 8)
    with pytest.raises(DataError, match=r"images\.npy.*8x8.*--img_size"):
        load_samples(tmp_path / "images.npy", img_size=32)
    np.save(tmp_path / "images.npy", random_images(height=8, width=9))
    assert load_samples(tmp_path / "images.npy", img_size=8).shape == (5, 3, 8, 8)  # its middle
    np.save(tmp_path / "images.npy", random_images(height=9, width=9))
    with pytest.raises(DataError, match=r"holds 9x9 images \(width x height\), not 8x8"):
        load_samples(tmp_path / "images.npy", img_size=8)


BAD_ARRAYS = {
    "NaN": (np.full((2, 3, 8, 8), np.nan), "NaN"),
    "one NaN": (np.where(np.arange(2 * 3 * 64).reshape(2, 3, 8, 8) == 5, np.nan, 0.5), "NaN"),
    "negative": (np.full((2, 3, 8, 8), -0.5), r"\[0, 1\]"),
    "0..255 as float": (np.full((2, 3, 8, 8), 255.0), "uint8"),
    "out of range far behind": (np.concatenate([np.zeros((1500, 3, 4, 4)), np.full((1, 3, 4, 4), 2.0)]), r"\[0, 1\]"),
    "integers": (np.zeros((2, 3, 8, 8), np.int64), "int64"),
    "booleans": (np.zeros((2, 3, 8, 8), bool), "bool"),
    "complex": (np.zeros((2, 3, 8, 8), complex), "complex"),
    "text": (np.full((2, 3, 8, 8), "a"), "U1"),
    "one image": (np.zeros((3, 8, 8), np.uint8), "shape"),
    "five axes": (np.zeros((1, 2, 3, 8, 8), np.uint8), "shape"),
    "a number": (np.array(1.0), "shape"),
    "RGBA": (np.zeros((2, 4, 8, 8), np.uint8), "channels"),
    "ambiguous": (np.zeros((2, 3, 8, 3), np.uint8), "may be"),
    "no images": (np.zeros((0, 3, 8, 8), np.uint8), ""),
}


@pytest.mark.parametrize(("array", "message"), BAD_ARRAYS.values(), ids=BAD_ARRAYS.keys())
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_bad_arrays_are_refused(tmp_path, array, message, suffix):
    path = tmp_path / f"bad.{suffix}"
    np.save(path, array) if suffix == "npy" else np.savez(path, array)
    with pytest.raises(DataError, match=rf"bad\.{suffix}: .*{message}") as error:
        load_samples(path)
    assert "\n" not in str(error.value)


class Bomb:
    """Unpickling this writes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_pickled_arrays_run_nothing(tmp_path, suffix):
    marker, path = tmp_path / "marker", tmp_path / f"bad.{suffix}"
    array = np.empty((2, 3, 8, 8), object)
    array[...] = Bomb(marker)
    np.save(path, array) if suffix == "npy" else np.savez(path, array)
    with pytest.raises(DataError, match=rf"bad\.{suffix}"):
        load_samples(path)
    path.write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(DataError, match=rf"bad\.{suffix}"):
        load_samples(path)
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists()


def npy_header(shape, dtype="|u1"):
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def test_headers_that_promise_too_much_are_refused_at_once(tmp_path):
    huge = (10**6, 3, 10**4, 10**4)
    (tmp_path / "huge.npy").write_bytes(npy_header(huge) + b"little")
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:
        archive.writestr("images.npy", npy_header(huge) + b"little")
    for name in ("huge.npy", "huge.npz"):
        with pytest.raises(DataError, match=name):
            load_samples(tmp_path / name)


def test_more_than_the_memory_is_refused(tmp_path, monkeypatch):
    np.save(tmp_path / "images.npy", random_images())
    np.savez(tmp_path / "images.npz", random_images())
    save_pngs(tmp_path / "images", torch.from_numpy(random_images()))
    monkeypatch.setattr(safe_files, "available_memory", lambda: 100)
    for name in ("images.npy", "images.npz", "images"):
        with pytest.raises(DataError, match=f"{re.escape(name)}: needs .* GiB"):
            load_samples(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"text", b"\x93NUMPY\x01\x00", b"PK\x03\x04"])
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_damaged_files_are_refused(tmp_path, content, suffix):
    path = tmp_path / f"bad.{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"bad\.{suffix}"):
        load_samples(path)


def test_truncated_and_flipped_files_are_refused(tmp_path):
    np.save(tmp_path / "bad.npy", random_images(N=100))
    np.savez_compressed(tmp_path / "bad.npz", random_images(N=100))
    for name in ("bad.npy", "bad.npz"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:-1000])
        with pytest.raises(DataError, match=name):
            load_samples(tmp_path / name)
    flipped = bytearray(content)
    flipped[len(flipped) // 2] ^= 16
    (tmp_path / "bad.npz").write_bytes(flipped)
    with pytest.raises(DataError, match=r"bad\.npz"):
        load_samples(tmp_path / "bad.npz")


def test_npz_of_several_unnamed_arrays_is_refused(tmp_path):
    np.savez(tmp_path / "bad.npz", a=random_images(), b=random_images())
    with pytest.raises(DataError, match=r"bad\.npz: holds .* none is called images or arr_0"):
        load_samples(tmp_path / "bad.npz")


def test_paths_that_are_nothing_of_this_are_refused(tmp_path):
    (tmp_path / "images.txt").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("images.txt", "empty", "loop", "missing.npy"):
        with pytest.raises(DataError, match=re.escape(name)):
            load_samples(tmp_path / name)


def refuse_beside_a_good_image(folder, name):
    Image.new("RGB", (7, 6)).save(folder / "0.png")
    with pytest.raises(DataError, match=re.escape(name)) as error:
        load_samples(folder)
    assert "\n" not in str(error.value)


def test_image_of_another_size_is_named(tmp_path):
    Image.new("RGB", (6, 7)).save(tmp_path / "bad.png")
    refuse_beside_a_good_image(tmp_path, "bad.png: is 6x7, 0.png is 7x6 (width x height)")


def test_files_that_are_no_images_are_named(tmp_path):
    Image.new("RGB", (7, 6)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "whole.png").unlink()
    for content in (b"", b"text", whole[: len(whole) // 2]):
        (tmp_path / "bad.png").write_bytes(content)
        refuse_beside_a_good_image(tmp_path, "bad.png")


def test_loops_pipes_and_links_to_directories_are_named(tmp_path):
    for i, make in enumerate([lambda path: path.symlink_to(path), os.mkfifo, lambda path: path.symlink_to(tmp_path)]):
        folder = tmp_path / str(i)
        folder.mkdir()
        make(folder / "bad.png")
        refuse_beside_a_good_image(folder, "bad.png")


def test_other_files_in_a_folder_are_passed_over(tmp_path, capsys):
    Image.new("RGB", (7, 6), "red").save(tmp_path / "b.PNG")
    Image.new("RGB", (7, 6), "blue").save(tmp_path / "a.png")
    (tmp_path / "notes.txt").touch()
    (tmp_path / "._a.png").write_bytes(b"side file of macOS")
    (tmp_path / "result").mkdir()
    Image.new("RGB", (70, 60)).save(tmp_path / "result" / "grid.png")
    assert load_samples(tmp_path)[:, :, 0, 0].tolist() == [[0, 0, 255], [255, 0, 0]]
    assert f"{tmp_path}: passed over 2 other files or sub-folders: notes.txt, result/\n" in capsys.readouterr().err


def test_images_of_one_kind_or_another_are_measured_together(tmp_path):
    for i, suffix in enumerate(("png", "gif", "BMP", "jpeg", "webp", "pgm")):
        Image.new("L" if suffix == "pgm" else "RGB", (8, 8)).save(tmp_path / f"{i}.{suffix}")
    assert len(load_samples(tmp_path)) == 6


def test_sub_folders_are_read_where_no_images_lie_beside_them(tmp_path):
    for i, name in enumerate(("b", "a/deeper", "c")):
        save_pngs(tmp_path / name, torch.full((2, 3, 8, 8), i, dtype=torch.uint8))
    assert load_samples(tmp_path)[:, 0, 0, 0].tolist() == [1, 1, 0, 0, 2, 2]


def test_all_bad_files_of_a_folder_are_named_together(tmp_path):
    save_pngs(tmp_path, torch.from_numpy(random_images(20)))
    (tmp_path / "00000.png").write_bytes(b"")
    Image.new("RGB", (9, 9)).save(tmp_path / "00007.png")
    message = (
        r"00000\.png: cannot be read as an image.*; .*00007\.png: is 9x9, 00001\.png is 7x6 \(width x height\): .* them"
    )
    with pytest.raises(DataError, match=message):
        load_samples(tmp_path)


def tile(picture, row, column, size):
    """The image in a grid with borders of 2 pixels, as (3, size, size)."""
    y, x = (2 + (size + 2) * place for place in (row, column))
    return np.array(picture)[y : y + size, x : x + size].transpose(2, 0, 1)


def test_grids_show_the_most_memorised_pairs_first(tmp_path):
    rng = np.random.default_rng(0)
    generated, training = (torch.from_numpy(random_images(N, 4, 4, seed=N)) for N in (700, 50))
    nearest = torch.from_numpy(rng.integers(0, 50, 700))
    ratio = torch.from_numpy(rng.permutation(700) / 700)
    paths = save_grids(tmp_path / "new", generated, training, nearest, ratio)
    assert [path.name for path in paths] == [f"grid_image{k}.png" for k in range(5)]
    ranked = sorted(range(700), key=lambda i: ratio[i])
    for rank in (0, 1, 7, 8, 127, 128, 300, 639):
        picture, place = Image.open(paths[rank // 128]), rank % 128
        assert picture.size == (16 * 6 + 2, 16 * 6 + 2)
        row, column = place // 8, 2 * (place % 8)
        np.testing.assert_array_equal(tile(picture, row, column, 4), training[nearest[ranked[rank]]])
        np.testing.assert_array_equal(tile(picture, row, column + 1, 4), generated[ranked[rank]])


def test_few_images_make_few_grids_and_remove_old_ones(tmp_path):
    generated, training = (torch.from_numpy(random_images(N, 4, 4, seed=N)) for N in (131, 2))
    (tmp_path / "grid_image4.png").touch()
    (tmp_path / "other.png").touch()
    paths = save_grids(tmp_path, generated, training, torch.zeros(131, dtype=torch.int64), torch.zeros(131))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["grid_image0.png", "grid_image1.png", "other.png"]
    assert paths == [tmp_path / "grid_image0.png", tmp_path / "grid_image1.png"]
    # With equal ratios the images keep their order: the second picture shows images 128, 129 and 130.
    np.testing.assert_array_equal(tile(Image.open(paths[1]), 0, 5, 4), generated[130])


def test_picture_has_a_row_for_each_set(tmp_path):
    folder, made = tmp_path / "train", tmp_path / "generate.npy"
    folder.mkdir()
    Image.new("RGB", (8, 8), "red").save(folder / "0.png")
    np.save(made, np.full((20, 3, 8, 8), [[[[0]], [[0]], [[255]]]], np.uint8))
    run_module("score.grids", tmp_path / "out.png", f"training={folder}", f"a=b={made}", cwd=tmp_path)
    picture = Image.open(tmp_path / "out.png").convert("RGB")
    assert picture.size == (12 * 64, 2 * (28 + 64))
    assert [picture.getpixel((x, y)) for x, y in ((32, 60), (96, 60), (32, 152), (736, 152))] == [
        (255, 0, 0), (255, 255, 255), (0, 0, 255), (0, 0, 255),
    ]  # fmt: skip


def photographs(N, seed):
    """Images (N, 3, 8, 8) float64 in [0, 1] with all levels, some of them at the ends, and colours."""
    rng = np.random.default_rng(seed)
    return np.clip(0.5 + 0.2 * rng.normal(size=(N, 3, 8, 8)) + 0.16 * rng.normal(size=(N, 1, 8, 8)), 0, 1)


ODD = {
    "0..1 as uint8": (lambda x: (x > 0.5).astype(np.uint8), "between 0 and 1, of"),
    "0..1 twice divided": (lambda x: x / 255, "between 0 and 1, of"),
    "0..15 as uint8": (lambda x: (16 * x).clip(0, 15).astype(np.uint8), "between 0 and 15, of"),
    "half the range": (lambda x: x.astype("f2") / 2, "between 0 and 12"),
    "0..1 taken for -1..1": (lambda x: (x + 1) / 2, "between 12[78] and 255, of"),
    "-1..1 clipped": (
        lambda x: (2 * x - 1).clip(0, 1),
        "(49|5.).*% of the values are 0, of the training images' [0-9]\\.",
    ),
    "a channel is missing": (lambda x: x * [[[1]], [[1]], [[0]]], "3.*% of the values are 0"),
    "black and white": (lambda x: (x > 0.4).astype(float), "% of the values are 255, of"),
    "grey": (lambda x: x[:, :1], "^100.0% are grey, of the training images 0.0%$"),
    "channels are equal": (lambda x: x[:, [1, 1, 1]], "^100.0% are grey, of the training images 0.0%$"),
    "black": (lambda x: 0 * x, "100.0% are black.*; all are equal"),
    "some are black": (lambda x: np.concatenate([x[:95], 0 * x[:5]]), "^5.0% are black, of the training images 0.0%$"),
    "one colour": (lambda x: x[..., :1, :1].repeat(8, 2).repeat(8, 3), "^100.0% have one colour only"),
    "all equal": (lambda x: x[:1].repeat(100, 0), "^all are equal$"),
    "three only": (lambda x: x[:3].repeat(40, 0), "^only 3 of 120 are different$"),
}


@pytest.mark.parametrize("kind", ODD)
def test_values_that_can_hardly_be_meant(kind, tmp_path):
    change, said = ODD[kind]
    np.save(tmp_path / "images.npy", change(photographs(100, 0)))
    training = to_uint8(torch.from_numpy(2 * photographs(200, 1) - 1))
    assert re.search(said, "; ".join(odd_values(load_samples(tmp_path / "images.npy"), training)))


def test_red_and_blue_that_have_changed_places():
    """As of OpenCV's BGR; not of inverted images, whose difference of red and blue changes its sign too."""
    warm = photographs(300, 0) * [[[1.0]], [[0.9]], [[0.8]]]
    sets = [to_uint8(torch.from_numpy(2 * part - 1)) for part in (warm[:200], warm[200:], 1 - warm[200:])]
    training, others, inverted = sets
    said = "red, green and blue have the means 102 114 126, of the training images 127 115 103: are red and blue"
    assert odd_values(others.flip(1), training) == [said + " swapped?"]
    assert odd_values(others, training) == odd_values(inverted, training) == []


def test_values_that_can_be_meant():
    training = to_uint8(torch.from_numpy(2 * photographs(200, 1) - 1))
    grey = training[:, :1].repeat(1, 3, 1, 1)
    black = torch.zeros(40, 3, 8, 8, dtype=torch.uint8)
    for images in (photographs(100, 0), 0.2 + 0.6 * photographs(100, 0), 1 - photographs(100, 0), photographs(1, 0)):
        assert odd_values(to_uint8(torch.from_numpy(2 * images - 1)), training) == []
    assert odd_values(grey[:50], grey[50:]) == []
    assert odd_values(torch.cat([training[:98], black[:2]]), torch.cat([training[98:], black])) == []
    assert odd_values(black + 7, black[:1]) == ["all are equal"]

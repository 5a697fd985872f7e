"""Pickles, archives and memory: nothing runs, and nothing fills the memory."""

import gzip
import os
import pickle
import tarfile

import numpy as np
import pytest

from tests.dataset_files import data_error, write_archive
from utils import safe_files
from utils.safe_files import read_archive, unpickle_dict


@pytest.mark.parametrize("protocol", [3, 4])
def test_pickles_of_python_3_are_read(protocol):
    array = np.arange(244, 256, dtype=np.uint8).reshape(3, 4)
    content = unpickle_dict(
        pickle.dumps({"data": array, "fortran": np.asfortranarray(array), "labels": [1, 2], "f": 0.5}, protocol),
        "file",
    )
    np.testing.assert_array_equal(content["data"], array)
    np.testing.assert_array_equal(content["fortran"], array)
    assert content["labels"] == [1, 2] and content["f"] == 0.5


@pytest.mark.parametrize(
    "payload",
    [
        b"\x80\x02cnumpy\nload\nU\x01x\x85R.",
        b"\x80\x02cnumpy.core.multiarray\nscalar\n.",
        b"\x80\x02}U\x04datac_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00bz2\x86Rs.",
        pickle.dumps({"data": np.array([b"text"])}, protocol=2),
        pickle.dumps({"data": np.zeros((2, 3072), np.float32)}, protocol=2),
        b"\x80\x02cnumpy\ndtype\n}\x8c\x01xb.",
        b"\x80\x02]\x82\x01.",
        pickle.dumps([1, 2]),
        pickle.dumps({"data": np.zeros(3)})[:-20],
        pickle.dumps({"data": np.array([{}, []], dtype=object)}, protocol=2),
        b"",
        b"not a pickle",
    ],
    ids=[
        "np.load",
        "scalar",
        "bz2",
        "strings",
        "floats",
        "class-state",
        "extension",
        "list",
        "truncated",
        "objects",
        "empty",
        "text",
    ],
)
def test_pickles_of_anything_else_are_refused(payload):
    data_error(lambda: unpickle_dict(payload, "some_file"), "some_file", "fetch it again")


def test_archive_ignores_paths_and_other_members(tmp_path):
    path = tmp_path / "a.tar.gz"
    names = {"../evil": b"evil", "/tmp/evil": b"evil", "./wanted/one": b"1" * 700, "wanted/two": b"22"}
    write_archive(path, names)
    assert read_archive(path, ["wanted/two", "wanted/one"]) == {
        path / "wanted/two": b"22",
        path / "wanted/one": b"1" * 700,
    }
    assert list(tmp_path.iterdir()) == [path]


def archive_with_header(member, content=b""):
    return gzip.compress(member.tobuf(tarfile.GNU_FORMAT) + content)


def test_bad_archives_are_named(tmp_path):
    path = tmp_path / "a.tar.gz"
    write_archive(path, {"wanted": os.urandom(5000)})
    whole = path.read_bytes()
    link, huge, short = tarfile.TarInfo("wanted"), tarfile.TarInfo("other"), tarfile.TarInfo("wanted")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    huge.size = 2**50
    short.size = 100
    for data in (
        whole[: len(whole) // 2],
        whole[:-4000] + bytes(4000),
        b"plain text",
        gzip.compress(b"no tar" * 200),
        gzip.compress(b""),
        archive_with_header(link),
        archive_with_header(huge),
        archive_with_header(short, b"too short"),
    ):
        path.write_bytes(data)
        data_error(lambda: read_archive(path, ["wanted"]), path, "fetch it again")


def test_an_archive_of_more_than_the_memory_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.tar.gz"
    write_archive(path, {"other": bytes(40_000), "wanted": bytes(40_000)})
    assert read_archive(path, ["wanted"]) == {path / "wanted": bytes(40_000)}
    monkeypatch.setattr(safe_files, "available_memory", lambda: 30_000)
    data_error(lambda: read_archive(path, ["wanted"]), path, "GiB of memory")


def test_available_memory_is_between_what_is_free_and_what_is_there():
    free, all_memory = (os.sysconf("SC_PAGE_SIZE") * os.sysconf(name) for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"))
    assert free / 2 < safe_files.available_memory() < all_memory

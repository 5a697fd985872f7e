"""Checkpoints on disk: ours, published ones, and files that are none."""

import pickle

import numpy as np
import pytest
import torch

from errors import DataError
from tests.networks import tiny_learner, tiny_unet
from training import checkpoint


class Exploit:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_names():
    assert [checkpoint.step_name(step) for step in (400_000, 1000, 1234, 999, 0)] == [
        "ckpt400k.pt",
        "ckpt1k.pt",
        "ckpt1234.pt",
        "ckpt999.pt",
        "ckpt0.pt",
    ]
    assert checkpoint.round_name(10) == "global_ckpt_round10.pt"


def test_newest_goes_by_number(tmp_path):
    assert checkpoint.newest_first(tmp_path) == []
    for name in ("ckpt999.pt", "ckpt2k.pt", "ckpt1500.pt", "other9999999.pt", "notes.txt"):
        (tmp_path / name).touch()
    assert checkpoint.newest_first(tmp_path)[0].name == "ckpt2k.pt"
    for r in (9, 10):
        (tmp_path / f"global_ckpt_round{r}.pt").touch()
    assert checkpoint.find(tmp_path).name == "global_ckpt_round10.pt"
    assert checkpoint.find(tmp_path / "ckpt999.pt").name == "ckpt999.pt"


def test_round_trip_of_a_learner(tmp_path):
    learner, other = tiny_learner(0), tiny_learner(1)
    path = tmp_path / "deep" / "ckpt0.pt"
    checkpoint.save(path, learner.state_dict())
    assert torch.load(path, weights_only=True)["format"] == checkpoint.FORMAT
    checkpoint.restore(other, checkpoint.load(path), path)
    for key, value in learner.net.state_dict().items():
        assert torch.equal(other.net.state_dict()[key], value)
    assert [file.name for file in path.parent.iterdir()] == ["ckpt0.pt"], "no temporary file stays"


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "ckpt1.pt"
    checkpoint.save(path, {"step": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(DataError, match=r"ckpt1\.pt.*No space left"):
        checkpoint.save(path, {"step": 2})
    assert checkpoint.load(path)["step"] == 1
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("dtype", ["f8", "i8", "f4", "bool"])
def test_published_index_arrays_load(dtype, tmp_path):
    path = tmp_path / "global_ckpt_round1.pt"
    torch.save({"global_model": {}, "global_ema_model": {}, "index_array": np.zeros(150_000, dtype)}, path)
    assert checkpoint.load(path)["index_array"].shape == (150_000,)


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_index_arrays_of_old_and_new_numpy_load(module, tmp_path):
    """The file says where NumPy kept its reconstruction function when it was written."""
    path = tmp_path / "ckpt1.pt"
    torch.save({"index_array": np.arange(5)}, path)
    ours, other = b"numpy._core.multiarray", module.encode()
    data = path.read_bytes()
    assert ours in data
    stored = torch.serialization._legacy_save if module == "numpy.core.multiarray" else None
    if stored:
        with path.open("wb") as file:
            torch.save({"index_array": np.arange(5)}, file, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes().replace(ours, other))
    assert checkpoint.load(path)["index_array"].tolist() == [0, 1, 2, 3, 4]


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    marker = tmp_path / "marker"
    for name, write in (("torch.pt", torch.save), ("pickle.pt", lambda x, path: path.write_bytes(pickle.dumps(x)))):
        write({"net_model": Exploit(marker)}, tmp_path / name)
        with pytest.raises(DataError, match=name):
            checkpoint.load(tmp_path / name)
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04" + bytes(100)])
def test_other_files_are_refused_in_one_line(content, tmp_path):
    path = tmp_path / "ckpt1.pt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"ckpt1\.pt: cannot be read") as error:
        checkpoint.load(path)
    assert "\n" not in str(error.value)


def test_missing_files_and_parts_are_named(tmp_path):
    with pytest.raises(DataError, match="no such checkpoint"):
        checkpoint.load(tmp_path / "ckpt1.pt")
    with pytest.raises(DataError, match="holds no ckpt"):
        checkpoint.find(tmp_path)
    with pytest.raises(DataError, match=r"neither ema_model nor global_ema_model; it holds net_model"):
        checkpoint.weights({"net_model": {}}, True, "file.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(DataError, match="holds a list"):
        checkpoint.load(tmp_path / "list.pt")


def test_weights_of_another_network_are_named():
    with pytest.raises(DataError, match=r"file\.pt: does not fit .*size mismatch for \S+.* more problems") as error:
        checkpoint.load_weights(tiny_unet(), tiny_unet(ch=64).state_dict(), "file.pt")
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"Missing key.*head\.bias"):
        weights = tiny_unet().state_dict()
        del weights["head.bias"]
        checkpoint.load_weights(tiny_unet(), weights, "file.pt")
    with pytest.raises(DataError, match="does not fit"):
        checkpoint.load_weights(tiny_unet(), "no dict", "file.pt")


def test_only_our_own_runs_can_be_continued():
    learner = tiny_learner()
    with pytest.raises(DataError, match="another program"):
        checkpoint.restore(learner, {"net_model": {}, "step": 5}, "file.pt")
    with pytest.raises(DataError, match="newer version"):
        checkpoint.restore(learner, {**learner.state_dict(), "format": checkpoint.FORMAT + 1}, "file.pt")


def test_checkpoints_of_a_gpu_load_without_one(tmp_path, monkeypatch):
    """The file says where its tensors were; here that they were on a GPU."""
    path = tmp_path / "ckpt1.pt"
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save({"net_model": tiny_unet().state_dict()}, path)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(path, weights_only=True)
    state = checkpoint.load(path)["net_model"]
    assert torch.equal(state["head.weight"], tiny_unet().state_dict()["head.weight"])

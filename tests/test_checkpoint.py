"""Checkpoints on disk: ours, published ones, and files that are none."""

import pickle

import numpy as np
import pytest
import torch

from tests.faults import differences
from tests.networks import tiny_learner, tiny_unet
from training.logdir import LogDirectory
from training.resume import newest_step, restore, save_step
from training.weights import (
    FORMAT,
    STEPS,
    find_checkpoint,
    load_checkpoint,
    load_weights,
    numbered,
    round_name,
    save_checkpoint,
    step_name,
    weights_in,
)
from utils.errors import DataError, UsageError


class Exploit:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_names():
    assert [step_name(step) for step in (400_000, 1000, 1234, 999, 0)] == [
        "ckpt400k.pt",
        "ckpt1k.pt",
        "ckpt1234.pt",
        "ckpt999.pt",
        "ckpt0.pt",
    ]
    assert round_name(10) == "global_ckpt_round10.pt"


def test_newest_goes_by_number(tmp_path):
    for name in ("ckpt999.pt", "ckpt2k.pt", "ckpt1500.pt", "other9999999.pt", "notes.txt"):
        (tmp_path / name).touch()
    assert list(numbered(tmp_path, STEPS)) == [2000, 1500, 999]
    assert find_checkpoint(tmp_path).name == "ckpt2k.pt"
    for r in (9, 10):
        (tmp_path / f"global_ckpt_round{r}.pt").touch()
    assert find_checkpoint(tmp_path).name == "global_ckpt_round10.pt"
    assert find_checkpoint(tmp_path / "ckpt999.pt").name == "ckpt999.pt"


def test_round_trip_of_a_learner(tmp_path):
    learner, other = tiny_learner(0), tiny_learner(1)
    path = tmp_path / "deep" / "ckpt0.pt"
    save_checkpoint(path, learner.state_dict())
    assert torch.load(path, weights_only=True)["format"] == FORMAT
    restore(other, load_checkpoint(path), path)
    for key, value in learner.net.state_dict().items():
        assert torch.equal(other.net.state_dict()[key], value)
    assert [file.name for file in path.parent.iterdir()] == ["ckpt0.pt"], "no temporary file stays"


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "ckpt1.pt"
    save_checkpoint(path, {"step": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(DataError, match=r"ckpt1\.pt.*No space left"):
        save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path)["step"] == 1
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("dtype", ["f8", "i8", "f4", "bool"])
def test_published_index_arrays_load(dtype, tmp_path):
    path = tmp_path / "global_ckpt_round1.pt"
    torch.save({"global_model": {}, "global_ema_model": {}, "index_array": np.zeros(150_000, dtype)}, path)
    assert load_checkpoint(path)["index_array"].shape == (150_000,)


def test_index_arrays_of_old_numpy_load(tmp_path):
    """The file says where NumPy kept its reconstruction function when it was written."""
    path = tmp_path / "ckpt1.pt"
    torch.save({"index_array": np.arange(5)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    assert b"numpy._core.multiarray" in data
    path.write_bytes(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert load_checkpoint(path)["index_array"].tolist() == [0, 1, 2, 3, 4]


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    marker = tmp_path / "marker"
    for name, write in (("torch.pt", torch.save), ("pickle.pt", lambda x, path: path.write_bytes(pickle.dumps(x)))):
        write({"net_model": Exploit(marker)}, tmp_path / name)
        with pytest.raises(DataError, match=name):
            load_checkpoint(tmp_path / name)
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04" + bytes(100)])
def test_other_files_are_refused_in_one_line(content, tmp_path):
    path = tmp_path / "ckpt1.pt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"ckpt1\.pt: cannot be read") as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)


def test_missing_files_and_parts_are_named(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        load_checkpoint(tmp_path / "ckpt1.pt")
    with pytest.raises(DataError, match="holds no ckpt"):
        find_checkpoint(tmp_path)
    with pytest.raises(DataError, match=r"neither ema_model nor global_ema_model; it holds net_model"):
        weights_in({"net_model": {}}, True, "file.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(DataError, match="holds a list"):
        load_checkpoint(tmp_path / "list.pt")


def test_weights_of_another_network_are_named():
    without_bias = tiny_unet().state_dict()
    del without_bias["head.bias"]
    for weights, message in (
        (tiny_unet(ch=64).state_dict(), r"file\.pt: does not fit .*size mismatch for \S+"),
        (without_bias, r"Missing key.*head\.bias"),
        ({"conv_in.weight": torch.zeros(1)}, r"holds no weights of this UNet: its entries are conv_in\.weight"),
        (5, "does not fit"),
    ):
        with pytest.raises(DataError, match=message) as error:
            load_weights(tiny_unet(), weights, "file.pt")
        assert "\n" not in str(error.value)


SETTINGS = {"script": "main", "lr": 1.0}


def open_directory(path, settings=None, **flags):
    return LogDirectory(path, settings or SETTINGS, {"script"}, "--lr=1\n", torch.arange(3), **flags)


def foreign(path, legacy=False):
    torch.save({"net_model": {}, "step": 5}, path, _use_new_zipfile_serialization=not legacy)


def with_code(path):
    torch.save({"net_model": Exploit("marker")}, path)


@pytest.mark.parametrize("flags", [{}, {"fresh": True, "overwrite": True}, {"allow_change": True}])
@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("write", [foreign, lambda path: foreign(path, legacy=True), with_code])
def test_checkpoints_of_others_are_refused_and_left_as_they_are(write, ours, flags, tmp_path):
    """In a directory of theirs, or put into one of ours."""
    if ours:
        directory = open_directory(tmp_path)
        directory.begin(0)
        directory.lock.close()
    write(tmp_path / "ckpt5.pt")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DataError, match=r"ckpt5\.pt: .*: choose another --logdir"):
        open_directory(tmp_path, **flags)
    after = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert {**after, tmp_path / ".lock": b""} == {**before, tmp_path / ".lock": b""}


RUN_OF_ANOTHER = '{"settings": {"lr": 1.0}, "changes": ["lr"]}'


@pytest.mark.parametrize("content", ['{"learning_rate": 1}', '["lr"]', '{"settings": [1]}', RUN_OF_ANOTHER, "\xff"])
@pytest.mark.parametrize("name", ["run.json", "flagfile.txt", "metrics.jsonl", "subset.npy"])
def test_other_files_of_others_are_not_replaced_either(name, content, tmp_path):
    (tmp_path / name).write_text(content, encoding="latin1")
    for flags in ({}, {"fresh": True, "overwrite": True}):
        with pytest.raises(DataError, match=rf"{name}.*choose another --logdir"):
            open_directory(tmp_path, **flags)
    assert (tmp_path / name).read_text(encoding="latin1") == content


def test_the_lock_comes_before_all_else(tmp_path):
    """What is in a directory is looked at when nobody else can change it any more."""
    directory = open_directory(tmp_path)
    directory.begin(0)
    with pytest.raises(DataError, match="is writing there"):
        open_directory(tmp_path, {**SETTINGS, "lr": 2.0})
    directory.lock.close()
    with pytest.raises(UsageError, match=r"--lr=2\.0"):
        open_directory(tmp_path, {**SETTINGS, "lr": 2.0})


def test_a_learner_that_is_continued_keeps_nothing_of_the_file(tmp_path):
    """Tensors that are loaded are mapped, and a user can replace the file while the run goes on."""
    learner, other, path = tiny_learner(0), tiny_learner(1), tmp_path / "ckpt1.pt"
    learner.update(learner.trainer(torch.zeros(2, 3, 8, 8)).mean())
    save_checkpoint(path, learner.state_dict())
    restore(other, load_checkpoint(path, check=False), path)
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert differences(learner.state_dict(), other.state_dict()) == []


def test_old_milestones_keep_what_evaluation_needs(tmp_path):
    learner = tiny_learner()
    learner.update(learner.trainer(torch.zeros(2, 3, 8, 8)).mean())  # so that there are moments
    for learner.step in range(1, 7):
        state = {**learner.state_dict(), "norm_groups": 8, "x_T": torch.zeros(2, 3, 8, 8), "seconds": 1.0}
        save_step(tmp_path, state, milestone=learner.step != 3, keep=2)
    files = {path.name: load_checkpoint(path) for path in tmp_path.iterdir()}
    assert sorted(files) == ["ckpt1.pt", "ckpt2.pt", "ckpt4.pt", "ckpt5.pt", "ckpt6.pt"]
    slim = {"format", "norm_groups", "net_model", "ema_model", "sched", "step", "x_T"}
    assert all(files[f"ckpt{step}.pt"].keys() == slim for step in (1, 2, 4))
    assert all(files[f"ckpt{step}.pt"].keys() > {*slim, "optim"} for step in (5, 6))
    assert (tmp_path / "ckpt4.pt").stat().st_size < 0.6 * (tmp_path / "ckpt5.pt").stat().st_size
    assert newest_step(tmp_path) == tmp_path / "ckpt6.pt"
    (tmp_path / "ckpt6.pt").write_bytes(b"")
    assert newest_step(tmp_path) == tmp_path / "ckpt5.pt"
    learner.step = 5  # as a run that has continued from there
    save_step(tmp_path, {**learner.state_dict(), "seconds": 1.0}, milestone=True, keep=1)
    assert (tmp_path / "ckpt6.pt").exists() and newest_step(tmp_path) == tmp_path / "ckpt5.pt"
    (tmp_path / "ckpt5.pt").unlink()
    with pytest.raises(DataError, match=r"ckpt4\.pt: what the run needs beside it to be continued is missing"):
        newest_step(tmp_path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
@pytest.mark.parametrize("bare", [False, True])
def test_weights_of_other_programs_load(prefix, bare, tmp_path):
    weights = {prefix + key: value for key, value in tiny_unet(1).state_dict().items()}
    weights |= {"n_averaged": torch.tensor(3)}  # as in torch's AveragedModel
    torch.save(weights if bare else {"ema_model": weights}, tmp_path / "a.pt")
    net = tiny_unet(2)
    load_weights(net, weights_in(load_checkpoint(tmp_path / "a.pt"), True, "a.pt"), "a.pt")
    assert torch.equal(net.head.weight, tiny_unet(1).head.weight)


def test_checkpoints_of_a_gpu_load_without_one(tmp_path, monkeypatch):
    """The file says where its tensors were; here that they were on a GPU."""
    path = tmp_path / "ckpt1.pt"
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save({"net_model": tiny_unet().state_dict()}, path)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(path, weights_only=True)
    state = load_checkpoint(path)["net_model"]
    assert torch.equal(state["head.weight"], tiny_unet().state_dict()["head.weight"])

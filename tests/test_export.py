"""Exported weights: what other programs find in the file, and all_in.py's images of them."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.commands import eval_flags, run, run_module
from tests.networks import TINY_FLAGS, tiny_unet, visible
from training.logdir import training_of
from training.weights import load_checkpoint
from utils.errors import DataError

EVALUATION = ["--dataset=digits", "--num_train=48", "--device=cpu", "--stages=generate", "--num_images=4"]
EVALUATION += ["--sample_steps=4"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A directory with logs/ckpt3.pt, whose raw and EMA weights differ, and both exported."""
    directory = tmp_path_factory.mktemp("export")
    flags = ["--norm_groups=4", "--total_steps=3", "--logdir=logs", "--lr=0.01", "--ema_decay=0.5"]
    run("main.py", "--train", *TINY_FLAGS, *flags, "--use_labels", "--num_labels=10", cwd=directory)
    run_module("training.export", "logs", "ema.safetensors", cwd=directory)
    run_module("training.export", "logs/ckpt3.pt", "--nouse_ema", "raw.safetensors", cwd=directory)
    return directory


@pytest.mark.parametrize("kind", ["ema", "raw"])
def test_the_file_holds_the_weights_and_says_what_they_are(kind, trained):
    state = torch.load(trained / "logs/ckpt3.pt", weights_only=True)
    expected = state["ema_model" if kind == "ema" else "net_model"]
    written = load_file(trained / f"{kind}.safetensors")
    assert written.keys() == expected.keys() and all(torch.equal(written[key], expected[key]) for key in written)
    with safe_open(trained / f"{kind}.safetensors", "pt") as file:
        metadata = file.metadata()
    flags = json.loads(metadata["flags"])
    assert flags.items() >= json.loads((trained / "logs/run.json").read_text())["settings"].items()
    assert metadata["checkpoint"] == "ckpt3.pt" and flags["use_ema"] == (kind == "ema") and flags["lr"] == 0.01


def test_images_of_the_file_are_those_of_its_checkpoint(trained):
    """Without a word about the network in the command, since the file says it."""
    images = {}
    of_run = ["--flagfile=logs/flagfile.txt", "--unet_dir=logs", "--nouse_ema"]
    for name, flags in (("file", ["--unet_dir=raw.safetensors"]), ("run", of_run)):
        run("all_in.py", *flags, *EVALUATION, *eval_flags(trained / name), cwd=trained)
        images[name] = np.load(trained / name / "generate/generate.npy")
    assert np.array_equal(images["file"], images["run"])


def test_what_contradicts_the_file_or_would_replace_it(trained):
    result = run("all_in.py", "--unet_dir=ema.safetensors", *EVALUATION, "--T=30", cwd=trained, code=2)
    assert result.stderr == "all_in.py: error: --T=30: ema.safetensors says 20, leave the flag out\n"
    result = run_module("training.export", "logs", "ema.safetensors", "--ch=64", cwd=trained, code=2)
    assert "ema.safetensors: is there already" in result.stderr
    result = run_module("training.export", "logs", "--ch=64", "new.safetensors", cwd=trained, code=2)
    assert "--ch=64: logs/ckpt3.pt says 32" in result.stderr and not (trained / "new.safetensors").exists()
    result = run_module("training.export", "logs", cwd=trained, code=2)
    assert result.stderr == "training.export: error: give CHECKPOINT and OUT.safetensors, see --help\n"


def test_files_of_shards_and_of_earlier_versions(trained, tmp_path):
    """The run.json of a file in state/ is one directory up; what earlier runs did unrecorded is recorded."""
    shutil.copytree(trained / "logs", tmp_path / "logs")
    record = json.loads((tmp_path / "logs/run.json").read_text())
    del record["settings"]["resize"]
    (tmp_path / "logs/run.json").write_text(json.dumps(record))
    (tmp_path / "logs/state").mkdir()
    (tmp_path / "logs/ckpt3.pt").rename(tmp_path / "logs/state/ckpt3.pt")
    run_module("training.export", "logs/state/ckpt3.pt", "old.safetensors", cwd=tmp_path)
    assert training_of(tmp_path / "old.safetensors")["resize"] == "squeeze"
    # as a version before --resize has exported it
    with safe_open(tmp_path / "old.safetensors", "pt") as file:
        metadata = file.metadata()
    flags = json.loads(metadata["flags"])
    del flags["resize"]
    weights = load_file(tmp_path / "old.safetensors")
    save_file(weights, tmp_path / "older.safetensors", metadata | {"flags": json.dumps(flags)})
    assert training_of(tmp_path / "older.safetensors")["resize"] == "squeeze"
    (tmp_path / "logs/run.json").write_text('{"a": 1}')
    result = run_module("training.export", "logs/state/ckpt3.pt", "none.safetensors", cwd=tmp_path, code=1)
    assert result.stderr.count("\n") == 1 and "fit" in result.stderr


def test_a_published_checkpoint(tmp_path):
    """There is no run.json: the flags say what network it is."""
    published = {key: value for key, value in visible(tiny_unet()).state_dict().items() if "cemb_proj" not in key}
    torch.save({"net_model": published, "ema_model": published}, tmp_path / "ckpt.pt")
    architecture = ["--T=10", "--ch=32", "--ch_mult=2", "--attn=0", "--num_res_blocks=1", "--img_size=8"]
    architecture += ["--sample_steps=4"]  # of T=10, or the flags' check refuses them
    run_module("training.export", *architecture, "ckpt.pt", "out.safetensors", cwd=tmp_path)
    written = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(written[key], value) for key, value in published.items())
    run("all_in.py", "--unet_dir=out.safetensors", *EVALUATION, *eval_flags(tmp_path), cwd=tmp_path)


@pytest.mark.parametrize(
    ("name", "metadata", "reason"),
    [
        ("noise", None, "cannot be read as a checkpoint (Error while deserializing header"),
        ("missing", None, "cannot be read as a checkpoint (No such file"),
        ("bare", None, "its metadata does not say what network it is of"),
        ("list", {"flags": "[]"}, "its metadata does not say what network it is of"),
        ("word", {"flags": '{"use_ema": true, "norm_groups": 8, "ch": "wide"}'}, "flag --ch=wide"),
    ],
)
def test_other_files_are_refused_in_one_line(name, metadata, reason, tmp_path):
    path = tmp_path / f"{name}.safetensors"
    if name == "noise":
        path.write_bytes(bytes(range(256)))
    elif name != "missing":
        save_file({"head.weight": torch.zeros(2)}, path, metadata)
    if name == "word":
        line = run("all_in.py", f"--unet_dir={path}", *EVALUATION, cwd=tmp_path, code=1).stderr
        assert line.count("\n") == 1
    else:
        with pytest.raises(DataError) as error:
            load_checkpoint(path)
        line = str(error.value)
    assert f"{path}: " in line and reason in line

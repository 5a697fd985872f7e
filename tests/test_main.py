"""main.py as users run it."""

import json

import numpy as np
import pytest
import torch

from model import UNet
from tests.commands import read_jsonl, run
from tests.networks import TINY_FLAGS
from training.launch import check_warmup

SETTINGS = [*TINY_FLAGS, "--total_steps=12", "--log_step=4", "--save_step=6"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("main")
    run("main.py", "--train", *SETTINGS, "--sample_step=6", "--sample_size=4", "--logdir=log", cwd=directory)
    return directory / "log"


def test_writes_what_the_readme_says(trained):
    for name in ("flagfile.txt", "subset.npy", "sample/ema_step6.png", "sample/ema_step12.png", "train.json"):
        assert (trained / name).stat().st_size > 0, name
    assert sorted(path.name for path in trained.glob("*.pt")) == ["ckpt12.pt", "ckpt6.pt"]
    assert list(trained.glob("events.out.tfevents.*"))
    subset = np.load(trained / "subset.npy")
    assert len(set(subset.tolist())) == 48 and subset.max() < 1797
    records = read_jsonl(trained / "metrics.jsonl")
    assert [record["step"] for record in records] == [4, 8, 12]
    assert all(record["loss"] > 0 and record["images_per_second"] > 0 and record["lr"] == 1e-3 for record in records)


def test_checkpoint_is_the_contract(trained):
    state = torch.load(trained / "ckpt12.pt", weights_only=True)
    assert {"net_model", "ema_model", "sched", "optim", "step", "x_T"} <= state.keys()
    assert state["step"] == 12 and state["x_T"].shape == (4, 3, 8, 8)
    net = UNet(T=20, ch=32, ch_mult=[2], attn=[0], num_res_blocks=1, dropout=0.1)
    for weights in (state["net_model"], state["ema_model"]):
        net.load_state_dict(weights)
    torch.optim.Adam(net.parameters()).load_state_dict(state["optim"])


def test_the_same_command_continues_and_ends_the_same(trained, tmp_path):
    half = [*SETTINGS, "--sample_size=4", "--logdir=log"]
    run("main.py", "--train", *half, "--total_steps=6", cwd=tmp_path)
    result = run("main.py", "--train", *half, cwd=tmp_path)
    assert "continuing from log/ckpt6.pt: 6 of 12 steps done" in result.stdout
    whole, continued = (torch.load(path / "ckpt12.pt", weights_only=True) for path in (trained, tmp_path / "log"))
    for name in ("net_model", "ema_model"):
        assert all(torch.equal(whole[name][key], continued[name][key]) for key in whole[name])
    assert torch.equal(whole["x_T"], continued["x_T"])


def test_flagfile_of_the_log_directory_repeats_the_run(trained, tmp_path):
    run("main.py", f"--flagfile={trained / 'flagfile.txt'}", "--logdir=again", "--sample_step=0", cwd=tmp_path)
    first, again = (torch.load(path / "ckpt12.pt", weights_only=True) for path in (trained, tmp_path / "again"))
    assert all(torch.equal(first["net_model"][key], again["net_model"][key]) for key in first["net_model"])


def test_eval_scores_raw_and_ema_weights(trained, tmp_path):
    flags = ["--eval", f"--logdir={trained}", "--num_images=20", "--fid_features=pixels"]
    trained_with = (trained / "flagfile.txt").read_text()
    result = run("main.py", *TINY_FLAGS, *flags, f"--unet_dir={trained / 'ckpt6.pt'}", cwd=tmp_path)
    assert (trained / "flagfile.txt").read_text() == trained_with, "the flags of the training stay"
    scores = json.loads((trained / "eval_ckpt6.json").read_text())
    assert scores["net"]["fpd"] > 0 and scores["net"]["fpd"] != scores["ema"]["fpd"]
    assert "ckpt6.pt net: fpd" in result.stdout and scores["checkpoint"].endswith("ckpt6.pt")


def test_evaluates_during_training(tmp_path):
    flags = ["--total_steps=4", "--eval_step=2", "--num_images=12", "--fid_features=pixels", "--logdir=log"]
    run("main.py", "--train", *TINY_FLAGS, *flags, cwd=tmp_path)
    scores = [record for record in read_jsonl(tmp_path / "log/metrics.jsonl") if "fpd" in record]
    assert [(line["step"], line["weights"]) for line in scores] == [(2, "net"), (2, "ema"), (4, "net"), (4, "ema")]


@pytest.mark.parametrize(("precision", "mean_type"), [("bf16", "xstart"), ("fp16", "xprev")])
def test_conditional_low_precision_training_and_sampling(precision, mean_type, tmp_path):
    flags = ["--use_labels", "--num_labels=10", "--label_dropout=0.2", "--guidance=0.5", "--sample_step=2"]
    flags += [f"--precision={precision}", f"--mean_type={mean_type}", "--sampler=ddpm", "--data_device=cpu"]
    result = run(
        "main.py", "--train", *TINY_FLAGS, *flags, "--total_steps=2", "--parallel", "--logdir=log", cwd=tmp_path
    )
    assert result.stderr.count("--parallel has no effect: torchrun trains on several GPUs") == 1
    state = torch.load(tmp_path / "log/ckpt2.pt", weights_only=True)
    assert state["net_model"]["cond_embedding.timembedding.0.weight"].shape == (11, 32)
    assert (tmp_path / "log/sample/ema_step2.png").exists()


def test_guidance_is_of_trainings_that_learned_the_null_class(tmp_path):
    """Flags that are not given are the training's."""
    own = ["--use_labels", "--num_labels=10", "--total_steps=1"]
    for share in (0, 0.2):
        flags = [*TINY_FLAGS, *own, "--sample_step=0", f"--label_dropout={share}", f"--logdir={share}"]
        run("main.py", "--train", *flags, cwd=tmp_path)
    error = run("main.py", "--train", *TINY_FLAGS, *own, "--guidance=2", "--logdir=no", cwd=tmp_path, code=2).stderr
    assert "--guidance with --train needs --label_dropout" in error
    generate = [
        "--dataset=digits",
        "--guidance=2",
        "--stages=generate",
        "--num_images=2",
        "--device=cpu",
        "--sample_steps=2",
    ]
    error = run("all_in.py", *generate, "--unet_dir=0", cwd=tmp_path, code=2).stderr
    assert "0/ckpt1.pt was trained with --label_dropout=0, so it has not learned the null class" in error
    run("all_in.py", *generate, "--unet_dir=0.2", cwd=tmp_path)
    (tmp_path / "0.2/run.json").unlink()
    error = run("all_in.py", *generate, "--unet_dir=0.2", cwd=tmp_path, code=2).stderr
    assert "--guidance=2.0 needs --use_labels and --num_labels" in error


def test_a_warm_up_longer_than_the_training_is_said(capsys):
    check_warmup(10, 10)
    assert capsys.readouterr().err == ""
    check_warmup(5000, 16)
    assert "--warmup=5000 is more than the 16 steps" in capsys.readouterr().err

"""Losses, gradients and weights that are not finite: nothing takes them in, and they are counted and said."""

import json
import math
import re
import time

import pytest
import torch

from diffusion import GaussianDiffusionSampler
from score.generate import generate
from tests.commands import read_jsonl, run
from tests.networks import TINY_FLAGS, tiny_learner
from training.agc import AntiGradientControl
from training.averaging import average_learners
from training.logger import Logger
from utils.errors import DataError


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("anti_grad", ["skip", "ascend", "off"])
def test_a_loss_that_is_not_finite_is_seen_and_not_remembered(bad, anti_grad):
    agc = AntiGradientControl(4, anti_grad=anti_grad, ascend_weight=0.5)
    agc.bank[:] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    loss, keep = agc(torch.tensor([0.1, bad, 9.0]), torch.tensor([0, 1, 2]))
    assert not loss.isfinite()
    assert keep.tolist() == [False, True, True], "the bad sample is not taken for memorised"
    assert agc.bank.tolist() == [1.0, 2.0, 3.0, 4.0]


def feed(logger, pattern):
    """Steps of which those with a + were applied, and the line at their end."""
    for step, letter in enumerate(pattern, 1):
        loss = torch.tensor(1.0 if letter == "+" else float("nan"))
        logger.step(
            step,
            {"loss": loss, "applied": torch.tensor(letter == "+"), "lr": 1e-3},
            now=step == len(pattern),
            round=1,
            shard=2,
        )


def test_bad_steps_are_counted_and_left_out_of_the_mean(tmp_path):
    with Logger(tmp_path, 12, 0, log_step=4, max_bad_steps=5, batch_size=4) as logger:
        feed(logger, "+-++----++")
    records = read_jsonl(tmp_path / "metrics.jsonl")
    assert [(record["step"], record["loss"], record["bad_steps"]) for record in records] == [
        (4, 1.0, 1),
        (8, None, 4),
        (10, 1.0, 0),
    ]


@pytest.mark.parametrize(("pattern", "stops"), [("+----+++", False), ("+-----++", True), ("--++--++", False)])
def test_too_many_in_a_row_stop_the_run_even_between_two_records(pattern, stops, tmp_path):
    def whole_run():
        with Logger(tmp_path, 8, 0, log_step=8, max_bad_steps=5, batch_size=4) as logger:
            feed(logger, pattern)

    if not stops:
        return whole_run()
    with pytest.raises(DataError, match=r"5 steps in a row .* step 8, round 1, shard 2, learning rate 0.001; "):
        whole_run()
    return None


def test_a_diverging_run_stops_with_what_one_needs_to_know(tmp_path):
    """After a good start the learning rate is changed to one that sends the weights to infinity."""
    flags = [*TINY_FLAGS, "--save_step=2", "--log_step=2", "--max_bad_steps=4", "--client_num=2", "--local_epoch=10"]
    run("main_fed.py", "--train", *flags, "--total_round=1", "--logdir=log", cwd=tmp_path)
    wild = ["--lr=1e36", "--grad_clip=1e9", "--allow_change", "--total_round=2", "--logdir=log"]
    line = run("main_fed.py", "--train", *flags, *wild, cwd=tmp_path, code=1).stderr.splitlines()[-1]
    assert "steps in a row without a finite loss and gradient" in line and "learning rate 1e+36" in line
    assert "the checkpoints are good" in line and "shard 0" in line
    records = read_jsonl(tmp_path / "log/metrics.jsonl")
    assert sum(record["bad_steps"] for record in records) >= 4 and records[0]["bad_steps"] == 0
    assert all(json.dumps(record, allow_nan=False) for record in records)


@pytest.mark.parametrize("ema", [False, True])
def test_a_diverged_average_is_refused_before_it_overwrites_the_shards(ema):
    learners = [tiny_learner(seed) for seed in range(3)]
    broken = learners[1].ema if ema else learners[1].net
    broken.head.bias.data[3] = float("inf")
    before = [[learner.weights.clone(), learner.ema_weights.clone()] for learner in learners]
    with pytest.raises(DataError, match="average of the shards is not finite"):
        average_learners(dict(enumerate(learners)), [1, 1, 1])
    for learner, values in zip(learners, before, strict=True):
        for value, kept in zip((learner.weights, learner.ema_weights), values, strict=True):
            assert torch.equal(value, kept)


def test_sample_grids_say_what_they_cost_and_what_is_not_finite(tmp_path, capsys):
    def draw():
        time.sleep(0.3)
        return torch.tensor([0.5, math.nan]).reshape(2, 1, 1, 1).expand(2, 3, 4, 4)

    with Logger(tmp_path, 1, 0, log_step=1, max_bad_steps=1, batch_size=8) as logger:
        logger.images("ema_step1", 1, draw)
        logger.finish(1)
    said = capsys.readouterr()
    assert "warning: 1 of 2 images of ema_step1.png hold values that are not finite, black here" in said.err
    assert re.search(r"1 steps done in 00:\d\d, 00:00 of it for sample grids: --sample_step=0 draws none", said.out)


class Broken(torch.nn.Module):
    def forward(self, x, t, labels=None):
        return x.new_full(x.shape, math.nan)


def test_images_that_a_training_measures_are_said_too(capsys):
    """Those of --watch_step and of main.py --eval."""
    sampler = GaussianDiffusionSampler(Broken(), 1e-4, 0.02, 20, 8, steps=2)
    assert not generate(sampler, 6, 4, seed=0).any()
    assert "6 of 6 generated images hold values that are not finite, black here" in capsys.readouterr().err

"""The frontier: its arithmetic by hand, and the experiment itself with almost no steps."""

import json

import numpy as np
import pytest

from experiments.matched import at_quality, interval
from tests.commands import run_bash


def test_memorisation_at_a_quality_by_hand():
    distances, shares = [4.0, 2.0, 1.0, 1.5, 0.5], [0.0, 0.1, 0.4, 0.5, 0.9]
    assert at_quality(distances, shares, 2.0) == 0.1
    assert at_quality(distances, shares, 3.0) == pytest.approx(0.05)
    assert at_quality(distances, shares, 1.25) == pytest.approx(0.325)
    assert at_quality(distances, shares, 0.75) == pytest.approx(0.8), "it got worse in between"
    assert at_quality(distances, shares, 5.0) == 0.0
    assert at_quality(distances, shares, 0.4) is None


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Images whose ratio is below 15 % with probability 0.3; seeds that do not differ."""
    random = np.random.default_rng(0)
    hits = 0
    for trial in range(60):
        draw = lambda share, n: np.where(random.random(n) < share, 0.1, 0.9)  # noqa: E731
        paths = [[(2.0, draw(0.1, 200)), (1.0, draw(0.3, 200))] for _ in range(4)]
        found = interval(paths, 1.0, 15, draw(0.05, 500), draws=200, seed=trial)
        hits += found["low"] <= 0.25 <= found["high"]
        assert found["low"] <= found["mean"] <= found["high"] and found["reached"] == 4
    assert hits >= 50


def test_a_quality_that_some_seeds_do_not_reach():
    ratios = np.array([0.1, 0.9])
    paths = [[(2.0, ratios), (1.0, ratios)], [(2.0, ratios), (1.6, ratios)]]
    assert interval(paths, 1.5, 15, ratios)["reached"] == 1
    assert interval(paths, 0.5, 15, ratios) == {"reached": 0}


def test_the_frontier_is_made_and_nothing_is_made_twice(tmp_path):
    flags = ["--seeds=1", "--round_steps=8", "--rounds=2", "--images=20", f"--out={tmp_path}", "--num_train=32"]
    first = run_bash("com/frontier.sh", *flags, "--arms=default,IET-AGC", cwd=tmp_path)
    assert "IET-AGC" in first.stdout and "fpd" in first.stdout
    result = json.loads((tmp_path / "frontier.json").read_text())["digits32"]
    points = {(p["arm"], p["weights"], p["steps"]) for p in result["points"]}
    assert points == {(a, w, s) for a, last in (("default", 16), ("IET-AGC", 32)) for w in ("raw", "ema") for s in
                      range(16, last + 1, 16)}  # fmt: skip
    assert result["floor"]["heldout"]["mq_fraction"]["90"] > 0 and len(result["floor"]) == 3
    assert (tmp_path / "frontier.png").stat().st_size > 10_000
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    run_bash("com/frontier.sh", *flags, "--arms=default,IET-AGC", cwd=tmp_path)
    assert times == {path: path.stat().st_mtime_ns for path in times}
    again = json.loads((tmp_path / "frontier.json").read_text())["digits32"]
    assert again["points"] == result["points"] and again["seconds"] > result["seconds"]

"""The experiments: their arithmetic by hand or brute force, and the commands themselves with almost no steps."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import sklearn.datasets
import torch

from diffusion import GaussianDiffusionTrainer
from experiments import arms, frontier, runs, tables, tuning
from experiments.matched import at_quality, difference, differences, mean_at_quality
from tests.commands import ROOT, environment
from utils.errors import DataError, UsageError


def test_memorisation_at_a_quality_by_hand():
    distances, shares = np.array([[4.0, 2.0, 1.0, 1.5, 0.5], [0.0, 0.1, 0.4, 0.5, 0.9]])[:, None]
    by_hand = {2.0: 0.1, 3.0: 0.05, 1.25: 0.325, 0.75: 0.8, 5.0: 0.0, 0.4: np.nan}  # at 0.75 it got worse in between
    for quality, share in by_hand.items():
        np.testing.assert_allclose(at_quality(distances, shares, quality), [share])


def test_memorisation_at_a_quality_of_many_paths():
    random = np.random.default_rng(4)
    distances, shares = random.random((200, 5)), random.random((200, 5))
    expected = []
    for path, share in zip(distances, shares, strict=True):
        first = next((i for i, distance in enumerate(path) if distance <= 0.2), None)
        if first:  # falling from the one before to the first that reaches it
            expected.append(np.interp(0.2, path[[first, first - 1]], share[[first, first - 1]]))
        else:
            expected.append(np.nan if first is None else share[0])
    assert 10 < np.isnan(expected).sum() < 150
    np.testing.assert_allclose(at_quality(distances, shares, 0.2), expected)


def point(fpd, share, images=200, fpd_std=0.0):
    return {"fpd": fpd, "fpd_std": fpd_std, "images": images, "MQ@15": share}


def path(random, share, n=200):
    """A training that comes to memorise a share of its n images when its distance is 1."""
    return [point(2.0, random.binomial(n, 0.1) / n), point(1.0, random.binomial(n, share) / n)]


def floor(random):
    """Held-out images in the place of a training, at any quality."""
    return [[point(0.0, random.binomial(500, 0.05) / 500, images=500)]]


def test_the_interval_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(0)
    hits = 0
    for trial in range(60):
        paths = [path(random, 0.3) for _ in range(4)]
        mean, low, high = difference(paths, floor(random), 1.0, "MQ@15", draws=200, seed=trial)
        hits += low <= 0.25 <= high
        assert low <= mean <= high
    assert hits >= 50


def test_a_difference_is_found_where_there_is_one_and_seldom_where_there_is_none():
    random = np.random.default_rng(1)
    false_alarms = 0
    for trial in range(40):
        a, b, c = ([path(random, share) for _ in range(4)] for share in (0.3, 0.3, 0.5))
        _, low, high = difference(a, b, 1.0, "MQ@15", draws=200, seed=trial)
        false_alarms += not low <= 0 <= high
        _, low, high = difference(a, c, 1.0, "MQ@15", draws=200, seed=trial)
        assert low < -0.2 < high + 0.15 and high < 0
    assert false_alarms <= 8
    assert difference(a, [*c, path(random, 0.5)[:1]], 1.0, "MQ@15") is None, "a seed of the other side is not there"


def test_an_uncertain_distance_widens_the_interval():
    random = np.random.default_rng(2)
    certain = [path(random, 0.8) for _ in range(4)]
    uncertain = [[{**point, "fpd_std": 0.3} for point in p] for p in certain]
    widths = []
    for paths in (certain, uncertain):
        _, low, high = difference(paths, floor(random), 1.5, "MQ@15")
        widths.append(high - low)
    assert widths[1] > 1.5 * widths[0]


def test_all_are_compared_at_qualities_that_all_reach():
    one, two = [[point(3.0, 0.0), point(2.0, 0.5)]], [[point(3.0, 0.0), point(1.0, 0.4)]]
    rows = differences({"one": (one, two)}, ["MQ@15"], weights="raw")
    assert [row["fpd"] for row in rows] == [2.0, 2.3, 2.8, 3.6]
    assert {(row["arm"], row["weights"]) for row in rows} == {("one", "raw")}
    np.testing.assert_allclose([row["MQ@15"][0] for row in rows], [0.3, 0.21, 0.06, 0.0])
    assert np.isnan(mean_at_quality(one + two, 1.5, "MQ@15"))


def test_the_measures_by_brute_force():
    random = torch.Generator().manual_seed(0)
    training, heldout, images = (
        torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=random) for n in (60, 300, 300)
    )
    images[:3] = training[5]
    images[3:9] = (training[9].int() + torch.randint(0, 20, (6, 3, 8, 8), generator=random)).clamp(max=255)
    numbers, ratio, nearest = runs.measure(images, training, heldout)
    x, y, real = (part.flatten(1).numpy() / 255 for part in (images, training, heldout))
    distance = np.square(x[:, None] - y).sum(axis=2)
    ordered = np.sort(distance, axis=1)
    expected = ordered[:, 0] / ordered[:, :50].mean(axis=1)
    np.testing.assert_allclose(ratio, expected, atol=1e-5)
    assert nearest.tolist() == distance.argmin(axis=1).tolist()
    assert numbers["MQ@15"] == (100 * expected < 15).mean() == 9 / 300
    assert numbers["f_mem"] == (9 * ordered[:, 0] < ordered[:, 1]).mean()
    among = np.square(y[:, None] - y).sum(axis=2) + np.diag(np.full(60, np.inf))
    assert numbers["AuthPct"] == (ordered[:, 0] > among.min(axis=1)[distance.argmin(axis=1)]).mean()
    roots = scipy.linalg.sqrtm(np.cov(x.T) @ np.cov(real.T)).real
    fpd = np.square(x.mean(axis=0) - real.mean(axis=0)).sum() + np.trace(np.cov(x.T) + np.cov(real.T) - 2 * roots)
    assert numbers["fpd"] == pytest.approx(fpd, abs=1e-3)
    assert 0 < runs.fpd_spread(images, heldout) < numbers["fpd"]


def test_patches_do_not_overlap_and_some_are_repeated_ten_times():
    patches = arms.patches(16)
    assert len(np.unique(patches.reshape(len(patches), -1), axis=0)) == len(patches)
    photographs = [image[: 26 * 16, : 40 * 16] for image in sklearn.datasets.load_sample_images().images]
    cuts = [p[y : y + 16, x : x + 16] for p in photographs for y in range(0, 416, 16) for x in range(0, 640, 16)]
    most_contrast = sorted(cuts, key=lambda cut: -cut.std(axis=(0, 1)).mean())[: len(patches)]
    assert abs(len(patches) - len(cuts) / 3) < 1
    for cut in most_contrast[:: len(patches) // 9]:
        assert (patches == cut).all(axis=(1, 2, 3)).sum() == 1


def test_repeated_images_are_measured_once(tmp_path, monkeypatch):
    flags = arms.DATA["patches128"]["flags"] | {"data_root": f"{tmp_path}/small/train"}
    monkeypatch.setitem(arms.DATA, "small", {"flags": flags, "num_train": 100})
    training, group, distinct, heldout = runs.real_images("small")
    assert training.shape == (100, 3, 16, 16) and distinct.shape == (64, 3, 16, 16)
    assert torch.equal(distinct[group], training)
    assert sorted(np.bincount(group).tolist()) == [1] * 60 + [10] * 4
    # copies are not neighbours in file order, so they come into several shards
    shards = [set(group[k * 25 : k * 25 + 25]) for k in range(4)]
    assert all(sum(image in shard for shard in shards) > 1 for image in np.flatnonzero(np.bincount(group) == 10))
    assert len(heldout) == len(arms.patches(16)) - 64
    assert not (heldout[:, None] == distinct).flatten(2).all(dim=2).any()
    floor = runs.floor_of("small", 20)
    assert floor["fpd"] > 0 and floor["images"] == len(heldout) and floor["MQ@90"] > 0


def test_per_image_loss_prefers_what_the_network_knows():
    """A network that says the noise of every x_t from knowing x_0 has no loss on that image, and some on others."""
    images = torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    known = images[2].float() / 127.5 - 1
    betas = np.linspace(1e-4, 0.02, 1000, dtype=np.float32).astype(np.float64)
    abar = torch.from_numpy(np.cumprod(1 - betas))

    def knows_one(x_t, t, labels=None):
        a = abar[t].float()[:, None, None, None]
        return (x_t - a.sqrt() * known) / (1 - a).sqrt()

    losses = runs.per_image_loss(GaussianDiffusionTrainer(knows_one, 1e-4, 0.02, 1000), images, 0)
    assert losses[2] < 1e-6 and np.delete(losses, 2).min() > 0.01
    # the loss of another image is abar / (1 - abar) |x_0 - known|^2, averaged over the timesteps
    steps = [round((i + 0.5) * 1000 / 32) for i in range(32)]
    weight = np.mean([float(abar[t] / (1 - abar[t])) for t in steps])
    expected = weight * (images.float() / 127.5 - 1 - known).square().mean(dim=(1, 2, 3)).numpy()
    np.testing.assert_allclose(np.delete(losses, 2), np.delete(expected, 2), rtol=1e-4)


def test_arms_have_the_steps_they_say(tmp_path):
    own = {"out": tmp_path, "steps": None, "points": None, "images": None}
    trials = {name: arms.ARMS[method] | flags for method in arms.TRIALS for name, flags in arms.TRIALS[method].items()}
    for name, data in arms.DATA.items():
        planned = runs.plan(name, arms.ARMS | trials, [1], SimpleNamespace(**own))
        assert len({run.directory for run in planned}) == len(planned) == len({str(run.flags) for run in planned})
        for run in planned:
            value = dict(flag.removeprefix("--").split("=", 1) for flag in run.flags)
            rounds, kept, batch = (int(value[flag]) for flag in ("total_round", "save_round", "batch_size"))
            shards = int(value["client_num"])
            total = run.steps_per_round * rounds / (1 if shards == 1 else arms.ENSEMBLE_STEPS)
            assert 0.9 * data["steps"] <= total <= data["steps"] and data["num_train"] // shards >= batch
            assert rounds / kept > data["points"] / 2
    assert len(arms.TRIALS["default"]) == len(arms.TRIALS["IET-AGC"])


def test_the_best_trial_is_the_least_memorising_that_reaches_the_quality():
    rows = [
        {"setting": setting, "MQ@15": fifteen, "MQ@30": thirty}
        for setting, fifteen, thirty in (("a", 0.1, 0.0), ("b", None, None), ("c", -0.05, 0.3), ("d", -0.01, 0.2))
    ]
    assert tuning.best(rows)["setting"] == "d"


@pytest.mark.parametrize("wrong", ["--data=digits", "--arms=IET,ITE", "--images=0", "--seeds=x"])
def test_a_wrong_flag_is_named(wrong, tmp_path):
    with pytest.raises(UsageError, match=wrong.partition("=")[0]):
        frontier.main([wrong, f"--out={tmp_path}"])


def test_tuning_then_frontier_and_nothing_is_made_twice(tmp_path, monkeypatch, capsys):
    out = tmp_path / "results"
    tiny = ["--data=digits64", "--steps=16", "--points=2", "--images=20", "--out=results"]
    monkeypatch.setattr(tuning, "TRIALS", {method: {method: {}} for method in arms.TRIALS})
    monkeypatch.setattr(runs, "SAMPLER", {"sampler": "dpmpp", "sample_steps": 2})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="not all trials are done: the same command goes on"):
        tuning.main([*tiny, "--minutes=0.02"])
    assert not multiprocessing.active_children()
    tuning.main(tiny)
    best = json.loads((out / "tuning.json").read_text())["best"]
    assert {method: row["setting"] for method, row in best.items()} == {"default": "default", "IET-AGC": "IET-AGC"}

    times = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*") if path.is_file()}
    command = [*tiny, "--seeds=11", "--arms=default,IET-AGC,tuned IET-AGC"]
    frontier.main(command)  # the trainings of the tuning's seed are there already, and the tuned arm is no other
    results = json.loads((out / "frontier.json").read_text())
    points = {(p["arm"], p["weights"], p["steps"]) for p in results["digits64"]["points"]}
    ends = {"default": (8, 16), "IET-AGC": (16, 32), "tuned IET-AGC": (16, 32)}
    assert points == {(arm, weights, s) for arm, steps in ends.items() for weights in ("raw", "ema") for s in steps}
    matched, compared, found = (results["digits64"][name] for name in ("matched", "comparisons", "detection"))
    assert len(matched) == 24 and len(compared) == 8 and {row["arm"] for row in found} == set(ends)
    assert (out / "frontier.png").stat().st_size > 10_000
    assert times == {path: path.stat().st_mtime_ns for path in times}
    assert "IET-AGC" in capsys.readouterr().out

    frontier.main([*tiny, "--seeds=12", "--arms=default", "--minutes=0"])  # does not touch the results
    assert "digits64: no training is complete yet: the same command goes on" in capsys.readouterr().out
    assert json.loads((out / "frontier.json").read_text()) == results
    (run, *_) = runs.plan("digits64", arms.ARMS, [11], SimpleNamespace(out=out, steps=16, points=2, images=20))
    assert len(runs.measured(run)["points"]) == 4 and runs.measured(run)["skips"] == [0] * 64
    assert runs.measured(run._replace(images=30))["points"] == []
    assert runs.measured(run._replace(flags=[*run.flags, "--lr=1"]))["points"] == []

    text = tables.filled("".join(f"<!-- table: {name} -->\nold<!-- end -->\n" for name in tables.TABLES), results)
    assert "old" not in text and text.count("<!-- end -->") == len(tables.TABLES) and "IET-AGC against default" in text


def test_detection_by_hand(monkeypatch):
    """Images 0 and 2 are one that is repeated, which default training has copied; 3 has been copied as well."""
    copies = {"nearest": [0, 2, 1], "ratio": [0.1, 0.14, 0.2]}
    measured = {
        "default": {**copies, "skips": [0, 0, 0, 0], "losses": [0.1, 0.4, 0.2, 0.3]},
        "AGC": {"nearest": [], "ratio": [], "skips": [5, 1, 0, 2], "losses": [1, 1, 1, 1]},
    }
    images = (None, np.array([0, 1, 0, 2]), None, None)
    monkeypatch.setattr(runs, "real_images", lambda name: images)
    monkeypatch.setattr(runs, "measured", lambda run: measured[run.arm])
    rows = frontier.detection([SimpleNamespace(data="x", arm=arm, seed=1) for arm in measured])
    found = {(row["arm"], row["images"]): (row["skip count"], row["low loss"]) for row in rows}
    assert found == {
        ("default", "repeated"): ([0.5], [1.0]),
        ("default", "memorised by default"): ([0.5], [1.0]),
        ("AGC", "repeated"): ([0.5], [0.5]),
        ("AGC", "memorised by default"): ([2 / 3], [0.5]),
    }


def processes_of(session):
    """The states of all processes of a session that have not ended."""
    found = subprocess.run(["ps", "-s", str(session), "-o", "stat="], capture_output=True, text=True, check=False)
    return [state for state in found.stdout.split() if not state.startswith("Z")]


def test_a_stopped_experiment_leaves_no_process_behind(tmp_path):
    flags = ["--data=digits64", "--arms=default", "--seeds=1", "--steps=100000"]
    started, limit = {}, time.monotonic() + 100
    for by in ("kill", "Ctrl-C"):
        command = [sys.executable, "-m", "experiments.frontier", *flags, f"--out={tmp_path / by}"]
        with (tmp_path / f"{by}.err").open("w") as err:
            settings = {"cwd": ROOT, "env": environment(), "stderr": err, "start_new_session": True}
            started[by] = subprocess.Popen(command, **settings)
    for by, process in started.items():
        while not list((tmp_path / by).rglob("run.json")):  # of a training that has begun
            assert time.monotonic() < limit and process.poll() is None
            time.sleep(0.1)
    with pytest.raises(DataError, match="is writing there"):
        frontier.main([*flags, f"--out={tmp_path / 'kill'}"])
    started["kill"].kill()
    os.killpg(started["Ctrl-C"].pid, signal.SIGINT)
    assert started["Ctrl-C"].wait(20) == 130
    while any(processes_of(process.pid) for process in started.values()):
        assert time.monotonic() < limit
        time.sleep(0.1)
    lines = (tmp_path / "Ctrl-C.err").read_text().splitlines()
    assert [line for line in lines if "runs of" not in line] == ["experiments.frontier: stopped by SIGINT"]


def test_the_document_says_what_the_results_say():
    text, results = tables.DOCUMENT.read_text(), json.loads((ROOT / "results/frontier.json").read_text())
    assert tables.filled(text, results) == text, f"{tables.DOCUMENT} differs: run python -m experiments.tables"
    assert text.count("<!-- table: ") == len(tables.TABLES)

"""The experiments: their arithmetic by hand or brute force, and the commands themselves with almost no steps."""

import dataclasses
import itertools
import json
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.datasets
import torch

from errors import UsageError
from experiments import arms, document, frontier, runs, tuning
from experiments.detection import per_image_loss, roc_auc
from experiments.judge import Judge
from experiments.matched import Point, at_quality, at_quality_of_draws, difference, interval
from experiments.patches import choose, tiles, write_patches
from files import lock_directory
from tests.browser import CHROMIUM, assert_readable
from tests.commands import ROOT, environment, run_bash


def options_of(out, **said):
    """What a command has read of its line."""
    return SimpleNamespace(**{"out": out, "steps": None, "points": None, "images": None, **said})


def test_memorisation_at_a_quality_by_hand():
    distances, shares = [4.0, 2.0, 1.0, 1.5, 0.5], [0.0, 0.1, 0.4, 0.5, 0.9]
    assert at_quality(distances, shares, 2.0) == 0.1
    assert at_quality(distances, shares, 3.0) == pytest.approx(0.05)
    assert at_quality(distances, shares, 1.25) == pytest.approx(0.325)
    assert at_quality(distances, shares, 0.75) == pytest.approx(0.8), "it got worse in between"
    assert at_quality(distances, shares, 5.0) == 0.0
    assert at_quality(distances, shares, 0.4) is None


def test_many_paths_at_once_are_as_one_by_one():
    random = np.random.default_rng(4)
    distances, shares = random.random((200, 5)), random.random((200, 5))
    found = at_quality_of_draws(distances, shares, 0.2)
    expected = [at_quality(d, s, 0.2) for d, s in zip(distances.tolist(), shares.tolist(), strict=True)]
    assert 10 < expected.count(None) < 150
    np.testing.assert_allclose(found, [np.nan if value is None else value for value in expected])


def ratios(random, share, n):
    """n ratios, each of them below 15 % with probability `share`."""
    return np.where(random.random(n) < share, 0.1, 0.9)


def path(random, share, n=200):
    """A training that comes to memorise a share of its images when its distance is 1."""
    return [Point(2.0, 0.0, ratios(random, 0.1, n)), Point(1.0, 0.0, ratios(random, share, n))]


def test_the_interval_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(0)
    hits = 0
    for trial in range(60):
        paths = [path(random, 0.3) for _ in range(4)]
        found = interval(paths, 1.0, 15, ratios(random, 0.05, 500), draws=200, seed=trial)
        hits += found["low"] <= 0.25 <= found["high"]
        assert found["low"] <= found["mean"] <= found["high"] and found["reached"] == 4
    assert hits >= 50


def test_a_difference_is_found_where_there_is_one_and_seldom_where_there_is_none():
    random = np.random.default_rng(1)
    false_alarms = 0
    for trial in range(40):
        a, b, c = ([path(random, share) for _ in range(4)] for share in (0.3, 0.3, 0.5))
        equal = difference(a, b, 1.0, 15, draws=200, seed=trial)
        false_alarms += not equal["low"] <= 0 <= equal["high"]
        unequal = difference(a, c, 1.0, 15, draws=200, seed=trial)
        assert unequal["high"] < 0 and unequal["low"] < -0.2 < unequal["high"] + 0.15
    assert false_alarms <= 8
    assert difference(a, [*c, path(random, 0.5)[:1]], 1.0, 15) is None, "a seed of the other side does not reach it"


def test_an_uncertain_distance_widens_the_interval():
    random = np.random.default_rng(2)
    certain = [path(random, 0.8) for _ in range(4)]
    uncertain = [[point._replace(spread=0.3) for point in p] for p in certain]
    widths = []
    for paths in (certain, uncertain):
        found = interval(paths, 1.5, 15, ratios(random, 0.05, 500))
        widths.append(found["high"] - found["low"])
    assert widths[1] > 1.5 * widths[0]


def test_a_quality_that_some_seeds_do_not_reach():
    values = np.array([0.1, 0.9])
    paths = [[Point(2.0, 0.0, values), Point(last, 0.0, values)] for last in (1.0, 1.6)]
    assert interval(paths, 1.5, 15, values)["reached"] == 1
    assert interval(paths, 0.5, 15, values) == {"reached": 0}


def test_roc_auc_against_all_pairs():
    random = np.random.default_rng(3)
    scores, labels = random.integers(0, 6, 60), random.random(60) < 0.3
    pairs = itertools.product(scores[labels], scores[~labels])
    assert roc_auc(scores, labels) == pytest.approx(np.mean([(a > b) + 0.5 * (a == b) for a, b in pairs]))
    assert roc_auc(scores, np.zeros(60, bool)) is None and roc_auc(scores, np.ones(60, bool)) is None


def test_patches_do_not_overlap_and_some_are_repeated_ten_times(tmp_path):
    patches = tiles(16)
    assert len(np.unique(patches.reshape(len(patches), -1), axis=0)) == len(patches)
    photographs = [image[: 26 * 16, : 40 * 16] for image in sklearn.datasets.load_sample_images().images]
    cuts = [p[y : y + 16, x : x + 16] for p in photographs for y in range(0, 416, 16) for x in range(0, 640, 16)]
    most_contrast = sorted(cuts, key=lambda cut: -cut.std(axis=(0, 1)).mean())[: len(patches)]
    assert abs(len(patches) - len(cuts) / 3) < 1
    for cut in most_contrast[:: len(patches) // 9]:
        unclipped = cut + (127.5 - cut.mean(axis=(0, 1)))
        assert (abs(patches - np.clip(unclipped, 0, 255)).max(axis=(1, 2, 3)) <= 0.5).sum() == 1
    assert abs(patches.mean(axis=(1, 2)) - 127.5).max() < 25, "clipping moves the mean of a few"
    train, heldout = choose(len(patches), 256)
    times = np.bincount(train, minlength=len(patches))
    assert sorted(times[times > 0].tolist()) == [1] * 156 + [10] * 10
    assert set(heldout) == set(np.flatnonzero(times == 0))
    # copies are not neighbours in file order, so they come into several shards
    shards = [set(train[k * 64 : k * 64 + 64]) for k in range(4)]
    assert all(sum(tile in shard for shard in shards) > 1 for tile in np.flatnonzero(times == 10))

    write_patches(tmp_path / "p", 50, 16)
    names = sorted(path.name for path in (tmp_path / "p/train").iterdir())
    assert len(names) == 50 and len({name[6:] for name in names}) == 32


def test_repeated_images_are_measured_once(tmp_path):
    judge = Judge(arms.subject("patches50", options_of(tmp_path, images=20)))
    assert judge.training.shape == (50, 3, 16, 16) and judge.distinct.shape == (32, 3, 16, 16)
    assert torch.equal(judge.distinct[judge.group], judge.training)
    assert sorted(np.bincount(judge.group).tolist()) == [1] * 30 + [10] * 2
    assert judge.floor["fpd of a held-out sample to the others"] > 0


def test_per_image_loss_prefers_what_the_network_knows():
    """A network that says the noise of every x_t from knowing x_0 has no loss on that image, and some on others."""
    images = torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    known = images[2].float() / 127.5 - 1
    betas = np.linspace(1e-4, 0.02, 1000, dtype=np.float32).astype(np.float64)
    abar = torch.from_numpy(np.cumprod(1 - betas))

    def knows_one(x_t, t, labels=None):
        a = abar[t].float()[:, None, None, None]
        return (x_t - a.sqrt() * known) / (1 - a).sqrt()

    losses = per_image_loss(knows_one, images, {"beta_1": 1e-4, "beta_T": 0.02, "T": 1000, "mean_type": "epsilon"}, 0)
    assert losses[2] < 1e-6 and np.delete(losses, 2).min() > 0.01
    # the loss of another image is abar / (1 - abar) |x_0 - known|^2, averaged over the timesteps
    steps = [round((i + 0.5) * 1000 / 32) for i in range(32)]
    weight = np.mean([float(abar[t] / (1 - abar[t])) for t in steps])
    expected = weight * (images.float() / 127.5 - 1 - known).square().mean(dim=(1, 2, 3)).numpy()
    np.testing.assert_allclose(np.delete(losses, 2), np.delete(expected, 2), rtol=1e-4)


def test_arms_have_the_steps_they_say(tmp_path):
    for name in ("digits64", "digits256", "patches128"):
        about = arms.subject(name, options_of(tmp_path))
        for arm in [*arms.ARMS.values(), *arms.TRIALS["default"], *arms.TRIALS["IET-AGC"]]:
            flags, steps = arms.command_line(about, arm, 1, tmp_path)
            value = {name: number for name, _, number in (flag.removeprefix("--").partition("=") for flag in flags)}
            rounds, kept, batch = (int(value[name]) for name in ("total_round", "save_round", "batch_size"))
            total = steps * rounds
            assert 0.9 * about.steps <= total / (1 if arm.shards == 1 else arms.ENSEMBLE_STEPS) <= about.steps
            assert about.points / 2 < rounds / kept <= about.points + 2 and about.num_train // arm.shards >= batch
    assert len(arms.TRIALS["default"]) == len(arms.TRIALS["IET-AGC"])
    for wrong in ("digits", "patches7", "cifar64"):
        with pytest.raises(UsageError, match=wrong):
            arms.subject(wrong, options_of(tmp_path))


def test_another_choice_of_the_tuning_is_another_training(tmp_path):
    options = options_of(tmp_path, points=2, steps=16)
    places = []
    for setting in ("2 shards", "mem_ratio 1.25"):
        best = {"default": {"setting": "dropout 0.3"}, "IET-AGC": {"setting": setting}}
        (tmp_path / "tuning.json").write_text(json.dumps({"best": best}))
        tuned = arms.tuned_arms(tmp_path)
        assert list(tuned) == ["tuned default", "tuned IET-AGC"]
        places.append([run.directory for run in runs.plan("digits32", tuned.values(), [1], options)])
    assert places[0][0] == places[1][0] and places[0][1] != places[1][1]


def test_the_best_trial_is_the_least_memorising_that_reaches_the_quality():
    def entry(fifteen, thirty):
        return {"fpd reached": 1.0, "MQ@15": fifteen, "MQ@30": thirty}

    found = {
        "a": {"raw": entry(0.1, 0.0), "ema": entry(None, None)},
        "b": {"raw": entry(-0.05, 0.3), "ema": entry(-0.01, 0.2)},
    }
    assert tuning.best(found) == {"setting": "b", "weights": "ema"}


TINY = ["--steps=16", "--points=2", "--images=20"]


@pytest.mark.parametrize("experiment", [tuning, frontier])
def test_one_experiment_per_directory(experiment, tmp_path, capsys):
    with lock_directory(tmp_path, "out"):
        assert experiment.main(["--data=digits32", f"--out={tmp_path}"]) == 1
    assert f"--out={tmp_path}: process" in capsys.readouterr().err


def test_tuning_then_frontier_then_document_and_nothing_is_made_twice(tmp_path, monkeypatch):
    out = tmp_path / "results"
    monkeypatch.setattr(tuning, "TRIALS", {method: trials[:1] for method, trials in arms.TRIALS.items()})
    monkeypatch.chdir(ROOT)
    assert tuning.main(["--data=digits32", *TINY, f"--out={out}"]) == 0
    chosen = json.loads((out / "tuning.json").read_text())
    assert chosen["best"]["IET-AGC"]["setting"] == "IET-AGC" and chosen["best"]["default"]["setting"] == "default"

    command = ["com/frontier.sh", "--data=digits32", "--seeds=11", *TINY, f"--out={out}", "--arms=default,IET-AGC"]
    first = run_bash(*command, cwd=tmp_path)  # the trainings of the tuning's seed are there already
    assert "IET-AGC" in first.stdout and "fpd" in first.stdout
    result = json.loads((out / "frontier.json").read_text())["digits32"]
    points = {(p["arm"], p["weights"], p["steps"]) for p in result["points"]}
    expected = itertools.product((("default", (8, 16)), ("IET-AGC", (16, 32))), ("raw", "ema"))
    assert points == {(arm, weights, s) for (arm, steps), weights in expected for s in steps}
    assert result["floor"]["heldout"]["mq_fraction"]["90"] > 0
    assert result["matched quality"]["raw"].keys() and result["samplers"].keys() == {"default", "IET-AGC"}
    assert (out / "frontier.png").stat().st_size > 10_000 and (out / "pairs_digits32.png").stat().st_size > 1000
    page = out / "frontier_digits32.html"
    assert "held-out real images" in page.read_text() and "http" not in page.read_text()
    if CHROMIUM:
        assert assert_readable(page, tmp_path)["charts"] == 6

    times = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*") if path.is_file()}
    run_bash(*command[:-1], "--arms=default,IET-AGC", cwd=tmp_path)
    assert times == {path: path.stat().st_mtime_ns for path in times}
    again = json.loads((out / "frontier.json").read_text())["digits32"]
    assert again["points"] == result["points"] and again["seconds"] > result["seconds"]

    (tmp_path / "README.md").write_text(f"before\n{document.BEGIN}\nold\n{document.END}\nafter\n")
    pages = document.written(tmp_path)
    assert (
        "IET-AGC less default" in pages[tmp_path / "docs/RESULTS.md"]
        and "**chosen**" in pages[tmp_path / "docs/RESULTS.md"]
    )
    readme = pages[tmp_path / "README.md"]
    assert readme.startswith("before\n") and readme.endswith("after\n") and "old" not in readme


def processes_of(path):
    return subprocess.run(["pgrep", "-f", str(path)], capture_output=True, text=True, check=False).stdout.split()


def test_a_killed_experiment_leaves_no_training_behind(tmp_path):
    command = [sys.executable, "-m", "experiments.tuning", "--data=digits32", "--steps=100000", f"--out={tmp_path}"]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL) as process:
        limit = time.monotonic() + 100
        while not list(tmp_path.glob("runs/digits32/*/seed11/log/flagfile.txt")):
            assert time.monotonic() < limit and process.poll() is None
            time.sleep(0.1)
        assert len(processes_of(tmp_path)) > 1
        process.kill()
    while processes_of(tmp_path):
        assert time.monotonic() < limit
        time.sleep(0.1)


def test_the_documents_say_what_the_results_say():
    for path, text in document.written(ROOT).items():
        assert path.read_text() == text, f"{path.name} differs from results/*.json: run python -m experiments.document"


@pytest.fixture
def half_measured(tmp_path):
    """A run whose training was stopped by the deadline, and measuring after the first of its two checkpoints."""
    options = options_of(tmp_path, points=2, steps=16, images=20)
    (run,) = runs.plan("digits32", [arms.ARMS["default"]], [1], options)
    (run.directory / "log").mkdir(parents=True)
    (run.directory / "measured").mkdir()
    points = []
    for r in (1, 2):
        (run.directory / "log" / f"global_ckpt_round{r}.pt").touch()
    for weights in ("raw", "ema"):
        np.savez(runs.measured_path(run, 1, weights), ratio=np.full(20, 0.5), skips=np.arange(32))
        points.append({"round": 1, "steps": 8, "weights": weights})
    (run.directory / "points.json").write_text(json.dumps(points))
    return run


def test_what_is_measured_last_is_not_what_was_saved_last(half_measured):
    assert runs.rounds_kept(half_measured) == [1, 2]
    assert runs.is_measured(half_measured)
    assert runs.last_measured(half_measured)["skips"].tolist() == list(range(32))
    path = half_measured.directory / "points.json"
    path.write_text(json.dumps(json.loads(path.read_text())[:1]))
    assert not runs.is_measured(half_measured), "it has no EMA point to compare with other runs"


def test_points_of_another_number_of_images_are_made_again(half_measured):
    assert {(p["round"], p["weights"]) for p in runs.measured_already(half_measured)} == {(1, "raw"), (1, "ema")}
    more = dataclasses.replace(half_measured.subject, images=40)
    assert runs.measured_already(dataclasses.replace(half_measured, subject=more)) == []


def test_a_training_with_other_flags_is_not_taken_for_done(half_measured):
    (half_measured.directory / "trained").write_text("\n".join(half_measured.flags))
    assert runs.train(half_measured, deadline=0)
    longer = dataclasses.replace(half_measured, flags=(*half_measured.flags, "--total_round=9"))
    assert not runs.train(longer, deadline=0)

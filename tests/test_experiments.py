"""The experiments: their arithmetic by hand or brute force, and the commands themselves with almost no steps."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import time
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import sklearn.datasets
import torch

from diffusion import GaussianDiffusionTrainer
from experiments import arms, frontier, runs, tables, tuning
from experiments.detection import per_image_loss, roc_auc
from experiments.matched import at_quality, difference, interval
from tests.commands import ROOT, environment
from utils.errors import DataError, UsageError


def options_of(out, **said):
    """What a command has read of its line."""
    return SimpleNamespace(**{"out": out, "steps": None, "points": None, "images": None, **said})


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
    return {"MQ@15": random.binomial(500, 0.05) / 500, "images": 500}


def test_the_interval_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(0)
    hits = 0
    for trial in range(60):
        paths = [path(random, 0.3) for _ in range(4)]
        mean, low, high = interval(paths, 1.0, "MQ@15", floor(random), draws=200, seed=trial)
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
        _, low, high = interval(paths, 1.5, "MQ@15", floor(random))
        widths.append(high - low)
    assert widths[1] > 1.5 * widths[0]


def test_qualities_that_some_seeds_do_not_reach():
    own = {"seed": 1, "arm": "default", "weights": "raw"}
    points = [{**own, **point(2.0, 0.5)}, {**own, **point(1.0, 0.5)}, {**own, "seed": 2, **point(1.6, 0.5)}]
    points = [
        {**p, "weights": weights, **dict.fromkeys(frontier.MEASURES, 0.5)} for p in points for weights in runs.WEIGHTS
    ]
    assert frontier.qualities(frontier.paths_of(points, "default", "raw"))[0] == 1.6
    assert interval(frontier.paths_of(points, "default", "raw"), 0.5, "MQ@15", point(0, 0.1)) is None
    rows = frontier.matched(points, {**dict.fromkeys(frontier.MEASURES, 0.1), "images": 50})
    assert [row["reached"] for row in rows] == [2] * 8
    assert tables.in_points([0.1, 0.05, 0.2], 1, 2) == "+10.0 [+5.0, +20.0] (1 of 2 seeds)"
    assert tables.in_points(None, 0, 2) == "not reached"


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


def test_roc_auc_against_all_pairs():
    random = np.random.default_rng(3)
    scores, labels = random.integers(0, 6, 60), random.random(60) < 0.3
    pairs = itertools.product(scores[labels], scores[~labels])
    assert roc_auc(scores, labels) == pytest.approx(np.mean([(a > b) + 0.5 * (a == b) for a, b in pairs]))
    assert roc_auc(scores, np.zeros(60, bool)) is None and roc_auc(scores, np.ones(60, bool)) is None


def test_patches_do_not_overlap_and_some_are_repeated_ten_times():
    patches = arms.patches(16)
    assert len(np.unique(patches.reshape(len(patches), -1), axis=0)) == len(patches)
    photographs = [image[: 26 * 16, : 40 * 16] for image in sklearn.datasets.load_sample_images().images]
    cuts = [p[y : y + 16, x : x + 16] for p in photographs for y in range(0, 416, 16) for x in range(0, 640, 16)]
    most_contrast = sorted(cuts, key=lambda cut: -cut.std(axis=(0, 1)).mean())[: len(patches)]
    assert abs(len(patches) - len(cuts) / 3) < 1
    for cut in most_contrast[:: len(patches) // 9]:
        assert (patches == cut).all(axis=(1, 2, 3)).sum() == 1
    train, heldout = arms.choose(len(patches), 256)
    times = np.bincount(train, minlength=len(patches))
    assert sorted(times[times > 0].tolist()) == [1] * 156 + [10] * 10
    assert set(heldout) == set(np.flatnonzero(times == 0))
    # copies are not neighbours in file order, so they come into several shards
    shards = [set(train[k * 64 : k * 64 + 64]) for k in range(4)]
    assert all(sum(patch in shard for shard in shards) > 1 for patch in np.flatnonzero(times == 10))


def test_repeated_images_are_measured_once(tmp_path, monkeypatch):
    data = arms.DATA["patches128"]
    flags = (data.flags[0], f"--data_root={tmp_path}/small/train")
    data = dataclasses.replace(data, name="small", flags=flags, num_train=50, images=20)
    monkeypatch.setitem(arms.DATA, "small", data)
    training, group, distinct, heldout = runs.real_images("small")
    assert training.shape == (50, 3, 16, 16) and distinct.shape == (32, 3, 16, 16)
    assert torch.equal(distinct[group], training)
    assert sorted(np.bincount(group).tolist()) == [1] * 30 + [10] * 2
    names = sorted(file.name for file in (tmp_path / "small/train").glob("*.png"))
    assert len(names) == 50 and len({name[6:] for name in names}) == 32
    assert len(heldout) == len(arms.patches(16)) - 32
    floor = runs.floor_of(data)
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

    losses = per_image_loss(GaussianDiffusionTrainer(knows_one, 1e-4, 0.02, 1000), images, 0)
    assert losses[2] < 1e-6 and np.delete(losses, 2).min() > 0.01
    # the loss of another image is abar / (1 - abar) |x_0 - known|^2, averaged over the timesteps
    steps = [round((i + 0.5) * 1000 / 32) for i in range(32)]
    weight = np.mean([float(abar[t] / (1 - abar[t])) for t in steps])
    expected = weight * (images.float() / 127.5 - 1 - known).square().mean(dim=(1, 2, 3)).numpy()
    np.testing.assert_allclose(np.delete(losses, 2), np.delete(expected, 2), rtol=1e-4)


def test_arms_have_the_steps_they_say(tmp_path):
    for data in arms.DATA.values():
        for arm in [*arms.ARMS.values(), *arms.TRIALS["default"], *arms.TRIALS["IET-AGC"]]:
            flags, steps = arms.command_line(data, arm, 1, tmp_path)
            value = {name: number for name, _, number in (flag.removeprefix("--").partition("=") for flag in flags)}
            rounds, kept, batch = (int(value[name]) for name in ("total_round", "save_round", "batch_size"))
            total = steps * rounds
            assert 0.9 * data.steps <= total / (1 if arm.shards == 1 else arms.ENSEMBLE_STEPS) <= data.steps
            assert data.points / 2 < rounds / kept <= data.points + 2 and data.num_train // arm.shards >= batch
    assert len(arms.TRIALS["default"]) == len(arms.TRIALS["IET-AGC"])


def test_another_choice_of_the_tuning_is_another_training(tmp_path):
    options = options_of(tmp_path, points=2, steps=16)
    places = []
    for setting in ("2 shards", "mem_ratio 1.25"):
        best = {"default": {"setting": "dropout 0.3"}, "IET-AGC": {"setting": setting}}
        (tmp_path / "tuning.json").write_text(json.dumps({"best": best}))
        tuned = arms.tuned_arms(tmp_path)
        assert list(tuned) == ["tuned default", "tuned IET-AGC"]
        places.append([run.directory for run in runs.plan("digits64", tuned.values(), [1], options)])
    assert places[0][0] == places[1][0] and places[0][1] != places[1][1]


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
    monkeypatch.setattr(tuning, "TRIALS", {method: trials[:1] for method, trials in arms.TRIALS.items()})
    monkeypatch.setattr(arms, "SAMPLER", ("--sampler=dpmpp", "--sample_steps=2"))
    monkeypatch.chdir(tmp_path)
    tuning.main(tiny)
    chosen = json.loads((out / "tuning.json").read_text())
    assert chosen["best"]["IET-AGC"]["setting"] == "IET-AGC" and chosen["best"]["default"]["setting"] == "default"

    times = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*") if path.is_file()}
    command = [*tiny, "--seeds=11", "--arms=default,IET-AGC"]
    frontier.main(command)  # the trainings of the tuning's seed are there already
    result = json.loads((out / "frontier.json").read_text())["digits64"]
    points = {(p["arm"], p["weights"], p["steps"]) for p in result["points"]}
    expected = itertools.product((("default", (8, 16)), ("IET-AGC", (16, 32))), ("raw", "ema"))
    assert points == {(arm, weights, s) for (arm, steps), weights in expected for s in steps}
    assert result["floor"]["MQ@90"] > 0 and len(result["matched"]) == 16 and len(result["comparisons"]) == 8
    assert {row["arm"] for row in result["detection"]} == {"default", "IET-AGC"}
    assert (out / "frontier.png").stat().st_size > 10_000 and (out / "pairs_digits64.png").stat().st_size > 1000

    assert "IET-AGC" in capsys.readouterr().out
    frontier.main(command)
    assert times == {path: path.stat().st_mtime_ns for path in times}
    results = json.loads((out / "frontier.json").read_text())
    assert results["digits64"]["points"] == result["points"]
    assert results["digits64"]["seconds"] >= result["seconds"]

    names = ("floor", "equal steps", "comparisons", "detection", "end digits64", "matched digits64")
    text = tables.filled("".join(f"<!-- table: {name} -->\nold<!-- end -->\n" for name in names), results)
    assert "old" not in text and text.count("<!-- end -->") == len(names) and "IET-AGC against default" in text
    with pytest.raises(DataError, match="no table 'flor'"):
        tables.filled("<!-- table: flor -->\n<!-- end -->", results)
    del results["digits64"]["flags"]["IET-AGC"]
    with pytest.raises(DataError, match="digits64 lacks IET-AGC"):
        tables.filled("", results)


def processes_of(session):
    """The states of all processes of a session that have not ended."""
    found = subprocess.run(["ps", "-s", str(session), "-o", "stat="], capture_output=True, text=True, check=False)
    return [state for state in found.stdout.split() if not state.startswith("Z")]


@pytest.mark.parametrize("by", ["kill", "Ctrl-C"])
def test_a_stopped_experiment_leaves_no_process_behind(by, tmp_path):
    flags = ["--data=digits64", "--arms=default", "--seeds=1", "--steps=100000", f"--out={tmp_path}/a"]
    command = ["bash", str(ROOT / "com/frontier.sh"), *flags]
    errors, limit = tmp_path / "err", time.monotonic() + 100
    with (
        errors.open("w") as err,
        subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=err, start_new_session=True) as process,
    ):
        while not list(tmp_path.rglob("run.json")):  # of a training that has begun
            assert time.monotonic() < limit and process.poll() is None
            time.sleep(0.1)
        with pytest.raises(DataError, match="is writing there"):
            frontier.main(flags)
        if by == "kill":
            subprocess.run(["pkill", "-KILL", "-P", str(process.pid)], check=True)  # the child of bash
        else:
            os.killpg(process.pid, signal.SIGINT)
    while processes_of(process.pid):
        assert time.monotonic() < limit
        time.sleep(0.1)
    if by == "Ctrl-C":
        assert [line for line in errors.read_text().splitlines() if "runs of" not in line] == [
            "experiments.frontier: stopped by SIGINT"
        ]


def test_the_document_says_what_the_results_say():
    text, results = tables.DOCUMENT.read_text(), json.loads((ROOT / "results/frontier.json").read_text())
    assert tables.filled(text, results) == text, f"{tables.DOCUMENT} differs: run python -m experiments.tables"
    assert text.count("<!-- table: ") == 10


@pytest.fixture
def half_measured(tmp_path):
    """A run whose training was stopped by the deadline, and measuring after the first of its two checkpoints."""
    options = options_of(tmp_path, points=2, steps=16, images=20)
    (run,) = runs.plan("digits64", [arms.ARMS["default"]], [1], options)
    (run.directory / "log").mkdir(parents=True)
    (run.directory / "measured").mkdir()
    for r in (1, 2):
        (run.directory / "log" / f"global_ckpt_round{r}.pt").touch()
    np.savez(runs.arrays_path(run, 1, "raw"), skips=np.arange(64))
    points = [{"round": 1, "steps": 8, "weights": weights, "images": 20} for weights in runs.WEIGHTS]
    (run.directory / "points.json").write_text(json.dumps(points))
    return run


def test_what_is_measured_last_is_not_what_was_saved_last(half_measured):
    assert runs.rounds_kept(half_measured) == [1, 2]
    assert runs.is_measured(half_measured)
    assert runs.last_arrays(half_measured)["skips"].tolist() == list(range(64))
    path = half_measured.directory / "points.json"
    path.write_text(json.dumps(json.loads(path.read_text())[:1]))
    assert not runs.is_measured(half_measured), "it has no EMA point to compare with other runs"


def test_points_of_another_number_of_images_are_made_again(half_measured):
    assert {(p["round"], p["weights"]) for p in runs.read_points(half_measured)} == {(1, "raw"), (1, "ema")}
    more = dataclasses.replace(half_measured, data=dataclasses.replace(half_measured.data, images=40))
    assert runs.read_points(more) == [] and runs.arrays_path(more, 1, "raw") != runs.arrays_path(
        half_measured, 1, "raw"
    )


def test_a_training_with_other_flags_is_not_taken_for_done(half_measured):
    (half_measured.directory / "trained").write_text("\n".join(half_measured.flags))
    assert runs.is_trained(half_measured)
    longer = dataclasses.replace(half_measured, flags=(*half_measured.flags, "--total_round=9"))
    assert not runs.is_trained(longer)


def test_what_lies_deep_in_json_is_on_one_line(tmp_path):
    value = {"a": {"b": [{"c": [1, {"d": "x\n y"}]}, {}], "e": []}, "f": 0.1}
    runs.write_lines(tmp_path / "x.json", value, depth=3)
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == value and '\n      { "c": [ 1, { "d": "x\\n y" } ] },\n      {}\n' in text

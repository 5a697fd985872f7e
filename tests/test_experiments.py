"""The experiment: its arithmetic by hand or brute force, and the command itself with almost no steps."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from experiments import __main__ as experiments
from experiments import cifar10, digits, images, runs, tables
from experiments.matched import at_quality, best_common, comparison, interval, verdict
from score.swd import sliced_wasserstein
from tests.commands import ROOT, environment
from utils.errors import DataError, UsageError


def point(fpd, f_mem, images=200, extracted=0, **about):
    return {"fpd": fpd, "f_mem": f_mem, "images": images, "extracted": extracted, **about}


def test_memorisation_at_a_quality_by_hand():
    path = [point(*pair) for pair in ((4.0, 0.0), (2.0, 0.1), (1.0, 0.4), (1.5, 0.5), (0.5, 0.9))]
    by_hand = {2.0: 0.1, 3.0: 0.05, 1.25: 0.325, 0.75: 0.8, 5.0: 0.0, 0.4: np.nan}  # at 0.75 it got worse in between
    for quality, share in by_hand.items():
        np.testing.assert_allclose(at_quality(path, quality, "f_mem"), share)
    assert best_common(path, path[:3]) == 1.0
    doubled = [{**p, "other": 2 * p["fpd"]} for p in path]
    assert at_quality(doubled, 4.0, "f_mem", "other") == at_quality(path, 2.0, "f_mem")


def test_the_interval_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(0)
    for n in (3, 5):
        found = [interval(random.normal(0.1, 0.02, n)) for _ in range(400)]
        assert 0.92 < np.mean([low <= 0.1 <= high for _, low, high in found]) < 0.98
    values = [0.2, 0.5, 0.3]
    by_scipy = scipy.stats.ttest_1samp(values, 0).confidence_interval()
    np.testing.assert_allclose(interval(values)[1:], by_scipy)
    assert interval([0.25, 0.75]) == (0.5, None, None)


def test_each_seed_is_compared_with_its_own_baseline():
    points = [
        {"arm": arm, "seed": seed, **point(*pair)}
        for arm, seed, path in (
            ("default", 1, ((2.0, 0.0), (1.0, 0.4))),
            ("default", 2, ((2.0, 0.0), (0.8, 0.6))),
            ("default", 3, ((2.0, 0.0), (0.5, 0.9))),
            ("x", 1, ((2.0, 0.0), (0.5, 0.3))),
            ("x", 2, ((1.2, 0.1),)),
            ("x", 3, ((2.0, 0.0), (1.5, 0.1))),
        )
        for pair in path
    ]
    row = comparison(points, "x")  # at 1.0, 1.2 and 1.5
    assert row["seeds"] == 3 and row["fpd"] == pytest.approx(3.7 / 3)
    own, of_default = np.array([0.2, 0.1, 0.1]), np.array([0.4, 0.4, 0.3])
    np.testing.assert_allclose([row["f_mem"], row["default f_mem"]], [own.mean(), of_default.mean()])
    expected = scipy.stats.ttest_rel(own, of_default).confidence_interval()
    np.testing.assert_allclose(row["f_mem difference"], [(own - of_default).mean(), *expected])


def test_what_cannot_be_told_apart_is_not_called_equal():
    """A comparison is no test where the baseline copies nothing, far from its best, and with two seeds."""

    def compared(own, baseline, seeds=3):
        points = [{"arm": "x", "seed": s, **p} for s in range(seeds) for p in own]
        return comparison(points + [{"arm": "default", "seed": s, **p} for s in range(seeds) for p in baseline], "x")

    copying = [point(2.0, 0.0), point(1.0, 0.2, extracted=9)]
    assert verdict(compared([point(1.0, 0.0)], copying), "f_mem") == "less"
    assert verdict(compared([point(1.0, 0.4, extracted=12)], copying), "extracted") == "more"
    assert verdict(compared(copying, copying), "f_mem") == "not shown"
    assert "does not copy" in verdict(compared([point(1.0, 0.0)], [point(2.0, 0.0), point(0.9, 0.005)]), "f_mem")
    assert "above 1.5 times" in verdict(compared([point(1.8, 0.0)], copying), "f_mem")
    assert "2 of 3 seeds" in verdict(compared([point(1.0, 0.0)], copying, seeds=2), "f_mem")


def test_the_measures_by_brute_force(monkeypatch):
    random = torch.Generator().manual_seed(0)
    training, heldout, generated = (
        torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=random) for n in (60, 300, 300)
    )
    generated[:3] = training[5]
    generated[3:9] = (training[9].int() + torch.randint(0, 20, (6, 3, 8, 8), generator=random)).clamp(max=255)
    generated[9] = training[40]
    repeated = torch.arange(60) < 20
    monkeypatch.setattr(digits, "real_images", lambda data: (training, repeated, heldout))
    numbers = digits.measure(generated, {})
    x, y, real = (part.flatten(1).numpy() / 255 for part in (generated, training, heldout))
    distance = np.square(x[:, None] - y).sum(axis=2)
    ordered, nearest = np.sort(distance, axis=1), distance.argmin(axis=1)
    copies = (9 * ordered[:, 0] < ordered[:, 1]) | (ordered[:, 0] == 0)
    assert numbers["f_mem"] == copies.mean() == 10 / 300
    assert numbers["f_mem of copies"] == (copies & (nearest < 20)).mean() == 9 / 300
    assert numbers["extracted"] == len(set(nearest[copies & (nearest < 20)])) == 2
    assert numbers["near copies"] == (nearest < 20).mean()
    assert numbers["MQ@15"] == (100 * ordered[:, 0] / ordered[:, :50].mean(axis=1) < 15).mean()
    roots = scipy.linalg.sqrtm(np.cov(x.T) @ np.cov(real.T)).real
    fpd = np.square(x.mean(axis=0) - real.mean(axis=0)).sum() + np.trace(np.cov(x.T) + np.cov(real.T) - 2 * roots)
    assert numbers["fpd"] == pytest.approx(fpd, abs=1e-3)
    others = x[nearest >= 20]
    mixed = others.mean(axis=0) - real.mean(axis=0)
    roots = scipy.linalg.sqrtm(np.cov(others.T) @ np.cov(real.T)).real
    expected = np.square(mixed).sum() + np.trace(np.cov(others.T) + np.cov(real.T) - 2 * roots)
    assert numbers["fpd of others"] == pytest.approx(expected, abs=1e-3)


def test_arms_have_the_steps_they_say(tmp_path):
    data = images.load(**digits.DATA, data_root="")
    assert len(data.train.images) == 4000 and len(data.heldout.images) == 2980
    for name, spec in runs.EXPERIMENTS.items():
        planned = runs.plan(name, tmp_path, "data")
        assert len({run.directory for run in planned}) == len(planned) and {run.arm for run in planned} == set(
            spec.ARMS
        )
        assert [run.arm for run in planned[:2]] == ["default", "AGC"] and planned[0].seed == 1
        for run in planned:
            values = runs.values_of(run.flags)
            slots = values.num_train + values.duplicates * (values.copies - 1)
            size = slots if values.split == "all" else slots // values.client_num
            assert run.steps_per_round == values.client_num * values.local_epoch * (size // values.batch_size)
            assert run.rounds * run.steps_per_round == pytest.approx(spec.ARMS[run.arm]["steps"], rel=0.04), run.arm
            if name == "cifar10":
                assert run.rounds == (1 if run.arm == "score ensemble" else 20) and not values.duplicates
            else:
                assert digits.real_images(run.data)[0].shape == (2020, 3, values.img_size, values.img_size)


def test_the_measures_of_cifar10_by_brute_force(tmp_path, monkeypatch):
    rows = random_cifar10(tmp_path)
    monkeypatch.setitem(cifar10.DATA, "num_train", 60)
    data = {**cifar10.DATA, "data_root": tmp_path}
    loaded = images.load(**data)
    training, heldout = loaded.train.images, loaded.heldout.images
    assert not loaded.hflip and len(training) + len(heldout) == rows
    generated = heldout[:100].clone()
    generated[:5] = training[:5]
    numbers = cifar10.measure(generated, data)

    def mq(x, p):
        distance = np.square(x.flatten(1).numpy()[:, None] / 255.0 - training.flatten(1).numpy() / 255.0).sum(axis=2)
        ordered = np.sort(distance, axis=1)
        return (100 * ordered[:, 0] / ordered[:, :50].mean(axis=1) < p).mean()

    for p in (15, 30, 50):
        assert numbers[f"MQ@{p}"] == pytest.approx(mq(generated, p))
        assert numbers[f"MQ@{p} above"] == pytest.approx(mq(generated, p) - mq(heldout, p))
    assert numbers["extracted"] == 5 and numbers["f_mem"] >= 0.05
    assert numbers["swd"] == sliced_wasserstein(heldout, generated)["16"]
    assert numbers["fpd"] == images.fpd(generated, heldout)
    real = cifar10.floor(tmp_path)
    assert real["MQ@30 above"] == 0 and real["fpd"] > 0 and real["swd"] > 0


def random_cifar10(folder):
    """Write batches of random images in CIFAR's format, 100 each; returns how many images they are."""
    random = np.random.default_rng(0)
    directory = folder / "cifar-10-batches-py"
    directory.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        content = {"data": random.integers(0, 256, (100, 3072), np.uint8), "labels": [i % 10 for i in range(100)]}
        (directory / name).write_bytes(pickle.dumps(content))
    return 600


@pytest.mark.parametrize("wrong", [["--arms=nothing"], ["--minutes=x"], ["--unknown"]])
def test_a_wrong_flag_is_named(wrong, tmp_path):
    with pytest.raises(UsageError, match=wrong[0].partition("=")[0]):
        experiments.main([*wrong, "--experiment=digits", f"--out={tmp_path}"])


def test_nothing_is_made_twice(tmp_path, monkeypatch):
    """A trial of arms of every kind: one model, an ensemble of scores, and all of IET-AGC+ from a checkpoint."""
    chosen = ["default", "clustered score ensemble", "clustered IET-AGC+ (fine-tuned)"]
    seeds = dict.fromkeys(chosen, range(1, 2))
    monkeypatch.setattr(digits, "SEEDS", seeds)
    monkeypatch.setattr(digits, "ARMS", {arm: digits.ARMS[arm] for arm in chosen})
    monkeypatch.setattr(digits, "POINTS", 2)
    command = ["--experiment=digits", "--scale=0.008", f"--out={tmp_path}"]
    experiments.main(command)
    experiments.main(command)  # the fine-tuned one begins when default training is there
    result = json.loads((tmp_path / "digits.json").read_text())
    assert [(t["arm"], t["device"], t["stacked"]) for t in result["trainings"]] == [(a, "cpu", False) for a in chosen]
    assert list(dict.fromkeys(p["arm"] for p in result["points"])) == chosen
    assert {p.get("network") for p in result["points"] if p["arm"] == "clustered score ensemble"} == {None, "sub-model"}
    assert all(0 <= p["f_mem"] <= 1 and p["fpd"] > 0 for p in result["points"])
    assert result["floor"]["fpd of the training set"] > result["floor"]["fpd of distinct training images"] > 0
    for name, table in tables.TABLES.items():
        header, rows = table(result)
        assert all(len(row) == len(header) for row in rows), name
    monkeypatch.setattr(runs, "work", None)
    shutil.rmtree(tmp_path / "runs")  # the file alone says what need not be made again
    experiments.main(command)
    again = json.loads((tmp_path / "digits.json").read_text())
    assert again["points"] == result["points"] and again["trainings"] == result["trainings"]
    with pytest.raises(UsageError, match="other flags: choose another --out"):
        experiments.main([*command[:1], "--scale=0.01", *command[2:]])


def processes_of(session):
    """{process number: command} of a session, of those that have not ended."""
    columns = ["ps", "-s", str(session), "-o", "pid=,stat=,args="]
    found = subprocess.run(columns, capture_output=True, text=True, check=False).stdout.splitlines()
    rows = (line.split(maxsplit=2) for line in found)
    return {int(pid): command for pid, state, command in rows if not state.startswith("Z")}


def test_a_stopped_experiment_leaves_no_process_behind(tmp_path):
    """By SIGKILL the trainings at work go on, but no other begins."""
    flags = ["--experiment=digits", "--arms=default"]
    started, limit = {}, time.monotonic() + 100
    for by in ("SIGKILL", "Ctrl-C"):
        command = [sys.executable, "-m", "experiments", *flags, f"--out={tmp_path / by}"]
        with (tmp_path / f"{by}.err").open("w") as err:
            settings = {"cwd": ROOT, "env": environment(), "stderr": err, "start_new_session": True}
            started[by] = subprocess.Popen(command, **settings)
    for by, process in started.items():
        while not list((tmp_path / by).rglob("run.json")):  # of a training that has begun
            assert time.monotonic() < limit and process.poll() is None
            time.sleep(0.1)
    with pytest.raises(DataError, match="is writing there"):
        experiments.main([*flags, f"--out={tmp_path / 'SIGKILL'}"])
    started["SIGKILL"].kill()
    os.killpg(started["Ctrl-C"].pid, signal.SIGINT)
    assert started["Ctrl-C"].wait(20) == 130
    while any(processes_of(process.pid) for process in started.values()):
        assert time.monotonic() < limit
        for pid, command in processes_of(started["SIGKILL"].pid).items():
            if "main_fed.py" in command:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    for by in started:
        assert len(list((tmp_path / by).glob("runs/digits/default/*"))) <= os.cpu_count()
    lines = (tmp_path / "Ctrl-C.err").read_text().splitlines()
    assert [line for line in lines if not line.startswith("runs:")] == ["experiments: stopped by SIGINT"]


def test_the_document_says_what_the_results_say():
    text, results = tables.DOCUMENT.read_text(), json.loads((ROOT / "results/digits.json").read_text())
    assert tables.filled(text, results) == text, f"{tables.DOCUMENT} differs: run python -m experiments.tables"
    assert text.count("<!-- table: ") == len(tables.TABLES)

"""The experiment: its arithmetic by hand or brute force, and the command itself with almost no steps."""

import json
import os
import pickle
import re
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
from PIL import Image

from experiments import __main__ as experiments
from experiments import altered, cifar10, digits, images, lora, lora_rates, runs, tables
from experiments.matched import at_quality, best_without_copying, corrected, holm, onset, welch
from score.swd import sliced_wasserstein
from tests.commands import ROOT, environment, forking_python, run_module
from tests.text_files import save_captions, save_images, saved_pipeline
from training import build
from utils.errors import DataError, UsageError
from utils.name_lists import write_names, write_table

KINDS = ("generate", "similar", "grid")  # of what all_in writes


def test_memorisation_at_a_quality_by_hand():
    numbers = ((4.0, 0.0), (2.0, 0.1), (1.0, 0.4), (1.5, 0.5), (0.5, 0.9))
    path = [{"fpd": fpd, "f_mem": f_mem, "other": 2 * fpd} for fpd, f_mem in numbers]
    by_hand = {2.0: 0.1, 3.0: 0.05, 1.25: 0.325, 0.75: 0.8, 5.0: 0.0, 0.4: np.nan}  # at 0.75 it got worse in between
    for quality, share in by_hand.items():
        np.testing.assert_allclose(at_quality(path, quality, "f_mem"), share)
    assert at_quality(path, 4.0, "f_mem", "other") == at_quality(path, 2.0, "f_mem")


def test_the_best_quality_without_copying_and_the_onset_by_hand():
    numbers = ((100, 3.0, -0.01), (200, 1.0, 0.02), (300, 2.0, 0.04), (400, 0.5, 0.10), (500, 0.8, 0.01))
    path = [{"steps": steps, "fpd": fpd, "MQ@30 above": above} for steps, fpd, above in numbers]
    assert best_without_copying(path, "fpd") == 0.8 and best_without_copying(path[:4], "fpd") == 1.0
    assert np.isnan(best_without_copying(path[2:4], "fpd"))
    assert onset(path) == 200  # where it passes 0.02, which is no copying yet
    assert onset([path[0], path[3]]) == pytest.approx(100 + 300 * 3 / 11)
    assert onset(path[3:]) == 400 and np.isnan(onset(path[:2]))


def test_welch_by_its_formula():
    random = np.random.default_rng(0)
    for sizes in ((3, 3), (5, 8), (3, 12)):
        one, other = (random.normal(i, 1 + i, size) for i, size in enumerate(sizes))
        of_means = np.array([np.var(x, ddof=1) / len(x) for x in (one, other)])
        error = np.sqrt(of_means.sum())
        freedom = of_means.sum() ** 2 / (of_means**2 / (np.array(sizes) - 1)).sum()
        difference, half = one.mean() - other.mean(), scipy.stats.t.ppf(0.975, freedom) * error
        p = 2 * scipy.stats.t.sf(abs(difference) / error, freedom)
        np.testing.assert_allclose(welch(one, other), [difference, difference - half, difference + half, p])
    one_sample = scipy.stats.ttest_1samp([-1, -2, -3], 0)  # the same where one side has no spread
    expected = [-2, *one_sample.confidence_interval(), one_sample.pvalue]
    np.testing.assert_allclose(welch([0.0, 0.0, 0.0], [1.0, 2.0, 3.0]), expected)
    assert welch([0.25, 0.75], [1.0, 2.0, 3.0]) == (-1.5, None, None, None)
    assert welch([1.0] * 3, [3.0] * 4) == (-2.0, None, None, None)
    difference, *test = welch([1.0, 2.0, np.nan], [1.0, 2.0, 3.0])
    assert np.isnan(difference) and test == [None] * 3


def test_holm_is_bonferroni_of_every_subset():
    """Closed testing: a hypothesis is rejected if every set that holds it is, each by Bonferroni."""
    random = np.random.default_rng(0)
    for n in (1, 2, 5):
        for p_values in (*random.uniform(0, 0.3, (5, n)), np.full(n, 0.02)):
            sets = [np.flatnonzero([bits >> i & 1 for i in range(n)]) for bits in range(1, 2**n)]
            by_set = {tuple(chosen): min(1, len(chosen) * p_values[chosen].min()) for chosen in sets}
            expected = [max(p for chosen, p in by_set.items() if i in chosen) for i in range(n)]
            np.testing.assert_allclose(holm(p_values), expected)
    assert holm([]) == []
    comparisons = {"a": (1.0, 0.0, 2.0, 0.01), "b": (1.0, None, None, None), "c": (1.0, 0.0, 2.0, 0.04)}
    assert [found[-1] for found in corrected(comparisons).values()] == [0.02, None, 0.04]


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
    write_lists(runs.lists_of("altered", tmp_path))
    for name, spec in runs.EXPERIMENTS.items():
        planned = runs.plan(name, tmp_path, "data")
        assert len({run.directory for run in planned}) == len(planned) and {run.arm for run in planned} == set(
            spec.ARMS
        )
        assert [run.arm for run in planned[:2]] == ["default", "AGC"] and planned[0].seed == 1
        for run in planned:
            values = runs.values_of(run.flags)
            slots = values.num_train + values.duplicates * (values.copies - 1)
            sizes = [slots if values.split == "all" else slots // values.client_num] * values.client_num
            if name == "altered":
                data = images.load(**run.data, keep_list=values.keep_list)
                sizes = build.sizes(values, data, build.slots(values, data))
            steps = sum(size // values.batch_size for size in sizes)
            assert run.steps_per_round == values.local_epoch * steps
            assert run.rounds * run.steps_per_round == pytest.approx(spec.ARMS[run.arm]["steps"], rel=0.04), run.arm
            if name == "cifar10":
                assert run.rounds == (1 if run.arm == "score ensemble" else 20) and not values.duplicates
            elif name == "digits":
                assert digits.real_images(run.data)[0].shape == (2020, 3, values.img_size, values.img_size)


def write_lists(folder):
    """What the finder would write of the altered copies if it found all of them but one, and 97 pairs more.

    As many images are kept as by the finder's own lists."""
    data = {**altered.DATA, "data_root": ""}
    del data["groups"]
    names = images.load(**data).train.names
    wrong = dict(zip(names[:194:2], names[1:194:2], strict=True))  # single images
    wrong[names[-1]] = names[-1]
    group_of = {name: wrong.get(name, altered.original(name)) for name in names}
    folder.mkdir(parents=True)
    write_table(folder / "groups.csv", ("group", "image"), [(group, name) for name, group in group_of.items()])
    kept = {group: name for name, group in group_of.items()}
    write_names(folder / "keep.txt", kept.values())
    assert len(kept) == 1924


def test_the_measures_with_groups_by_brute_force():
    """Copies of an image that is there three times, altered, and of one that is there once."""
    random = torch.Generator().manual_seed(0)
    training, heldout, generated = (
        torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=random) for n in (60, 20, 100)
    )
    training[20:40] = training[:20] ^ 1
    training[40:50] = training[:10] ^ 2
    groups = torch.cat([torch.arange(20), torch.arange(20), torch.arange(10), torch.arange(20, 30)])
    generated[:6], generated[6] = training[[3, 23, 43, 4, 24, 15]] ^ 4, training[55] ^ 4
    repeated = torch.arange(60) < 50
    numbers = digits.numbers_of(generated, training, repeated, heldout, groups)
    distance = np.square(generated.flatten(1).numpy()[:, None] / 255.0 - training.flatten(1).numpy() / 255.0).sum(
        axis=2
    )
    copied, below = [], 0
    for row in distance:
        nearest = row.argmin()
        others = np.sort(row[groups != groups[nearest]])
        copied += [nearest] if 9 * row[nearest] < others[0] else []
        below += row[nearest] < 0.15 * np.mean([row[nearest], *others[:49]])
    assert numbers["f_mem"] == len(copied) / 100 == 0.07 and numbers["MQ@15"] == below / 100
    assert numbers["extracted"] == 3 and numbers["f_mem of copies"] == 0.06
    without = digits.numbers_of(generated, training, repeated, heldout)
    assert without["f_mem"] == 0.01  # which sees none of those


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
    real = cifar10.floor(data)
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


def make_in_this_process(command, monkeypatch, work=runs.work):
    """Run the command without its pool of processes, and its trainings in forks: in half the time."""
    with monkeypatch.context() as at_once:
        at_once.setattr(sys, "executable", forking_python())
        at_once.setattr(runs, "work_on", lambda found, *_: [work(run) for run in found])
        experiments.main(command)


def test_nothing_is_made_twice(tmp_path, monkeypatch):
    """A trial of arms of every kind: one model, an ensemble of scores, and all of IET-AGC+ from a checkpoint."""
    chosen = ["default", "clustered score ensemble", "clustered IET-AGC+ (fine-tuned)"]
    seeds = dict.fromkeys(chosen, range(1, 2))
    monkeypatch.setattr(digits, "SEEDS", seeds)
    monkeypatch.setattr(digits, "ARMS", {arm: digits.ARMS[arm] for arm in chosen})
    monkeypatch.setattr(digits, "POINTS", 2)
    monkeypatch.setattr(digits, "DATA", {**digits.DATA, "num_train": 220, "copies": 10})
    monkeypatch.setattr(digits, "SAMPLER", {**digits.SAMPLER, "sample_steps": 4})
    command = ["--experiment=digits", "--scale=0.001", f"--out={tmp_path}", "--processes=1"]
    experiments.main([*command, "--arms=default"])
    make_in_this_process(command, monkeypatch)
    result = json.loads((tmp_path / "digits.json").read_text())
    assert [(t["arm"], t["device"], t["stacked"]) for t in result["trainings"]] == [(a, "cpu", False) for a in chosen]
    assert list(dict.fromkeys(p["arm"] for p in result["points"])) == chosen
    assert {p.get("network") for p in result["points"] if p["arm"] == "clustered score ensemble"} == {None, "sub-model"}
    assert all(0 <= p["f_mem"] <= 1 and p["fpd"] > 0 for p in result["points"])
    assert result["floor"]["fpd of the training set"] > result["floor"]["fpd of distinct training images"] > 0
    check_tables("digits", result)
    monkeypatch.setattr(runs, "work", None)
    shutil.rmtree(tmp_path / "runs")  # the file alone says what need not be made again
    experiments.main(command)
    again = json.loads((tmp_path / "digits.json").read_text())
    assert again["points"] == result["points"] and again["trainings"] == result["trainings"]
    with pytest.raises(UsageError, match="other flags: choose another --out"):
        experiments.main([*command[:1], "--scale=0.01", *command[2:]])


def test_groups_are_known_whatever_their_scores(tmp_path):
    """Their last digits, and so the order of rows, depend on the processor."""

    def hashed(*rows):
        (tmp_path / "groups.csv").write_text("\n".join(["group,image,kept,score,kind", *rows, ""]))
        return altered.hash_of_groups(tmp_path / "groups.csv")

    known = hashed("0,a,yes,,", "0,b,no,0.1,near", "0,c,no,0.2,near", "1,d,yes,,", "1,e,no,0.2,near")
    assert known == hashed("0,d,yes,,", "0,e,no,0.199999,near", "1,a,yes,,", "1,c,no,0.1,near", "1,b,no,0.1,near")
    assert known != hashed("0,b,yes,,", "0,a,no,0.1,near", "0,c,no,0.2,near", "1,d,yes,,", "1,e,no,0.2,near")
    assert known != hashed("0,a,yes,,", "0,b,no,0.1,near", "1,d,yes,,", "1,e,no,0.2,near", "1,c,no,0.2,near")


def test_the_experiment_on_altered_copies(tmp_path, monkeypatch):
    """A trial with the finder, and with checkpoints that two arms have."""
    chosen = ["default", "keep list", "together IET-AGC", "held back"]
    of_digits = images.load(dataset="digits", img_size=8, data_root="").train.images[:110]
    (tmp_path / "images").mkdir()
    for i, image in enumerate(of_digits):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"images/{i}.png")
    data = {**altered.DATA, "dataset": "folder", "num_train": 80, "duplicates": 4, "copies": 20}
    monkeypatch.setattr(altered, "DATA", data)
    monkeypatch.setattr(altered, "SEEDS", dict.fromkeys(chosen, range(1, 2)))
    monkeypatch.setattr(altered, "ARMS", {arm: altered.ARMS[arm] for arm in chosen})
    flags = ["--experiment=altered", "--scale=0.0005", "--processes=1"]
    command = [*flags, f"--out={tmp_path}", f"--data_root={tmp_path}/images"]
    make_in_this_process(command, monkeypatch)
    result, lists = json.loads((tmp_path / "altered.json").read_text()), tmp_path / "runs/altered/lists"
    assert [training["arm"] for training in result["trainings"]] == chosen
    points = {arm: [point for point in result["points"] if point["arm"] == arm] for arm in chosen}
    assert len(points["held back"]) == len(points["default"]) > 1
    assert all(0 <= point["held_back"]["share"] <= 1 for point in points["held back"])
    found, said = result["lists"], json.loads((lists / "result.json").read_text())
    assert found["kept"] == said["kept"] == sum(found["copies kept of each"]) + found["single images kept"]
    assert found["true pairs found"] + found["false pairs"] == said["pairs"]["train near"]
    assert found["true pairs"] == 760 and found["true pairs found"] > 380 and found["single images"] == 76
    check_tables("altered", result)
    # with the file alone, without checkpoints, those of default are made again for the images that are held back
    shutil.rmtree(tmp_path / "runs/altered/default")
    shutil.rmtree(tmp_path / "runs/altered/held back")
    of_others = {name: [row for row in result[name] if row["arm"] != "held back"] for name in ("trainings", "points")}
    (tmp_path / "altered.json").write_text(json.dumps(result | of_others))
    make_in_this_process([*command, "--arms=held back"], monkeypatch)
    again = json.loads((tmp_path / "altered.json").read_text())
    assert again["trainings"][:1] == result["trainings"][:1]
    numbers = [[(point["arm"], point["fpd"]) for point in both["points"]] for both in (again, result)]
    assert numbers[0] == numbers[1]

    kept = (lists / "keep.txt").read_text().splitlines()
    (lists / "keep.txt").write_text("\n".join(kept[:-1]))
    with pytest.raises(UsageError, match="other lists of copies: choose another --out"):
        experiments.main(command)


def check_tables(experiment, result):
    """That all tables of an experiment can be made and read."""
    for name, table in tables.TABLES.items():
        if name.startswith(experiment):
            header, rows = table(result)
            assert rows and all(len(row) == len(header) <= 8 for row in rows), name


def made_up_cifar10(seeds):
    """A result of the experiment on CIFAR-10: {arm: (how many seeds, its fpd without copying)}."""
    random, points = np.random.default_rng(0), []
    names = ("fpd", "swd", "f_mem", "near copies", *(f"MQ@{p} above" for p in (15, 30, 50)))
    for arm, (n, best) in seeds.items():
        spec = cifar10.ARMS[arm]
        for seed in range(1, n + 1):
            for i in range(1, 21):
                steps = i * spec["steps"] // 20
                above = 0.01 * (i - 10) + 0.001 * seed
                fpd = best + abs(i - 10) / 10 + random.normal(0, 0.01)
                numbers = (fpd, 60 * fpd, max(above, 0), 0.3, above / 2, above, 2 * above)
                about = {"arm": arm, "seed": seed, "steps": steps, "sequential": steps // spec["client_num"]}
                points.append(about | dict(zip(names, numbers, strict=True)))
    return {"points": points, "floor": {"fpd": 0.1, "swd": 19.0}, "data": cifar10.DATA}


def test_the_tables_and_the_figure_of_cifar10(tmp_path):
    arms = {"default": (3, 0.5), "AGC": (3, 0.4), "random skip": (3, 0.5), "IET-AGC": (3, 1.0), "IET": (1, 1.2)}
    result = made_up_cifar10(arms | {"250 images": (1, 0.8), "1000 images": (1, 0.3)})
    check_tables("cifar10", result)
    _, rows = tables.cifar10_primary(result)
    assert [row[0] for row in rows] == [*arms, "AGC, to random skip"]
    paths = {arm: tables.paths_of(result["points"], arm) for arm in arms}
    pairs = [(arm, "default") for arm in ("AGC", "random skip", "IET-AGC")] + [("AGC", "random skip")]
    best = {
        (arm, axis): [min(p[axis] for p in path if p["MQ@30 above"] <= 0.02) for path in paths[arm].values()]
        for arm in arms
        for axis in ("fpd", "swd")
    }
    tests = [scipy.stats.ttest_ind(best[a, x], best[b, x], equal_var=False) for x in ("fpd", "swd") for a, b in pairs]
    p_values = holm([test.pvalue for test in tests])
    expected = [f"{p:.3f}" if p >= 0.001 else "< 0.001" for p in p_values]
    assert [row[column] for column in (4, 7) for row in (*rows[1:4], rows[5])] == expected
    assert rows[1][2] == f"{np.mean(best['AGC', 'fpd']):.3f} ± {np.std(best['AGC', 'fpd'], ddof=1):.3f}"
    low, high = tests[0].confidence_interval()
    assert rows[1][3] == f"{np.subtract(*(np.mean(best[a, 'fpd']) for a in pairs[0])):+.3f} [{low:+.3f}, {high:+.3f}]"
    assert rows[4][4] == rows[4][7] == "shown, not compared" and "[" not in rows[4][3] and "±" not in rows[4][2]
    assert tables.cifar10_sizes(result)[1][0][:3] == [250, 1, f"{11.9 * 8400 / 20:,.0f}"]
    _, in_a_row = tables.TABLES["cifar10 in a row"](result)
    assert in_a_row[0][2] == "+5.2% ± 0.1%" and in_a_row[3][2] == "+10.2% ± 0.1%"  # 12,600 steps: 15 of 20, and the end
    tables.plot("cifar10", tmp_path / "cifar10.png", result)
    assert (tmp_path / "cifar10.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arms", [{"AGC": (1, 0.5)}, {"default": (1, 0.5)}, {"250 images": (1, 0.5)}])
def test_the_tables_of_cifar10_of_its_first_training(arms, tmp_path):
    result = made_up_cifar10(arms)
    assert tables.shown("cifar10", result)
    for name, table in tables.TABLES.items():
        if name.startswith("cifar10"):
            table(result)
    tables.plot("cifar10", tmp_path / "cifar10.png", result)


def test_a_table_without_results_stays_as_it_is():
    text = "a\n<!-- table: cifar10 primary -->\nb\n<!-- end -->\nc\n<!-- table: digits arms -->\n<!-- end -->\n"
    assert tables.filled(text, {}) == text
    filled = tables.filled(text, {"cifar10": made_up_cifar10({"default": (1, 0.5)})})
    before, after = text.split("b\n")
    assert filled.startswith(before + "| arm ") and filled.endswith(after) and filled.count("\n| default |") == 1


def processes_of(session):
    """{process number: command} of a session, of those that have not ended."""
    columns = ["ps", "-s", str(session), "-o", "pid=,stat=,args="]
    found = subprocess.run(columns, capture_output=True, text=True, check=False).stdout.splitlines()
    rows = (line.split(maxsplit=2) for line in found)
    return {int(pid): command for pid, state, command in rows if not state.startswith("Z")}


def test_a_stopped_experiment_leaves_no_process_behind(tmp_path):
    """By SIGKILL the trainings at work go on, but no other begins."""
    flags = ["--experiment=digits", "--arms=default", "--processes=1"]
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
        assert len(list((tmp_path / by).glob("runs/digits/default/*"))) == 1
    lines = (tmp_path / "Ctrl-C.err").read_text().splitlines()
    assert [line for line in lines if not line.startswith("runs:")] == ["experiments: stopped by SIGINT"]


def test_the_document_says_what_the_results_say():
    results = tables.read_results()
    for document in tables.DOCUMENTS:
        text = document.read_text()
        assert tables.filled(text, results) == text, f"{document} differs: run python -m experiments.tables"
    text = tables.DOCUMENTS[0].read_text()
    assert {f"digits {place}" for place in re.findall("<!-- table: digits (.*) -->", text)} == {
        name for name in tables.TABLES if name.startswith("digits")
    }


def test_the_experiment_on_lora(tmp_path, monkeypatch):
    """One training of shards with a LoRA, against text_to_image.all_in, and then by the file alone."""
    made, log = tmp_path / "runs/emoji", tmp_path / "runs/lora/LoRA 2 IET-AGC/seed1/log"
    saved_pipeline(made)
    for part, number in (("train", 16), ("heldout", 36)):
        save_images(made / part, [f"{part}{i:02}.png" for i in range(number)], lora.SIDE)
    for i in range(16):  # which are those of the training
        (made / f"heldout/heldout{i:02}.png").unlink()
    save_captions(made / "train.json", {f"train{i:02}.png": [f"image {i}", "it"] for i in range(16)})
    (made / "made.json").write_text('{"vae_steps": 1, "unet_steps": 4}')
    monkeypatch.setattr(lora, "SEEDS", dict.fromkeys(lora.ARMS, range(1, 2)))
    monkeypatch.setattr(lora, "ROUNDS", 2)
    monkeypatch.setattr(lora, "POINTS", 2)
    monkeypatch.setitem(lora.TRAINING, "batch_size", 2)
    command = ["--experiment=lora", "--arms=LoRA 2 IET-AGC", "--processes=1", f"--out={tmp_path}", "--scale=0.002"]
    make_in_this_process(command, monkeypatch, lora.work)
    result = json.loads((tmp_path / "lora.json").read_text())
    assert result["data"] == lora.DATA and result["flags"].keys() == {"LoRA 2 IET-AGC"}
    flags, points = result["flags"]["LoRA 2 IET-AGC"], result["points"]
    assert {"--lora_rank=2", "--lora_freeze_a=True"} <= set(flags) and str(tmp_path) not in str(flags)
    assert [point["steps"] for point in points] == [0, 4, 8] and points[0]["similarity"] != points[2]["similarity"]
    flags = ["--prompts=all", "--num_images=8", "--features=pixels", "--seed=1", "--device=cpu", "--guidance=2"]
    flags += ["--scheduler=dpm", "--sample_steps=10", f"--heldout={made / 'heldout'}", f"--unet={log}"]
    run_module("text_to_image.all_in", *flags, *(f"--{kind}_dir={kind}" for kind in KINDS), cwd=tmp_path)
    theirs = json.loads((tmp_path / "grid/result.json").read_text())
    for numbers, point in ((theirs, points[-1]), (theirs["base"], points[0])):
        expected = {name: numbers["similarity"][name] for name in ("own_image", "f_mem")}
        expected |= {"similarity": numbers["similarity"]["sim_mean"], "fpd": numbers["heldout_fpd"]}
        assert expected == pytest.approx({name: point[name] for name in expected}, rel=1e-4)
        above = point["similarity"] - theirs["holdout"]["similarity"]["sim_mean"]
        assert point["similarity above"] == pytest.approx(above)
    check_tables("lora arms", result)
    shutil.rmtree(tmp_path / "runs/lora")
    monkeypatch.setattr(lora, "work", None)
    experiments.main(command)
    assert json.loads((tmp_path / "lora.json").read_text())["points"] == points
    with pytest.raises(UsageError, match="was made with another --scale"):
        experiments.main([*command[:-1], "--scale=0.1"])


def test_the_tables_of_lora_by_hand(tmp_path):
    """Of three seeds, whose fpd without copying is by construction that of the second point."""
    points = [
        {"arm": arm, "seed": seed, "steps": steps, "fpd": fpd + i / 10 + seed / 100, "own_image above": own,
         "f_mem above": 0.0, "similarity above": 0.1}
        for i, arm in enumerate(lora.ARMS) for seed in (1, 2, 3)
        for steps, fpd, own in ((0, 2.0, 0.0), (480, 1.5, 0.1), (960, 1.0, 0.11))
    ]  # fmt: skip
    header, rows = tables.lora_arms({"points": points})
    assert len(header) == 8 and rows[0][:4] == ["default, 3", "1.520 ± 0.010", "", ""]
    assert rows[-1][:2] == ["LoRA 32 IET-AGC, 3", "2.220 ± 0.010"] and rows[-1][2].startswith("+0.700 [+0.6")
    assert rows[-1][3] == "< 0.001" and rows[-1][4:] == [
        "+11.0% ± 0.0%",
        "+0.0% ± 0.0%",
        "+0.100 ± 0.000",
        "1.720 ± 0.010",
    ]
    tables.plot("lora", tmp_path / "lora.png", {"points": points})
    assert (tmp_path / "lora.png").read_bytes().startswith(b"\x89PNG")


def test_the_rates_of_lora_are_those_by_the_rule():
    grid = {(rank, lr): abs(lr - 3e-3) + rank for rank in (0, 8) for lr in lora_rates.GRID}
    points = [
        {"arm": lora_rates.name_of(*key), "seed": 4, "steps": steps, **({"loss": loss} if steps else {})}
        for key, loss in grid.items() for steps in (0, 240)
    ]  # fmt: skip
    assert lora_rates.chosen(points) == {0: 3e-3, 8: 3e-3} and lora_rates.chosen(points[:-1]) == {0: 3e-3}
    assert [row[-1] for row in tables.lora_grid({"points": points})[1]] == ["0.003", "-", "0.003", "-"]
    for run in lora.plan("lora_rates", lora_rates, ROOT):
        assert run.rounds * run.steps_per_round == lora.STEPS / 4 and run.seed == 4
    for run in lora.plan("lora", lora, ROOT):
        assert run.rounds * run.steps_per_round == lora.STEPS and "--save_round=4" in run.flags
    result = tables.read_results().get("lora_rates")
    assert result is None or lora_rates.chosen(result["points"]) == lora.RATES

"""score.compare: what may stand side by side, what may be averaged, and the page."""

import base64
import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from score.columns import is_old, renewed, summary
from score.compare import floors_of
from score.evaluate import evaluate, identity
from score.grids import save_grids
from score.memorization import memorization_ratio
from score.report import SERIES
from tests.browser import assert_readable, needs_chromium, seen_at
from tests.commands import eval_flags, run, run_module
from tests.test_report import Tags, charts_of
from tests.test_startup import ODD

SHA, OTHER = "12345678" + "a" * 56, "87654321" + "b" * 56
SIMILARITY = {"sim_mean": 0.5, "sim_gt_05pc": 0.25, "sim_histogram": [0.5, 0.5]}
RESULT = {
    "N": 40,
    "checkpoint": "logs/x/ckpt6k.pt",
    "weights": "ema",
    "training_sha256": SHA,
    "training_set_size": 30,
    "flags": {"img_size": 32},
    "pixels": {"mq": {}, "mq_fraction": {"15": 0.25}, "extracted": 3},
    "holdout": {"N": 20, "images_sha256": SHA, "pixels": {"mq_fraction": {"15": 0.125}}},
    "similarity": {"features": "sscd", "preprocess": "published", "weights_sha256": SHA, **SIMILARITY},
    "fid_reference": "train",
    "scored_with": {"features": "inception", "images": SHA, "weights": SHA},
    "fid": 2.0,
    "origin": {"checkpoint_sha256": SHA, "weights": "ema", "sampler": "ddim", "steps": 50, "seed": 0},
    "training": {"script": "main", "lr": 1e-3, "seed": 0, "training images (sha256)": SHA},
}
TEXT = {"N": 40, "similarity": {"features": "sscd", **SIMILARITY, "mq_fraction": {"15": 0.25}}}
# as earlier versions wrote them
OLD = {
    "N": 40,
    "checkpoint": "logs/x/ckpt6k.pt",
    "mq": {"15": 10},
    "mq_fraction": {"15": 0.25},
    "mq_curve": [0.0, 0.25],
    "share_sqrt_d1_d2_below_third": 0.125,
    "extracted": 3,
    "auth_pct": 50.0,
    "mirrored": {"share_sqrt_d1_d2_below_third": 0.5, "extracted": 5},
    "holdout": {"N": 20, "images_sha256": SHA, "mq_fraction": {"15": 0.125}, "share_sqrt_d1_d2_below_third": 0.0},
    "mq_above_floor": {"15": 0.125},
    "c_t": -1.0,
    "c_t_cells": 2,
    "feature_space": {
        "features": "pixels",
        "preprocess": None,
        **SIMILARITY,
        "f_mem": 0.75,
        "bg_mean": 0.4,
        "holdout": {"N": 20, **SIMILARITY, "f_mem": 0.25},
    },
    "fpd": 2.0,
}
OLD_TEXT = {
    "N": 40,
    "features": "sscd",
    "preprocess": "published",
    **SIMILARITY,
    "mq_fraction": {"15": 0.25},
    "f_mem": 0.5,
    "own_image": 0.75,
    "bg_mean": 0.4,
    "fpd": 2.0,
    "clip_score": 30.0,
    "base": {"N": 40, "images_sha256": SHA, **SIMILARITY, "f_mem": 0.25, "own_image": 0.125, "fpd": 4.0},
    "detector": {"above_05": {"auc": 0.75}},
}


def changed(result, changes):
    """A result with other values, some of them of its dicts."""
    new = {
        key: {**result.get(key, {}), **value} if isinstance(value, dict) else value for key, value in changes.items()
    }
    return {**result, **new}


def write_run(directory, result):
    directory.mkdir(parents=True)
    (directory / "result.json").write_text(json.dumps(result))
    return directory


def first_cells(table):
    return [line.split("|")[1].strip() for line in table.splitlines()[2:]]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training_sha256": OTHER}, "training images: A: 12345678…; B: 87654321…"),
        ({"training_set_size": 29}, "number of training images: A: 30; B: 29"),
        ({"flags": {"img_size": 64}}, "image size: A: 32; B: 64"),
        ({"N": 41}, "number of images: A: 40; B: 41"),
        ({"groups": {"sha256": OTHER}}, "groups of training images: A: none; B: 87654321…"),
        ({"pixels": {"mirrored": {"extracted": 4}}}, "mirror images: A: False; B: True"),
        ({"holdout": {"images_sha256": OTHER}}, "held-out images: A: 12345678…; B: 87654321…"),
        ({"holdout": {"N": 19}}, "number of held-out images: A: 20; B: 19"),
        ({"holdout": None}, "held-out images: A: 12345678…; B: none"),
        ({"fid_reference": "heldout"}, "fid_reference: A: train; B: heldout"),
        ({"scored_with": {"images": OTHER}}, "reference images: A: 12345678…; B: 87654321…"),
        ({"scored_with": {"weights": OTHER}}, "scores: weights: A: 12345678…; B: 87654321…"),
        ({"similarity": {"features": "clip"}}, "features of similarity: A: sscd; B: clip"),
        ({"similarity": {"preprocess": "recommended"}}, "preprocessing of similarity: A: published; B: recommended"),
        ({"similarity": {"weights_sha256": OTHER}}, "weights of similarity: A: 12345678…; B: 87654321…"),
        ({"weights": "raw", "origin": {"weights": "raw"}}, "weights: A: ema; B: raw"),
        ({"origin": {"steps": 20}}, "sampling: steps: A: 50; B: 20"),
        ({"origin": {"sampler": "dpm"}}, "sampling: sampler: A: ddim; B: dpm"),
    ],
)
def test_what_differs_is_said_and_not_averaged(tmp_path, changes, said):
    for name, result in (("a", RESULT), ("b", changed(RESULT, changes))):
        write_run(tmp_path / name, result)
    arguments = ["X=a", "X=b", "X=a", "--html=both.html", "--json=table.json"]
    found = run_module("score.compare", *arguments, cwd=tmp_path)
    name, said = said[: said.index(": A: ")], said.replace(" A: ", " X (1): ").replace(" B: ", " X (2): ")
    files = "X (1): a/result.json, a/result.json; X (2): b/result.json"
    lines = [
        f"X has a row for each kind of its results, no mean, since they differ in {name}: {files}",
        f"not all numbers compare, since these differ in {said}",
    ]
    assert found.stderr.splitlines() == [f"warning: {line}" for line in lines]
    assert first_cells(found.stdout) == ["X (1)", "X (2)"]
    assert json.loads((tmp_path / "table.json").read_text()).keys() == {"X (1)", "X (2)"}
    page = (tmp_path / "both.html").read_text()
    assert all(f">{line}<" in page for line in lines) and "None that are known" not in page


@pytest.mark.parametrize(
    "changes",
    [
        {"checkpoint": "logs/x/ckpt8k.pt"},
        {"checkpoint": "logs/x/best_ckpt6k.pt"},
        {"training": {"lr": 2e-3}},
        {"training": {"script": "main_fed"}},
    ],
)
def test_other_trainings_are_no_repeats_but_what_is_compared(tmp_path, changes):
    """Runs in DIRECTORY/eval/grid are all called eval where no labels are given."""
    for name, result in (("a", RESULT), ("b", changed(RESULT, changes))):
        write_run(tmp_path / name / "eval/grid", result)
    assert not run_module("score.compare", "A=a/eval/grid", "B=b/eval/grid", cwd=tmp_path).stderr
    found = run_module("score.compare", "a/eval/grid", "b/eval/grid", cwd=tmp_path)
    assert first_cells(found.stdout) == ["eval (1)", "eval (2)"] and found.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"seed": 1, "training images (sha256)": OTHER}, "origin": {"seed": 1, "checkpoint_sha256": OTHER}},
        {"checkpoint": "other/mine.safetensors"},
        {name: None for name in RESULT if name not in ("N", "pixels")} | {"holdout": {"images_sha256": None}},
    ],
)
def test_seeds_are_repeats_and_nothing_is_said_of_what_is_not_known(tmp_path, changes):
    """The last is of an earlier version, which knew none of this."""
    result = {key: value for key, value in changed(RESULT, changes).items() if value is not None}
    write_run(tmp_path / "a", RESULT)
    write_run(tmp_path / "b", result)
    found = run_module("score.compare", "same=a", "same=b", "A=a", "B=b", "--html=both.html", cwd=tmp_path)
    assert first_cells(found.stdout) == ["same", "A", "B"] and "40 ± 0" in found.stdout
    assert not found.stderr


def test_the_best_checkpoints_of_two_seeds_are_repeats_whatever_their_steps(tmp_path):
    for name, steps in (("a", "6k"), ("b", "8k")):
        write_run(tmp_path / name, {**RESULT, "checkpoint": f"logs/x/best_ckpt{steps}.pt"})
    assert first_cells(run_module("score.compare", "same=a", "same=b", cwd=tmp_path).stdout) == ["same"]


def test_samples_in_the_order_of_their_names_are_said(tmp_path):
    """As earlier versions scored them: by names or listing, which changes recall and Inception score."""
    new = changed(RESULT, {"samples": "mine", "scored_with": {"samples_order": 1}})
    for name, result in (("a", new), ("b", changed(RESULT, {"samples": "mine"}))):
        write_run(tmp_path / name, result)
    said = run_module("score.compare", "A=a", "B=b", cwd=tmp_path).stderr
    assert said == "warning: not all numbers compare, since these differ in scores: samples_order: A: 1; B: by name\n"


def test_text_beside_unconditional_is_said(tmp_path):
    write_run(tmp_path / "a", {key: value for key, value in RESULT.items() if key != "flags"})
    write_run(tmp_path / "b", TEXT)
    found = run_module("score.compare", "same=a", "same=b", cwd=tmp_path)
    assert first_cells(found.stdout) == ["same (1)", "same (2)"]
    assert "evaluation: same (1): all_in; same (2): text_to_image.all_in" in found.stderr


def test_a_row_of_its_own_takes_no_other_label(tmp_path):
    write_run(tmp_path / "a", RESULT)
    write_run(tmp_path / "b", {**RESULT, "N": 8})
    found = run_module("score.compare", "x=a", "x=b", "x (1)=a", cwd=tmp_path)
    assert first_cells(found.stdout) == ["x (2)", "x (3)", "x (1)"]


def test_paths_of_any_kind(tmp_path):
    write_run(tmp_path / ODD, RESULT)
    write_run(tmp_path / f"{ODD}2", {**RESULT, "N": 8})
    found = run_module("score.compare", f"x={ODD}", f"x={ODD}2", "--html=both.html", cwd=tmp_path)
    assert found.stderr.count("\n") == 2 and r"\udcff" in found.stderr
    assert r"x (2): no grid_image0.png of these images beside \udcff" in (tmp_path / "both.html").read_text()


def test_evaluations_against_other_training_images(tmp_path):
    """Of the same images, by the command lines."""
    np.save(tmp_path / "s.npy", np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8))
    given = ["--dataset=digits", "--img_size=8", "--num_train=48", "--fid_features=pixels", "--samples=s.npy"]
    for name, seed in (("a", 0), ("b", 1)):
        flags = [f"--subset_seed={seed}", "--stages=score,memorise", *eval_flags(tmp_path / name)]
        run("all_in.py", *given, *flags, cwd=tmp_path)
    found = run_module("score.compare", "a=a/grid", "b=b/grid", "--floors", cwd=tmp_path)
    for name in ("training images", "reference images", "held-out images"):
        assert f"differ in {name}: a: " in found.stderr
    assert found.stderr.count("\n") == 3, found.stderr
    assert first_cells(found.stdout) == ["a", "b", "held-out (a)", "held-out (b)"]
    results = [json.loads((tmp_path / label / "grid/result.json").read_text()) for label in "ab"]
    for line, result in zip(found.stdout.splitlines()[-2:], results, strict=True):
        assert f"{result['holdout']['pixels']['mq_fraction']['50']:.1%}" in line


def test_results_of_earlier_versions(tmp_path):
    new = renewed(OLD)
    pixels = {"mq", "mq_fraction", "mq_curve", "f_mem", "extracted", "auth_pct", "mirrored", "mq_above_floor"}
    assert new.keys() == {"N", "checkpoint", "pixels", "similarity", "holdout", "fpd"}
    assert new["pixels"].keys() == pixels | {"c_t", "c_t_cells"}
    assert new["pixels"]["f_mem"] == 0.125 and new["pixels"]["mirrored"] == {"f_mem": 0.5, "extracted": 5}
    assert new["similarity"]["f_mem"] == 0.75 and "holdout" not in new["similarity"]
    assert new["holdout"]["pixels"] == {"mq_fraction": {"15": 0.125}, "f_mem": 0.0}
    assert new["holdout"]["similarity"]["features"] == "pixels" and new["holdout"]["similarity"]["f_mem"] == 0.25
    text = renewed(OLD_TEXT)
    assert text.keys() == {"N", "similarity", "fpd", "clip_score", "base", "detector"}
    assert text["similarity"]["f_mem"] == 0.5 and text["base"]["similarity"]["own_image"] == 0.125
    assert text["base"]["fpd"] == 4.0 and text["base"]["similarity"]["preprocess"] == "published"
    for old, renewed_result in ((OLD, new), (OLD_TEXT, text)):
        assert is_old(old) and not is_old(renewed_result) and renewed(renewed_result) == renewed_result
    for name, old in (("a", OLD), ("b", OLD_TEXT)):
        write_run(tmp_path / name, old)
    found = run_module("score.compare", "a", "b", "--floors", cwd=tmp_path).stdout
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in found.splitlines()]
    rows = {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells[2:]}
    for name, result in (("a", new), ("b", text)):
        assert {key: value for key, value in rows[name].items() if value != "-"} == {"method": name} | summary(result)
    assert rows["a"]["f_mem"] == "12.5%" and rows["a"]["f_mem of features"] == "75.0%"
    assert rows["held-out"]["MQ@15"] == "12.5%" and rows["base model"]["own image"] == "12.5%"


def test_rows_of_floors():
    base = {"similarity": {"own_image": 0.1, "sim_mean": 0.3}}
    result = {"similarity": {"own_image": 0.7, "sim_mean": 0.9, "bg_mean": 0.4}, "base": base}
    other = {**result, "base": {"similarity": {"own_image": 0.2, "sim_mean": 0.3}}}

    def floors(results):
        return {label: {c: n["mean"] for c, n in row.items()} for label, row in floors_of(results).items()}

    training = {"training, of each other": {"similarity": 0.4}}
    base = {"own image": 0.1, "similarity": 0.3}
    assert floors({"a": [result, result], "b": [result]}) == {"base model": base, **training}
    found = floors({"a": [result], "b": [other], "c": [result]})
    bases = {"base model (a, c)": base, "base model (b)": {"own image": 0.2, "similarity": 0.3}}
    assert found == {**bases, **training}
    assert floors({"a": [{"N": 4, "checkpoint": None}]}) == {}


def test_only_sscd_has_a_threshold_in_older_results_too(tmp_path):
    for name in ("sscd", "pixels", "clip"):
        write_run(tmp_path / name, changed(RESULT, {"similarity": {"features": name}}))
        text = {**OLD_TEXT, "features": name, "holdout": SIMILARITY, "bg_mean": 0.1, "bg_gt_05pc": 0.1}
        write_run(tmp_path / f"text_{name}", text)
    for run_name in ("pixels", "text_pixels", "clip", "text_clip"):
        found = run_module("score.compare", run_name, "--floors", "--html=one.html", cwd=tmp_path)
        assert "similarity" in found.stdout
        assert "above 0.5" not in found.stdout + (tmp_path / "one.html").read_text()
    for run_name in ("sscd", "text_sscd"):
        assert "above 0.5" in run_module("score.compare", run_name, cwd=tmp_path).stdout


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A directory of six runs, one of them of two seeds, with their page both.html, and what was said."""
    tmp_path = tmp_path_factory.mktemp("compared")
    runs, draw = [], torch.Generator().manual_seed(0)
    training, heldout = (torch.randint(256, (n, 3, 8, 8), dtype=torch.uint8, generator=draw) for n in (20, 50))
    for number, name in enumerate(("default", "default", "IET & AGC", "a longer name, round 20", "IET", "AGC", "plus")):
        images = training.repeat(2, 1, 1, 1)[: 30 - (name == "AGC")].roll(number, 0)
        result, (sq_distance, index) = evaluate(images, training, heldout)
        result |= {"fpd": 1.25, "N": len(images), "checkpoint": "logs/ckpt1.pt", "seconds": {}, "flags": {"lr": 1.0}}
        result |= identity(images, training) | {"scored_with": {"images": SHA if number < 2 else OTHER}}
        result["training"] = {"lr": 1e-3 if name == "default" else 2e-3, "ch": 32, "seed": 4}
        result["origin"] = {"steps": 50 if name == "default" else 20, "seed": number, "checkpoint_sha256": name}
        directory = tmp_path / f"{name}{number}" / "grid"
        if name != "plus":
            directory.mkdir(parents=True)
            paths = save_grids(directory, images, training, index[:, 0], memorization_ratio(sq_distance))
            write_run(directory / "new", result | {"grids": list(map(str, paths))})
            (directory / "new/result.json").rename(directory / "result.json")
            (directory / "new").rmdir()
        else:
            write_run(directory, result)
        runs.append(f"{name}={directory}")
    found = run_module("score.compare", *runs, "--html=both.html", cwd=tmp_path)
    return tmp_path, found, training


def test_runs_on_one_page(compared):
    directory, found, _ = compared
    assert "above floor" in found.stdout and " ± " in found.stdout
    page = (directory / "both.html").read_text()
    (chart,) = charts_of(Tags(page))
    drawn = [len(re.findall(f"fill: none; stroke: {colour};", chart)) for colour in SERIES]
    assert drawn == [2, 1, 1, 1, 1, 1, 1, 0] and "IET &amp; AGC" in page and "held-out real images<" in page
    differ = page[page.index("Settings that differ") :]
    assert "<td>lr</td><td>0.001</td><td>0.002</td>" in differ and "<td>sampling: steps</td><td>50</td>" in differ
    assert "<td>sampling: seed</td><td>0 / 1</td><td>2</td>" in differ
    assert f'<td title="{SHA}">12345678…</td><td title="{OTHER}">87654321…</td>' in differ
    assert not re.search("[0-9a-f]{64}", re.sub('title="[^"]*"|data:[^"]*"', "", page))
    by_name = run_module("score.compare", directory / "default0/grid", cwd=directory)
    assert "| default0 |" in by_name.stdout


def test_the_page_shows_the_closest_pairs_of_every_run(compared):
    directory, _, training = compared
    page = (directory / "both.html").read_text()
    images = {image["alt"]: image["src"] for image in Tags(page).images}
    assert all(source.startswith("data:image/") for source in images.values()) and len(page) < 2e5
    assert len(images) == 1 + 6 * 16
    names = ["default, 1 of 2", "default, 2 of 2", "IET & AGC", "a longer name, round 20", "IET", "AGC"]
    for name in names:
        for kind in ("training", "generated"):
            found = decoded(images[f"{kind} image of pair 8 of {name}"])
            assert (found == training).flatten(1).all(dim=1).sum() == 1, "they are copies"
    assert f"plus: no grid_image0.png of these images beside {directory}/plus6/grid/result.json<" in page


def decoded(source):
    """The image of a data URL: (3, H, W) uint8."""
    picture = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


@needs_chromium
def test_the_page_fits_every_screen(compared, tmp_path):
    page = compared[0] / "both.html"
    assert assert_readable(page, tmp_path)["charts"] == 1
    for width in (800, 1200, 1920):
        seen = seen_at(width, page, tmp_path)
        assert seen["wide"] <= width and seen["cut"] == 0 == seen["broken"], (width, seen)


def test_the_page_of_large_images_is_small(tmp_path):
    """Photographs are smooth, so these are."""
    images = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(images, (256, 256), mode="bicubic").clamp(0, 1).mul(255).byte()
    paths = save_grids(tmp_path / "a", images, images, torch.arange(8), torch.rand(8))
    for name in "ab":
        write_run(tmp_path / name / "grid", changed(RESULT, {"N": 8, "grids": list(map(str, paths))}))
        shutil.copy(paths[0], tmp_path / name / "grid")
    (tmp_path / "b/grid/grid_image0.png").write_bytes(b"no picture")
    run_module("score.compare", tmp_path / "a/grid", tmp_path / "b/grid", "--html=both.html", cwd=tmp_path)
    page = (tmp_path / "both.html").read_text()
    assert len(page) < 100_000 and page.count("data:image/jpeg") == 16
    assert "b: " in page and "grid_image0.png: cannot be read as an image" in page


def test_a_grid_of_other_images_is_in_no_picture(tmp_path):
    """Of a result whose grid stage was not run again."""
    images = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    paths = save_grids(tmp_path / "a", images, images, torch.arange(8), torch.rand(8))
    for name, grids in (("a", {"grids": list(map(str, paths))}), ("b", {})):
        write_run(tmp_path / name / "grid", changed(RESULT, {"N": 8, **grids}))
        shutil.copy(paths[0], tmp_path / name / "grid")
    alone = run_module("score.compare", "x=a/grid", "--picture=a.png", cwd=tmp_path)
    both = run_module("score.compare", "x=a/grid", "y=b/grid", "--picture=both.png", cwd=tmp_path)
    assert "y: no grid of these images beside" in both.stderr and "warning" not in alone.stderr
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "both.png").read_bytes()
    none = run_module("score.compare", "y=b/grid", "--picture=none.png", cwd=tmp_path, code=1)
    assert "no result has a grid: run the grid stage" in none.stderr

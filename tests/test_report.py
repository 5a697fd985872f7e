"""The HTML pages: self-contained, small, and looked at in a real browser where there is one."""

import base64
import html.parser
import json
import re

import numpy as np
import pytest
import torch

from experiments.tables import with_interval
from score.columns import SIMILARITIES
from score.evaluate import evaluate
from score.memorization import memorization_ratio, shares_below
from score.report import all_columns, detector, similarities, training_seconds, write_report
from tests.browser import assert_readable, needs_chromium
from tests.commands import run_module


def evaluation(N, M, size, seed=0):
    """(result, generated, training, nearest, ratio) of noise, some of it near copies."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=random)  # noqa: E731
    training, heldout = draw(M), draw(50)
    generated = training[torch.randint(M, (N,), generator=random)]
    generated[N // 2 :] = draw(N - N // 2)
    result, (sq_distance, index) = evaluate(generated, training, heldout)
    result |= {"N": N, "training_set_size": M, "checkpoint": "logs/<a>/ckpt1.pt", "seconds": {"memorise": 1.0}}
    result |= {"fpd": 1.25, "flags": {"lr": 1e-3, "hflip": None, "seed": 1}}
    return result, generated, training, index[:, 0], memorization_ratio(sq_distance)


def test_a_file_beside_a_pipeline_is_not_taken_for_the_record_of_a_training(tmp_path):
    """text_to_image.tiny writes captions as train.json beside the pipeline."""
    path = tmp_path / "train.json"
    for content, seconds in (({"steps": 1, "seconds": 2.5}, 2.5), ({"a.png": ["a caption"]}, None), ([1], None)):
        path.write_text(json.dumps(content))
        assert training_seconds(tmp_path / "pipeline") == seconds


class Tags(html.parser.HTMLParser):
    """The tags of a page, all closed in order, and the sources of its images."""

    def __init__(self, page):
        super().__init__()
        self.open, self.images, self.links = [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "img":
            self.images.append(attributes)
        self.links += [value for name, value in attributes.items() if name in ("href", "src", "srcset")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def charts_of(tags):
    """The SVG texts of a page's charts."""
    sources = [image["src"].removeprefix("data:image/svg+xml;base64,") for image in tags.images]
    return [base64.b64decode(source).decode() for source in sources if not source.startswith("data:")]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    result, generated, training, nearest, ratio = evaluation(60, 40, 8)
    skips = torch.arange(40)
    of_gap = {"auc": 0.75, "tpr": 0.125, "best_auc": 0.875, "best_tpr": 0.25}
    losses = {"training": [0.9, 0.1, 0.01], "heldout": [1.0, 0.3, 0.012]}
    result["gap"] = {"t": [100, 500, 900], **losses, "images": [4000, 50], "best_t": 500, **of_gap}
    write_report(path, result, generated, training, nearest, ratio, skips)
    return path, result, ratio


def test_the_page_needs_nothing_else_and_describes_its_pictures(report):
    path, result, ratio = report
    page = path.read_text()
    tags = Tags(page)
    assert all(link.startswith("data:image/") for link in tags.links), "no network"
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    assert len(tags.images) > 80 and all(image["alt"] for image in tags.images)
    assert len(charts_of(tags)) == 2
    assert "Of 4,000 training and 50 held-out images" in page and "At t = 500" in page
    c_t = f"{result['pixels']['c_t']:.1f}"
    for name, value in (("AUC of losses", "0.750"), ("TPR at 1% FPR", "12.5%"), ("C_T", c_t)):
        assert f"<td>{name}</td><td>{value}</td><td></td>" in page
    f_mem = [f"{numbers['pixels']['f_mem']:.1%}" for numbers in (result, result["holdout"])]
    assert f"<td>f_mem</td><td>{f_mem[0]}</td><td>{f_mem[1]}</td>" in page
    assert "<td>lr</td><td>0.001</td>" in page and "hflip" not in page
    assert "logs/&lt;a&gt;/ckpt1.pt" in page and "prefers-color-scheme: dark" in page and "width=device-width" in page
    pixels = result["pixels"]
    assert f"{pixels['mq_fraction']['15']:.1%}" in page and f"{pixels['mq_above_floor']['30']:+.1%}" in page
    best = ratio.argsort(stable=True)[0].item()
    assert page.index("most memorised pairs") < page.index(f"generated image {best}")
    assert "skipped 39×" in page and "1.250" in page


def test_a_large_evaluation_stays_below_5_megabytes(tmp_path):
    N, M, size = 65_536, 2_000, 64
    training = torch.randint(0, 256, (M, 3, size, size), dtype=torch.uint8)
    generated = training[torch.randint(M, (512,))].repeat(N // 512, 1, 1, 1)
    ratio, nearest = torch.rand(N, dtype=torch.float64), torch.randint(M, (N,))
    result, *_ = evaluation(20, 20, 8)
    result |= {"N": N, "training_set_size": M}
    write_report(tmp_path / "report.html", result, generated, training, nearest, ratio, torch.arange(M))
    assert (tmp_path / "report.html").stat().st_size < 5e6


def test_the_curve_against_numpy():
    ratio = torch.cat([torch.rand(500, dtype=torch.float64), torch.tensor([0.0, 0.15, 0.3, 1.0])])
    expected = [np.mean(100 * ratio.numpy() < p) for p in range(101)]
    np.testing.assert_allclose(shares_below(ratio)["mq_curve"], expected)


def test_no_zero_has_a_sign_of_minus(tmp_path):
    result, *shown = evaluation(60, 40, 8)
    pixels = result["pixels"]
    pixels |= {"c_t": -0.04, "mq_above_floor": dict.fromkeys(pixels["mq_above_floor"], -0.0004)}
    result["clip_score"] = -0.04
    of_features = {f"{set_}_{name}": -0.0004 for set_ in ("sim", "bg") for name in SIMILARITIES}
    histograms = {"sim_histogram": [1.0], "bg_histogram": [1.0], "f_mem": 0.0}
    result["similarity"] = {"features": "pixels", "preprocess": None, **of_features, **histograms}
    result["similarity"]["sim_gt_05pc"] = 0.0
    write_report(tmp_path / "report.html", result, *shown)
    (tmp_path / "result.json").write_text(json.dumps(result))
    printed = run_module("score.compare", tmp_path, "--html=both.html", cwd=tmp_path).stdout
    shown_at = [printed, *((tmp_path / name).read_text() for name in ("report.html", "both.html"))]
    for text in (text.replace(str(tmp_path), "") for text in shown_at):  # a directory may be called pytest-0
        assert "+0.0%" in text and not re.search(r"-0\.?0*[^0-9.-]", re.sub('src="[^"]*"|<style>.*?</style>', "", text))
    assert with_interval((-0.00004, -0.00004, 0.01), "f_mem") == "+0.0 [+0.0, +1.0]"


@needs_chromium
def test_in_a_browser_it_fits_a_phone_and_has_a_dark_side(report, tmp_path):
    seen = assert_readable(report[0], tmp_path)
    assert seen["images"] > 80 and seen["charts"] == 2


def test_only_sscd_has_a_threshold_in_older_results_too():
    of_copies = {"copies": 3, "mean_of_copies": 1.0, "mean_of_others": 0.5, "auc": 0.75}
    numbers = {f"{kind}_{name}": 0.5 for kind in ("sim", "bg") for name in SIMILARITIES}
    numbers |= {"sim_histogram": [0.25, 0.75], "bg_histogram": [1.0, 0.0], "f_mem": 0.5, "preprocess": None}
    result = {"N": 4, "similarity": numbers, "holdout": {"N": 4, "similarity": numbers}}
    result["detector"] = {"above_05": of_copies, "f_mem": of_copies}
    for features in ("sscd", "clip", "pixels"):
        numbers["features"] = features
        html = similarities(result) + detector(result) + all_columns(result)
        assert [text in html for text in ("gt_05pc", "bove 0.5", "above_05")] == [features == "sscd"] * 2 + [False]
        assert "<td>f_mem</td><td>3</td>" in html

"""The HTML pages: self-contained, small, and looked at in a real browser where there is one."""

import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from score.charts import ticks
from score.memorization import above_floor, measures, memorization_ratio, mq_curve, nearest_neighbors
from score.report import copy_counts, write_report
from tests.commands import run_module

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def evaluation(N, M, size, seed=0):
    """(result, generated, training, nearest, ratio, ratio of held-out images) of noise, some of it near copies."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=random)  # noqa: E731
    training, heldout = draw(M), draw(50)
    generated = training[torch.randint(M, (N,), generator=random)]
    generated[N // 2 :] = draw(N - N // 2)
    sq_distance, index = nearest_neighbors(generated, training)
    of_heldout, heldout_index = nearest_neighbors(heldout, training)
    result, floor = measures(sq_distance, index, training), measures(of_heldout, heldout_index, training)
    result |= {"holdout": {"N": 50, **floor}, "mq_above_floor": above_floor(result, floor), "fpd": 1.25}
    result |= {"N": N, "training_set_size": M, "checkpoint": "logs/<a>/ckpt1.pt", "flags": {"lr": 1e-3, "hflip": None}}
    result |= {"seconds": {"memorise": 1.0}}
    return result, generated, training, index[:, 0], memorization_ratio(sq_distance), memorization_ratio(of_heldout)


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


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    result, generated, training, nearest, ratio, holdout = evaluation(60, 40, 8)
    skips = torch.arange(40)
    write_report(path, result, generated, training, nearest, ratio, holdout, skips)
    return path, result, ratio


def test_the_page_needs_nothing_else_and_describes_its_pictures(report):
    path, result, ratio = report
    page = path.read_text()
    tags = Tags(page)
    assert all(link.startswith("data:image/png;base64,") for link in tags.links), "no network"
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    assert len(tags.images) > 80 and all(image["alt"] for image in tags.images)
    assert len(re.findall(r'<svg[^>]* role="img" aria-label="[^"]+"', page)) == 2
    assert "logs/&lt;a&gt;/ckpt1.pt" in page and "prefers-color-scheme: dark" in page and "width=device-width" in page
    assert f"{result['mq_fraction']['15']:.1%}" in page and f"{result['mq_above_floor']['30']:+.1%}" in page
    best = ratio.argsort(stable=True)[0].item()
    assert page.index("most memorised pairs") < page.index(f"generated image {best}, its ratio is")
    assert "skipped 39×" in page and "1.250" in page


def test_a_large_evaluation_stays_below_5_megabytes(tmp_path):
    N, M, size = 65_536, 2_000, 64
    training = torch.randint(0, 256, (M, 3, size, size), dtype=torch.uint8)
    generated = training[torch.randint(M, (512,))].repeat(N // 512, 1, 1, 1)
    ratio, nearest = torch.rand(N, dtype=torch.float64), torch.randint(M, (N,))
    result, *_ = evaluation(20, 20, 8)
    result |= {"N": N, "training_set_size": M}
    write_report(tmp_path / "report.html", result, generated, training, nearest, ratio, ratio[:10_000], torch.arange(M))
    assert (tmp_path / "report.html").stat().st_size < 5e6


def test_the_curve_and_the_counts_against_numpy():
    ratio = torch.cat([torch.rand(500, dtype=torch.float64), torch.tensor([0.0, 0.15, 0.3, 1.0])])
    expected = [np.mean(100 * ratio.numpy() < p) for p in range(101)]
    np.testing.assert_allclose(mq_curve(ratio), expected)
    nearest = torch.randint(7, (504,))
    expected = [sum(n == j and 100 * r < 15 for n, r in zip(nearest, ratio, strict=True)) for j in range(9)]
    assert copy_counts(nearest, ratio, 9).tolist() == expected


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 100), (0.37, 0.41), (0, 0.093), (12, 9000)])
def test_ticks_are_round_and_few(low, high):
    marks = ticks(low, high)
    assert 2 <= len(marks) <= 7 and low <= marks[0] and marks[-1] <= high * (1 + 1e-9)
    gaps = np.diff(marks)
    assert np.allclose(gaps, gaps[0]) and f"{gaps[0]:.0e}"[0] in "125"


def browse(page, *flags):
    """Open a page in headless Chromium; returns its standard output."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_in_a_browser_it_fits_a_phone_and_has_a_dark_side(report, tmp_path):
    page, _, _ = report
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe id="f" src="{page.as_uri()}" style="width:390px;height:800px;border:0"></iframe><pre id="o"></pre>'
        "<script>f.onload = () => { const d = f.contentDocument; const images = [...d.images];"
        "o.textContent = JSON.stringify({wide: d.documentElement.scrollWidth, broken:"
        "images.filter(i => !i.naturalWidth).length, images: images.length, charts: d.querySelectorAll('svg').length,"
        "chart: d.querySelector('svg').getBoundingClientRect().width}) }</script>"
    )
    dom = browse(frame, "--allow-file-access-from-files", "--virtual-time-budget=5000", "--dump-dom")
    seen = json.loads(re.search(r'<pre id="o">(.*?)</pre>', dom)[1])
    assert seen["wide"] <= 390 and seen["broken"] == 0 and seen["images"] > 80 and seen["charts"] == 2
    assert 300 < seen["chart"] <= 390
    corners = {}
    for scheme in (0, 1):  # dark, light
        picture = tmp_path / f"{scheme}.png"
        browse(
            page, "--window-size=500,900", f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={picture}"
        )
        corners[scheme] = sum(Image.open(picture).convert("RGB").getpixel((2, 2)))
    assert corners[0] < 100 < 700 < corners[1]


def test_compare_puts_runs_on_one_page(tmp_path):
    runs = []
    for name, repeats in (("default", 2), ("IET & AGC", 1)):
        for seed in range(repeats):
            result, *_ = evaluation(30, 20, 8, seed)
            directory = tmp_path / f"{name}{seed}" / "grid"
            directory.mkdir(parents=True)
            result["flags"] = {"seed": seed, "lr": 1e-3 if name == "default" else 2e-3, "ch": 32}
            (directory / "result.json").write_text(json.dumps(result | {"checkpoint": None}))
            runs.append(f"{name}={directory}")
    found = run_module("score.compare", *runs, "--html=both.html", cwd=tmp_path)
    assert "above floor" in found.stdout and " ± " in found.stdout
    page = (tmp_path / "both.html").read_text()
    Tags(page)
    assert page.count("<polyline") == 4 and "IET &amp; AGC" in page and "held-out real images" in page
    assert "<td>lr</td><td>0.001</td><td>0.002</td>" in page and "<td>ch</td>" not in page
    by_name = run_module("score.compare", tmp_path / "default0" / "grid", cwd=tmp_path)
    assert "| default0 |" in by_name.stdout

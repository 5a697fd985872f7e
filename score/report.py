"""An evaluation as one HTML page that needs nothing else: no network, no script, light or dark, phone or desk."""

import base64
import io
import re
from html import escape

import torch
from PIL import Image

from score.memorization import THRESHOLDS
from utils.files import write_text

PAIRS = 40
TRAINING_IMAGES = 24
LARGEST_SIDE = 96  # pixels of a picture in the page
COPIED = 15  # a generated image counts as a copy of its nearest training image below this ratio, in percent

# what matplotlib draws in becomes what the page calls by these names, in light and in dark
SERIES = ("#0b62a8", "#b4470a", "#1a7a3c", "#8a2f8f", "#7a6200", "#00717a", "#a3243b", "#555c66")
NAMES = {"#1b1f24": "ink", "#d5dae0": "faint", "#57606a": "muted", **{c: f"series-{i}" for i, c in enumerate(SERIES)}}

PAGE = """
:root { --ink: #1b1f24; --paper: #ffffff; --faint: #d5dae0; --muted: #57606a; --card: #f5f7f9;
  --series-0: #0b62a8; --series-1: #b4470a; --series-2: #1a7a3c; --series-3: #8a2f8f;
  --series-4: #7a6200; --series-5: #00717a; --series-6: #a3243b; --series-7: #555c66; }
@media (prefers-color-scheme: dark) {
:root { --ink: #e6e9ed; --paper: #12161b; --faint: #343b44; --muted: #a0a9b4; --card: #1b2128;
  --series-0: #6cb6f2; --series-1: #f2a26c; --series-2: #6fd08c; --series-3: #d79adb;
  --series-4: #dcc24a; --series-5: #5fcdd6; --series-6: #f28ba0; --series-7: #b6bec8; } }
svg.chart { width: 100%; max-width: 720px; height: auto; display: block; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .2rem 0 1rem; padding: 0; list-style: none; }
.legend i { display: inline-block; width: 1.6em; height: 0; border-top: 3px solid; vertical-align: middle; }
body { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
  max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
p.note { color: var(--muted); font-size: .9rem; max-width: 45rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .6rem; }
.tiles div { background: var(--card); border-radius: .5rem; padding: .5rem .8rem; min-width: 7rem; }
.tiles b { display: block; font-size: 1.3rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--faint); }
th:first-child, td:first-child { text-align: left; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .8rem; }
figure { margin: 0; background: var(--card); border-radius: .5rem; padding: .5rem; }
figure img { width: 48%; image-rendering: pixelated; }
figure img:only-of-type { width: 60%; }
figcaption { font-size: .8rem; color: var(--muted); }
code { overflow-wrap: anywhere; }
"""


def page(title, sections):
    """A whole HTML page; sections: [(heading, html)]."""
    body = "".join(f"<section><h2>{escape(heading)}</h2>{html}</section>" for heading, html in sections)
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{PAGE}</style></head><body><h1>{escape(title)}</h1>{body}</body></html>\n"
    )


def picture(image, alt):
    """An <img> of a uint8 image (3, H, W), at most LARGEST_SIDE pixels wide and high."""
    drawn = Image.fromarray(image.permute(1, 2, 0).numpy())
    if max(drawn.size) > LARGEST_SIDE:
        drawn.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    data = io.BytesIO()
    drawn.save(data, format="PNG", optimize=True)
    encoded = base64.b64encode(data.getvalue()).decode()
    return f'<img src="data:image/png;base64,{encoded}" alt="{escape(alt, quote=True)}">'


def table(header, rows):
    head = "".join(f"<th>{escape(str(cell))}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def tiles(numbers):
    return '<div class="tiles">' + "".join(f"<div>{escape(k)}<b>{escape(v)}</b></div>" for k, v in numbers) + "</div>"


def chart(draw, x_label, y_label, alt):
    """What draw(axes) draws with matplotlib, as SVG in the page's colours; the y axis is a share, written in percent.

    alt: what the chart says, for those who do not see it.
    """
    # a second that evaluations without a page need not wait
    from matplotlib import cycler, rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    ink, faint, muted = (colour for colour in NAMES if colour not in SERIES)
    colours = {"text.color": ink, "axes.labelcolor": ink, "xtick.color": ink, "ytick.color": ink, "grid.color": faint}
    colours |= {"axes.edgecolor": muted, "axes.prop_cycle": cycler(color=SERIES)}
    with rc_context({**colours, "svg.fonttype": "none", "font.size": 13, "axes.axisbelow": True}):
        figure = Figure(figsize=(6.4, 3.2), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.yaxis.grid(True)
        axes.spines[["top", "left", "right"]].set_visible(False)
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    drawn = re.search(r'viewBox="([^"]*)"[^>]*>(.*)</svg>', file.getvalue(), re.DOTALL)
    marks = re.sub(r'<style.*?</style>| id="[a-z0-9.]+_[0-9]+"', "", drawn[2]).replace("xlink:href", "href")
    marks = re.sub("|".join(NAMES), lambda colour: f"var(--{NAMES[colour[0]]})", marks)
    head = f'<svg class="chart" viewBox="{drawn[1]}" role="img" aria-label="{escape(alt, quote=True)}">'
    return f"{head}<title>{escape(alt)}</title>{marks}</svg>"


def legend(names):
    """What the series colours 0, 1, ... stand for, as HTML."""
    items = (
        f'<li><i style="border-color: var(--series-{i % len(SERIES)})"></i> {escape(name)}</li>'
        for i, name in enumerate(names)
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def curves(series):
    """MQ over all thresholds as a chart with its legend; series: {name: curves of `mq_curve`, one per repeat}."""
    said = []
    for name, repeats in series.items():
        low, high = (sum(curve[p] for curve in repeats) / len(repeats) for p in (15, 50))
        said.append(f"{name}: {low:.1%} below 15, {high:.1%} below 50")
    alt = f"Share of images whose ratio is below a threshold. {'; '.join(said)}."

    def draw(axes):
        for colour, repeats in enumerate(series.values()):
            for curve in repeats:
                axes.plot(range(101), curve, color=SERIES[colour % len(SERIES)])
        axes.set(xlim=(0, 100), ylim=(0, 1))

    return chart(draw, "threshold p, percent", "share with ratio below p", alt) + legend(series)


def histogram(series):
    """The distribution of the ratios as a chart with its legend; series: {name: ratio (N,)}."""
    counts = {name: torch.histc(100 * ratio.double(), 50, 0, 100) / len(ratio) for name, ratio in series.items()}
    medians = "; ".join(f"{name}: median {100 * ratio.median().item():.0f}" for name, ratio in series.items())
    alt = f"Histogram of 100 d1 / mean(d1 .. d50). {medians}."

    def draw(axes):
        for count in counts.values():
            axes.stairs(count.numpy(), range(0, 102, 2), fill=True, alpha=0.55)
        axes.set(xlim=(0, 100))

    return chart(draw, "ratio, percent", "share of images", alt) + legend(counts)


def pair_figure(place, original, j, copy, i, ratio):
    """Training image j beside generated image i, uint8 (3, H, W) both; `place` is its rank by `ratio`."""
    left = picture(original, f"training image {j}")
    right = picture(copy, f"generated image {i}, its ratio is {100 * ratio:.1f} percent")
    caption = f"{place}. ratio {100 * ratio:.1f}&thinsp;%, training {j}, generated {i}"
    return f"<figure>{left} {right}<figcaption>{caption}</figcaption></figure>"


def pairs(generated, training, nearest, ratio):
    """The most memorised pairs as figures."""
    figures = []
    for place, i in enumerate(ratio.argsort(stable=True)[:PAIRS].tolist()):
        j = nearest[i].item()
        figures.append(pair_figure(place + 1, training[j], j, generated[i], i, ratio[i].item()))
    return f'<div class="pictures">{"".join(figures)}</div>'


def copy_counts(nearest, ratio, size):
    """How many generated images copy each training image: int64 (size,)."""
    return torch.bincount(nearest[100 * ratio < COPIED], minlength=size)


def copied(training, copies, skips):
    """The training images that are copied and skipped most, as figures; skips: int64 (M,) or None."""
    parts = []
    for counts, heading in ((copies, "copied most"), (skips, "skipped most in training")):
        if counts is None:
            continue
        figures = []
        for j in counts.argsort(descending=True, stable=True)[:TRAINING_IMAGES].tolist():
            if counts[j] == 0:
                break
            skipped = "" if skips is None else f", skipped {skips[j]}×"
            caption = f"training {j}: copied {copies[j]}×{skipped}"
            figures.append(
                f"<figure>{picture(training[j], f'training image {j}')}<figcaption>{caption}</figcaption></figure>"
            )
        shown = f'<div class="pictures">{"".join(figures)}</div>' if figures else "<p>None.</p>"
        parts.append(f"<h3>Those {heading}</h3>{shown}")
    return "".join(parts)


def thresholds(result):
    """The counts at the published thresholds, with the floor of held-out images where there is one."""
    header, rows = ["100 ratio below", "images", "share"], []
    floor = result.get("holdout")
    if floor:
        header += ["held-out images", "above floor"]
    for p in map(str, THRESHOLDS):
        row = [p, result["mq"][p], f"{result['mq_fraction'][p]:.1%}"]
        if floor:
            row += [f"{floor['mq_fraction'][p]:.1%}", f"{result['mq_above_floor'][p]:+.1%}"]
        rows.append(row)
    return table(header, rows)


def write_report(path, result, generated, training, nearest, ratio, holdout_ratio=None, skips=None):
    """Write the page of one evaluation.

    Args:
        path: of the .html.
        result: the dict of result.json.
        generated: uint8 (N, 3, H, W); training: uint8 (M, 3, H, W).
        nearest: (N,) int64, the nearest training image of every generated one; ratio: (N,).
        holdout_ratio: (L,) of held-out real images, the floor; None without them.
        skips: (M,) int64, how often training left each image out; None if it did not count.
    """
    series = {"generated": ratio} | ({} if holdout_ratio is None else {"held-out real images": holdout_ratio})
    all_thresholds = {"generated": [result["mq_curve"]]}
    if "holdout" in result:
        all_thresholds["held-out real images"] = [result["holdout"]["mq_curve"]]
    names = {"fid": "FID", "fpd": "fpd", "is": "IS"}
    numbers = [(names[key], f"{result[key]:.3f}") for key in names if key in result]
    numbers += [(f"MQ@{p}", f"{result['mq_fraction'][str(p)]:.1%}") for p in (15, 30, 50)]
    if "mq_above_floor" in result:
        numbers += [(f"MQ@{p} above floor", f"{result['mq_above_floor'][str(p)]:+.1%}") for p in (15, 30)]
    numbers += [("√(d1/d2) < 1/3", f"{result['share_sqrt_d1_d2_below_third']:.1%}")]
    numbers += [("AuthPct", f"{result['auth_pct']:.1f}")]
    note = (
        '<p class="note">The ratio of an image is 100 d1 / mean(d1 .. d50), with its squared distances to the 50 '
        "nearest training images (Liu et al. 2024). The floor is the same figure for real images that were not trained "
        "on: what a generator that copies nothing may reach.</p>"
    )
    if result.get("warning"):
        note += f'<p class="note">{escape(result["warning"])}.</p>'
    copies = copy_counts(nearest, ratio, len(training))
    about = f'<p class="note">A generated image with a ratio below {COPIED} % is a copy of its nearest training image.'
    about += f" {(copies > 0).sum()} of {len(training)} training images are copied.</p>"
    settings = table(["flag", "value"], sorted((k, v) for k, v in result["flags"].items() if v is not None))
    source = result.get("checkpoint") or result.get("samples")
    title = f"{result['N']:,} images of {source} against {result['training_set_size']:,} training images"
    sections = [
        ("Summary", tiles(numbers) + note),
        ("Memorised quantity over all thresholds", curves(all_thresholds) + thresholds(result)),
        ("Distribution of the ratios", histogram(series)),
        ("The most memorised pairs", pairs(generated, training, nearest, ratio)),
        ("Training images", about + copied(training, copies, skips)),
        ("Settings", f"<details><summary>All flags</summary>{settings}</details>"),
    ]
    write_text(path, page(title, sections))

"""An evaluation as one HTML page that needs nothing else: no network, no script, light or dark, phone or desk."""

import base64
import io
from html import escape

import torch
from PIL import Image

from files import atomic_write
from score.charts import STYLE, Chart, legend
from score.memorization import THRESHOLDS

PAIRS = 40
TRAINING_IMAGES = 24
LARGEST_SIDE = 96  # pixels of a picture in the page
COPIED = 15  # a generated image counts as a copy of its nearest training image below this ratio, in percent

PAGE = (
    STYLE
    + """
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
)


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


def curves(series):
    """MQ over all thresholds as a chart with its legend; series: {name: curves of `mq_curve`, one per repeat}."""
    said = []
    for name, repeats in series.items():
        low, high = (sum(curve[p] for curve in repeats) / len(repeats) for p in (15, 50))
        said.append(f"{name}: {low:.1%} below 15, {high:.1%} below 50")
    alt = f"Share of images whose ratio is below a threshold. {'; '.join(said)}."
    chart = Chart((0, 100), (0, 1), "threshold p, percent", "share with ratio below p", alt, percent=True)
    for colour, repeats in enumerate(series.values()):
        for curve in repeats:
            chart.line(range(101), curve, colour)
    return chart.svg() + legend(series)


def histogram(series):
    """The distribution of the ratios as a chart with its legend; series: {name: ratio (N,)}."""
    counts = {name: torch.histc(100 * ratio.double(), 50, 0, 100) / len(ratio) for name, ratio in series.items()}
    medians = "; ".join(f"{name}: median {100 * ratio.median().item():.0f}" for name, ratio in series.items())
    top = max(count.max().item() for count in counts.values())
    alt = f"Histogram of 100 d1 / mean(d1 .. d50). {medians}."
    chart = Chart((0, 100), (0, 1.05 * top), "ratio, percent", "share of images", alt, percent=True)
    for colour, count in enumerate(counts.values()):
        chart.bars(range(0, 102, 2), count.tolist(), colour)
    return chart.svg() + legend(counts)


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
    with atomic_write(path) as file:
        file.write(page(title, sections).encode())

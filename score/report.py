"""An evaluation as one HTML page that needs nothing else: no network, no script, phone or desk."""

import base64
import io
import itertools
import logging
import re
from html import escape
from pathlib import Path

import torch
from PIL import Image

from score.columns import COLUMNS, SIMILARITIES, is_sscd, sets_of
from utils.files import read_json, write_text

PAIRS = 40
TRAINING_IMAGES = 24
GROUP_IMAGES = 6  # of a group, at most
LARGEST_SIDE = 96  # pixels of a picture in the page
COPIED = 15  # a generated image counts as a copy below this ratio, in percent
WATCH_BOUNDS = (0.02, 0.05)  # of MQ@30 above its floor, as training.watch has them
SERIES = ("#0b62a8", "#b4470a", "#1a7a3c", "#8a2f8f", "#7a6200", "#00717a", "#a3243b", "#555c66")
STYLE = Path(__file__).with_name("report.css")


def training_seconds(checkpoint):
    """What train.json beside a checkpoint says, or None."""
    return (beside(checkpoint, "train.json") or {}).get("seconds")


def watched(checkpoint):
    """The measurements that a training made of itself, by best.json beside a checkpoint, or None."""
    return (beside(checkpoint, "best.json") or {}).get("measurements")


def beside(checkpoint, name):
    """The dict in a JSON file beside a checkpoint, or None.

    checkpoint: its path, or those of several with commas, as shards that are never averaged have."""
    if not checkpoint:
        return None
    first = checkpoint if Path(checkpoint).exists() else str(checkpoint).split(",")[0]
    path = Path(first).parent / name
    record = read_json(path) if path.exists() else None
    return record if isinstance(record, dict) else None


def page(title, sections, kind="report"):
    """A whole HTML page; sections: [(heading, html)]; kind: its class in report.css."""
    body = "".join(f"<section><h2>{escape(heading)}</h2>{html}</section>" for heading, html in sections)
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE.read_text()}</style></head>"
        f"<body class={kind}><h1>{escape(title)}</h1>{body}</body></html>\n"
    )


def shortened(text):
    """The text with the first digits only of every SHA-256 in it."""
    return re.sub(r"\b([0-9a-f]{8})[0-9a-f]{56}\b", r"\1…", text)


def cell(tag, value):
    """A cell of a table as HTML; what is shortened is whole in its title."""
    whole, short = str(value), shortened(str(value))
    title = "" if short == whole else f' title="{escape(whole, quote=True)}"'
    return f"<{tag}{title}>{escape(short)}</{tag}>"


def table(header, rows):
    head = "".join(cell("th", value) for value in header)
    body = "".join("<tr>" + "".join(cell("td", value) for value in row) + "</tr>" for row in rows)
    rows = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table>{rows}</table></div>'


def image_tag(file, kind, alt):
    """An <img> of the bytes in an open file; alt: what it shows, for those who do not see it."""
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/{kind};base64,{data}" alt="{escape(alt, quote=True)}">'


def figures(shown):
    """Pictures as HTML: pairs of a caption and its images, [(uint8 (3, H, W), description)]."""
    html = ""
    for caption, images in shown:
        tags = []
        for image, alt in images:
            picture, file = Image.fromarray(image.permute(1, 2, 0).numpy()), io.BytesIO()
            # what is made smaller is not exact anyway
            kind = "jpeg" if max(picture.size) > LARGEST_SIDE else "png"
            picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
            picture.save(file, format=kind, optimize=True, quality=90)
            tags.append(image_tag(file, kind, alt))
        html += f"<figure>{' '.join(tags)}<figcaption>{caption}</figcaption></figure>"
    return f'<div class="pictures">{html or "None."}</div>'


def chart(draw, names, x_label, y_label, alt):
    """What draw(axes) draws, and a legend of its series; y is a share in percent, x up to 100."""
    # a second that evaluations without a page need not wait
    from matplotlib import cycler, rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it says when it makes its font cache

    with rc_context({"axes.prop_cycle": cycler(color=SERIES), "font.size": 13, "axes.axisbelow": True}):
        drawn, file = Figure(figsize=(6.4, 3.2), layout="constrained"), io.BytesIO()
        axes = drawn.subplots()
        axes.set(xlabel=x_label, ylabel=y_label, xlim=(0, 100))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        draw(axes)
        axes.yaxis.grid(True)
        axes.spines[["top", "left", "right"]].set_visible(False)
        drawn.savefig(file, format="svg", transparent=True)
    colours = itertools.cycle(SERIES)
    marks = (f'<i style="border-color: {next(colours)}"></i> {escape(name)}' for name in names)
    legend = "".join(f"<li>{mark}</li>" for mark in marks)
    return f'<div class="chart">{image_tag(file, "svg+xml", alt)}</div><ul class="legend">{legend}</ul>'


def curves(series):
    """MQ over all thresholds as a chart; series: {name: [`mq_curve` of each repeat]}."""
    said = []
    for name, repeats in series.items():
        low, high = (sum(curve[p] for curve in repeats) / len(repeats) for p in (15, 50))
        said.append(f"{name}: {low:.1%} below 15, {high:.1%} below 50")

    def draw(axes):
        for i, repeats in enumerate(series.values()):
            for curve in repeats:
                axes.plot(range(101), curve, color=SERIES[i % len(SERIES)])
        axes.set(ylim=(0, 1))

    alt = f"Share of images whose ratio is below a threshold. {'; '.join(said)}."
    return chart(draw, series, "threshold p, percent", "share with ratio below p", alt)


def watch_curves(series):
    """What trainings measured of themselves over their steps, as two charts.

    series: {name: [measurements of each repeat]}, lists of {"step": n, "mq30_above_floor": share, ...}.
    """
    from matplotlib.ticker import ScalarFormatter

    measurements = [found for repeats in series.values() for of_repeat in repeats for found in of_repeat]
    distance = "swd" if all("swd" in found for found in measurements) else "fpd"
    last = max(found["step"] for found in measurements)

    def curves_of(name, axes):
        for i, repeats in enumerate(series.values()):
            for of_repeat in repeats:
                steps, values = zip(*((found["step"], found[name]) for found in of_repeat), strict=True)
                axes.plot(steps, values, marker=".", color=SERIES[i % len(SERIES)])
        axes.set(xlim=(0, 1.02 * last))

    def copies(axes):
        for share in WATCH_BOUNDS:
            axes.axhline(share, color="grey", linewidth=0.8, linestyle="--")
        curves_of("mq30_above_floor", axes)

    def distances(axes):
        axes.yaxis.set_major_formatter(ScalarFormatter())
        curves_of(distance, axes)

    label, html = distance.upper() if distance == "swd" else distance, ""
    charts = (copies, "MQ@30 above floor", "mq30_above_floor"), (distances, label, distance)
    for draw, what, name in charts:
        ends = (f"{of}: {repeats[0][-1][name]:.3g} at the end" for of, repeats in series.items())
        alt = f"{what} over the steps of training. {'; '.join(ends)}."
        html += chart(draw, series, "steps", what, alt)
    note = (
        f"Measured during training, by --watch_step; {label} is to held-out images. Dashed: how far "
        "above the floor the best checkpoint may be, and from where on the training counts as copying."
    )
    return f"{html}<p class=note>{note}</p>"


def watch_section(series):
    """[(heading, `watch_curves`)], or [] if all series are empty; series: as there, or None in them."""
    found = {name: [of_repeat for of_repeat in repeats if of_repeat] for name, repeats in series.items()}
    found = {name: repeats for name, repeats in found.items() if repeats}
    return [("While it trained", watch_curves(found))] if found else []


def losses(gap):
    """The mean losses of training and of held-out images over t as a chart."""

    def draw(axes):
        axes.plot(gap["t"], gap["training"])
        axes.plot(gap["t"], gap["heldout"])
        axes.set(xlim=(0, gap["t"][-1]), yscale="log")

    best = f"AUC {gap['best_auc']:.3f}"
    apart = f"At t = {gap['best_t']} they tell training images from held-out ones best: {best}"
    training, heldout = gap["images"]
    numbers = f"Of {training:,} training and {heldout:,} held-out images, with the same noise for all."
    drawn = chart(draw, ("training", "held-out"), "t", "mean loss", f"Mean loss over t. {apart}.")
    return f"{drawn}<p class=note>{numbers} {apart}.</p>"


def all_columns(result):
    """A table of the `COLUMNS` that a result has, beside what other images reach in their place."""
    rows, sets = [], sets_of(result)
    for name, (value_of, form) in COLUMNS.items():
        values = [value_of(numbers) for numbers in sets.values()]
        if values[0] is not None:
            rows.append([name, *("" if value is None else form.format(value) for value in values)])
    return table(["measure", *sets], rows)


def similarities(result):
    """The statistics of similarity to training images by their published names, and their histograms."""
    sets = {name: numbers.get("similarity") for name, numbers in sets_of(result).items()}
    sets = {name: numbers for name, numbers in sets.items() if numbers}
    training, rows = sets["generated"], []
    for name in SIMILARITIES if is_sscd(result) else SIMILARITIES[:-1]:
        values = [numbers.get(f"sim_{name}") for numbers in sets.values()] + [training[f"bg_{name}"]]
        rows.append([name, *("" if value is None else f"{value:z.3f}" for value in values)])
    rows.append(["f_mem", *(f"{numbers['f_mem']:.3f}" for numbers in sets.values()), ""])
    series = {name: numbers["sim_histogram"] for name, numbers in sets.items()}
    series["training"] = training["bg_histogram"]
    how = f" ({training['preprocess']} preprocessing)" if training["preprocess"] else ""
    note = f"The largest cosine similarity of each image to the training images, by {training['features']}{how}; "
    of_others = "Unrelated images may be as alike: only the floors say how much that means."
    of_sscd = "Above 0.5 Somepalli et al. 2023 call an image a copy."
    note += f"of a training image to the others. {of_sscd if is_sscd(result) else of_others}"
    return f"{table(['sim', *sets, 'training'], rows)}<p class=note>{note}</p>{histograms(series)}"


def histograms(series):
    """Histograms of similarities as a chart; series: {name: share in each of equal intervals}."""

    def draw(axes):
        for i, shares in enumerate(series.values()):
            edges = [k / len(shares) for k in range(len(shares) + 1)]
            axes.stairs(shares, edges, color=SERIES[i % len(SERIES)], linewidth=1.5)
        axes.set(xlim=(0, 1))

    peaks = {name: shares.index(max(shares)) / len(shares) for name, shares in series.items()}
    peaks = "; ".join(f"{name}: most at {peak:.2f}" for name, peak in peaks.items())
    return chart(draw, series, "similarity", "share of images", f"Histograms of similarity. {peaks}.")


def pairs(generated, training, nearest, order, say):
    """The first pairs in an order (N,) as figures; say: makes a caption of both numbers, i and j."""
    shown = []
    for place, i in enumerate(order[:PAIRS].tolist()):
        j = nearest[i].item()
        images = (training[j], f"training image {j}"), (generated[i], f"generated image {i}")
        shown.append((f"{place + 1}. {say(i, j)}", images))
    return figures(shown)


def most(counts, training, copies, skips, names, groups):
    """The groups of training images with the largest counts as figures, each image's own count before.

    counts, copies, skips: (M,) int64, of training images; skips may be None; groups: (M,), theirs."""
    shown, totals = [], of_groups(counts, groups)
    for group in totals.argsort(descending=True, stable=True)[:TRAINING_IMAGES].tolist():
        if totals[group] == 0:
            break
        members = (groups == group).nonzero().flatten()
        members = members[counts[members].argsort(descending=True, stable=True)].tolist()
        skipped = "" if skips is None else f", skipped {skips[members].sum()}×"
        others = f" and {len(members) - 1} of its group" if len(members) > 1 else ""
        name = f"training {escape(str(names[members[0]]))}{others}"
        images = [(training[j], f"training image {j}") for j in members[:GROUP_IMAGES]]
        shown.append((f"{name}: copied {copies[members].sum()}×{skipped}", images))
    return figures(shown)


def of_groups(counts, groups):
    """The sums of counts (M,) int64 over groups: (largest number of a group + 1,)."""
    return torch.zeros(int(groups.max()) + 1, dtype=torch.int64).index_add(0, groups, counts)


def thresholds(result):
    """The counts at the published thresholds, with the floor of held-out images where there is one."""
    header, rows, pixels = ["100 ratio below", "images", "share"], [], result["pixels"]
    if "holdout" in result:
        header += ["held-out images", "above floor"]
    for p, count in pixels["mq"].items():
        rows.append([p, count, f"{pixels['mq_fraction'][p]:.1%}"])
        if "holdout" in result:
            floor = result["holdout"]["pixels"]["mq_fraction"][p]
            rows[-1] += [f"{floor:.1%}", f"{pixels['mq_above_floor'][p]:+z.1%}"]
    return table(header, rows)


def write_report(path, result, generated, training, nearest, ratio, skips=None, names=None, groups=None):
    """Write the page of one evaluation; returns its path as text.

    Args:
        path: of the .html.
        result: the dict of result.json.
        generated, training: (N, 3, H, W) and (M, 3, H, W), uint8.
        nearest: (N,) int64, the nearest training image of every generated one; ratio: (N,).
        skips: (M,) int64, how often training left each image out; None if it did not count.
        names: of generated and training images; None for their numbers.
        groups: (M,) int64, of training images, which neighbours were searched with; None for none."""
    image_names, training_names = names or (range(len(generated)), range(len(training)))
    all_thresholds = {"generated": [result["pixels"]["mq_curve"]]}
    if "holdout" in result:
        all_thresholds["held-out real images"] = [result["holdout"]["pixels"]["mq_curve"]]
    note = (
        "The ratio of an image is 100 d1 / mean(d1 .. d50), with its squared distances to the 50 "
        "nearest training images (Liu et al. 2024). The floor is the same figure for real images that "
        "were not trained on: what a generator that copies nothing may reach."
    )
    note += note_of_groups(result) + note_of_held_back(result)

    def caption(i, j):
        of_files = f"training {escape(str(training_names[j]))}, generated {escape(str(image_names[i]))}"
        return f"ratio {100 * ratio[i]:.1f}&thinsp;%, {of_files}"

    copies = torch.bincount(nearest[100 * ratio < COPIED], minlength=len(training))
    rule = f"A generated image with a ratio below {COPIED} % is a copy of its nearest training image."
    units = "training images" if groups is None else "groups"
    groups = torch.arange(len(training)) if groups is None else groups
    copied, number = (of_groups(copies, groups) > 0).sum(), len(groups.unique())
    of_training = f"<p class=note>{rule} {copied} of {number} {units} are copied.</p>"
    shown = training, copies, skips, training_names, groups
    of_training += f"<h3>Those copied most</h3>{most(copies, *shown)}"
    if skips is not None:
        skipped = most(skips, *shown)
        of_training += f"<h3>Those skipped most in training</h3>{skipped}"
    order = ratio.argsort(stable=True)
    sections = [
        ("Memorised quantity over all thresholds", curves(all_thresholds) + thresholds(result)),
        *([("Similarity of features", similarities(result))] if "similarity" in result else []),
        *([("Loss of training and held-out images", losses(result["gap"]))] if "gap" in result else []),
        *watch_section({"measured": [result.get("watched")]}),
        ("The most memorised pairs", pairs(generated, training, nearest, order, caption)),
        ("Training images", of_training),
    ]
    return write_page(path, result, len(training), f"<p class=note>{note}</p>", sections)


def note_of_groups(result):
    """What the groups that neighbours were searched with mean, or nothing."""
    if not (groups := result.get("groups")):
        return ""
    sizes = f"{groups['number']:,} of several images, the largest of {groups['largest']:,}"
    how = "neighbours after the nearest, d2 .. d50, are of other groups than that"
    return f" Training images are in groups, {sizes}: {how}."


def note_of_held_back(result):
    """What making images again has done, or nothing."""
    if not (numbers := result.get("held_back")):
        return ""
    is_text = "reject_above" in result["origin"]
    limit = f"{result['origin']['reject_above' if is_text else 'reject_below']:g}"
    rule, measure = f"a ratio below {limit} %", f"MQ@{limit}"
    if is_text:
        rule, measure = f"a similarity above {limit}", f"the share above {limit}"
    seconds, without = (f"{numbers[f'seconds_per_image{end}']:.3g}" for end in ("", "_without"))
    return (
        f" Images with {rule} were held back and made again, {numbers['share']:.1%} of them: "
        f"{numbers['made']:,} were made for {result['N']:,}. For {numbers['after_tries']:,} all "
        f"{numbers['tries']} tries failed, and the best is here. All others meet {measure} by "
        "construction, so it says nothing; what that costs, and which copies are left, is "
        "said by f_mem in other features, FID or fpd, and recall. "
        f"An image took {seconds} seconds, {without} without holding back."
        f"{said_of_near(result)}"
    )


def said_of_near(result):
    """How many near-duplicates are left, where the finder was asked."""
    if "near_duplicates" not in result:
        return ""
    return f" Of all that are here {result['near_duplicates']:,} are near-duplicates of training images, by the finder."


def write_page(path, result, number, note, sections):
    """Write a page of sections between a summary with a note and all flags; returns its path as text.

    number: of training images. What ends in "warning" in a result.json is said in the summary."""
    texts = [text for key, text in result.items() if key.endswith("warning") and text]
    warnings = "".join(f"<p class=note>{escape(text)}.</p>" for text in texts)
    flags = table(["flag", "value"], sorted((k, v) for k, v in result["flags"].items() if v is not None))
    settings = f"<details><summary>All flags</summary>{flags}</details>"
    source = result.get("checkpoint") or result.get("samples")
    title = f"{result['N']:,} images of {source} against {number:,} training images"
    sections = [("Summary", all_columns(result) + note + warnings), *sections, ("Settings", settings)]
    write_text(path, page(title, sections))
    return str(path)


def write_similarity_report(path, result, generated, training, nearest, similarity, prompts, captions):
    """Write the page of one evaluation of text_to_image.all_in; returns its path as text.

    Args:
        path, result, generated, training: as for `write_report`.
        nearest: (N,) int64, the most similar training image of every generated one; similarity: (N,).
        prompts: N texts, or None; captions: of the training images."""
    shares = {name: [numbers["similarity"]["mq_curve"]] for name, numbers in sets_of(result).items()}

    def caption(i, j):
        texts = f"<br>training: {escape(captions[j])}<br>prompt: {escape(prompts[i])}" if prompts else ""
        return f"similarity {similarity[i]:z.3f}{texts}"

    order = similarity.argsort(descending=True, stable=True)
    shown = pairs(generated, training, nearest, order, caption)
    sections = [
        ("Similarity to training images", similarities(result)),
        ("Memorised quantity over all thresholds, in feature space", curves(shares)),
        *([("Detector of copies", detector(result))] if "detector" in result else []),
        *watch_section({"measured": [result.get("watched")]}),
        ("The most similar pairs: training image, generated image", shown),
    ]
    note = note_of_groups(result) + note_of_held_back(result)
    return write_page(path, result, len(training), note and f"<p class=note>{note}</p>", sections)


def detector(result):
    """What Wen et al.'s detector makes of the generated images, as HTML."""
    names, rows = {"f_mem": "f_mem"}, []
    if is_sscd(result):  # older results have it of other features too
        names["above_05"] = "similarity above 0.5"
    for name, numbers in result["detector"].items():
        if name in names:
            values = (numbers["mean_of_copies"], numbers["mean_of_others"], numbers["auc"])
            texts = ["" if value is None else f"{value:.3f}" for value in values]
            rows.append([names[name], numbers["copies"], *texts])
    note = (
        "The norm of the prediction with the prompt less that without, averaged over the first steps, "
        "is to be larger for copies (Wen et al. 2024)."
    )
    header = ["copies by", "number", "norm", "norm of others", "AUC"]
    return f"{table(header, rows)}<p class=note>{note}</p>"

"""The frontier of a data set as one HTML page that needs nothing else, made of the parts of an evaluation's report."""

from html import escape

import numpy as np
import torch

from experiments.plot import curves as frontier_curves
from experiments.runs import WEIGHTS, read_measured, rounds_kept
from files import atomic_write
from score.charts import Chart, legend
from score.memorization import mq_curve
from score.report import copied, copy_counts, curves, histogram, page, picture, table

SHOWN = (15, 30, 50)  # percent


def frontier_chart(result, weights):
    """Quality against memorisation: a line an arm, the mean over seeds at every checkpoint."""
    drawn = {}
    for arm in result["flags"]:
        steps, distances, shares = frontier_curves(result["points"], arm, weights)
        if steps:
            drawn[arm] = distances.mean(axis=0), shares.mean(axis=0)
    said = "; ".join(f"{arm} ends at fpd {x[-1]:.2f} with {y[-1]:+.1%}" for arm, (x, y) in drawn.items())
    xs, ys = (np.concatenate([line[i] for line in drawn.values()]) for i in (0, 1))
    chart = Chart(
        (0, 1.05 * xs.max()),
        (min(0.0, ys.min()) - 0.02, max(0.1, 1.05 * ys.max())),
        "fpd to held-out images",
        "MQ@15 above floor",
        f"Memorisation against quality, {weights} weights. {said}.",
        percent=True,
    )
    for colour, (x, y) in enumerate(drawn.values()):
        chart.line(x, y, colour)
    return f"<h3>{weights} weights</h3>" + chart.svg() + legend(drawn)


def matched(result, weights):
    """The table of MQ above floor at matched quality."""
    rows = []
    for quality, arms in result["matched quality"][weights].items():
        for arm, found in arms.items():
            cells = [found[f"MQ@{p}"] for p in SHOWN]
            shown = [f"{c['mean']:+.1%} [{c['low']:+.1%}, {c['high']:+.1%}]" if c["reached"] else "–" for c in cells]
            rows.append([f"{quality}, {arm}", *shown])
    return f"<h3>{weights} weights</h3>" + table(["fpd, arm", *(f"MQ@{p} above floor" for p in SHOWN)], rows)


def floor(result):
    heldout = result["floor"]["heldout"]
    rows = [[f"MQ@{p}", f"{share:.1%}"] for p, share in heldout["mq_fraction"].items()]
    rows += [["sqrt(d1/d2) < 1/3", f"{heldout['share_sqrt_d1_d2_below_third']:.1%}"]]
    rows += [["AuthPct", f"{heldout['auth_pct']:.1f}"]]
    rows += [[name, f"{value:.3f}"] for name, value in result["floor"].items() if name.startswith("fpd")]
    return table(["held-out real images in the place of generated ones", ""], rows)


def last_of(runs):
    """{arm: what was kept of the last raw checkpoint of each seed}."""
    found = {}
    for run in runs:
        found.setdefault(run.arm.name, []).append(read_measured(run, rounds_kept(run)[-1], "raw"))
    return found


def pairs(of_arm):
    """The most memorised pairs of an arm's first seed as figures."""
    figures = []
    first = of_arm[0]
    for place, (i, pair) in enumerate(zip(first["top"], torch.from_numpy(first["pairs"]), strict=True)):
        ratio, image = f"{100 * first['ratio'][i]:.1f}", first["nearest"][i]
        left = picture(pair[0], f"distinct training image {image}")
        right = picture(pair[1], f"generated image {i}, its ratio is {ratio} percent")
        caption = f"{place + 1}. ratio {ratio}&thinsp;%, training {image}, generated {i}"
        figures.append(f"<figure>{left} {right}<figcaption>{caption}</figcaption></figure>")
    return f'<div class="pictures">{"".join(figures)}</div>'


def training_images(of_arm, judge):
    """The training images that an arm's first seed copies and has skipped most."""
    first, group = of_arm[0], torch.from_numpy(judge.group)
    nearest, ratio = torch.from_numpy(first["nearest"]).long(), torch.from_numpy(first["ratio"])
    copies = copy_counts(nearest, ratio, len(judge.distinct))[group]
    return copied(judge.training, copies, torch.from_numpy(first["skips"]))


def write_page(path, name, result, runs, judge):
    """Write the page of a data set.

    Args:
        path: of the .html.
        result: its part of frontier.json.
        runs: the trainings that have been measured.
        judge: `judge.Judge`.
    """
    found = last_of(runs)
    ratios = {arm: [torch.from_numpy(seed["ratio"]) for seed in seeds] for arm, seeds in found.items()}
    floor_ratio = torch.from_numpy(judge.floor_ratio)
    all_curves = {arm: [mq_curve(ratio) for ratio in of_arm] for arm, of_arm in ratios.items()}
    all_curves["held-out real images"] = [mq_curve(floor_ratio)]
    compared = {arm: ratios[arm][0] for arm in ("default", "IET-AGC") if arm in ratios}
    settings = table(["arm", "flags of main_fed.py"], [[arm, " ".join(f)] for arm, f in result["flags"].items()])
    last = '<p class="note">After the last step, raw weights.</p>'
    counted = "IET-AGC" if "IET-AGC" in found else next(iter(found))
    sections = [
        ("Quality against memorisation", "".join(frontier_chart(result, weights) for weights in WEIGHTS)),
        ("At matched quality", "".join(matched(result, weights) for weights in WEIGHTS)),
        ("The floor", floor(result)),
        ("Memorised quantity over all thresholds", last + curves(all_curves)),
        ("Distribution of the ratios", last + histogram({**compared, "held-out real images": floor_ratio})),
        *((f"The most memorised pairs of {arm}", last + pairs(of_arm)) for arm, of_arm in found.items()),
        (f"Training images under {counted}", training_images(found[counted], judge)),
        ("Settings", f"<details><summary>All flags</summary>{settings}<p>{escape(result['command'])}</p></details>"),
    ]
    with atomic_write(path) as file:
        file.write(page(f"The memorisation frontier of {name}", sections).encode())

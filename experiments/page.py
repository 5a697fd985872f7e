"""The frontier of a data set as one HTML page that needs nothing else, made of the parts of an evaluation's report."""

from html import escape

import torch

from experiments.detection import copies_of
from experiments.plot import SHOWN
from experiments.plot import curves as frontier_curves
from experiments.runs import WEIGHTS
from experiments.tables import floor_rows, matched_rows
from files import atomic_write
from score.memorization import mq_curve
from score.report import chart, copied, curves, histogram, legend, page, pair_figure, table


def frontier_chart(result, weights, threshold):
    """Quality against memorisation: a line an arm, the mean over seeds at every checkpoint."""
    drawn = {}
    for arm in result["flags"]:
        steps, distances, shares = frontier_curves(result["points"], arm, weights, threshold)
        if steps:
            drawn[arm] = distances.mean(axis=0), shares.mean(axis=0)
    said = "; ".join(f"{arm} ends at fpd {x[-1]:.2f} with {y[-1]:+.1%}" for arm, (x, y) in drawn.items())

    def draw(axes):
        for x, y in drawn.values():
            axes.plot(x, y)
        axes.set_xlim(left=0)

    alt = f"MQ@{threshold} against quality, {weights} weights. {said}."
    picture = chart(draw, "fpd to held-out images", f"MQ@{threshold} above floor", alt)
    return f"<h3>MQ@{threshold}, {weights} weights</h3>" + picture + legend(drawn)


def pairs(found):
    """The most memorised pairs of a checkpoint as figures."""
    figures = [
        pair_figure(place + 1, original, found["nearest"][i], copy, i, found["ratio"][i])
        for place, (i, (original, copy)) in enumerate(zip(found["top"], torch.from_numpy(found["pairs"]), strict=True))
    ]
    return f'<div class="pictures">{"".join(figures)}</div>'


def training_images(found, judge):
    """The training images that a checkpoint copies and that were skipped most until then."""
    return copied(judge.training, copies_of(found, judge.group), torch.from_numpy(found["skips"]))


def write_page(path, name, result, last, judge):
    """Write the page of a data set.

    Args:
        path: of the .html.
        result: its part of frontier.json.
        last: {arm: what was kept of the last raw checkpoint of each seed}.
        judge: `judge.Judge`.
    """
    ratios = {arm: [torch.from_numpy(seed["ratio"]) for seed in seeds] for arm, seeds in last.items()}
    floor_ratio = torch.from_numpy(judge.floor_ratio)
    all_curves = {arm: [mq_curve(ratio) for ratio in of_arm] for arm, of_arm in ratios.items()}
    all_curves["held-out real images"] = [mq_curve(floor_ratio)]
    compared = {arm: ratios[arm][0] for arm in ("default", "IET-AGC") if arm in ratios}
    settings = table(["arm", "flags of main_fed.py"], [[arm, " ".join(f)] for arm, f in result["flags"].items()])
    note = '<p class="note">After the last step, raw weights.</p>'
    counted = "IET-AGC" if "IET-AGC" in last else next(iter(last))
    at_matched = (f"<h3>{weights} weights</h3>" + table(*matched_rows(result, weights)) for weights in WEIGHTS)
    charts = (frontier_chart(result, weights, threshold) for threshold in SHOWN for weights in WEIGHTS)
    sections = [
        ("Quality against memorisation", "".join(charts)),
        ("At matched quality", "".join(at_matched)),
        ("The floor", table(*floor_rows(result))),
        ("Memorised quantity over all thresholds", note + curves(all_curves)),
        ("Distribution of the ratios", note + histogram({**compared, "held-out real images": floor_ratio})),
        *((f"The most memorised pairs of {arm}", note + pairs(seeds[0])) for arm, seeds in last.items()),
        (f"Training images under {counted}", training_images(last[counted][0], judge)),
        ("Settings", f"<details><summary>All flags</summary>{settings}<p>{escape(result['command'])}</p></details>"),
    ]
    with atomic_write(path) as file:
        file.write(page(f"The memorisation frontier of {name}", sections).encode())

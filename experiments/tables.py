"""What docs/RESULTS.md shows of results/*.json: tables, in the places that the document marks, and a figure.

python -m experiments.tables
"""

import math
import re
import statistics

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from experiments.digits import FINE_TUNED, LARGER, MAIN, OTHERS, STEPS, K
from experiments.matched import LEAST_SEEDS, at_quality, comparison, interval, paths_of, verdict
from experiments.runs import ROOT
from score.compare import markdown_table
from utils import startup
from utils.files import atomic_write, read_json, write_text

DOCUMENT = ROOT / "docs/RESULTS.md"
DRAWN = (*MAIN, "spread IET", "spread IET-AGC", "clustered score ensemble", "spread score ensemble", "local SGD")
AXES = ("fpd", "fpd of others")  # of quality
GRID = (0.3, 0.2, 0.15, 0.12, 0.1)  # of "fpd of others"
FORMS = {"fpd": "{:.3f}", "fpd of others": "{:.3f}", "f_mem": "{:.2%}", "extracted": "{:.1f}", "near copies": "{:.1%}"}
FORMS |= {"steps": "{:,.0f}", "sequential": "{:,.0f}"}


def trainings(result, names, network=None):
    """[(arm, {seed: its points})] of those of `names` that the results have."""
    found = [(arm, paths_of(result["points"], arm, network)) for arm in names]
    return [(arm, paths) for arm, paths in found if paths]


def spread(values, form):
    """Mean ± standard deviation over seeds, if there are several."""
    deviation = f" ± {form.format(statistics.stdev(values))}" if len(values) > 1 else ""
    return form.format(statistics.fmean(values)) + deviation


def cells(points, measures):
    """The `spread` of each of the measures over points, one a seed."""
    return [spread([point[m] for point in points], FORMS[m]) for m in measures]


def nearest(paths, count, steps):
    """The point of each path whose `count` of steps is nearest to `steps`."""
    return [min(path, key=lambda point: abs(point[count] - steps)) for path in paths]


def same_steps(result):
    """All arms after as many gradient steps in all as default training, and after as many one after the other."""
    measures, rows = ("fpd of others", "f_mem", "extracted", "near copies"), []
    counts = (("steps", STEPS, "in all"), ("sequential", STEPS // 2, "in a row"))
    for arm, paths in trainings(result, MAIN | OTHERS):
        rows.append([arm, len(paths)])
        for count, steps, _ in counts:
            points = nearest(paths.values(), count, steps)
            near = abs(points[0][count] - steps) <= steps / 5
            rows[-1] += cells(points, measures) if near else ["-"] * len(measures)
    return ["arm", "seeds", *(f"{m}, {steps:,} {how}" for _, steps, how in counts for m in measures)], rows


def matched(result, least=LEAST_SEEDS):
    """Every arm with so many seeds at least against default training, at the best quality that both reach.

    By the fpd and, beside it, by that of images that are not near repeated ones.
    """
    header, rows, seeds = ["arm", "seeds"], [], set(paths_of(result["points"], "default"))
    for axis in AXES:
        header += [axis, "f_mem", "default's", "difference", "extracted", "default's", "difference"]
    for arm, paths in trainings(result, MAIN | OTHERS):
        pairs = len(seeds & set(paths))
        if arm == "default" or pairs < least:
            continue
        rows.append([arm, pairs])
        for axis in AXES:
            row = comparison(result["points"], arm, axis=axis)
            rows[-1].append(FORMS[axis].format(row[axis]))
            for measure in ("f_mem", "extracted"):
                rows[-1] += [FORMS[measure].format(row[name]) for name in (measure, f"default {measure}")]
                rows[-1].append(f"{with_interval(row[f'{measure} difference'], measure)}: {verdict(row, measure)}")
    return header, rows


def with_interval(difference, measure):
    """A mean and its interval, shares in percent."""
    form, scale = ("{:+z.2f}", 100) if measure == "f_mem" else ("{:+z.1f}", 1)
    mean, low, high = (None if x is None else form.format(scale * x) for x in difference)
    return mean if low is None else f"{mean} [{low}, {high}]"


def frontier(result):
    """f_mem of the arms in the figure where their images that are not near repeated ones first reach a quality."""
    rows = []
    for arm, paths in trainings(result, DRAWN):
        rows.append([arm, len(paths)])
        for quality in GRID:
            values = [at_quality(path, quality, "f_mem", "fpd of others") for path in paths.values()]
            rows[-1].append("never" if any(map(math.isnan, values)) else spread(values, FORMS["f_mem"]))
    return ["arm", "seeds", *(f"at {quality:g}" for quality in GRID)], rows


def fine_tuned(result):
    """Arms that go on from default training: where they begin and end, and f_mem at the end less that of default."""
    measures = ("fpd", "fpd of others", "f_mem", "extracted")
    header = ["arm", "seeds", *(f"{m}, {when}" for when in ("start", "end") for m in measures), "difference of f_mem"]
    rows, baseline = [], paths_of(result["points"], "default (fine-tuned)")
    for arm, paths in trainings(result, FINE_TUNED):
        starts, ends = zip(*((path[0], path[-1]) for path in paths.values()), strict=True)
        rows.append([arm, len(paths), *cells(starts, measures), *cells(ends, measures)])
        less = [paths[seed][-1]["f_mem"] - baseline[seed][-1]["f_mem"] for seed in paths if seed in baseline]
        rows[-1].append(with_interval(interval(less), "f_mem") if less and arm != "default (fine-tuned)" else "")
    return header, rows


def larger(result):
    """Images of 16x16 pixels: the end of the trainings."""
    measures, rows = ("steps", "sequential", "fpd", "fpd of others", "f_mem", "extracted", "near copies"), []
    for arm, paths in trainings(result, LARGER):
        ends = [path[-1] for path in paths.values()]
        rows.append([arm, len(ends), *cells(ends, measures)])
    return ["arm", "seeds", *measures], rows


def sub_models(result):
    """Every second point of a shard's network: does it generalise before it memorises its shard?"""
    measures, rows = ("fpd", "fpd of others", "f_mem", "extracted"), []
    for arm, paths in trainings(result, ("clustered score ensemble", "spread score ensemble"), "sub-model"):
        for points in list(zip(*paths.values(), strict=True))[1::2]:
            single = spread([p["f_mem"] - p["f_mem of copies"] for p in points], FORMS["f_mem"])
            steps = f"{points[0]['steps']:,}"
            rows.append([arm.split()[0], len(paths), steps, *cells(points, measures), single])
    return ["copies", "seeds", "steps", *measures, "f_mem of single images"], rows


TABLES = {
    "steps": same_steps, "matched": matched, "frontier": frontier, "fine-tuned": fine_tuned, "sub-models": sub_models,
    "larger": larger,
}  # fmt: skip


def filled(text, result):
    """A document with its tables made anew: each stands between `<!-- table: NAME -->` and `<!-- end -->`."""
    places = re.compile(r"(<!-- table: (.*?) -->).*?<!-- end -->", re.DOTALL)
    return places.sub(lambda place: f"{place[1]}\n{markdown_table(*TABLES[place[2]](result))}<!-- end -->", text)


def shown(experiment, result):
    """What the command prints of an experiment."""
    return markdown_table(*matched(result, least=1)) if experiment == "digits" else ""


def plot(experiment, path, result):
    """The figure of an experiment, as a PNG file."""
    if experiment == "digits":
        plot_digits(path, result)


def plot_digits(path, result):
    """Memorisation over quality and over steps: means over seeds at every checkpoint, bars of a deviation."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    for i, (arm, paths) in enumerate(trainings(result, DRAWN)):
        length = min(map(len, paths.values()))
        numbers = {
            name: np.array([[point[name] for point in path[:length]] for path in paths.values()])
            for name in ("fpd of others", "steps", "extracted", "f_mem")
        }
        for row, measure in enumerate(("extracted", "f_mem")):
            y = numbers[measure]
            for axis, name in zip(axes[row], ("fpd of others", "steps"), strict=True):
                x = numbers[name]
                bars = {
                    "elinewidth": 0.7,
                    "markersize": 3,
                    "fmt": "o-" if i < 10 else "s:",
                    "label": arm,
                    "color": f"C{i}",
                }
                if len(paths) > 1:
                    bars |= {"xerr": x.std(axis=0, ddof=1), "yerr": y.std(axis=0, ddof=1)}
                axis.errorbar(x.mean(axis=0), y.mean(axis=0), **bars)
    for row, label in enumerate((f"repeated images copied, of {result['data']['duplicates']}", "f_mem")):
        what = "fpd of images not near repeated ones (less is better)"
        axes[row, 0].set(xlabel=what, ylabel=label, xscale="log", xlim=(None, 1))
        axes[row, 1].set(xlabel=f"gradient steps in all (over {K} shards)")
    for axis in axes[1]:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=100)


def main():
    write_text(DOCUMENT, filled(DOCUMENT.read_text(), read_json(ROOT / "results/digits.json")))


if __name__ == "__main__":
    startup.run(main)

"""What docs/RESULTS.md shows of results/experiment.json: tables, in the places that the document marks, and a figure.

python -m experiments.tables
"""

import re
import statistics

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from experiments.arms import FINE_TUNED, LARGER, LEARNING_RATES, MAIN, OTHERS, ROOT, STEPS, K
from experiments.matched import comparison, paths_of, verdict
from score.compare import markdown_table
from utils import startup
from utils.files import atomic_write, read_json, write_text

DOCUMENT = ROOT / "docs/RESULTS.md"
DRAWN = (*MAIN, "IET (spread)", "IET-AGC (spread)", "local SGD", "score ensemble")
FORMS = {"fpd": "{:.3f}", "f_mem": "{:.2%}", "extracted": "{:.1f}", "near copies": "{:.1%}"}
FORMS |= {"MQ@15": "{:.1%}", "MQ@30": "{:.1%}"}


def arms_in(result, names):
    """Those of `names` that the results have."""
    return [arm for arm in names if any(point["arm"] == arm for point in result["points"])]


def spread(values, form):
    """Mean ± standard deviation over seeds, if there are several."""
    deviation = f" ± {form.format(statistics.stdev(values))}" if len(values) > 1 else ""
    return form.format(statistics.fmean(values)) + deviation


def nearest(paths, count, steps):
    """The point of each path whose `count` of steps is nearest to `steps`."""
    return [min(path, key=lambda point: abs(point[count] - steps)) for path in paths]


def floor(result):
    """What held-out real images reach in the place of generated ones."""
    header = ["held-out real images", *FORMS]
    rows = [["", *(form.format(result["floor"][name]) for name, form in FORMS.items())]]
    rows[0][0] = f"{result['floor']['images']:,}"
    return header, rows


def same_steps(result):
    """All arms after as many gradient steps in all as default training, and after as many one after the other."""
    measures = ("fpd", "f_mem", "extracted")
    header = ["arm", "seeds", *(f"{m}, {STEPS:,} in all" for m in measures)]
    header += [f"{m}, {STEPS // 2:,} in a row" for m in measures]
    rows = []
    for arm in arms_in(result, MAIN | OTHERS):
        paths = paths_of(result["points"], arm)
        rows.append([arm, len(paths)])
        for count, steps in (("steps", STEPS), ("sequential", STEPS // 2)):
            points = nearest(paths, count, steps)
            near = abs(points[0][count] - steps) <= steps / 5
            rows[-1] += [spread([p[m] for p in points], FORMS[m]) if near else "-" for m in measures]
    return header, rows


def matched(result, names=(*MAIN, *OTHERS), baseline="default"):
    """Every arm against default training at the best fpd that both reach."""
    header = ["arm", "seeds", "fpd", "f_mem", f"{baseline}'s", "difference", "extracted", f"{baseline}'s", "difference"]
    rows = []
    for arm in arms_in(result, names):
        if arm == baseline or not paths_of(result["points"], baseline):
            continue
        row = comparison(result["points"], arm, baseline)
        cells = [arm, "{} and {}".format(*row["seeds"]), f"{row['fpd']:.3f}"]
        for measure, form, scale in (("f_mem", "{:+.2f}", 100), ("extracted", "{:+.1f}", 1)):
            mean, low, high = (None if x is None else form.format(scale * x) for x in row[f"{measure} difference"])
            interval = f" [{low}, {high}]" if low else ""
            cells += [FORMS[measure].format(row[name]) for name in (measure, f"{baseline} {measure}")]
            cells.append(f"{mean}{interval}: {verdict(row, measure)}")
        rows.append(cells)
    return header, rows


def fine_tuned(result):
    """Arms that go on from default training, against default training that goes on."""
    return matched(result, FINE_TUNED, "default (fine-tuned)")


def larger(result):
    """Images of 16x16 pixels."""
    return matched(result, LARGER, "default (16x16)")


def sub_models(result):
    """A shard's network that is never averaged: does it generalise before it memorises its shard?"""
    points = [p for path in paths_of(result["points"], "score ensemble", "sub-model") for p in path]
    rows = []
    for step in sorted({p["steps"] for p in points}):
        there = [p for p in points if p["steps"] == step]
        cells = [spread([p[name] for p in there], FORMS[name]) for name in ("fpd", "f_mem", "extracted")]
        single = spread([p["f_mem"] - p["f_mem of copies"] for p in there], FORMS["f_mem"])
        rows.append([f"{step:,}", *cells, single])
    return ["steps", "fpd", "f_mem", "extracted", "f_mem of single images"], rows


def learning_rates(result):
    """The best fpd of default training within a third of its steps."""
    rows = []
    for arm in arms_in(result, LEARNING_RATES):
        best = [min(path, key=lambda p: p["fpd"]) for path in paths_of(result["points"], arm)]
        rows.append([arm, spread([p["fpd"] for p in best], "{:.3f}"), spread([p["f_mem"] for p in best], "{:.2%}")])
    return ["arm", "best fpd", "f_mem there"], rows


TABLES = {
    "floor": floor, "steps": same_steps, "matched": matched, "fine-tuned": fine_tuned, "sub-models": sub_models,
    "larger": larger, "learning rates": learning_rates,
}  # fmt: skip


def filled(text, result):
    """A document with its tables made anew: each stands between `<!-- table: NAME -->` and `<!-- end -->`."""
    places = re.compile(r"(<!-- table: (.*?) -->).*?<!-- end -->", re.DOTALL)
    return places.sub(lambda place: f"{place[1]}\n{markdown_table(*TABLES[place[2]](result))}<!-- end -->", text)


def plot(path, result):
    """Memorisation over quality and over steps: means over seeds at every checkpoint, bars of a deviation."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    for i, arm in enumerate(arms_in(result, DRAWN)):
        paths = paths_of(result["points"], arm)
        length = min(map(len, paths))
        numbers = {
            name: np.array([[point[name] for point in path[:length]] for path in paths])
            for name in ("fpd", "steps", "extracted", "f_mem")
        }
        for row, measure in enumerate(("extracted", "f_mem")):
            y = numbers[measure]
            for axis, name in zip(axes[row], ("fpd", "steps"), strict=True):
                x = numbers[name]
                bars = {"xerr": x.std(axis=0), "yerr": y.std(axis=0), "elinewidth": 0.7, "markersize": 3, "fmt": "o-"}
                axis.errorbar(x.mean(axis=0), y.mean(axis=0), label=arm, color=f"C{i}", **bars)
    for row, label in enumerate((f"repeated images copied, of {round(result['repeated'])}", "f_mem")):
        axes[row, 0].set(xlabel="fpd to held-out images (less is better)", ylabel=label, xscale="log")
        axes[row, 0].axvline(result["floor"]["fpd of the training set"], color="grey", linestyle=":")
        axes[row, 1].set(xlabel=f"gradient steps in all (over {K} shards)")
    for axis in axes[1]:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=100)


def main():
    write_text(DOCUMENT, filled(DOCUMENT.read_text(), read_json(ROOT / "results/experiment.json")))


if __name__ == "__main__":
    startup.run(main)

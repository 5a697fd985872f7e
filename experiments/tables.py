"""What docs/RESULTS.md shows of results/frontier.json: tables, in the places that the document marks, and a picture.

python -m experiments.tables
"""

if __name__ == "__main__":  # before the imports that take seconds
    from utils import startup

    startup.prepare()

import itertools
import re
import statistics

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from experiments.arms import ROOT
from experiments.matched import COMPARED, WEIGHTS, paths_of
from score.compare import markdown_table
from utils import startup
from utils.files import atomic_write, read_json, write_text

DOCUMENT = ROOT / "docs/RESULTS.md"
SHARES = (*COMPARED, "f_mem", "AuthPct")


def table(cells):
    """Markdown of (a row's labels {column: label}, column, text) in the order in which rows and columns come."""
    rows = {}
    for about, column, text in cells:
        rows.setdefault(tuple(about.values()), dict(about))[column] = text
    columns = dict.fromkeys(column for row in rows.values() for column in row)
    return markdown_table(columns, [[row.get(column, "") for column in columns] for row in rows.values()])


def floor(frontier):
    """What held-out real images reach."""
    for data, result in frontier.items():
        for name in (*SHARES, "fpd", "fpd of training images"):
            yield {"": name}, data, f"{result['floor'][name]:{'.1%' if name in SHARES else '.3f'}}"


def end(frontier):
    """Every arm after its last step and, where it makes more than default training, after about as many as that."""
    for data, result in frontier.items():
        ends = {arm: max(p["steps"] for p in result["points"] if p["arm"] == arm) for arm in result["flags"]}
        for weights, (arm, last) in itertools.product(WEIGHTS, ends.items()):
            points = [p for p in result["points"] if (p["arm"], p["weights"]) == (arm, weights)]
            nearest = min((p["steps"] for p in points), key=lambda steps: abs(steps - ends.get("default", last)))
            for steps in sorted({nearest, last}):
                about = {"data": data, "weights": weights, "arm": arm, "steps": f"{steps:,}"}
                there = [p for p in points if p["steps"] == steps]
                yield about, "fpd", spread([p["fpd"] for p in there], "{:.2f}")
                for name in SHARES:
                    values = [100 * p[name] for p in there]
                    above = statistics.fmean(values) - 100 * result["floor"][name]
                    yield about, f"{name} % (above floor)", f"{spread(values, '{:.1f}')} ({above:+.1f})"


def spread(values, form):
    """Mean ± standard deviation, if there are several."""
    deviation = f" ± {form.format(statistics.stdev(values))}" if len(values) > 1 else ""
    return form.format(statistics.fmean(values)) + deviation


def matched(frontier):
    """COMPARED above the floor, all arms at the same fpd: the best two of those that are in the results."""
    for (data, result), weights in itertools.product(frontier.items(), WEIGHTS):
        rows = [row for row in result["matched"] if row["weights"] == weights]
        best = sorted({row["fpd"] for row in rows})[:2]
        for fpd, name, row in itertools.product(best, COMPARED, rows):
            if row["fpd"] == fpd:
                text = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * value for value in row[name]))
                yield {"data": data, "weights": weights, "fpd": f"{fpd:.3f}", "": name}, row["arm"], text


def comparisons(frontier):
    """How often an arm memorises less than its baseline, without a difference, and more."""
    for data, result in frontier.items():
        for arm, baseline in dict.fromkeys((row["arm"], row["baseline"]) for row in result["comparisons"]):
            found = [row[name] for row in result["comparisons"] if row["arm"] == arm for name in COMPARED]
            less, more = sum(high < 0 for _, _, high in found), sum(low > 0 for _, low, _ in found)
            most = max(p["MQ@15"] for p in result["points"] if p["arm"] in (arm, baseline))
            star = "" if most > result["floor"]["MQ@15"] else " *"
            yield {"": f"{arm} against {baseline}"}, data, f"{less} / {len(found) - less - more} / {more}{star}"


def detection(frontier):
    """Skip counts of IET-AGC against the loss under default training, where both can be judged."""
    detectors = (("IET-AGC", "skip count"), ("default", "low loss"))
    for data, result in frontier.items():
        for row, (arm, name) in itertools.product(result["detection"], detectors):
            if row["arm"] == arm and None not in row[name]:
                text = f"{np.mean(row[name]):.2f} ({min(row[name]):.2f} to {max(row[name]):.2f})"
                yield {"data": data, "images that are": row["images"]}, f"{name} of {arm}", text


TABLES = {"floor": floor, "end": end, "matched": matched, "comparisons": comparisons, "detection": detection}


def filled(text, frontier):
    """A document with its tables made anew: each stands between `<!-- table: NAME -->` and `<!-- end -->`."""
    places = r"(<!-- table: (.*?) -->).*?<!-- end -->"
    return re.sub(places, lambda p: f"{p[1]}\n{table(TABLES[p[2]](frontier))}<!-- end -->", text, flags=re.DOTALL)


def plot_frontier(path, results):
    """Memorisation above the floor against quality: means of every checkpoint, bars of a deviation over seeds."""
    arms = list(dict.fromkeys(arm for result in results.values() for arm in result["flags"]))
    rows = len(results) * len(WEIGHTS)
    figure = Figure(figsize=(11, 3.6 * rows), layout="constrained")
    axes = figure.subplots(rows, len(COMPARED), squeeze=False)
    labels = {}
    panes = itertools.product(results.items(), WEIGHTS, COMPARED)
    for axis, ((name, result), weights, measure) in zip(axes.flat, panes, strict=True):
        for arm in result["flags"]:
            paths = paths_of(result["points"], arm, weights)
            x, y = (np.array([[p[column] for p in path] for path in paths]) for column in ("fpd", measure))
            y -= result["floor"][measure]
            style = {"fmt": "o--" if arm.startswith("tuned") else "o-", "color": f"C{arms.index(arm)}"}
            bars = {"xerr": x.std(axis=0), "yerr": y.std(axis=0), "elinewidth": 0.7}
            axis.errorbar(x.mean(axis=0), y.mean(axis=0), label=arm, markersize=4, **bars, **style)
        axis.axvline(result["floor"]["fpd"], color="grey", linestyle=":", label="held-out images against others")
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.set_xscale("log", subs=[2, 5])
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("{x:g}")
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        axis.set(title=f"{name}, {weights} weights", ylabel=f"{measure} above the floor of held-out images")
        axis.set_xlabel("fpd to held-out images (less is better)")
        labels |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(labels.values(), labels.keys(), loc="outside upper center", ncols=4)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)


def main():
    write_text(DOCUMENT, filled(DOCUMENT.read_text(), read_json(ROOT / "results/frontier.json")))


if __name__ == "__main__":
    startup.run(main)

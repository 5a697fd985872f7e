"""The frontier as a picture: memorisation above the floor against quality, a curve an arm, a band over seeds."""

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt

from experiments.matched import COMPARED, paths_of
from experiments.runs import WEIGHTS
from utils.files import atomic_write


def curves(points, arm, weights, measure):
    """(steps (S,), fpd (seeds, S), share (seeds, S)) of an arm, of the steps that all of its seeds have."""
    paths = paths_of(points, arm, weights)
    steps = sorted(set.intersection(*({point["steps"] for point in path} for path in paths)))
    common = [[point for point in path if point["steps"] in steps] for path in paths]
    return steps, *(np.array([[point[name] for point in path] for path in common]) for name in ("fpd", measure))


def plot_frontier(path, results):
    """Write the picture of `results`, as frontier.json holds them: of each data set a row for raw and one for EMA."""
    panes = [(name, weights) for name in results for weights in WEIGHTS]
    size = (11, 3.6 * len(panes))
    figure, axes = plt.subplots(len(panes), len(COMPARED), figsize=size, squeeze=False, layout="constrained")
    by_label = {}
    for row, (name, weights) in zip(axes, panes, strict=True):
        for axis, measure in zip(row, COMPARED, strict=True):
            draw(axis, results[name], weights, measure)
            axis.set(title=f"{name}, {weights} weights", ylabel=f"{measure} above the floor of held-out images")
            by_label |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(by_label.values(), by_label.keys(), loc="outside upper center", ncols=4)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


def draw(axis, result, weights, measure):
    """One pane: means over seeds of every checkpoint; a standard deviation of the share as a band, of fpd as bars."""
    for i, arm in enumerate(result["flags"]):
        steps, distances, shares = curves(result["points"], arm, weights, measure)
        if not steps:
            continue
        x, y, colour = distances.mean(axis=0), shares.mean(axis=0) - result["floor"][measure], f"C{i}"
        axis.plot(x, y, "o--" if arm.startswith("tuned") else "o-", color=colour, label=arm, markersize=4)
        axis.fill_between(x, y - shares.std(axis=0), y + shares.std(axis=0), color=colour, alpha=0.15, linewidth=0)
        axis.errorbar(x, y, xerr=distances.std(axis=0), color=colour, alpha=0.35, fmt="none")
        axis.annotate(f"{steps[-1]:,} steps", (x[-1], y[-1]), fontsize=7, color=colour)
    axis.axvline(result["floor"]["fpd"], color="grey", linestyle=":", label="held-out images against others")
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set(xscale="log", xlabel="fpd to held-out images (less is better)")
    for numbers in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
        numbers(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "125" else "")
    axis.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))

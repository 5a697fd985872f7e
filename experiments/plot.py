"""The frontier as a picture: memorisation above the floor against quality, a curve an arm, a band over seeds."""

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt

from experiments.runs import WEIGHTS
from files import atomic_write

COLOURS = {
    "default": "#b4470a", "IET": "#7a6200", "AGC": "#8a2f8f", "IET-AGC": "#0b62a8",
    "tuned default": "#e8863c", "tuned IET-AGC": "#3fa7f0",
}  # fmt: skip
SHOWN = ("15", "30")  # thresholds of MQ, in percent


def curves(points, arm, weights, threshold):
    """(steps (S,), fpd (seeds, S), MQ above floor (seeds, S)) of an arm, of the steps that all of its seeds have."""
    by_seed = {}
    for point in points:
        if point["arm"] == arm and point["weights"] == weights:
            value = (point["fpd"], point["mq_above_floor"][threshold])
            by_seed.setdefault(point["seed"], {})[point["steps"]] = value
    steps = sorted(set.intersection(*(set(of_seed) for of_seed in by_seed.values()))) if by_seed else []
    values = np.array([[of_seed[step] for step in steps] for of_seed in by_seed.values()])
    return steps, *(np.moveaxis(values, -1, 0) if len(steps) else (np.empty((0, 0)), np.empty((0, 0))))


def plot_frontier(path, results):
    """Write the picture of `results`, as frontier.json holds them: of each data set a row for raw and one for EMA."""
    panes = [(name, weights) for name in results for weights in WEIGHTS]
    size = (11, 3.6 * len(panes))
    figure, axes = plt.subplots(len(panes), len(SHOWN), figsize=size, squeeze=False, layout="constrained")
    for row, (name, weights) in zip(axes, panes, strict=True):
        for axis, threshold in zip(row, SHOWN, strict=True):
            draw(axis, results[name], weights, threshold)
            axis.set(title=f"{name}, {weights} weights", ylabel=f"MQ@{threshold} above the floor of held-out images")
            axis.set_xlabel("fpd to held-out images (less is better)")
    by_label = {}
    for axis in axes.flat:
        handles, labels = axis.get_legend_handles_labels()
        by_label |= zip(labels, handles, strict=True)
    figure.legend(by_label.values(), by_label.keys(), loc="outside upper center", ncols=4)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


def draw(axis, result, weights, threshold):
    """One pane: the mean over seeds of every checkpoint; one standard deviation of MQ as a band, of fpd as bars."""
    for arm, colour in COLOURS.items():
        steps, distances, shares = curves(result["points"], arm, weights, threshold)
        if not steps:
            continue
        x, y = distances.mean(axis=0), shares.mean(axis=0)
        line = "o--" if arm.startswith("tuned") else "o-"
        axis.plot(x, y, line, color=colour, label=arm, markersize=4)
        axis.fill_between(x, y - shares.std(axis=0), y + shares.std(axis=0), color=colour, alpha=0.15, linewidth=0)
        axis.errorbar(x, y, xerr=distances.std(axis=0), color=colour, alpha=0.35, fmt="none")
        axis.annotate(f"{steps[-1]:,} steps", (x[-1], y[-1]), fontsize=7, color=colour)
    floor = result["floor"]["fpd of a held-out sample to the others"]
    axis.axvline(floor, color="grey", linestyle=":", label="held-out images against others")
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set_xscale("log")
    for numbers in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
        numbers(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "125" else ""))
    axis.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))

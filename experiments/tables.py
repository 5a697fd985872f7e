"""What the documents show of results/*.json: tables, in places that they mark, and figures.

python -m experiments.tables
"""

import functools
import math
import re
import statistics

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from experiments import altered, cifar10, digits, lora, lora_rates, runs
from experiments.matched import COPIES, at_quality, best_without_copying, corrected, onset, paths_of, welch
from experiments.runs import ROOT
from score.compare import markdown_table
from training.watch import best_of
from utils import startup
from utils.files import atomic_write, read_json, write_text

EXPERIMENTS = runs.EXPERIMENTS | {"lora": lora, "lora_rates": lora_rates}
DOCUMENTS = ROOT / "docs/RESULTS.md", ROOT / "docs/TEXT_TO_IMAGE.md"
FORMS = {"fpd": "{:.3f}", "fpd of others": "{:.3f}", "swd": "{:.1f}", "f_mem": "{:.2%}", "extracted": "{:.1f}"}
FORMS |= {"near copies": "{:.1%}", "steps": "{:,.0f}", "MQ@15": "{:.1%}"}
FORMS |= {f"MQ@{p} above": "{:+.1%}" for p in ("15", "30", "50")}
FORMS |= {"own_image above": "{:+.1%}", "f_mem above": "{:+.1%}", "similarity above": "{:+.3f}"}
NAMES = {"swd": "SWD"}  # of measures that are called otherwise in a table
SHOWN_BELOW = 0.05  # p after Holm's correction

# at a `common_quality` by each of these distances
COMPARED = {"fpd of others": ("f_mem", "MQ@15"), "fpd": ("f_mem", "extracted")}
ALL_DIGITS = digits.MAIN | digits.OTHERS
DRAWN = (
    *digits.MAIN, "spread IET", "spread IET-AGC", "clustered score ensemble", "spread score ensemble", "local SGD"
)  # fmt: skip

SIZES = {"250 images": 250, "default": cifar10.DATA["num_train"], "1000 images": 1000}
ALL_CIFAR10 = [arm for arm in cifar10.ARMS if arm == "default" or arm not in SIZES]
IN_A_ROW = cifar10.ENSEMBLE["steps"] // cifar10.K  # all steps of an ensemble


def trainings(result, names):
    """[(arm, {seed: its points})] of those of `names` that the results have."""
    found = [(arm, paths_of(result["points"], arm)) for arm in names]
    return [(arm, paths) for arm, paths in found if paths]


def spread(values, measure):
    """Mean ± standard deviation over seeds, if there are several; or how many of them have a number."""
    reached = sum(map(math.isfinite, values))
    if reached < len(values):
        return f"{reached} of {len(values)} seeds" if reached else "never"
    form = FORMS[measure]
    deviation = f" ± {form.format(statistics.stdev(values)).lstrip('+')}" if len(values) > 1 else ""
    return form.format(statistics.fmean(values)) + deviation


def cells(points, measures):
    """The `spread` of each of the measures over points, one a seed."""
    return [spread([point[m] for point in points], m) for m in measures]


def with_interval(comparison, measure):
    """A difference and its interval, shares in percentage points; nothing of a NaN."""
    scale, form = (100, "{:+z.1f}") if "%" in FORMS[measure] else (1, FORMS[measure].replace(":", ":+z"))
    difference, low, high = (None if x is None else form.format(scale * x) for x in comparison[:3])
    if math.isnan(comparison[0]):
        return ""
    return difference if low is None else f"{difference} [{low}, {high}]"


def differences(values, baseline):
    """What `welch` says of all arms against the baseline, corrected; values: {(arm, ...): numbers}."""
    others = [key for key in values if key[0] != baseline and (baseline, *key[1:]) in values]
    return corrected({key: welch(values[key], values[baseline, *key[1:]]) for key in others})


def in_bold(comparison, measure):
    """A difference and its interval, bold if it is shown."""
    text, p = with_interval(comparison, measure), comparison[-1]
    return f"**{text}**" if p is not None and p < SHOWN_BELOW else text


def p_value(p):
    """A p-value as text; None is that of a comparison that is no test."""
    return "shown, not compared" if p is None else f"{p:.3f}" if p >= 0.001 else "< 0.001"


def after_steps(paths, count, steps, measures):
    """The `cells` of the points whose `count` of steps is nearest to `steps`; dashes if that is far."""
    points = [min(path, key=lambda point: abs(point[count] - steps)) for path in paths.values()]
    near = abs(points[0][count] - steps) <= steps / 5
    return cells(points, measures) if near else ["-"] * len(measures)


def digits_arms(result):
    """All arms after as many steps in a row, then `compared_arms`."""
    steps, measures = digits.ENSEMBLE["steps"] // digits.K, ("fpd of others", "f_mem", "MQ@15")
    found = dict(trainings(result, ALL_DIGITS))
    first = {arm: after_steps(paths, "sequential", steps, measures) for arm, paths in found.items()}
    return compared_arms(found, [f"{m}, {steps:,} in a row" for m in measures], first)


def compared_arms(found, names, first):
    """All arms at two qualities, where others are less the default.

    By Welch's t; bold is what Holm's correction over the table leaves.

    found: {arm: {seed: its points}}; names: of the columns before; first: {arm: their cells}."""
    columns = [(axis, measure) for axis in COMPARED for measure in COMPARED[axis]]
    quality = {axis: common_quality(found, axis) for axis in COMPARED}
    values = {
        (arm, *column): [at_quality(path, quality[column[0]], column[1], column[0]) for path in paths.values()]
        for arm, paths in found.items()
        for column in columns
    }
    compared = differences(values, "default")

    def cell(key):
        is_difference = key in compared and np.isfinite(values[key]).all()
        return in_bold(compared[key], key[-1]) if is_difference else spread(values[key], key[-1])

    rows = [
        [f"{arm}, {len(paths)}", *first[arm], *(cell((arm, *column)) for column in columns)]
        for arm, paths in found.items()
    ]
    return ["arm, seeds", *names, *(f"{m} at {x} {quality[x]:g}" for x, m in columns)], rows


def common_quality(found, axis):
    """The best hundredth that default training and more than half of the other arms reach in all seeds."""
    reached = {arm: max(min(p[axis] for p in path) for path in paths.values()) for arm, paths in found.items()}
    own = reached.pop("default", 0.0)
    others = sorted(reached.values())
    return math.ceil(100 * max([own, *others[len(others) // 2 :][:1]])) / 100


def altered_arms(result):
    """All arms after all steps, then `compared_arms`; below them what best.json would name."""
    measures, found = ("fpd of others", "f_mem", "extracted"), dict(trainings(result, altered.ARMS))
    ends = {arm: cells([path[-1] for path in paths.values()], measures) for arm, paths in found.items()}
    header, rows = compared_arms(found, [f"{m}, all steps" for m in measures], ends)
    for arm in altered.WATCHED:
        if paths := found.get(arm):
            none = dict.fromkeys(("steps", *measures), math.nan)
            best = [best_of(path, "fpd") or none for path in paths.values()]
            steps = spread([point["steps"] for point in best], "steps")
            rows.append([f"{arm}, best.json: step {steps}, {len(paths)}", *cells(best, measures)])
            rows[-1] += [""] * (len(header) - len(rows[-1]))
    return header, rows


def digits_fine_tuned(result):
    """Arms that go on from default training: their ends, and these less that of default training."""
    measures, compared = ("fpd of others", "f_mem", "MQ@15", "extracted"), ("f_mem", "MQ@15")
    found = trainings(result, digits.FINE_TUNED)
    ends = {arm: [path[-1] for path in paths.values()] for arm, paths in found}
    values = {(arm, m): [point[m] for point in points] for arm, points in ends.items() for m in compared}
    against = differences(values, next(iter(digits.FINE_TUNED)))
    rows = [["start", len(paths), *cells([p[0] for p in paths.values()], measures), "", ""] for _, paths in found[:1]]
    for arm, points in ends.items():
        less = [in_bold(against[arm, m], m) if (arm, m) in against else "" for m in compared]
        rows.append([arm, len(points), *cells(points, measures), *less])
    return ["arm", "seeds", *measures, *(f"difference of {m}" for m in compared)], rows


def cifar10_primary(result):
    """The best quality without copying of every arm, and its difference to the default, by Welch's t.

    AGC is compared with random skip too. p is that after Holm's correction over the table."""
    axes, found = ("fpd", "swd"), dict(trainings(result, ALL_CIFAR10))
    paths = [(arm, axis, found[arm].values()) for arm in found for axis in axes]
    best = {(arm, axis): [best_without_copying(p, axis) for p in of_arm] for arm, axis, of_arm in paths}
    pairs = [(arm, "default") for arm in found if arm != "default"] + [("AGC", "random skip")]
    pairs = [pair for pair in pairs if set(pair) <= set(found)]
    compared = corrected({(*pair, x): welch(best[pair[0], x], best[pair[1], x]) for pair in pairs for x in axes})

    def against(arm, other, axis):
        if (arm, other, axis) not in compared:
            return "", ""
        difference = compared[arm, other, axis]
        return with_interval(difference, axis), p_value(difference[-1])

    rows = []
    for arm, paths in found.items():
        rows.append([arm, len(paths)])
        for axis in axes:
            rows[-1] += [spread(best[arm, axis], axis), *against(arm, "default", axis)]
    if ("AGC", "random skip") in pairs:
        rows.append(["AGC, to random skip", ""])
        for axis in axes:
            rows[-1] += ["", *against("AGC", "random skip", axis)]
    header = [(f"best {NAMES.get(x, x)} without copying", "difference to default", "p") for x in axes]
    return ["arm", "seeds", *header[0], *header[1]], rows


def cifar10_steps(result, count, steps, how):
    """All arms after as many gradient steps."""
    measures = ("MQ@15 above", "MQ@30 above", "MQ@50 above", "f_mem", "near copies", "fpd", "swd")
    rows = [[arm, *after_steps(paths, count, steps, measures)] for arm, paths in trainings(result, ALL_CIFAR10)]
    return [f"after {steps:,} steps {how}", *(NAMES.get(m, m) for m in measures)], rows


def cifar10_sizes(result):
    """How default training grows with the number of images: when it begins to copy, its best quality."""
    rows = []
    for arm, paths in trainings(result, SIZES):
        rows.append([SIZES[arm], len(paths), spread([onset(path) for path in paths.values()], "steps")])
        for axis in ("fpd", "swd"):
            best = [min(path, key=lambda point: point[axis]) for path in paths.values()]
            rows[-1] += cells(best, (axis, "steps"))
    return ["images", "seeds", "copies from step", "best fpd", "at step", "best SWD", "at step"], rows


def lora_arms(result):
    """The best quality without copying of every arm, its difference to the default, and the ends.

    By Welch's t; p is that after Holm's correction over the table."""
    measures = ("own_image above", "f_mem above", "similarity above", "fpd")
    found = dict(trainings(result, lora.ARMS))
    best = {
        (arm,): [best_without_copying(path, "fpd", lora.COPIES) for path in paths.values()]
        for arm, paths in found.items()
    }
    compared, rows = differences(best, "default"), []
    for arm, paths in found.items():
        rows.append([f"{arm}, {len(paths)}", spread(best[arm,], "fpd"), "", ""])
        if less := compared.get((arm,)):
            rows[-1][2:] = with_interval(less, "fpd"), p_value(less[-1])
        rows[-1] += cells([path[-1] for path in paths.values()], measures)
    header = ["arm, seeds", "best fpd without copying", "difference to default", "p"]
    return header + [f"{measure.replace('_image', ' image')}, all steps" for measure in measures], rows


def lora_grid(result):
    """The loss of every rank with every rate, and the rate that has the lowest."""
    losses = {point["arm"]: f"{point['loss']:.4f}" for point in result["points"] if point["steps"]}
    chosen = lora_rates.chosen(result["points"])
    rows = [
        [rank or "whole UNet", *(losses.get(lora_rates.name_of(rank, lr), "-") for lr in lora_rates.GRID)]
        for rank in lora.RATES
    ]
    for row, rank in zip(rows, lora.RATES, strict=True):
        row.append(f"{chosen[rank]:g}" if rank in chosen else "-")
    return ["rank", *(f"loss, lr {lr:g}" for lr in lora_rates.GRID), "chosen"], rows


TABLES = {
    "digits arms": digits_arms,
    "digits fine-tuned": digits_fine_tuned,
    "altered arms": altered_arms,
    "cifar10 primary": cifar10_primary,
    "cifar10 in all": functools.partial(cifar10_steps, count="steps", steps=cifar10.STEPS, how="in all"),
    "cifar10 in a row": functools.partial(cifar10_steps, count="sequential", steps=IN_A_ROW, how="in a row"),
    "cifar10 sizes": cifar10_sizes,
    "lora arms": lora_arms,
    "lora_rates grid": lora_grid,
}
PRINTED = {"altered": altered_arms, "digits": digits_arms, "cifar10": cifar10_primary}
PRINTED |= {"lora": lora_arms, "lora_rates": lora_grid}


def filled(text, results):
    """A document whose tables, from `<!-- table: EXPERIMENT NAME -->` to `<!-- end -->`, are made anew.

    results: {experiment: what its file says}; the tables of others stay as they are."""

    def table(place):
        if place[2] not in results:
            return place[0]
        return f"{place[1]}\n{markdown_table(*TABLES[f'{place[2]} {place[3]}'](results[place[2]]))}<!-- end -->"

    return re.sub(r"(<!-- table: (\S+) (.*?) -->).*?<!-- end -->", table, text, flags=re.DOTALL)


def shown(experiment, result):
    """What the command prints of an experiment."""
    return markdown_table(*PRINTED[experiment](result))


def plot(experiment, path, result):
    """The figure of an experiment that has one, as a PNG file."""
    if experiment not in DRAW:
        return
    figure = Figure(layout="constrained")
    axes = DRAW[experiment](figure, result)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=100)


def draw(axis, x, y, result, arms):
    """One measure over another: means over seeds at every checkpoint, bars of a deviation."""
    for i, (arm, paths) in enumerate(trainings(result, arms)):
        length = min(map(len, paths.values()))
        means, bars = {}, {}
        for name in (x, y):
            values = np.array([[point[name] for point in path[:length]] for path in paths.values()])
            means[name] = values.mean(axis=0)
            bars[name] = values.std(axis=0, ddof=1) if len(paths) > 1 else None
        look = {"elinewidth": 0.7, "markersize": 3, "fmt": "o-" if i < 10 else "s:", "color": f"C{i % 10}"}
        axis.errorbar(means[x], means[y], xerr=bars[x], yerr=bars[y], label=arm, **look)


def draw_digits(figure, result, arms=DRAWN):
    """Memorisation over quality and over steps; returns the axes."""
    figure.set_size_inches(12, 8)
    axes = figure.subplots(2, 2)
    labels = {"extracted": f"repeated images copied, of {result['data']['duplicates']}", "f_mem": "f_mem"}
    for row, (measure, label) in zip(axes, labels.items(), strict=True):
        for axis, x in zip(row, ("fpd of others", "steps"), strict=True):
            draw(axis, x, measure, result, arms)
        what = "fpd of images not near repeated ones (less is better)"
        row[0].set(xlabel=what, ylabel=label, xscale="log", xlim=(None, 1))
        row[1].set(xlabel=f"gradient steps in all (over {digits.K} shards)")
    for axis in axes[1]:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    return axes


def draw_cifar10(figure, result):
    """Copies over both qualities and over steps; lines: what held-out images reach. Returns the axes."""
    measure, limit = COPIES
    figure.set_size_inches(12, 5)
    axes = figure.subplots(1, 3, sharey=True)
    names = {
        "fpd": "fpd to held-out images (less is better)",
        "swd": "SWD to held-out images (less is better)",
        "steps": f"gradient steps in all (over {cifar10.K} shards)",
    }
    for axis, (x, label) in zip(axes, names.items(), strict=True):
        draw(axis, x, measure, result, ALL_CIFAR10)
        axis.axhline(0, color="gray", linewidth=0.7)
        axis.axhline(limit, color="gray", linewidth=0.7, linestyle="--")
        if x in result["floor"]:
            axis.axvline(result["floor"][x], color="gray", linewidth=0.7)
        axis.set_xlabel(label)
    axes[0].set(xscale="log", ylabel=f"{measure} the floor (dashed: copying begins)")
    axes[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    return axes


def draw_lora(figure, result):
    """Three kinds of copying over quality, above what held-out images reach. Returns the axes."""
    figure.set_size_inches(12, 5)
    axes = figure.subplots(1, 3)
    measure, limit = lora.COPIES
    for axis, name in zip(axes, ("own_image above", "f_mem above", "similarity above"), strict=True):
        draw(axis, "fpd", name, result, lora.ARMS)
        axis.axhline(0, color="gray", linewidth=0.7)
        axis.set_xlabel("fpd to held-out images (less is better)")
        axis.set_ylabel(f"{name.replace('_image', ' image')} the floor")
        if name == measure:
            axis.axhline(limit, color="gray", linewidth=0.7, linestyle="--")
        if "%" in FORMS[name]:
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    return axes


DRAW = {"digits": draw_digits, "cifar10": draw_cifar10, "lora": draw_lora}
DRAW["altered"] = functools.partial(draw_digits, arms=altered.ARMS)


def read_results():
    """{experiment: what its file says} of those that have one."""
    paths = {name: ROOT / f"results/{name}.json" for name in EXPERIMENTS}
    return {name: read_json(path) for name, path in paths.items() if path.exists()}


def main():
    for document in DOCUMENTS:
        write_text(document, filled(document.read_text(), read_results()))


if __name__ == "__main__":
    startup.run(main)

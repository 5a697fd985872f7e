"""docs/RESULTS.md and the results in the README, written from results/*.json:

python -m experiments.document
"""

import statistics
import sys
from collections import Counter
from pathlib import Path

from errors import DataError
from experiments.command import report_errors
from experiments.frontier import BASELINES, DIFFERENCES
from experiments.runs import WEIGHTS
from experiments.tables import SHOWN, floor_rows, matched_rows, share
from files import atomic_write, read_json
from score.compare import markdown_table
from score.memorization import THRESHOLDS

ROOT = Path(__file__).parent.parent
MQ_COLUMNS = (*(f"MQ@{p} %" for p in SHOWN), *(f"@{p} above floor" for p in SHOWN))
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
DESCRIPTIONS = {
    "digits64": "64 handwritten digits of 8x8 pixels, held out: the other 1,733",
    "digits256": "256 handwritten digits of 8x8 pixels, held out: the other 1,541",
    "patches128": "128 colour patches of 16x16 pixels cut from two photographs and moved to mid grey, five of them "
    "repeated ten times; held out: the other patches",
}


def spread(values, form):
    deviation = f" ± {form.format(statistics.stdev(values)).lstrip('+')}" if len(values) > 1 else ""
    return form.format(statistics.fmean(values)) + deviation


def points_of(result, arm, weights, steps=None):
    """The points of an arm, one per seed, after the last steps, or after those that are nearest to `steps`."""
    points = [p for p in result["points"] if p["arm"] == arm and p["weights"] == weights]
    chosen = max(p["steps"] for p in points)
    if steps:
        chosen = min(sorted(p["steps"] for p in points), key=lambda made: abs(made - steps))
    return [p for p in points if p["steps"] == chosen]


def verdict(found):
    """What a `matched.difference` says."""
    if found is None:
        return "not reached by all seeds"
    if found["high"] < 0:
        return "less"
    return "more" if found["low"] > 0 else "no difference found"


def end_table(result, weights):
    """Mean and spread over seeds after the last step."""
    rows = []
    for arm in result["flags"]:
        points = points_of(result, arm, weights)
        shares = [spread([100 * p["mq_fraction"][str(t)] for p in points], "{:.1f}") for t in SHOWN]
        above = [spread([100 * p["mq_above_floor"][str(t)] for p in points], "{:+.1f}") for t in SHOWN]
        third = spread([100 * p["share_sqrt_d1_d2_below_third"] for p in points], "{:.1f}")
        authentic = spread([p["auth_pct"] for p in points], "{:.1f}")
        fpd = spread([p["fpd"] for p in points], "{:.2f}")
        rows.append([arm, f"{points[0]['steps']:,}", fpd, *shares, *above, third, authentic])
    return markdown_table(["arm", "steps", "fpd", *MQ_COLUMNS, "sqrt(d1/d2)<1/3 %", "AuthPct"], rows)


def all_thresholds_table(result, weights):
    """MQ above floor at the best quality that all reach, at every threshold."""
    quality, arms = next(iter(result["matched quality"][weights].items()))
    rows = [
        [arm, *(f"{100 * found[f'MQ@{p}']['mean']:+.1f}" if found[f"MQ@{p}"]["reached"] else "–" for p in THRESHOLDS)]
        for arm, found in arms.items()
    ]
    return markdown_table([f"at fpd {quality}", *(f"MQ@{p}" for p in THRESHOLDS)], rows)


def difference_table(result):
    rows = []
    for weights, compared in result["comparisons"].items():
        for row in compared:
            cells = (cell for p in DIFFERENCES for cell in (share(row[f"MQ@{p}"]), verdict(row[f"MQ@{p}"])))
            rows.append([weights, row["fpd"], f"{row['arm']} less {row['baseline']}", *cells])
    header = ["weights", "fpd", "", *(cell for p in DIFFERENCES for cell in (f"MQ@{p}, points", "memorises"))]
    return markdown_table(header, rows)


def tally(result, arm):
    """{verdict: how often} of an arm over weights, qualities and thresholds."""
    rows = [row for compared in result["comparisons"].values() for row in compared if row["arm"] == arm]
    return Counter(verdict(row[f"MQ@{p}"]) for row in rows for p in DIFFERENCES)


def auc(values):
    known = [value for value in values if value is not None]
    return f"{statistics.fmean(known):.2f} ({min(known):.2f} to {max(known):.2f})" if known else "none or all"


def detection_table(result):
    rows = []
    for arm, labels in result["detection (ROC AUC per seed)"].items():
        for label, detectors in labels.items():
            if any(value is not None for values in detectors.values() for value in values):
                rows.append([arm, label, *(auc(detectors[name]) for name in ("skip count", "low loss"))])
    return markdown_table(["training", "images that are", "skip count", "low loss (baseline)"], rows)


def sampler_table(result):
    rows = []
    for arm, samplers in result["samplers"].items():
        for sampler, found in samplers.items():
            shares = (f"{100 * found['mq_fraction'][str(p)]:.1f}" for p in SHOWN)
            above = (f"{100 * found['mq_above_floor'][str(p)]:+.1f}" for p in SHOWN)
            rows.append([arm, sampler, f"{found['fpd']:.2f}", *shares, *above])
    return markdown_table(["arm", "sampler", "fpd", *MQ_COLUMNS], rows)


def pairs_table(result):
    rows = [
        [arm, *(f"{100 * pair['ratio']:.2f} ({pair['training image']})" for pair in pairs)]
        for arm, pairs in result["most memorised"].items()
    ]
    return markdown_table(["arm", *(str(i + 1) for i in range(max(map(len, rows)) - 1))], rows)


def memorisation_and_quality(points):
    """(steps, mean MQ@15 above floor in points, mean fpd) of points with the same steps."""
    above = statistics.fmean(100 * point["mq_above_floor"]["15"] for point in points)
    return points[0]["steps"], above, statistics.fmean(point["fpd"] for point in points)


def at_equal_steps(name, result):
    """One sentence: default training and IET-AGC after as many steps, raw weights."""
    steps, above, fpd = memorisation_and_quality(points_of(result, "default", "raw"))
    our_steps, our_above, our_fpd = memorisation_and_quality(points_of(result, "IET-AGC", "raw", steps))
    return (
        f"{name}: {steps:,} steps of default training give MQ@15 {above:+.1f} points above the floor and fpd "
        f"{fpd:.2f}, {our_steps:,} of IET-AGC {our_above:+.1f} and {our_fpd:.2f}"
    )


def in_words(name, result, arm):
    """One sentence: an arm against default training at matched quality."""
    found = tally(result, arm)
    less, more, number = found["less"], found["more"], found.total()
    if less and more:
        said = f"mixed: it memorises less in {less} of {number} comparisons and more in {more}"
    elif less or more:
        said = f"it memorises {'less' if less else 'more'} in {less or more} of {number} comparisons"
        said += ", and in none the other way round"
    else:
        said = f"no difference found in any of {number} comparisons"
    if not any(memorises(result, side) for side in (arm, BASELINES[arm])):
        said += " (neither is above the floor at MQ@15 at any checkpoint)"
    return f"{name}: {arm} against {BASELINES[arm]}: {said}"


def memorises(result, arm):
    """Whether any checkpoint of an arm is above the floor at MQ@15."""
    return any(point["mq_above_floor"]["15"] > 0 for point in result["points"] if point["arm"] == arm)


def skips_in_words(name, result):
    """One sentence: what skip counts of IET-AGC reveal, against the loss of default training."""
    labels = result["detection (ROC AUC per seed)"]
    parts = []
    for label in ("repeated", "memorised by default"):
        ours, baseline = (labels[arm][label][detector] for arm, detector in
                          (("IET-AGC", "skip count"), ("default", "low loss")))  # fmt: skip
        if any(value is not None for value in ours):
            parts.append(f"images {label}: {auc(ours)} against {auc(baseline)}")
    return f"{name}: {'; '.join(parts) or 'no image is repeated or memorised'}"


def answers(frontier, tuning):
    """The findings as Markdown lists, from the numbers alone."""
    lines = ["At equal steps (raw weights, mean over seeds):", ""]
    lines += [f"- {at_equal_steps(name, result)}." for name, result in frontier.items()]
    lines += ["", "At equal quality (MQ@15 and MQ@30, raw and EMA weights, four values of fpd; 95 % intervals):", ""]
    for name, result in frontier.items():
        lines += [f"- {in_words(name, result, arm)}." for arm in BASELINES if tally(result, arm)]
    if tuning:
        chosen = " and ".join(with_setting(f"tuned {method}", tuning) for method in tuning["best"])
        lines += ["", f"The tuned arms are {chosen}."]
    lines += ["", "Skip counts of IET-AGC as detectors, against the low loss of default training (ROC AUC):", ""]
    lines += [f"- {skips_in_words(name, result)}." for name, result in frontier.items()]
    return "\n".join(lines) + "\n"


def data_set(name, result):
    """The chapter of a data set."""
    minutes = result["seconds"] / 60
    flags = markdown_table(
        ["arm", "flags of main_fed.py"], [[arm, f"`{' '.join(f)}`"] for arm, f in result["flags"].items()]
    )
    return f"""## {name}

{DESCRIPTIONS.get(name, name)}. {result["distinct training images"]} distinct training images,
{result["generated images"]} images generated for every point, seeds {", ".join(map(str, result["seeds"]))}.
`{result["command"]}`: {minutes:.0f} minutes.

### The floor

{markdown_table(*floor_rows(result))}
### After the last step

Raw weights, mean ± standard deviation over seeds:

{end_table(result, "raw")}
EMA weights:

{end_table(result, "ema")}
### At matched quality

MQ above floor where a training first reaches a Frechet distance to held-out images, linear between its checkpoints;
mean over seeds and 95 % bootstrap interval over seeds and images. Raw weights:

{markdown_table(*matched_rows(result, "raw"))}
EMA weights:

{markdown_table(*matched_rows(result, "ema"))}
All thresholds, raw and EMA weights, in points above the floor:

{all_thresholds_table(result, "raw")}
{all_thresholds_table(result, "ema")}
Each against default training, at qualities that the two reach with all their seeds:

{difference_table(result)}
### Skip counts as detectors

Area under the ROC curve, mean over seeds (lowest to highest). 0.5 is chance. A training image is *memorised* if it is
the nearest of a generated one with a ratio below 15 %, after the last step.

{detection_table(result)}
### The ten most memorised pairs

Of the first seed, after the last step, raw weights; ratio in % and number of the distinct training image:

{pairs_table(result)}
![The ten most memorised pairs of every arm on {name}](../results/pairs_{name}.png)

### The published sampler

The first seed after the last step, raw weights, sampled twice:

{sampler_table(result)}
### Settings

{flags}"""


def tuning_chapter(tuning, frontier):
    on = " and ".join(name for name, result in frontier.items() if "tuned IET-AGC" in result["flags"])
    rows = []
    for method, settings in tuning["trials"].items():
        for setting, found in settings.items():
            for weights in WEIGHTS:
                entry = found[weights]
                shares = (
                    "not reached" if entry[f"MQ@{p}"] is None else f"{100 * entry[f'MQ@{p}']:+.1f}" for p in DIFFERENCES
                )
                is_best = tuning["best"][method] == {"setting": setting, "weights": weights}
                mark = " **chosen**" if is_best else ""
                rows.append([method, setting + mark, weights, f"{entry['fpd reached']:.2f}", *shares])
    trials = len(tuning["trials"]["default"])
    header = ["method", "setting", "weights", "best fpd", "MQ@15 above floor, points", "MQ@30"]
    return f"""## Tuning

{trials} trials of default training and as many of IET-AGC, on {tuning["data"]} with seed {tuning["seed"]}, judged at
fpd {tuning["fpd matched"]:.2f}: 1.15 times the best that the worse of the two reaches untuned. Every checkpoint with
raw and EMA weights is a candidate, which is early stopping. The chosen settings are the *tuned* arms above, trained
with other seeds on {on or "no data set yet"}. Most knobs had one value besides their own, which is no
thorough search, and one seed does not tell settings apart that differ by less than the intervals above.
`{tuning["command"]}`: {tuning["seconds"] / 60:.0f} minutes.

{markdown_table(header, rows)}"""


def document(frontier, tuning):
    """The text of docs/RESULTS.md."""
    machine = ", ".join(f"{key} {value}" for key, value in next(iter(frontier.values()))["machine"].items())
    chapters = "\n".join(data_set(name, result) for name, result in frontier.items())
    return f"""# Does it work?

Written by `python -m experiments.document` from `results/*.json`, which `bash com/results.sh` makes; not by hand.

Machine: {machine}; trainings side by side on one thread each.

Quality is fpd, the Frechet distance on pooled pixels to held-out real images. Memorisation is measured among the
distinct training images, and its floor is the same figure for held-out real images. All arms are `main_fed.py` with the
same data, network and learning rate. Ensembles make twice as many steps in all as the others: each sub-model makes
a part of them. Images are made by DPM-Solver++ with 20 steps; the published sampler is compared below.

![Quality against memorisation of all arms](../results/frontier.png)

{answers(frontier, tuning)}
{chapters}
{tuning_chapter(tuning, frontier) if tuning else ""}"""


def with_setting(arm, tuning):
    """A tuned arm with the setting that was chosen for it, as text."""
    return f"{arm} ({tuning['best'][arm.removeprefix('tuned ')]['setting']})" if arm.startswith("tuned ") else arm


def compared_in_all(frontier, tuning, arm):
    """One sentence: how often an arm memorises less and more than default training at matched quality."""
    tallies = {name: tally(result, arm) for name, result in frontier.items() if tally(result, arm)}
    total = sum(tallies.values(), Counter())
    each = "; ".join(f"{name}: {found['less']} and {found['more']}" for name, found in tallies.items())
    ours, baseline = (with_setting(side, tuning) for side in (arm, BASELINES[arm]))
    return (
        f"At equal quality {ours} memorises less than {baseline} in {total['less']} of {total.total()} "
        f"comparisons, and more in {total['more']} ({each})."
    )


def readme_part(frontier, tuning):
    """What the README shows: the plot and three sentences."""
    steps = "; ".join(at_equal_steps(name, result) for name, result in frontier.items())
    arms = [arm for arm in ("IET-AGC", "tuned IET-AGC") if any(tally(result, arm) for result in frontier.values())]
    sentences = [f"At equal steps: {steps}.", *(compared_in_all(frontier, tuning, arm) for arm in arms)]
    return "![Quality against memorisation of all arms](results/frontier.png)\n\n" + "\n".join(sentences) + "\n"


def with_results(readme, frontier, tuning):
    """The README with its part about results replaced.

    Raises:
        DataError: it lacks the marks that the part stands between.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise DataError(f"README.md: lacks the lines {BEGIN} and {END} around its results: put them back")
    return f"{before}{BEGIN}\n{readme_part(frontier, tuning)}{END}{after}"


def written(root):
    """{path: text} of what is written from the results in `root`/results."""
    frontier, path = read_json(root / "results/frontier.json"), root / "results/tuning.json"
    tuning = read_json(path) if path.exists() else None
    return {
        root / "docs/RESULTS.md": document(frontier, tuning),
        root / "README.md": with_results((root / "README.md").read_text(), frontier, tuning),
    }


def write():
    for path, text in written(ROOT).items():
        with atomic_write(path) as file:
            file.write(text.encode())
        print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(report_errors("document", write))

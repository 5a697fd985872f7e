"""The tables of docs/RESULTS.md, from results/frontier.json into the places that the document marks for them:

python -m experiments.tables
"""

import re
import statistics
import sys
from collections import Counter
from pathlib import Path

from errors import DataError, UserError
from files import atomic_write, read_json
from score.markdown import markdown_table

DOCUMENT = Path("docs/RESULTS.md")
SHOWN = ("MQ@15", "MQ@30")


def spread(values, form):
    deviation = f" ± {form.format(statistics.stdev(values))}" if len(values) > 1 else ""
    return form.format(statistics.fmean(values)) + deviation


def points_of(result, arm, weights, steps=None):
    """The points of an arm, one per seed, after the last steps, or after those that are nearest to `steps`."""
    points = [p for p in result["points"] if (p["arm"], p["weights"]) == (arm, weights)]
    chosen = max(p["steps"] for p in points)
    if steps:
        chosen = min(sorted(p["steps"] for p in points), key=lambda made: abs(made - steps))
    return [p for p in points if p["steps"] == chosen]


def with_floor(points, measure, result):
    """Mean share ± spread over seeds in percent, and in brackets what it is above the floor, in points."""
    values = [100 * p[measure] for p in points]
    return f"{spread(values, '{:.1f}')} ({statistics.fmean(values) - 100 * result['floor'][measure]:+.1f})"


def in_points(found, reached=""):
    """An interval in percentage points."""
    return "not reached" if found is None else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * x for x in found)) + reached


def auc(values):
    known = [value for value in values if value is not None]
    return f"{statistics.fmean(known):.2f} ({min(known):.2f} to {max(known):.2f})" if known else "none or all"


def floor_table(frontier):
    names = next(iter(frontier.values()))["floor"]
    shares = [name for name in names if name.startswith("MQ@") or name in ("f_mem", "AuthPct")]
    rows = [[f"{name} %", *(f"{100 * r['floor'][name]:.1f}" for r in frontier.values())] for name in shares]
    rows.append(["fpd of a held-out sample to the others", *(f"{r['floor']['fpd']:.3f}" for r in frontier.values())])
    of_training = "fpd of training images"
    rows.append([f"{of_training} to held-out", *(f"{r['floor'][of_training]:.3f}" for r in frontier.values())])
    return markdown_table(["", *frontier], rows)


def equal_steps_table(frontier):
    """Default training and IET-AGC after as many steps."""
    rows = []
    for name, result in frontier.items():
        default = points_of(result, "default", "raw")
        for arm, points in (("default", default), ("IET-AGC", points_of(result, "IET-AGC", "raw", default[0]["steps"]))):
            fpd = statistics.fmean(p["fpd"] for p in points)
            rows.append([name, arm, f"{points[0]['steps']:,}", f"{fpd:.2f}", with_floor(points, "MQ@15", result)])
    return markdown_table(["data", "arm", "steps", "fpd", "MQ@15 % (above floor)"], rows)


def end_table(result):
    """Mean and spread over seeds after the last step."""
    rows = []
    for weights in ("raw", "ema"):
        for arm in result["flags"]:
            points = points_of(result, arm, weights)
            shares = (with_floor(points, name, result) for name in (*SHOWN, "f_mem"))
            authentic, fpd = spread([100 * p["AuthPct"] for p in points], "{:.1f}"), [p["fpd"] for p in points]
            rows.append([weights, arm, f"{points[0]['steps']:,}", spread(fpd, "{:.2f}"), *shares, authentic])
    shares = (f"{name} % (above floor)" for name in (*SHOWN, "f_mem"))
    return markdown_table(["weights", "arm", "steps", "fpd", *shares, "AuthPct"], rows)


def matched_table(result):
    """MQ above floor of all arms at the same Frechet distances."""
    found = {(row["weights"], row["fpd"], row["arm"]): row for row in result["matched"]}
    rows = []
    for weights, fpd in dict.fromkeys(key[:2] for key in found):
        for measure in SHOWN:
            cells = []
            for arm in result["flags"]:
                row = found[weights, fpd, arm]
                some = row["reached"] < len(result["seeds"])
                cells.append(in_points(row[measure], f" ({row['reached']} seeds)" if some else ""))
            rows.append([weights, f"{fpd:.3f}", measure, *cells])
    return markdown_table(["weights", "fpd", "", *result["flags"]], rows)


def comparison_table(frontier):
    """How often an arm memorises less than its baseline, without a difference, and more."""
    pairs = dict.fromkeys((row["arm"], row["baseline"]) for r in frontier.values() for row in r["comparisons"])
    return markdown_table(["", *frontier], [[" against ".join(p), *(tally(r, *p) for r in frontier.values())] for p in pairs])


def tally(result, arm, baseline):
    found = Counter()
    for row in result["comparisons"]:
        if row["arm"] == arm:
            for difference in filter(None, (row[measure] for measure in SHOWN)):
                found["less" if difference[2] < 0 else "more" if difference[1] > 0 else "no difference"] += 1
    floor = result["floor"]["MQ@15"]
    above = any(p["MQ@15"] > floor for p in result["points"] if p["arm"] in (arm, baseline))
    counts = " / ".join(str(found[verdict]) for verdict in ("less", "no difference", "more"))
    return counts + ("" if above else " *")


def detection_table(frontier):
    """Skip counts of IET-AGC against the loss under default training."""
    rows = []
    for name, result in frontier.items():
        found = {(row["arm"], row["images"]): row for row in result["detection"]}
        for label in ("repeated", "memorised by default"):
            skips, losses = found["IET-AGC", label]["skip count"], found["default", label]["low loss"]
            if any(value is not None for value in skips):
                rows.append([name, label, auc(skips), auc(losses)])
    return markdown_table(["data", "images that are", "skip count of IET-AGC", "low loss of default"], rows)


def sampler_table(frontier):
    rows = [
        [name, row["arm"], row["sampler"], f"{row['fpd']:.2f}", *(with_floor([row], m, result) for m in SHOWN)]
        for name, result in frontier.items()
        for row in result["samplers"]
    ]
    return markdown_table(["data", "arm", "sampler", "fpd", *(f"{name} % (above floor)" for name in SHOWN)], rows)


def filled(text, frontier):
    """A document with its tables made anew: each stands between `<!-- table: NAME -->` and `<!-- end -->`.

    NAME is one of those below; `end` and `matched` have the name of a data set behind them.
    """
    of_all = {
        "floor": floor_table, "equal steps": equal_steps_table, "comparisons": comparison_table,
        "detection": detection_table, "samplers": sampler_table,
    }  # fmt: skip
    of_one = {"end": end_table, "matched": matched_table}

    def table(match):
        kind, _, name = match[2].partition(" ")
        if match[2] in of_all:
            made = of_all[match[2]](frontier)
        elif kind in of_one and name in frontier:
            made = of_one[kind](frontier[name])
        else:
            raise DataError(f"{DOCUMENT}: there is no table {match[2]!r}: correct the name")
        return f"{match[1]}\n{made}\n<!-- end -->"

    return re.sub(r"(<!-- table: (.*?) -->).*?<!-- end -->", table, text, flags=re.DOTALL)


def main():
    try:
        text = filled(DOCUMENT.read_text(), read_json("results/frontier.json"))
        with atomic_write(DOCUMENT) as file:
            file.write(text.encode())
    except UserError as error:
        print(f"experiments.tables: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

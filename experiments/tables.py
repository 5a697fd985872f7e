"""The tables of docs/RESULTS.md, from results/frontier.json into the places that the document marks for them:

python -m experiments.tables
"""

if __name__ == "__main__":  # before the imports that take seconds
    from utils import startup

    startup.prepare()

import re
import statistics

import numpy as np

from experiments.arms import ROOT
from experiments.matched import COMPARED
from score.compare import markdown_table
from utils import startup
from utils.errors import DataError
from utils.files import read_json, write_text

DOCUMENT = ROOT / "docs/RESULTS.md"


def points_of(result, arm, weights, steps=None):
    """The points of an arm, one per seed, after the last steps, or after those that are nearest to `steps`."""
    points = [p for p in result["points"] if (p["arm"], p["weights"]) == (arm, weights)]
    made = sorted({p["steps"] for p in points})
    chosen = min(made, key=lambda number: abs(number - steps)) if steps else made[-1]
    return [p for p in points if p["steps"] == chosen]


def spread(values, form):
    deviation = f" ± {form.format(statistics.stdev(values))}" if len(values) > 1 else ""
    return form.format(statistics.fmean(values)) + deviation


def mean_cells(result, points):
    """Steps, fpd and shares, mean ± standard deviation over seeds; in brackets what shares are above the floor."""
    cells = [f"{points[0]['steps']:,}", spread([p["fpd"] for p in points], "{:.2f}")]
    for measure in (*COMPARED, "f_mem", "AuthPct"):
        values = [100 * p[measure] for p in points]
        above = f" ({statistics.fmean(values) - 100 * result['floor'][measure]:+.1f})"
        cells.append(spread(values, "{:.1f}") + (above if measure != "AuthPct" else ""))
    return cells


MEAN_HEADER = ["arm", "steps", "fpd", *(f"{name} % (above floor)" for name in (*COMPARED, "f_mem")), "AuthPct"]


def floor_table(frontier):
    rows = [
        [f"{name} %", *(f"{100 * result['floor'][name]:.1f}" for result in frontier.values())]
        for name in (*COMPARED, "f_mem", "AuthPct")
    ]
    for name, text in (("fpd", "fpd of a sample to the others"), ("fpd of training images",) * 2):
        rows.append([text, *(f"{result['floor'][name]:.3f}" for result in frontier.values())])
    return markdown_table(["", *frontier], rows)


def equal_steps_table(frontier):
    """Default training in the end, and IET-AGC after as many steps."""
    rows = []
    for name, result in frontier.items():
        steps = points_of(result, "default", "raw")[0]["steps"]
        for arm in ("default", "IET-AGC"):
            rows.append([name, arm, *mean_cells(result, points_of(result, arm, "raw", steps))])
    return markdown_table(["data", *MEAN_HEADER], rows)


def end_table(result):
    both = [(weights, arm) for weights in ("raw", "ema") for arm in result["flags"]]
    rows = [[weights, arm, *mean_cells(result, points_of(result, arm, weights))] for weights, arm in both]
    return markdown_table(["weights", *MEAN_HEADER], rows)


def matched_table(result):
    """MQ above floor of all arms at the same fpd: the best two of those that are in the results."""
    found = {(row["weights"], row["fpd"], row["arm"]): row for row in result["matched"]}
    rows = []
    for weights in ("raw", "ema"):
        for fpd in sorted({key[1] for key in found if key[0] == weights})[:2]:
            of_arms = [found[weights, fpd, arm] for arm in result["flags"]]
            for measure in COMPARED:
                cells = [in_points(row[measure], row["reached"], len(result["seeds"])) for row in of_arms]
                rows.append([weights, f"{fpd:.3f}", measure, *cells])
    return markdown_table(["weights", "fpd", "", *result["flags"]], rows)


def in_points(found, reached, seeds):
    """An interval in percentage points."""
    if found is None:
        return "not reached"
    some = f" ({reached} of {seeds} seeds)" if reached < seeds else ""
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * value for value in found)) + some


def comparison_table(frontier):
    """How often an arm memorises less than its baseline, without a difference, and more."""
    pairs = dict.fromkeys((row["arm"], row["baseline"]) for r in frontier.values() for row in r["comparisons"])
    rows = [[f"{arm} against {other}", *(tally(r, arm, other) for r in frontier.values())] for arm, other in pairs]
    return markdown_table(["", *frontier], rows)


def tally(result, arm, baseline):
    rows = [row for row in result["comparisons"] if row["arm"] == arm]
    differences = [row[measure] for row in rows for measure in COMPARED if row[measure]]
    less, more = sum(high < 0 for _, _, high in differences), sum(low > 0 for _, low, _ in differences)
    floor = result["floor"]["MQ@15"]
    above = any(p["MQ@15"] > floor for p in result["points"] if p["arm"] in (arm, baseline))
    return f"{less} / {len(differences) - less - more} / {more}" + ("" if above else " *")


def detection_table(frontier):
    """Skip counts of IET-AGC against the loss under default training."""
    rows = []
    for name, result in frontier.items():
        found = {(row["arm"], row["images"]): row for row in result["detection"]}
        for label in ("repeated", "memorised by default"):
            skips, losses = found["IET-AGC", label]["skip count"], found["default", label]["low loss"]
            if None not in skips + losses:
                rows.append(
                    [name, label, *(f"{np.mean(x):.2f} ({min(x):.2f} to {max(x):.2f})" for x in (skips, losses))]
                )
    return markdown_table(["data", "images that are", "skip count of IET-AGC", "low loss of default"], rows)


def filled(text, frontier):
    """A document with its tables made anew: each stands between `<!-- table: NAME -->` and `<!-- end -->`."""
    for name, result in frontier.items():
        if missing := [arm for arm in ("default", "IET-AGC") if arm not in result["flags"]]:
            raise DataError(f"results/frontier.json: {name} lacks {missing[0]}: go on with bash com/frontier.sh")
    tables = {
        "floor": floor_table(frontier),
        "equal steps": equal_steps_table(frontier),
        "comparisons": comparison_table(frontier),
        "detection": detection_table(frontier),
        **{f"end {name}": end_table(result) for name, result in frontier.items()},
        **{f"matched {name}": matched_table(result) for name, result in frontier.items()},
    }
    places = r"(<!-- table: (.*?) -->).*?<!-- end -->"
    if unknown := {name for _, name in re.findall(places, text, re.DOTALL)} - tables.keys():
        raise DataError(f"{DOCUMENT}: no table {unknown.pop()!r}: there are {', '.join(tables)}")
    return re.sub(places, lambda match: f"{match[1]}\n{tables[match[2]]}<!-- end -->", text, flags=re.DOTALL)


def main():
    write_text(DOCUMENT, filled(DOCUMENT.read_text(), read_json(ROOT / "results/frontier.json")))


if __name__ == "__main__":
    startup.run(main)

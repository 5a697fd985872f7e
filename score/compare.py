"""Several evaluations in one table and one page, repeats as mean and spread:

python -m score.compare runs/a/grid runs/b/grid --html=both.html
python -m score.compare default=runs/a/grid/result.json IET-AGC=runs/b/grid/result.json IET-AGC=runs/c/grid/result.json
"""

import os
import statistics
from pathlib import Path

from score.grids import save_comparison
from score.report import COLUMNS, FLOORS, curves, histograms, page, similarity, table
from utils import startup
from utils.errors import DataError, printable
from utils.files import read_json, write_json, write_text


def summarize(results):
    """{column: {"mean": x, "std": sample standard deviation or None}} over repeats, of the columns that all have."""
    summary = {}
    for column, (value_of, _) in COLUMNS.items():
        values = [value_of(result) for result in results]
        if None not in values:
            spread = statistics.stdev(values) if len(values) > 1 else None
            summary[column] = {"mean": statistics.fmean(values), "std": spread}
    return summary


def rows_of(summaries):
    """(header, rows) of {label: summary}, with the columns that at least one of them has."""
    columns = [column for column in COLUMNS if any(column in summary for summary in summaries.values())]

    def cell(column, numbers):
        return " ± ".join(COLUMNS[column][1].format(x) for x in numbers.values() if x is not None) or "-"

    rows = [[label, *(cell(c, summary.get(c, {})) for c in columns)] for label, summary in summaries.items()]
    return ["method", *columns], rows


def markdown_table(header, rows):
    """A table as Markdown, each line with its line break; rows: as many cells each as the header, of any type."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def read_results(arguments):
    """{label: [(path, result)]} from arguments RUN or LABEL=RUN: a result.json, or the directory that holds it."""
    groups = {}
    for argument in arguments:
        label, path = split_label(argument)
        if path.is_dir():
            path = path / "result.json"
        label = label or (path.parent.parent.name if path.parent.name == "grid" else path.parent.name) or str(path)
        result = read_json(path)
        if not isinstance(result, dict) or "N" not in result:
            raise DataError(f"{path}: no result of all_in.py: name its result.json")
        groups.setdefault(printable(label), []).append((path, result))
    return groups


def split_label(argument):
    """(label, path) of an argument: the longest end of it that exists, after no or some "=", is the path. DataError."""
    parts = argument.split("=")
    for i in range(len(parts)):
        path = os.path.expanduser("=".join(parts[i:]))  # noqa: PTH111
        if os.path.exists(path):  # noqa: PTH110 - false where Path.exists raises, as for a name that is too long
            return "=".join(parts[:i]), Path(path)
    raise DataError(f"{argument}: no such file or directory: name a result.json or its directory, or LABEL= and one")


def compare_page(results, summaries):
    """Everything of several runs that fits side by side, as HTML; results: {label: [result of each repeat]}."""
    measured = {label: [r["mq_curve"] for r in repeats if "mq_curve" in r] for label, repeats in results.items()}
    floors = [r["holdout"]["mq_curve"] for repeats in results.values() for r in repeats if "holdout" in r]
    measured["held-out real images"] = floors[:1]
    similar = {label: mean_histogram(repeats) for label, repeats in results.items()}
    similar = {label: shares for label, shares in similar.items() if shares}
    sections = [
        ("Scores", table(*rows_of(summaries)) + "<p class=note>Mean ± standard deviation over repeats.</p>"),
        ("Memorised quantity over all thresholds", curves({label: c for label, c in measured.items() if c})),
        *([("Similarity to training images", histograms(similar))] if similar else []),
        ("Settings that differ", differing_settings(results)),
    ]
    return page("Runs compared", sections)


def floors_of(result):
    """The summaries of what a result says of other images than the generated ones."""
    floors = {name: result[key] for name, key in FLOORS.items() if key in result}
    floors["training, of each other"] = {f"sim_{name[3:]}": result[name] for name in result if name.startswith("bg_")}
    return {label: summary for label, floor in floors.items() if (summary := summarize([floor]))}


def mean_histogram(repeats):
    """The mean of the histograms of similarity of the repeats that have one, or None."""
    found = [shares for result in repeats if (shares := similarity("sim_histogram")(result))]
    return [statistics.fmean(bin) for bin in zip(*found, strict=True)] if found else None


def settings_of(result):
    """{name: value} of what made a result's images, as far as it is known: training and sampling of the network."""
    checkpoint = Path(result["checkpoint"]).name if result["checkpoint"] else None
    sampling = {f"sampling: {k}": v for k, v in (result.get("origin") or {}).items() if k != "checkpoint_sha256"}
    return {"checkpoint": checkpoint, **(result.get("training") or {}), **sampling}


def differing_settings(results):
    """A table of the settings that differ between labels, the values of a label's repeats side by side."""
    settings = {label: [settings_of(result) for result in repeats] for label, repeats in results.items()}
    rows = []
    for name in dict.fromkeys(name for of_label in settings.values() for values in of_label for name in values):
        cells = [dict.fromkeys(str(v[name]) for v in of_label if name in v) for of_label in settings.values()]
        if len({frozenset(cell) for cell in cells if cell}) > 1:
            rows.append([name, *(" / ".join(cell) or "unknown" for cell in cells)])
    return table(["setting", *results], rows) if rows else "<p>None that are known.</p>"


def main(arguments=None):
    """Print the table, and write it where the arguments say."""
    parser = startup.Parser(prog="python -m score.compare", description="Several evaluations in one table.")
    parser.add_argument(
        "results", nargs="+", metavar="[LABEL=]RUN", help="a result.json or its directory; equal labels are repeats"
    )
    path = {"type": os.path.expanduser, "metavar": "FILE"}
    parser.add_argument("--json", **path, help="also write the numbers")
    parser.add_argument("--html", **path, help="also write a page with the table and the curves")
    parser.add_argument("--picture", **path, help="also write the most memorised pairs of every label, as PNG")
    parser.add_argument("--floors", action="store_true", help="rows of what the first run measured beside its images")
    options = parser.parse_args(arguments)
    groups = read_results(options.results)
    results = {label: [result for _, result in members] for label, members in groups.items()}
    summaries = {label: summarize(repeats) for label, repeats in results.items()}
    if options.floors:
        summaries |= floors_of(next(iter(results.values()))[0])
    print(markdown_table(*rows_of(summaries)), end="")
    if options.json:
        write_json(options.json, summaries)
    if options.html:
        write_text(options.html, compare_page(results, summaries))
    if options.picture:
        grids = {label: members[0][0].with_name("grid_image0.png") for label, members in groups.items()}
        save_comparison(options.picture, grids)


if __name__ == "__main__":
    startup.run(main)

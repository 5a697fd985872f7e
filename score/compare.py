"""Several evaluations in one table and one page, repeats as mean and spread.

    python -m score.compare runs/a/grid runs/b/grid --html=both.html
    python -m score.compare default=runs/a/grid IET-AGC=runs/b/grid IET-AGC=runs/c/grid

A name that is there several times has repeats.
"""

import functools
import itertools
import os
import re
import statistics
from html import escape
from pathlib import Path

from score import report
from score.columns import COLUMNS, FLOORS, floor_of, renewed, under
from score.grids import closest_pairs, save_comparison
from score.report import curves, figures, histograms, page, shortened, table, training_seconds
from utils import startup
from utils.errors import DataError, printable, warn
from utils.files import read_json, write_json, write_text
from utils.images import keep_apart

# of `origin`: said elsewhere, or free
NO_SAMPLING = ("seed", "checkpoint_sha256", "weights", "img_size", "resolution", "training_sha256")
NO_SAMPLING += ("reject_below", "reject_above")
OF_REPEATS = ("seed", "_dir", "(sha256)")  # ends of the names of settings that repeats differ in
STEPS_IN_NAME = r"(global_)?(ckpt|checkpoint)\w*\d"  # called by steps or rounds, not by a user


def summarize(results):
    """{column: {"mean": x, "std": sample deviation or None}} of the columns that all repeats have."""
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
        form = COLUMNS[column][1]
        forms = {"mean": form, "std": form.replace("+", "")}
        return " ± ".join(forms[name].format(x) for name, x in numbers.items() if x is not None) or "-"

    rows = [[cell(c, summary.get(c, {})) for c in columns] for summary in summaries.values()]
    return ["method", *columns], [[label, *row] for label, row in zip(summaries, rows, strict=True)]


def markdown_table(header, rows):
    """A table as Markdown, each line with its line break; rows: of as many cells as the header."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def read_results(arguments):
    """{label: [(path, result)]} from arguments RUN or LABEL=RUN: a result.json or its directory."""
    groups = {}
    for argument in arguments:
        label, path = startup.split_label(argument)
        if path.is_dir():
            path = path / "result.json"
        run = path.parent.parent if path.parent.name == "grid" else path.parent
        label = label or run.name or str(path)
        result = read_json(path)
        if not isinstance(result, dict) or "N" not in result:
            raise DataError(f"{path}: no result of all_in.py: name its result.json")
        result = renewed(result)
        if not result.get("training_seconds"):
            result["training_seconds"] = training_seconds(result.get("checkpoint"))
        result["watched"] = result.get("watched") or report.watched(result.get("checkpoint"))
        groups.setdefault(printable(label), []).append((path, result))
    return groups


def separate(groups):
    """The groups of `read_results`, a row for each kind of results where a label's are no repeats.

    Returns rows, {label, or "label (1)" and so on: [(path, result)]}, and notes on labels with several.
    """
    rows, notes = {}, []
    for label, members in groups.items():
        kinds = []
        for member in members:
            same = (kind for kind in kinds if all(are_repeats(member[1], result) for _, result in kind))
            if (kind := next(same, None)) is None:
                kinds.append(kind := [])
            kind.append(member)
        if len(kinds) == 1:
            rows[label] = members
            continue
        names = (name for i in itertools.count(1) if (name := f"{label} ({i})") not in groups)
        of_label = dict(zip(names, kinds, strict=False))
        what = ", ".join(differing(results_in(of_label), facts_of_repeats))
        files = {name: ", ".join(str(path) for path, _ in kind) for name, kind in of_label.items()}
        listed = "; ".join(f"{name}: {paths}" for name, paths in files.items())
        note = f"{label} has a row for each kind of its results, no mean, since they differ in {what}"
        notes.append(printable(f"{note}: {listed}"))
        rows |= of_label
    return rows, notes


def results_in(rows):
    return {label: [result for _, result in members] for label, members in rows.items()}


def are_repeats(result, other):
    """Whether two results say the same of all `facts_of_repeats` that both know."""
    facts, others = facts_of_repeats(result), facts_of_repeats(other)
    return all(others.get(name, value) == value for name, value in facts.items())


def facts_of(result):
    """{name: value} of what results share if their numbers compare; older ones do not know all of it."""
    names = ("flags", "holdout", "origin", "pixels")
    settings, heldout, origin, pixels = (result.get(name) or {} for name in names)
    is_text = "similarity" in result and "pixels" not in result
    has_copies = is_text or "pixels" in result  # else the search was not run yet
    groups = under("groups", "sha256")(result) or ("none" if has_copies else None)
    scored_with = result.get("scored_with") or {}
    if scored_with and result.get("samples"):  # earlier versions took them in the order of their names
        scored_with = {"samples_order": "by name", **scored_with}
    facts = {
        "evaluation": "text_to_image.all_in" if is_text else "all_in",
        "training images": result.get("training_sha256"),
        "number of training images": result.get("training_set_size"),
        "image size": settings.get("resolution" if is_text else "img_size"),
        "number of images": result["N"] or None,
        "groups of training images": groups,
        "mirror images": "mirrored" in pixels if "extracted" in pixels else None,
        "held-out images": heldout.get("images_sha256") if heldout or not has_copies else "none",
        "number of held-out images": heldout.get("N"),
        "features of similarity": under("similarity", "features")(result),
        "preprocessing of similarity": under("similarity", "preprocess")(result),
        "weights of similarity": under("similarity", "weights_sha256")(result),
        "fid_reference": result.get("fid_reference"),
        **{
            "reference images" if name == "images" else f"scores: {name}": value
            for name, value in scored_with.items()
            if name != "heldout"  # which the floor says
        },
        "weights": result.get("weights") or origin.get("weights"),
        "held back": origin.get("reject_below", origin.get("reject_above", "none")) if origin else None,
        **{f"sampling: {name}": value for name, value in origin.items() if name not in NO_SAMPLING},
    }
    return {name: value for name, value in facts.items() if value is not None}


def facts_of_repeats(result):
    """`facts_of` a result, and of its training and checkpoint what repeats share."""
    training = {k: v for k, v in (result.get("training") or {}).items() if not k.endswith(OF_REPEATS)}
    checkpoint = checkpoint_of(result)
    name = checkpoint.get("checkpoint", "")
    if name.startswith("best_"):  # by --best, after other steps in each of the repeats
        checkpoint = {"checkpoint": "best"}
    elif not re.match(STEPS_IN_NAME, name):
        checkpoint = {}
    return facts_of(result) | checkpoint | training


def checkpoint_of(result):
    """{"checkpoint": its name} of a result that has one, else {}."""
    return {"checkpoint": Path(result["checkpoint"]).name} if result.get("checkpoint") else {}


def settings_of(result):
    """{name: value} of what made a result, as far as it is known: `facts_of`, training, seed."""
    origin = result.get("origin") or {}
    seed = {"sampling: seed": origin["seed"]} if "seed" in origin else {}
    return checkpoint_of(result) | facts_of(result) | (result.get("training") or {}) | seed


def differing(results, values_of):
    """{name: {label: text}} of the values that differ between labels, those of repeats side by side.

    results: {label: [result of each repeat]}; values_of: a function of a result, {name: value}. A label
    none of whose results has a name has ""."""
    values = {label: [values_of(result) for result in repeats] for label, repeats in results.items()}
    different = {}
    for name in dict.fromkeys(itertools.chain(*itertools.chain(*values.values()))):
        texts = {label: [str(of[name]) for of in all_of if name in of] for label, all_of in values.items()}
        cells = {label: dict.fromkeys(of_label) for label, of_label in texts.items()}
        if len({frozenset(cell) for cell in cells.values() if cell}) > 1:
            different[name] = {label: " / ".join(cell) for label, cell in cells.items()}
    return different


def warnings_about(results):
    """A line for each of the `facts_of` in which labels differ, and for each doubt about a training.

    results: as for `differing`."""
    lines = []
    for name, texts in differing(results, facts_of).items():
        labels_of = {}
        for label, text in texts.items():
            labels_of.setdefault(text, []).append(label)
        said = "; ".join(f"{', '.join(labels)}: {text}" for text, labels in labels_of.items() if text)
        lines.append(f"not all numbers compare, since these differ in {name}: {said}")
    for label, repeats in results.items():
        doubts = dict.fromkeys(result.get("settings_warning") for result in repeats)
        lines += [f"{label}: {text}" for text in doubts if text]
    return lines


def shared(name, values):
    """{label: value} with equal values once: as `name` if all are equal, else with their labels."""
    different = once([*values.values()])
    if len(different) == 1:
        return {name: different[0]}
    labels_of = [[label for label in values if values[label] == value] for value in values.values()]
    return {f"{name} ({', '.join(labels)})": values[labels[0]] for labels in labels_of}


def floors_of(results):
    """{name: summary} of what is measured in place of images of {label: results}, equal ones once."""
    rows, floors_in = {}, {name: functools.partial(floor_of, key=key) for name, key in FLOORS.items()}
    for name, floor_in in (floors_in | {"training, of each other": similarity_of_training}).items():
        floors = {label: [floor_in(result) for result in repeats] for label, repeats in results.items()}
        floors = {label: summarize(once(repeats)) for label, repeats in floors.items() if all(repeats)}
        rows |= shared(name, {label: summary for label, summary in floors.items() if summary})
    return rows


def once(values):
    """One of them if all are equal, else all."""
    return values[:1] if all(value == values[0] for value in values) else values


def similarity_of_training(result):
    """How similar training images are to each other, under the names of generated images' numbers."""
    numbers = result.get("similarity") or {}
    among = {f"sim_{name[3:]}": value for name, value in numbers.items() if name.startswith("bg_")}
    return {"similarity": {"features": numbers.get("features"), **among}} if among else None


def compare_page(rows, summaries, notes):
    """Everything of several runs that fits side by side, as HTML; notes: lines of text."""
    results = results_in(rows)
    similar = {label: mean_histogram(repeats) for label, repeats in results.items()}
    similar = {label: shares for label, shares in similar.items() if shares}
    said = "".join(f"<p class=warning>{escape(shortened(note))}</p>" for note in notes)
    (_, *columns), scores = rows_of(summaries)
    labels, *measures = zip(*scores, strict=True)
    cells = [[text.replace("± ", "±\N{NO-BREAK SPACE}") for text in row] for row in measures]
    cells = [[name, *row] for name, row in zip(columns, cells, strict=True)]
    scores = table(["measure", *labels], cells)
    different = differing(results, settings_of).items()
    different = [[name, *(text or "unknown" for text in texts.values())] for name, texts in different]
    settings = table(["setting", *results], different) if different else "<p>None that are known.</p>"
    sections = [
        ("Scores", f"{said}{scores}<p class=note>Mean ± standard deviation over repeats.</p>"),
        *all_thresholds(results),
        *([("Similarity to training images", histograms(similar))] if similar else []),
        *report.watch_section({name: [r.get("watched") for r in rs] for name, rs in results.items()}),
        ("The closest pairs: training image, generated image", pictures(rows)),
        ("Settings that differ", settings),
    ]
    return page("Runs compared", sections, "comparison")


def all_thresholds(results):
    """[(heading, chart)] of MQ in pixels and in feature space, as far as the results have it."""
    sections = []
    for space, where in (("pixels", ""), ("similarity", ", in feature space")):
        of_heldout = curves_under(results, "holdout", space, "mq_curve")
        floors = {label: once(repeats) for label, repeats in of_heldout.items()}
        drawn = curves_under(results, space, "mq_curve") | shared("held-out real images", floors)
        if drawn:
            sections.append((f"Memorised quantity over all thresholds{where}", curves(drawn)))
    return sections


def curves_under(results, *keys):
    """{label: [curve of each repeat that has one under these keys]}, without labels that have none."""
    curve_of, drawn = under(*keys), {}
    for label, repeats in results.items():
        if of_label := [curve for result in repeats if (curve := curve_of(result))]:
            drawn[label] = of_label
    return drawn


def mean_histogram(repeats):
    """The mean of the histograms of similarity of the repeats that have one, or None."""
    known = [shares for result in repeats if (shares := under("similarity", "sim_histogram")(result))]
    return [statistics.fmean(bin) for bin in zip(*known, strict=True)] if known else None


def pictures(rows):
    """The closest pairs of every result, as its first grid shows them, as figures side by side."""
    shown, missing = [], []
    for label, members in rows.items():
        for number, (path, result) in enumerate(members, 1):
            name = f"{label}, {number} of {len(members)}" if len(members) > 1 else label
            grid = path.with_name("grid_image0.png")
            if "grids" not in result or not grid.exists():  # a grid is of other images
                missing.append(f"{name}: no grid_image0.png of these images beside {path}")
                continue
            try:
                pairs = closest_pairs(grid, result["N"])
            except DataError as error:
                missing.append(f"{name}: {error}")
                continue
            images = []
            for place, pair in enumerate(pairs, 1):
                what = f"of pair {place} of {name}"
                images += [(pair[0], f"training image {what}"), (pair[1], f"generated image {what}")]
            shown.append((escape(name), images))
    return figures(shown) + "".join(f"<p class=note>{escape(printable(line))}</p>" for line in missing)


def main(arguments=None):
    """Print the table, and write it where the arguments say."""
    parser = startup.Parser("python -m score.compare", description="Several evaluations in one table.")
    what = "a result.json or its directory; repeats have equal labels"
    parser.add_argument("results", nargs="+", metavar="[LABEL=]RUN", help=what)
    path = {"type": os.path.expanduser, "metavar": "FILE"}
    parser.add_argument("--json", **path, help="also write the numbers")
    parser.add_argument("--html", **path, help="also write a page: the table, curves and pictures")
    parser.add_argument("--picture", **path, help="also write the most memorised pairs of all, as PNG")
    what = "rows of what the runs measured in the place of generated images"
    parser.add_argument("--floors", action="store_true", help=what)
    options = parser.parse_args(arguments)
    rows, notes = separate(read_results(options.results))
    results = results_in(rows)
    flags = [result.get("flags") or {} for repeats in results.values() for result in repeats]
    folders = {of_run["data_root"] for of_run in flags if of_run.get("dataset") == "folder"}
    keep_apart(sorted(folders), {}, {"picture": options.picture})
    notes += warnings_about(results)
    for note in notes:
        warn(f"warning: {shortened(note)}")
    summaries = {label: summarize(repeats) for label, repeats in results.items()}
    if options.floors:
        summaries |= floors_of(results)
    print(markdown_table(*rows_of(summaries)), end="")
    if options.json:
        write_json(options.json, summaries)
    if options.html:
        write_text(options.html, compare_page(rows, summaries, notes))
    if options.picture:
        first = {label: members[0] for label, members in rows.items()}
        for label in [label for label, (_, result) in first.items() if "grids" not in result]:
            what = f"no grid of these images beside {first.pop(label)[0]}"
            warn(f"warning: {label}: {what}: it is not in --picture")
        if not first:
            raise DataError(f"--picture={options.picture}: no result has a grid: run the grid stage")
        grids = {label: path.with_name("grid_image0.png") for label, (path, _) in first.items()}
        save_comparison(options.picture, grids)


if __name__ == "__main__":
    startup.run(main)

"""The page of a search for copies within a data set."""

from html import escape

from score.report import chart, figures, page, table
from utils.files import write_text

GROUPS = 60  # shown at most, and so many pairs of a part
MEMBERS = 12  # of a group


def write_duplicates_report(path, result, images, names, pairs, groups, conflicts):
    """Write the page: groups, the doubtful ones first, leaks, and pairs that are similar only.

    Args:
        result: the dict of result.json.
        images: (N + L, 3, H, W) uint8; names: N + L texts.
        pairs: [(score, kind, part, image, other)], the surest first.
        groups: [[(image, score, kind)]], the kept image first, the surest first; conflicts: a text each.
    """
    leaks = [pair for pair in pairs if pair[2] == "heldout"]
    similar = [pair for pair in pairs if pair[2] == "train" and pair[1] == "similar"]

    def shown_pairs(chosen):
        shown = []
        for score, kind, _, a, b in chosen[:GROUPS]:
            caption = f"{kind}, {score:.3f}: {escape(str(names[a]))} and {escape(str(names[b]))}"
            shown.append((caption, [(images[i], f"image {names[i]}") for i in (a, b)]))
        return figures(shown) + more(len(chosen))

    of_groups = []
    for group, said in list(zip(groups, conflicts, strict=True))[::-1][:GROUPS]:
        others = ", ".join(f"{escape(str(names[i]))} ({score:.3f})" for i, score, _ in group[1:MEMBERS])
        caption = f"kept: {escape(str(names[group[0][0]]))}; not kept: {others}"
        caption += f" and {len(group) - MEMBERS} more" if len(group) > MEMBERS else ""
        caption = f"<b>Different {said}.</b> {caption}" if said else caption
        is_exact = all(kind == "exact" for *_, kind in group)
        kind = "exact" if is_exact else f"farthest {group[-1][1]:.3f}"
        caption = f"{len(group)} images, {kind}: {caption}"
        of_groups.append((caption, [(images[i], f"image {names[i]}") for i, *_ in group[:MEMBERS]]))
    note = (
        "The score of a pair is its squared distance over the mean squared distance to the 50 nearest images. "
        f"Pairs below {result['near']:g} are near, and grouped; below {result['similar']:g} they are similar, and "
        "shown only. Of a group the image with the most pixels is kept, of equal ones the first; every other is "
        "near to the kept one. keep.txt names what is kept. Nothing was deleted or moved."
    )
    facts = [[name, f"{result[key]:,}"] for name, key in (
        ("training images", "images"), ("kept", "kept"), ("not kept", "not_kept"), ("groups", "groups"),
        ("groups with different labels or captions", "conflicts"), ("largest group", "largest_group"),
        ("held-out images", "heldout_images"), ("of these near to training images", "leaked"),
    )]  # fmt: skip
    facts += [[f"pairs, {name}", f"{count:,}"] for name, count in result["pairs"].items()]
    summary = table(["", "number"], facts) + f"<p class=note>{escape(note)}</p>"
    sections = [
        ("Summary", summary),
        ("Scores of all pairs that might be alike", histogram(result)),
        ("Groups, the doubtful ones first", figures(of_groups) + more(len(groups))),
        *([("Held-out images that are like training images", shown_pairs(leaks))] if leaks else []),
        ("Similar training images, not grouped, the most alike first", shown_pairs(similar)),
    ]
    write_text(path, page(f"Copies among {result['images']:,} training images", sections, kind="duplicates"))


def more(number):
    return f"<p class=note>{number - GROUPS:,} more are in the tables.</p>" if number > GROUPS else ""


def histogram(result):
    """The number of pairs in each hundredth of the score, with the two thresholds."""
    counts = result["histogram"]

    def draw(axes):
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set(yscale="symlog", xlim=(0, 1))
        axes.bar([(x + 0.5) / len(counts) for x in range(len(counts))], counts, width=1 / len(counts))
        for name in ("near", "similar"):
            axes.axvline(result[name], color="grey", linestyle="--")
            axes.annotate(name, (result[name], max(counts)), rotation=90, ha="right", va="top", backgroundcolor="white")

    return chart(draw, (), "score", "pairs", "Pairs by their score, with the thresholds of near and similar.")

"""The rows that the document, the page and the terminal show of a data set's part of frontier.json."""

from score.memorization import THRESHOLDS

SHOWN = (15, 30, 50)  # percent


def share(found):
    """An interval of `matched.interval` or `matched.difference` in percent."""
    if found is None or found.get("reached") == 0:
        return "not reached"
    seeds = f" ({found['reached']} seeds)" if "reached" in found else ""
    return f"{100 * found['mean']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]{seeds}"


def floor_rows(result):
    """(header, rows) of what held-out real images reach."""
    floor = result["floor"]
    rows = [[f"MQ@{p}", f"{floor['heldout']['mq_fraction'][str(p)]:.1%}"] for p in THRESHOLDS]
    rows.append(["sqrt(d1/d2) < 1/3", f"{floor['heldout']['share_sqrt_d1_d2_below_third']:.1%}"])
    rows.append(["AuthPct", f"{floor['heldout']['auth_pct']:.1f}"])
    sample = f"fpd of {floor['images held out, sample']} held-out images to the others"
    rows.append([sample, f"{floor['fpd of a held-out sample to the others']:.3f}"])
    rows.append(["fpd of the training images to the held-out", f"{floor['fpd of training images']:.3f}"])
    return ["held-out real images in the place of generated ones", ""], rows


def matched_rows(result, weights):
    """(header, rows) of MQ above floor at matched quality."""
    rows = [
        [quality, arm, *(share(found[f"MQ@{p}"]) for p in SHOWN)]
        for quality, arms in result["matched quality"][weights].items()
        for arm, found in arms.items()
    ]
    return ["fpd", "arm", *(f"MQ@{p} above floor, points" for p in SHOWN)], rows

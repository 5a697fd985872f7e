"""The numbers in a result.json: what they are called, where they are, how they are written.

    {"N": ..., "pixels": {"mq": ..., "f_mem": ...}, "similarity": {"features": "sscd", "f_mem": ...},
     "fpd": ..., "holdout": {"N": ..., "pixels": ..., "similarity": ...}}

What is measured in the place of generated images, under the keys of `FLOORS`, has the same shape.
"""

import functools
import json

# what is measured in the place of generated images: {name: key in a result.json}
FLOORS = {"held-out": "holdout", "base model": "base", "round trip": "round_trip"}
SHOWN = ("15", "30", "50")  # of the thresholds of MQ
SIMILARITIES = ("mean", "std", "75pc", "90pc", "95pc", "gt_05pc")  # of sim_ and bg_, as published
# what earlier versions had at the top, by how the names begin, and those of the text half
OLD_PIXELS = ("mq", "f_mem", "extracted", "auth_pct", "mirrored", "c_t")
OLD_SIMILARITY = ("features", "preprocess", "sim_", "bg_", "mq_", "f_mem", "own_image")


def under(*keys):
    """A function that finds what is under these keys of nested dicts, or None."""
    return lambda result: functools.reduce(lambda inner, key: (inner or {}).get(key), keys, result)


def is_sscd(result):
    """Whether similarities are SSCD's: above 0.5 they tell copies, of other features they do not."""
    return under("similarity", "features")(result) == "sscd"


def above_half(result):
    """The share above 0.5, or None; older results have it of other features than SSCD's too."""
    return under("similarity", "sim_gt_05pc")(result) if is_sscd(result) else None


def detector_auc(result):
    """Of copies by similarity above 0.5 or, for other features than SSCD's, by f_mem."""
    return under("detector", "above_05" if is_sscd(result) else "f_mem", "auc")(result)


# what is said of an evaluation first: {name: (value in a result.json or None, its format)}
# z, where a value can be below 0: a rounded -0.0 is 0.0
COLUMNS = {
    **{f"MQ@{p}": (under("pixels", "mq_fraction", p), "{:.1%}") for p in SHOWN},
    **{f"@{p} above floor": (under("pixels", "mq_above_floor", p), "{:+z.1%}") for p in SHOWN},
    "f_mem": (under("pixels", "f_mem"), "{:.1%}"),
    "extracted": (under("pixels", "extracted"), "{:.0f}"),
    "f_mem, mirrored too": (under("pixels", "mirrored", "f_mem"), "{:.1%}"),
    "extracted, mirrored too": (under("pixels", "mirrored", "extracted"), "{:.0f}"),
    "similarity": (under("similarity", "sim_mean"), "{:z.3f}"),
    "above 0.5": (above_half, "{:.1%}"),
    "own image": (under("similarity", "own_image"), "{:.1%}"),
    **{f"MQ@{p} of features": (under("similarity", "mq_fraction", p), "{:.1%}") for p in SHOWN},
    "f_mem of features": (under("similarity", "f_mem"), "{:.1%}"),
    "detector's AUC": (detector_auc, "{:.3f}"),
    "CLIP score": (under("clip_score"), "{:z.1f}"),
    "AuthPct": (under("pixels", "auth_pct"), "{:.1f}"),
    "C_T": (under("pixels", "c_t"), "{:z.1f}"),
    "AUC of losses": (under("gap", "auc"), "{:.3f}"),
    "TPR at 1% FPR": (under("gap", "tpr"), "{:.1%}"),
    "FID": (under("fid"), "{:.3f}"),
    "IS": (under("is"), "{:.3f}"),
    "fpd": (under("fpd"), "{:.3f}"),
    "FID to held-out": (under("heldout_fid"), "{:.3f}"),
    "fpd to held-out": (under("heldout_fpd"), "{:.3f}"),
    "precision": (under("precision"), "{:.1%}"),
    "recall": (under("recall"), "{:.1%}"),
    "SWD": (under("swd"), "{:.1f}"),
    "held back": (under("held_back", "share"), "{:.1%}"),
    "images": (under("N"), "{:.0f}"),
    "train s": (under("training_seconds"), "{:.0f}"),
    "eval s": (lambda result: sum(result.get("seconds", {}).values()) or None, "{:.0f}"),
}


def summary(result):
    """{name: text} of the `COLUMNS` that a result has."""
    values = {name: (value_of(result), form) for name, (value_of, form) in COLUMNS.items()}
    return {name: form.format(value) for name, (value, form) in values.items() if value is not None}


def sets_of(result):
    """{name: the numbers} of the generated images and of what is measured in their place."""
    floors = {name: floor_of(result, key) for name, key in FLOORS.items()}
    return {"generated": result} | {name: floor for name, floor in floors.items() if floor is not None}


def floor_of(result, key):
    """The numbers of what is measured in place of generated images, under a key of `FLOORS`, or None."""
    if key not in result:
        return None
    scores = ("precision", "recall", "swd") if key == "holdout" else ()
    return result[key] | {name: result[f"{name}_floor"] for name in scores if f"{name}_floor" in result}


def is_old(result):
    """Whether a result.json was written by a version that had the numbers of copies at the top."""
    return any(key.startswith((*OLD_PIXELS, "feature")) for key in result)


def renewed(result):
    """A result of an earlier version in today's shape; one of today as it is."""
    if not is_old(result):
        return result
    result = json.loads(json.dumps(result).replace('"share_sqrt_d1_d2_below_third": ', '"f_mem": '))
    kind = {name: result[name] for name in ("features", "preprocess") if name in result}
    # those of the text half say what features they are of
    name, beginnings = ("similarity", OLD_SIMILARITY) if kind else ("pixels", OLD_PIXELS)

    def lowered(numbers):
        numbers = kind | numbers
        lower = {key: value for key, value in numbers.items() if key.startswith(beginnings)}
        return {key: value for key, value in numbers.items() if key not in lower} | {name: lower}

    new = lowered(result) | {key: lowered(result[key]) for key in FLOORS.values() if result.get(key)}
    if similarity := new.pop("feature_space", None):
        if "holdout" in similarity:
            floor = {name: similarity.get(name) for name in ("features", "preprocess")}
            floor |= similarity.pop("holdout")
            new["holdout"] = new.get("holdout", {}) | {"similarity": floor}
        new["similarity"] = similarity
    return new

"""Medians of alternating runs, so that what disturbs the machine disturbs both sides, and the rows made of them."""

import statistics
import time

import torch


def alternate(works, repeats, warmup=1):
    """Median seconds, with what is queued on the GPU, of each of {name: work}, which are called in turn."""
    times = {name: [] for name in works}
    for _ in range(warmup + repeats):
        for name, work in works.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[warmup:]) for name, seconds in times.items()}


def row(what, ours, baseline=None, *, at_most=None, at_least=None):
    """A row of the table.

    ratio: ours / baseline, or baseline / ours for what is to be so many times faster (`at_least`). The target is the
    ratio's or, without a baseline, that of our number.
    """
    ratio = None
    if None not in (ours, baseline):
        ratio = baseline / ours if at_least else ours / baseline
    value = ours if ratio is None else ratio
    target, ok = None, True
    if at_most:
        target, ok = f"at most {at_most:g}", value <= at_most
    elif at_least:
        target, ok = f"at least {at_least:g}", value >= at_least
    return {"what": what, "ours": ours, "baseline": baseline, "ratio": ratio, "target": target, "ok": ok}

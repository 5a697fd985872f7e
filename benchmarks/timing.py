"""Medians of alternating runs: what disturbs the machine disturbs both sides."""

import statistics
import time

import torch


def seconds_of(work):
    """Wall-clock seconds of work(), including what it has queued on the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def alternate(works, repeats, warmup=1):
    """Median seconds of each of several callables {name: work}, run in turn `repeats` times."""
    times = {name: [] for name in works}
    for i in range(warmup + repeats):
        for name, work in works.items():
            seconds = seconds_of(work)
            if i >= warmup:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def row(what, ours, baseline, target, *, at_most):
    """A row of the table: ours / baseline at most the target, or baseline / ours at least."""
    ratio = ours / baseline if at_most else baseline / ours
    ok = ratio <= target if at_most else ratio >= target
    return {"what": what, "ours": ours, "baseline": baseline, "ratio": ratio, "target": target, "ok": ok}

"""What main_fed.py continues from: a file per shard and save, a file per average, and which of them fit together.

A run stands at (rounds done, own steps of every shard): in a round, no shard depends on another. Which process trains a
shard is not in the files.
"""

import re
from pathlib import Path

import distributed
from training import checkpoint
from training.progress import restore_lines


def shard_file(logdir, number, step):
    return Path(logdir) / "state" / f"shard{number}_step{step}.pt"


def average_file(logdir, r):
    return Path(logdir) / "state" / f"average_round{r}.pt"


def saved_steps(logdir, number):
    """The shard's own steps after which it was saved, newest first."""
    return sorted(numbers_in(logdir, rf"shard{number}_step(\d+)\.pt"), reverse=True)


def saved_averages(logdir):
    """The rounds whose averages were saved, newest first."""
    in_state = numbers_in(logdir, r"average_round(\d+)\.pt")
    kept = [checkpoint.progress_of(path)[0] for path in Path(logdir).glob("global_ckpt_round*.pt")]
    return sorted({*in_state, *kept}, reverse=True)


def newest_file(logdir):
    """The file in state/ that was written last, or None."""
    return max((Path(logdir) / "state").glob("*.pt"), key=lambda path: path.stat().st_mtime_ns, default=None)


def numbers_in(logdir, pattern):
    names = [path.name for path in (Path(logdir) / "state").glob("*.pt")]
    return [int(match[1]) for name in names if (match := re.fullmatch(pattern, name))]


def newest_consistent(schedule, logdir):
    """(rounds done, the shards' own steps) of the newest files that fit together; a damaged one is set aside.

    A shard at step 0 has no file.
    """
    for r in [*saved_averages(logdir), 0]:
        if r == 0 or any(checkpoint.is_whole(path) for path in average_paths(logdir, r)):
            steps = newest_steps(schedule, logdir, r)
            if steps is not None:
                break
    return r, steps


def average_paths(logdir, r):
    """The files that may hold the average of a round: main_fed.py writes one or both."""
    paths = (average_file(logdir, r), Path(logdir) / checkpoint.round_name(r))
    return [path for path in paths if path.exists()]


def newest_steps(schedule, logdir, r):
    """The steps of the shards' newest good files of round r + 1, or None if a shard has no file to start from."""
    steps = []
    for shard in range(len(schedule.steps)):
        fitting = [s for s in saved_steps(logdir, shard) if schedule.end(shard, r) <= s <= schedule.end(shard, r + 1)]
        good = (step for step in fitting if checkpoint.is_whole(shard_file(logdir, shard, step)))
        step = next(good, None)
        if step is None and r > 0:
            return None
        steps.append(step or 0)
    return steps


def remove_later(steps, logdir, r):
    """Remove what was saved after the point that a run continues from; it will be made again, the same."""
    for shard, own in enumerate(steps):
        for step in saved_steps(logdir, shard):
            if step > own:
                shard_file(logdir, shard, step).unlink()
    for later in numbers_in(logdir, r"average_round(\d+)\.pt"):
        if later > r:
            average_file(logdir, later).unlink()


def prune(shard, logdir, end_of_round, keep):
    """Keep a shard's newest files, and that of the end of the last round: all shards need it until the next average."""
    for step in saved_steps(logdir, shard)[keep:]:
        if step != end_of_round:
            shard_file(logdir, shard, step).unlink()


def prune_averages(logdir, keep):
    """Keep the newest averages in state/; a round's checkpoint in the log directory is not touched."""
    for r in sorted(numbers_in(logdir, r"average_round(\d+)\.pt"), reverse=True)[keep:]:
        average_file(logdir, r).unlink()


def adopt_format_1(logdir):
    """Rename what format 1 has written: one file per shard and one average, without their numbers in the names."""
    state = Path(logdir) / "state"
    for path in state.glob("shard*.pt"):
        if (match := re.fullmatch(r"shard(\d+)\.pt", path.name)) and checkpoint.is_whole(path):
            path.rename(shard_file(logdir, int(match[1]), checkpoint.load(path)["step"]))
    path = state / "average.pt"
    if path.exists() and checkpoint.is_whole(path):
        path.rename(average_file(logdir, checkpoint.load(path)["round"]))


def where_to_continue(schedule, logdir):
    """(rounds done, the shards' own steps) that a log directory stands at, its files and lines in order; on rank 0.

    Raises:
        DataError: a file is of a newer version.
    """
    adopt_format_1(logdir)
    existed = any(Path(logdir).glob("**/*.pt"))
    r, steps = newest_consistent(schedule, logdir)
    remove_later(steps, logdir, r)
    lines = 0
    if r:
        average = load_average(logdir, r)
        lines = average.get("progress", {}).get("metrics_lines", 0)
    numbers = [schedule.number(shard, step) if step else 0 for shard, step in enumerate(steps)]
    restore_lines(logdir, lambda line: line["round"] <= r or line["step"] <= numbers[line["shard"]], lines)
    if any(steps):
        print(f"continuing in {logdir}: {r} rounds and {sum(steps)} steps done")
    elif existed:
        print(f"{logdir}: nothing in it can be continued, starting anew")
    return r, steps


def load_average(logdir, r):
    """The state that round r ended with."""
    path = average_paths(logdir, r)[0]
    state = checkpoint.load(path)
    checkpoint.check_format(state, path)
    return state


def restore(shards, schedule, skip_counts, logdir):
    """Continue the shards of this process from the newest files of the log directory that fit together.

    Sets their learners, banks and meters, and their images' skip counts, in place.

    Returns:
        The number of rounds done, and the seconds of training so far.

    Raises:
        DataError: a file is of a newer version or of another network.
    """
    r, steps = distributed.from_main(where_to_continue(schedule, logdir) if distributed.is_main() else None)
    average = load_average(logdir, r) if r else {}
    seconds = average.get("progress", {}).get("seconds", 0.0)
    for shard in shards:
        step = steps[shard.number]
        if step == 0:
            continue
        path = shard_file(logdir, shard.number, step)
        state = checkpoint.load(path)
        checkpoint.restore(shard.learner, state, path)
        shard.agc.bank.copy_(state["bank"])
        skip_counts[shard.batches.index] = state["skip_counts"].to(skip_counts.device)
        if step == schedule.end(shard.number, r):
            shard.learner.set_weights(average["global_model"], average["global_ema_model"])
        progress = state.get("progress", {"seconds": 0.0})
        shard.meter.restore(progress, same_round=step > schedule.end(shard.number, r))
        seconds = max(seconds, progress["seconds"])
    return r, max(distributed.from_main(distributed.gather(seconds)))

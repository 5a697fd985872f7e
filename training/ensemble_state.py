"""What main_fed.py continues from: a file per shard and save, a file per average, and which of them fit together.

A run trains its shards one after the other, then averages them. So where it stands is (rounds done, shard, step): the
shards before that shard have finished the round, those after it have not begun it.
"""

import re
from pathlib import Path

from training import checkpoint
from training.progress import progress_of_format_1


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
    """The file in state/ that was written last."""
    return max((Path(logdir) / "state").glob("*.pt"), key=lambda path: path.stat().st_mtime_ns)


def numbers_in(logdir, pattern):
    names = [path.name for path in (Path(logdir) / "state").glob("*.pt")]
    return [int(match[1]) for name in names if (match := re.fullmatch(pattern, name))]


def newest_consistent(shards, logdir):
    """(rounds done, {shard number: step}) of the newest files that fit together; a damaged one is set aside.

    A shard at step 0 has no file. The caller's shards have `number` and `steps(rounds)`.
    """
    for r in [*saved_averages(logdir), 0]:
        if r == 0 or any(checkpoint.is_whole(path) for path in average_paths(logdir, r)):
            steps = consistent_steps(shards, logdir, r)
            if steps is not None:
                break
    return r, steps


def average_paths(logdir, r):
    """The files that may hold the average of a round: main_fed.py writes one or both."""
    paths = (average_file(logdir, r), Path(logdir) / checkpoint.round_name(r))
    return [path for path in paths if path.exists()]


def consistent_steps(shards, logdir, r):
    """{shard number: step} of the newest good files of round r + 1, or None where a shard has no file to start from."""
    steps, in_work = {}, False
    for shard in shards:
        first, last = shard.steps(r), shard.steps(r if in_work else r + 1)
        fitting = (step for step in saved_steps(logdir, shard.number) if first <= step <= last)
        good = (step for step in fitting if checkpoint.is_whole(shard_file(logdir, shard.number, step)))
        step = next(good, None)
        if step is None and first > 0:
            return None
        steps[shard.number] = step or 0
        in_work = steps[shard.number] < shard.steps(r + 1)
    return steps


def remove_later(shards, logdir, r, steps):
    """Remove what was saved after the point that a run continues from; it will be made again, the same."""
    for shard in shards:
        for step in saved_steps(logdir, shard.number):
            if step > steps[shard.number]:
                shard_file(logdir, shard.number, step).unlink()
    for later in numbers_in(logdir, r"average_round(\d+)\.pt"):
        if later > r:
            average_file(logdir, later).unlink()


def prune(shard, logdir, r, keep):
    """Keep a shard's newest files, and that of the end of round r: all shards need it until the next average."""
    for step in saved_steps(logdir, shard.number)[keep:]:
        if step != shard.steps(r):
            shard_file(logdir, shard.number, step).unlink()


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


def restore(shards, skip_counts, logdir):
    """Continue from the newest files of the log directory that fit together.

    Sets the shards' learners and banks and the skip counts, in place.

    Returns:
        The number of rounds done, and the logs' state (None at the very start).

    Raises:
        DataError: a file is of a newer version or of another network.
    """
    adopt_format_1(logdir)
    existed = any(Path(logdir).glob("**/*.pt"))
    r, steps = newest_consistent(shards, logdir)
    remove_later(shards, logdir, r, steps)
    device = skip_counts.device
    steps_done, progress = sum(steps.values()), None
    if not steps_done and existed:
        print(f"{logdir}: nothing in it can be continued, starting anew")
    if r:
        path = average_paths(logdir, r)[0]
        average = checkpoint.load(path, device)
        checkpoint.check_format(average, path)
        progress = average.get("progress")
    for shard in shards:
        step = steps[shard.number]
        if step == 0:
            continue
        path = shard_file(logdir, shard.number, step)
        state = checkpoint.load(path, device)
        checkpoint.restore(shard.learner, state, path)
        shard.agc.bank.copy_(state["bank"])
        skip_counts[shard.batches.index] = state["skip_counts"]
        if step == shard.steps(r):
            shard.learner.set_weights(average["global_model"], average["global_ema_model"])
        else:
            progress = state.get("progress")
    if steps_done:
        progress = progress or progress_of_format_1(logdir, steps_done)
        print(f"continuing in {logdir}: {r} rounds and {steps_done} steps done")
    return r, progress

"""What a run continues from: the newest files that fit together, written so that there always are some.

main.py writes ckpt{steps}.pt. main_fed.py writes global_ckpt_round{r}.pt and, to continue from, state/:
a file per shard and save, and the averages that are not to stay. It stands at (rounds done, own steps
of every shard), since in a round no shard depends on another.
"""

from contextlib import suppress
from copy import deepcopy

from training.weights import (
    AVERAGES,
    BEST,
    ROUNDS,
    STEPS,
    load_checkpoint,
    numbered,
    own_files,
    round_name,
    save_checkpoint,
    step_name,
)
from utils import distributed
from utils.errors import DamagedError, DataError, UsageError, one_line, warn
from utils.files import remove

FOR_RESUMING = ("optim", "scaler", "seconds", "milestone")  # what main.py's older checkpoints lack


def load_whole(path):
    """What a checkpoint of a run holds; None if it is damaged, which is said; it stays as it is."""
    try:
        return load_checkpoint(path)
    except DamagedError as error:
        warn(f"{error}: passed over, what it held is made again")
        return None


def nothing_to_continue(path):
    """The error where a new start would replace what is whole."""
    what = "what the run needs beside it to be continued is missing or damaged"
    return DataError(f"{path}: {what}: choose another --logdir, or start over with --fresh --overwrite")


def restore(learner, state, path):
    """Continue a learner from its `state_dict` in a file; DataError if it does not fit the network."""
    try:
        # the optimiser goes on with the tensors that it is given, which must not be those of the file
        learner.load_state_dict({**state, "optim": deepcopy(state["optim"])})
    except (KeyError, ValueError, RuntimeError) as error:
        raise DataError(f"{path}: does not fit the network of the flags: {one_line(error)[:300]}") from error


def check_length(flag, wanted, done, logdir):
    """Raise a UsageError if the flag, the length of a run, asks for less than the run has done."""
    if done > wanted:
        advice = "give at least that, or choose another --logdir"
        raise UsageError(f"--{flag}={wanted}: the run in {logdir} has done {done}: {advice}")


# ---- main.py


def resume(learner, logdir, total_steps):
    """Continue from the newest good checkpoint, if any; returns the seconds of training until then."""
    seconds = 0.0
    path = distributed.from_main(newest_step(logdir) if distributed.is_main() else None)
    if path:
        state = load_checkpoint(path, check=False)  # rank 0 has checked it
        restore(learner, state, path)
        seconds = state["seconds"]
    check_length("total_steps", total_steps, learner.step, logdir)
    if path:
        print(f"continuing from {path}: {learner.step} of {total_steps} steps done")
    return seconds


def newest_step(logdir):
    """The newest whole checkpoint of main.py, or None; a DataError if a run cannot go on from it."""
    for path in numbered(logdir, STEPS).values():
        if state := load_whole(path):
            if "optim" not in state:
                raise nothing_to_continue(path)
            return path
    return None


def save_step(logdir, state, milestone, keep):
    """Write a checkpoint of main.py; of those before the `keep` newest milestones stay, to evaluate."""
    save_checkpoint(logdir / step_name(state["step"]), {**state, "milestone": milestone})
    until_now = [path for step, path in numbered(logdir, STEPS).items() if step <= state["step"]]
    for path in until_now[keep:]:
        with suppress(DamagedError):  # a damaged one stays as it is
            old = load_checkpoint(path)
            if "optim" not in old:
                break  # nor do those before it have more
            if old["milestone"]:
                save_checkpoint(path, {name: value for name, value in old.items() if name not in FOR_RESUMING})
            else:
                remove(path)


# ---- both


def best_name(state):
    """Where `save_best` keeps a checkpoint."""
    if "shard" in state:
        return f"best_shard{state['shard']}_step{state['step']}.pt"
    return f"best_{round_name(state['round']) if 'round' in state else step_name(state['step'])}"


def save_best(logdir, state):
    """Keep a checkpoint for evaluation, beside those to continue from; returns its name."""
    of_network = {name: value for name, value in state.items() if name not in FOR_RESUMING}
    save_checkpoint(logdir / best_name(state), of_network)
    return best_name(state)


def remove_other_bests(logdir, names):
    """Remove what `save_best` has kept, but for these names."""
    for path in own_files(logdir, BEST):
        if path.name not in names:
            remove(path)


# ---- main_fed.py


def shard_files(logdir, shard):
    """{own step: path} of what was saved of a shard, the newest first."""
    return numbered(logdir, rf"state/shard{shard}_step(\d+)\.pt")


def newest_of_round(files, first, last):
    """The newest own step from `first` to `last` of which a shard has a whole file, or None.

    files: of `shard_files`. Step 0 needs no file."""
    whole = (step for step, path in files.items() if first <= step <= last and load_whole(path))
    return next(whole, None if first else 0)


def newest_round(steps_per_round, logdir):
    """(rounds done, own steps of the shards, file of the average) of the newest files that fit together.

    The average of round r fits to shards that stand anywhere in round r + 1. Round 1 needs none.

    Raises:
        DataError: nothing can be continued, but there are whole files, which a new start would replace.
    """
    averages = numbered(logdir, AVERAGES) | numbered(logdir, ROUNDS)
    shards = [shard_files(logdir, shard) for shard in range(len(steps_per_round))]
    for r in [*sorted(averages, reverse=True), 0]:
        if r and not load_whole(averages[r]):
            continue
        own_steps = zip(shards, steps_per_round, strict=True)
        steps = [newest_of_round(files, r * n, (r + 1) * n) for files, n in own_steps]
        if None not in steps:
            break
    files = [*averages.values(), *(path for own in shards for path in own.values())]
    if not any(steps) and (whole := next(filter(load_whole, files), None)):
        raise nothing_to_continue(whole)
    return r, steps, averages.get(r)


def resume_shards(shards, steps_per_round, logdir, total_round):
    """Continue the shards of this process from the newest good files.

    Returns the rounds done, the seconds of training until then, and the slots if they were exchanged.

    Raises:
        DataError: the files do not fit the run.
        UsageError: more rounds are done than `total_round`."""
    found = newest_round(steps_per_round, logdir) if distributed.is_main() else None
    r, steps, average_path = distributed.from_main(found)
    average = load_checkpoint(average_path, check=False) if r else {"seconds": 0.0}
    seconds = average["seconds"]
    for shard in shards:
        step = steps[shard.number]
        if step:
            path = shard_files(logdir, shard.number)[step]
            state = load_checkpoint(path, check=False)
            restore(shard.learner, state, path)
            shard.load_state_dict(state)
            seconds = max(seconds, state["seconds"])
        if r and step == r * steps_per_round[shard.number]:
            shard.round_counts.zero_()
            if average["averaged"]:
                shard.learner.set_weights(average["global_model"], average["global_ema_model"])
    check_length("total_round", total_round, r, logdir)
    if any(steps):
        print(f"continuing in {logdir}: {r} rounds and {sum(steps)} steps done")
    return r, seconds, average.get("slots", average.get("shards"))  # as earlier versions called them


def save_shard(logdir, number, state, end_of_round, keep):
    """Write a shard's file. Its `keep` newest stay, and the last round's until the next average."""
    save_checkpoint(logdir / "state" / f"shard{number}_step{state['step']}.pt", state)
    until_now = [item for item in shard_files(logdir, number).items() if item[0] <= state["step"]]
    for step, path in until_now[keep:]:
        if step != end_of_round:
            remove(path)


def save_average(logdir, state, publish, keep):
    """Write a round's average, for the next to start from: to stay if `publish`, else `keep` stay."""
    r = state["round"]
    save_checkpoint(logdir / (round_name(r) if publish else f"state/average_round{r}.pt"), state)
    until_now = [path for s, path in numbered(logdir, AVERAGES).items() if s <= r]
    for path in until_now[keep:]:
        remove(path)

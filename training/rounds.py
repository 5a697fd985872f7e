"""IET-AGC (Liu et al. 2024), the paper's algorithm: a model per shard of images, averaged every round.

For rounds r = 1 .. R:
        For every shard k, in parallel if there are several processes, with weights theta_k and bank b_k:
        For every step, with a batch of images x_0, timesteps t and noise eps:
            l_i = |eps_i - eps_theta_k(x_t,i, t_i)|^2
            leave sample i out of the step where mem_ratio l_i < b_k[t_i]: it looks memorised
            b_k takes in all l_i; theta_k makes a step of Adam down the mean of the others
        theta_k <- sum_j |D_j| theta_j / |D| for all k, unless shards exchange images instead (IET-AGC+)
"""

from collections import namedtuple
from functools import partial

import torch

from training.averaging import average_learners, ema_networks
from training.ensemble import total_of
from training.launch import Interruption
from training.logger import due
from training.resume import save_shard
from training.shards import exchange, exchange_is_due, number_of_step
from utils import distributed
from utils.seeding import derive_seed

# sizes: |D_k| of each of the K shards, its weight in the average; steps_per_round: own steps of each in
# a round; augments: whether samples near the threshold are augmented (IET-AGC+); all others as the flags
# of these names
Schedule = namedtuple(
    "Schedule",
    "total_round sizes steps_per_round exchange exchange_every exchange_share augments seed "
    "sample_step save_step save_round keep",
)


def train(
    shards, slots, schedule, logger, *, first_round, extra, slots_of_round, preview, publish, watch,
):  # fmt: skip
    """Train the shards of this process from `first_round` on, counted from 1, to the last one.

    Args:
        shards: the `Shard`s of this process; shard k is trained by process k mod P.
        slots: K int64 tensors, which images of the training set each of the shards has.
        logger: a `Logger`, whose directory also has the files to continue from.
        extra: what every one of these says besides, a dict.
        slots_of_round: a function of r: the slots of round r, or None for those of the round before.
        preview: a function of a network: its images (B, 3, H, W) in [-1, 1], for the sample grids.
        publish: a function of (state, is_due) that saves the average, for all to see if that is due.
        watch: a `Watch`, which measures averages after the round in which it falls due, or if that round
            exchanges images after the next that does not. In an only round, whose shards are never
            averaged, it measures the mean prediction of all shards, which wait for each other for it.
            Where it ends a training within a round, that has no average.
    """
    sizes, per_round = schedule.sizes, schedule.steps_per_round
    with Interruption() as interruption, logger:
        for r in range(first_round, schedule.total_round + 1):
            slots = slots_of_round(r) or slots
            for shard in shards:
                shard.batches.use(slots[shard.number])
            for stops in stops_of_round(schedule, r, watch.every):
                if watch.is_over:
                    break
                for shard in shards:
                    with shard.learner.on_device():
                        train_shard(shard, r, stops, schedule, logger, interruption, extra, preview)
                interruption.wait_for_all(logger.logdir)
                if schedule.total_round == 1:
                    watch_ensemble(watch, sum(stops), shards, len(sizes), extra, logger, interruption)
            # a round that is not at its end has no average; killed just before it was saved, it has
            if watch.is_over and steps_done(shards) < sum(per_round) * r:
                break

            exchanges = exchange_is_due(r, schedule.total_round, schedule.exchange, schedule.exchange_every)
            learners = {shard.number: shard.learner for shard in shards}
            average, ema_average = average_learners(learners, sizes, replace=not exchanges)
            if exchanges:
                slots = exchange(slots, total_of(shards, "round_counts"), schedule.exchange_share)
            skip_counts = total_of(shards, "skip_counts")
            for shard in shards:
                shard.round_counts.zero_()

            state = {"global_model": average, "global_ema_model": ema_average, **extra, "round": r}
            state |= {"index_array": skip_counts, "averaged": not exchanges}
            step, learner = sum(per_round) * r, shards[0].learner
            if not exchanges and schedule.total_round > 1 and watch.is_due(step):
                leave_if_stopped(interruption, logger.logdir)
                with learner.on_device():
                    watch(step, [learner.ema], [state] if distributed.is_main() else [], logger)

            logger.memorization(skip_counts, {shard.number: shard.agc.bank for shard in shards}, r)
            if distributed.is_main():
                if schedule.sample_step and not exchanges:
                    with learner.on_device():
                        logger.images(f"average_round{r}", step, partial(preview, learner.ema))
                logger.flush()
                state |= {"seconds": logger.seconds}
                state |= {"slots": slots} if schedule.exchange != "off" else {}
                is_last = r == schedule.total_round or watch.is_over
                publish(state, due(r, schedule.save_round) or is_last)
        logger.finish(steps_done(shards), watch.is_over)


def steps_done(shards):
    """The steps that the shards of all processes have made together."""
    return int(distributed.total(torch.tensor(sum(shard.learner.step for shard in shards))))


def stops_of_round(schedule, r, watch_every):
    """The own steps of all shards at which they wait for each other in round r, lists: at its end.

    In an only round that is watched they also wait where all have made their part of so many steps.
    """
    per_round, total = schedule.steps_per_round, sum(schedule.steps_per_round)
    watched = range(watch_every, total, watch_every) if watch_every and schedule.total_round == 1 else []
    parts = [[-(-step * own // total) for own in per_round] for step in watched]
    return [*parts, [r * own for own in per_round]]


def leave_if_stopped(interruption, logdir):
    """End the processes before a measurement, which takes long, if one of them was signalled."""
    if interruption.of_any():
        interruption.exit(logdir)


def watch_ensemble(watch, step, shards, K, extra, logger, interruption):
    """Measure all K shards as one, if that is due and they have made `step` steps together, no more."""
    if steps_done(shards) == step and watch.is_due(step):
        leave_if_stopped(interruption, logger.logdir)
        networks = ema_networks({shard.number: shard.learner for shard in shards}, K)
        states = [{**shard.state_dict(), **extra, "shard": shard.number} for shard in shards]
        watch(step, networks, states, logger)


def train_shard(shard, r, stops, schedule, logger, interruption, extra, preview):
    """The steps of a shard in round r, from where it stands to its own stop; others as for `train`."""
    k, learner, own_steps = shard.number, shard.learner, schedule.steps_per_round[shard.number]
    while learner.step < stops[k]:
        torch.manual_seed(derive_seed(schedule.seed, "dropout", k, learner.step))
        batch = shard.batches(learner.step)
        losses = learner.losses(batch)
        near = shard.agc.near_threshold(losses, batch.t)
        loss, keep = shard.agc(losses, batch.t)
        numbers = learner.update(loss)
        shard.count(batch.slots, keep, near)
        if schedule.augments:
            shard.augment(batch.slots, near, schedule.seed)

        step, stop = number_of_step(schedule.steps_per_round, k, learner.step), bool(interruption)
        round_ends = learner.step == stops[k]
        logger.step(step, numbers, keep, now=round_ends or stop, round=r, shard=k)
        if due(step, schedule.sample_step):
            logger.images(f"shard{k}_step{step}", step, partial(preview, learner.ema))
        if due(step, schedule.save_step) or round_ends or stop:
            logger.flush()
            state = {**shard.state_dict(), **extra, "seconds": logger.seconds}
            save_shard(logger.logdir, k, state, (r - 1) * own_steps, schedule.keep)
        if stop:
            interruption.exit(logger.logdir)

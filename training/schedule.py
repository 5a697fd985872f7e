"""Where a step stands in a run of main_fed.py, as if its shards were trained one after the other in every round.

So a step has the same number whichever process makes it, and whenever.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """`steps`: of each of the K shards in a round. Rounds count from 1, shards from 0."""

    steps: tuple[int, ...]

    def end(self, shard, r):
        """The shard's own steps after r rounds."""
        return r * self.steps[shard]

    def number(self, shard, step):
        """The number in the whole run, from 1, of the shard's own step number `step`, from 1."""
        rounds_before = (step - 1) // self.steps[shard]
        in_round = step - self.end(shard, rounds_before)
        return rounds_before * sum(self.steps) + sum(self.steps[:shard]) + in_round

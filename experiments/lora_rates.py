"""The learning rate of each rank of experiments/lora.py, by one rule, before the experiment.

    bash com/results.sh --experiment=lora_rates

The rule: default training of one other seed makes a quarter of the steps with every rate of the grid,
and the rate with the lowest loss in the last of six rounds is taken, for IET-AGC too. All see the same
images, timesteps and noise.
"""

from experiments import lora

DATA, floor = lora.DATA, lora.floor
POINTS = 1
ROUNDS = lora.ROUNDS // 4
GRID = (3e-4, 1e-3, 3e-3, 1e-2)


def name_of(rank, lr):
    """Of an arm."""
    return f"rank {rank} at {lr:g}"


ARMS = {name_of(rank, lr): lora.PLAIN | lora.of_rank(rank, lr) for rank in lora.RATES for lr in GRID}
SEEDS = dict.fromkeys(ARMS, range(4, 5))


def chosen(points):
    """{rank: rate} by the rule, of the ranks whose rates are all in the points of a result."""
    losses = {point["arm"]: point["loss"] for point in points if point["steps"]}
    found = {}
    for rank in lora.RATES:
        of_rank = {lr: losses.get(name_of(rank, lr)) for lr in GRID}
        if None not in of_rank.values():
            found[rank] = min(of_rank, key=of_rank.get)
    return found

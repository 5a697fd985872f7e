"""The numbers of steps against a run that counts them."""

from training.schedule import Schedule


def test_numbers_are_those_of_shards_trained_one_after_the_other():
    schedule, count, own = Schedule((3, 1, 4)), 0, [0, 0, 0]
    for r in (1, 2, 3):
        for shard in range(3):
            for _ in range(schedule.steps[shard]):
                own[shard] += 1
                count += 1
                assert schedule.number(shard, own[shard]) == count
            assert schedule.end(shard, r) == own[shard]

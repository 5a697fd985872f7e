"""Batches are a pure function of (seed, shard, step)."""

import numpy as np
import pytest
import torch

from diffusion import AmbientTrainer
from training.batches import ShardBatches
from utils.errors import UsageError
from utils.images import normalize

IMAGES = torch.randint(0, 256, (50, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(50) % 5


def make(index=None, **changes):
    settings = {"batch_size": 6, "T": 100, "seed": 3}
    return ShardBatches(IMAGES, LABELS, torch.arange(50) if index is None else index, **{**settings, **changes})


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("x_0", "labels", "t", "eps", "slots"))


def test_an_epoch_shows_every_image_once_but_the_last_incomplete_batch():
    index = torch.arange(3, 50, 2)  # 24 images: 4 batches of 6
    for batches, dropped in ((make(index), 0), (make(index, batch_size=7), 3)):
        for epoch in range(2):
            first = epoch * batches.steps_per_epoch
            seen = torch.cat([batches(first + step).slots for step in range(batches.steps_per_epoch)]).tolist()
            assert len(set(seen)) == len(seen) == 24 - dropped
            assert set(seen) <= set(index.tolist())
    first, second = (batches.slots_of(epoch * batches.steps_per_epoch).tolist() for epoch in (0, 1))
    assert first != second


def test_balanced_groups_are_drawn_as_often_as_single_images():
    """Every epoch leaves some groups out, large ones no more rarely; members take turns at random."""
    groups = torch.tensor([7] * 12 + [3] * 4 + list(range(100, 134)))[torch.randperm(50)]  # 36 groups
    index, epochs = torch.arange(50)[groups != 105], 400
    batches = make(index, groups=groups, batch_size=8)
    assert batches.steps_per_epoch == 4
    drawn = torch.stack([batches.slots_of(step) for step in range(4 * epochs)]).reshape(epochs, 32)
    assert all(len(groups[epoch].unique()) == 32 for epoch in drawn)
    times = drawn.flatten().bincount(minlength=50)
    of_group = {group: times[groups == group] for group in groups.unique().tolist()}
    assert of_group.pop(105).sum() == 0
    mean = epochs * 32 / 35
    for group, members in of_group.items():
        assert abs(members.sum() - mean) < 5 * (mean * 3 / 35) ** 0.5, group
        assert members.min() > members.sum() / len(members) / 3
    assert torch.equal(make(index, groups=groups, batch_size=8)(37).slots, drawn.reshape(-1, 8)[37])
    with pytest.raises(UsageError, match="--batch_size=36 is larger than the 35 groups of shard 0"):
        make(index, groups=groups, batch_size=36)


def test_a_step_does_not_depend_on_the_steps_before():
    straight, jumping = make(hflip=True, label_dropout=0.3), make(hflip=True, label_dropout=0.3)
    expected = [straight(step) for step in range(20)]
    for step in (17, 3, 19, 0):
        assert same(jumping(step), expected[step])
    torch.manual_seed(0)
    straight(0)
    assert torch.equal(torch.rand(5), torch.rand(5, generator=torch.Generator().manual_seed(0))), "no side effect"


def test_addresses_do_not_share_randomness():
    reference = make()(5)
    for other in (make()(6), make(shard=1)(5), make(seed=4)(5)):
        assert not torch.equal(reference.eps, other.eps)
        assert reference.slots.tolist() != other.slots.tolist()


def test_images_match_their_index_and_labels():
    batch = make(hflip=True)(2)
    flipped = 0
    for x, label, i in zip(batch.x_0, batch.labels, batch.slots, strict=True):
        image = normalize(IMAGES[i])
        assert label == LABELS[i]
        assert torch.equal(x, image) or torch.equal(x, image.flip(-1))
        flipped += torch.equal(x, image.flip(-1))
    assert 0 < flipped < 6


def test_half_are_flipped_and_labels_are_dropped_at_their_rate():
    batches = make(hflip=True, label_dropout=0.25, batch_size=50)
    draws = [batches(step) for step in range(40)]
    flips = [not torch.equal(x, normalize(IMAGES[i])) for b in draws for x, i in zip(b.x_0, b.slots, strict=True)]
    assert np.mean(flips) == pytest.approx(0.5, abs=0.05)
    assert np.mean([(b.labels == -1).float().mean() for b in draws]) == pytest.approx(0.25, abs=0.05)


def test_timesteps_and_noise_have_their_distributions():
    batches = make(batch_size=50)
    t = torch.cat([batches(step).t for step in range(200)])
    assert t.min() == 0 and t.max() == 99
    assert torch.bincount(t, minlength=100).float().std() < 20
    eps = torch.cat([batches(step).eps for step in range(20)])
    assert eps.mean().item() == pytest.approx(0, abs=0.02)
    assert eps.std().item() == pytest.approx(1, abs=0.02)


def test_normalize():
    assert normalize(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


def test_shard_smaller_than_a_batch_says_what_to_change():
    with pytest.raises(UsageError, match=r"--batch_size=60.*50 images.*--client_num"):
        make(batch_size=60)


def test_the_noise_of_a_slot_is_always_the_same_and_turns_with_its_image():
    batches, seen = make(hflip=True), {}
    ambient = AmbientTrainer(None, 1e-4, 0.02, 100, ambient_t=30, seed=3)
    noises = []
    ambient.forward = lambda x_0, labels, t, eps, eps_n: noises.append(eps_n)
    for step in range(3 * batches.steps_per_epoch):
        batch = batches(step)
        ambient.error_of(batch)
        for x, eps_n, i in zip(batch.x_0, noises.pop(), batch.slots.tolist(), strict=True):
            upright = eps_n if torch.equal(x, normalize(IMAGES[i])) else eps_n.flip(-1)
            assert torch.equal(seen.setdefault(i, upright), upright)
    values = torch.stack(list(seen.values()))
    assert abs(values.mean()) < 0.1 and abs(values.std() - 1) < 0.1


def test_augmented_images_belong_to_their_slots():
    batches, index = make(), torch.tensor([4, 9, 4])
    torch.manual_seed(0)
    plain, strong = batches.augmented(index, 0), batches.augmented(index, 5)
    assert plain.slots.tolist() == strong.slots.tolist() == [4, 9, 4]
    assert torch.equal(plain.labels, LABELS[index]) and plain.t.max() < 100
    assert plain.x_0.shape == strong.x_0.shape == (3, 3, 4, 4)
    assert not torch.equal(plain.eps, strong.eps)
    assert not torch.equal(strong.x_0, normalize(IMAGES[index]))


def test_a_shard_goes_on_with_other_images():
    batches = make(index=torch.arange(12))
    batches(0)
    batches.use(torch.arange(12, 24))
    assert set(batches(0).slots.tolist() + batches(1).slots.tolist()) == set(range(12, 24))

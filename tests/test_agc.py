"""Anti-gradient control against the rule applied to one sample after the other."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from training.agc import AntiGradientControl
from training.ensemble import Shard


def sequential(bank, losses, t, mem_ratio, d):
    """METHOD in numpy float64: judge by the bank before the batch, then take in every sample in order."""
    keep = np.array([mem_ratio * loss >= bank[step] for loss, step in zip(losses, t, strict=True)])
    bank = bank.copy()
    for loss, step in zip(losses, t, strict=True):
        bank[step] = d * bank[step] + (1 - d) * loss
    return bank, keep


@pytest.mark.parametrize(("mem_ratio", "d"), [(2.0, 0.8), (1.0, 0.5), (3.0, 0.99), (2.0, 0.0), (2.0, 1.0)])
def test_equals_the_sequential_rule_over_many_batches(mem_ratio, d):
    random = np.random.default_rng(0)
    T = 7
    agc = AntiGradientControl(T, mem_ratio, d)
    skipped = 0
    for _ in range(1000):
        size = int(random.integers(1, 40))
        losses = random.lognormal(-2, 1, size).astype(np.float32)
        t = random.integers(0, T, size)
        before = agc.bank.double().numpy()
        bank, keep = sequential(before, losses.astype(float), t, mem_ratio, d)
        # a verdict within rounding of the threshold may fall either way
        clear = np.abs(mem_ratio * losses - before[t]) > 1e-5 * before[t]
        loss, our_keep = agc(torch.from_numpy(losses), torch.from_numpy(t))
        np.testing.assert_array_equal(our_keep.numpy()[clear], keep[clear])
        np.testing.assert_allclose(agc.bank.numpy(), bank, rtol=3e-6, atol=1e-9)
        kept = losses[our_keep.numpy()]
        assert float(loss) == pytest.approx(kept.sum() / max(1, len(kept)), rel=1e-5)
        skipped += int((~our_keep).sum())
    assert skipped > 0 or d == 1.0


def test_large_batch_of_a_thousand_timesteps():
    random = np.random.default_rng(1)
    agc = AntiGradientControl(1000)
    for _ in range(5):
        losses = random.random(512).astype(np.float32)
        t = random.integers(0, 1000, 512)
        bank, _ = sequential(agc.bank.double().numpy(), losses.astype(float), t, 2.0, 0.8)
        agc(torch.from_numpy(losses), torch.from_numpy(t))
        np.testing.assert_allclose(agc.bank.numpy(), bank, rtol=3e-6)


def primed(**kwargs):
    agc = AntiGradientControl(3, **kwargs)
    agc.bank.copy_(torch.tensor([1.0, 1.0, 0.0]))
    losses = torch.tensor([0.1, 0.5, 4.0, 0.3], requires_grad=True)
    return agc, losses, torch.tensor([0, 1, 1, 2])


def test_first_batches_are_all_kept():
    _, keep = AntiGradientControl(5)(torch.tensor([0.0, 1.0]), torch.tensor([2, 2]))
    assert keep.all()


def test_skip_drops_the_gradient():
    agc, losses, t = primed()
    loss, keep = agc(losses, t)
    loss.backward()
    assert keep.tolist() == [False, True, True, True]
    assert loss.item() == pytest.approx((0.5 + 4.0 + 0.3) / 3)
    np.testing.assert_allclose(losses.grad, [0, 1 / 3, 1 / 3, 1 / 3], rtol=1e-6)


def test_random_leaves_out_as_many_by_chance():
    """As many as the bank takes for memorised, others in every step, the same again with the same seed."""
    random = torch.Generator().manual_seed(0)
    by_bank, by_chance = AntiGradientControl(4, 1.0, 0.8), AntiGradientControl(4, 1.0, 0.8, anti_grad="random")
    left_out, differ = torch.zeros(40), 0
    for step in range(300):
        losses, t = torch.rand(40, generator=random, requires_grad=True), torch.randint(4, (40,), generator=random)
        _, memorised = by_bank(losses, t)
        torch.manual_seed(step)
        loss, keep = by_chance(losses, t)
        assert keep.sum() == memorised.sum() and torch.equal(by_bank.bank, by_chance.bank)
        assert loss.item() == pytest.approx(losses[keep].mean().item() if keep.any() else 0)
        loss.backward()
        assert torch.equal(losses.grad != 0, keep) or not keep.any()
        differ += not torch.equal(keep, memorised)
        left_out += ~keep
    share = left_out / 300
    assert differ > 250 and share.std() < 0.06 and 0.2 < share.mean() < 0.8  # every place as often
    verdicts = []
    for _ in range(2):
        torch.manual_seed(5)
        by_chance.bank.fill_(0.5)
        verdicts.append(by_chance(losses, t)[1])
    assert torch.equal(*verdicts) and not verdicts[0].all()


def test_ascend_turns_it_round():
    agc, losses, t = primed(anti_grad="ascend", ascend_weight=0.5)
    loss, _ = agc(losses, t)
    loss.backward()
    assert loss.item() == pytest.approx((4.8 - 0.5 * 0.1) / 3)
    np.testing.assert_allclose(losses.grad, [-0.5 / 3, 1 / 3, 1 / 3, 1 / 3], rtol=1e-6)


def test_off_keeps_it_but_records_the_verdict():
    agc, losses, t = primed(anti_grad="off")
    other, same_losses, _ = primed()
    loss, keep = agc(losses, t)
    other(same_losses, t)
    assert loss.item() == pytest.approx(losses.mean().item())
    assert keep.tolist() == [False, True, True, True]
    assert torch.equal(agc.bank, other.bank)


def test_nothing_kept_gives_zero():
    agc = AntiGradientControl(1)
    agc.bank.fill_(10.0)
    losses = torch.ones(4, requires_grad=True)
    loss, keep = agc(losses, torch.zeros(4, dtype=torch.long))
    loss.backward()
    assert not keep.any() and loss.item() == 0 and not losses.grad.any()


def test_bank_is_saved_with_the_state():
    agc, losses, t = primed()
    agc(losses, t)
    again = AntiGradientControl(3)
    again.load_state_dict(agc.state_dict())
    assert torch.equal(again.bank, agc.bank)
    assert agc.bank.shape == (3,) and not agc.bank.requires_grad


def test_a_bank_of_few_entries_is_that_of_their_timesteps():
    random = np.random.default_rng(2)
    coarse, fine = AntiGradientControl(1000, bins=10), AntiGradientControl(10)
    for _ in range(20):
        losses = torch.from_numpy(random.lognormal(-2, 1, 64).astype(np.float32))
        t = torch.from_numpy(random.integers(0, 1000, 64))
        found, expected = coarse(losses, t), fine(losses, t // 100)
        assert torch.equal(found[1], expected[1]) and torch.equal(coarse.bank, fine.bank)
    assert coarse.bank.shape == (10,)


def test_samples_near_the_threshold_give_no_gradient_and_are_queued():
    """The rule of IET-AGC+ sample by sample: below the threshold skipped, up to 1.5 times it near, above it trained."""
    random = np.random.default_rng(3)
    agc, augmented = AntiGradientControl(4, mem_ratio=1.25, bar=1.5), []
    batches = SimpleNamespace(batch_size=8, augmented=lambda *chosen: augmented.append(chosen))
    learner = SimpleNamespace(step=0, losses=lambda batch: torch.ones(8), update=lambda loss, extra: None)
    shard = Shard(0, batches, learner, agc, *torch.zeros(2, 1000))
    agc.bank.copy_(torch.tensor([1.0, 0.5, 0.2, 0.0]))
    seen = {"skip": 0, "near": 0, "train": 0}
    waiting = []
    for step in range(50):
        losses = torch.from_numpy(random.lognormal(-1, 1, 16).astype(np.float32)).requires_grad_()
        t = torch.from_numpy(random.integers(0, 4, 16))
        verdicts, strength = [], []
        for loss, b in zip(losses.tolist(), agc.bank[t].tolist(), strict=True):
            scaled = 1.25 * loss
            verdicts.append("skip" if scaled < b else "near" if scaled < 1.5 * b else "train")
            strength.append(np.exp(-5 * abs(scaled - b) / b) if verdicts[-1] == "near" else 0.0)
        near = agc.near_threshold(losses, t)
        loss, keep = agc(losses, t)
        loss.backward()
        trains = np.array([verdict == "train" for verdict in verdicts])
        np.testing.assert_allclose(near, strength, rtol=1e-4)
        np.testing.assert_allclose(losses.grad, trains / max(1, trains.sum()), rtol=1e-6)
        assert keep.tolist() == [verdict != "skip" for verdict in verdicts]
        for verdict in verdicts:
            seen[verdict] += 1
        index = torch.arange(16) + 16 * step
        waiting += [(int(i), s) for i, s in zip(index, near.tolist(), strict=True) if s > 0]
        shard.augment(index, near, seed=0)
        if len(waiting) >= 8:
            images, magnitude = augmented.pop()
            assert images.tolist() == [i for i, _ in waiting[:8]]
            assert magnitude == int(5 * np.mean([s for _, s in waiting[:8]]))
            waiting = []
        assert not augmented
    assert min(seen.values()) > 20

"""Anti-gradient control against the rule applied to one sample after the other."""

import numpy as np
import pytest
import torch

from training.agc import AntiGradientControl


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


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="anti_grad"):
        AntiGradientControl(3, anti_grad="reverse")

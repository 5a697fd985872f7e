"""The mathematics against numpy in float64 and against the Gaussian case that can be solved by hand."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from diffusion import AmbientTrainer, GaussianDiffusionSampler, GaussianDiffusionTrainer, ddim_timesteps

T, BETA_1, BETA_T = 1000, 1e-4, 0.02
BETAS = np.linspace(BETA_1, BETA_T, T)
ABAR = np.cumprod(1 - BETAS)


class Smooth(nn.Module):
    """A closed-form, well-conditioned stand-in for a network."""

    def forward(self, x, t, labels=None):
        shift = 0 if labels is None else 0.1 * labels[:, None, None, None]
        return 0.7 * torch.tanh(x) * torch.cos(t / 300)[:, None, None, None] + shift


def smooth(x, t, label=None):
    return 0.7 * np.tanh(x) * np.cos(t / 300) + (0 if label is None else 0.1 * label)


def noise(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()


def sampler(**kwargs):
    return GaussianDiffusionSampler(Smooth(), BETA_1, BETA_T, T, img_size=8, **kwargs)


def posterior(x_0, x_t, t):
    """Mean and variance of x_{t-1} given x_t and x_0, by conditioning the joint Gaussian of the two."""
    abar_prev = ABAR[t - 1] if t else 1.0
    mean_prev, var_prev = np.sqrt(abar_prev) * x_0, 1 - abar_prev
    mean_t, var_t = np.sqrt(ABAR[t]) * x_0, 1 - ABAR[t]
    covariance = np.sqrt(1 - BETAS[t]) * var_prev
    return mean_prev + covariance / var_t * (x_t - mean_t), var_prev - covariance**2 / var_t


def to_x_0(mean_type, prediction, x_t, t):
    """What a prediction says about x_0, by solving for it numerically where no formula is needed."""
    if mean_type == "xstart":
        return prediction
    if mean_type == "epsilon":
        return (x_t - np.sqrt(1 - ABAR[t]) * prediction) / np.sqrt(ABAR[t])
    offset, _ = posterior(np.zeros_like(x_t), x_t, t)
    slope, _ = posterior(np.ones_like(x_t), np.zeros_like(x_t), t)
    return (prediction - offset) / slope


def test_plain_call_draws_t_then_eps():
    trainer = GaussianDiffusionTrainer(Smooth(), BETA_1, BETA_T, T)
    x_0 = noise(0, 4, 3, 8, 8)
    torch.manual_seed(5)
    loss = trainer(x_0)
    torch.manual_seed(5)
    t = torch.randint(T, (4,))
    eps = torch.randn_like(x_0)
    assert loss.shape == x_0.shape
    assert torch.equal(loss, trainer(x_0, t=t, eps=eps))
    scale = ABAR[t.numpy()][:, None, None, None]
    x_t = np.sqrt(scale) * x_0.numpy() + np.sqrt(1 - scale) * eps.numpy()
    prediction = np.stack([smooth(x, int(step)) for x, step in zip(x_t, t, strict=True)])
    np.testing.assert_allclose(loss.numpy(), (prediction - eps.numpy()) ** 2, atol=1e-5)


@pytest.mark.parametrize("mean_type", ["epsilon", "xstart", "xprev"])
def test_target_is_what_the_network_predicts(mean_type):
    """A network that answers with the right thing has no loss, and no other network type does."""
    x_0, eps, t = noise(1, 6, 3, 8, 8), noise(2, 6, 3, 8, 8), torch.tensor([0, 1, 5, 300, 998, 999])
    answers = []
    for x, e, step in zip(x_0.double().numpy(), eps.double().numpy(), t.tolist(), strict=True):
        x_t = np.sqrt(ABAR[step]) * x + np.sqrt(1 - ABAR[step]) * e
        answers.append({"epsilon": e, "xstart": x, "xprev": posterior(x, x_t, step)[0]}[mean_type])
    answer = torch.from_numpy(np.stack(answers)).float()
    network = lambda x, t, labels: answer  # noqa: E731
    trainer = GaussianDiffusionTrainer(nn.Identity(), BETA_1, BETA_T, T, mean_type)
    trainer.model.forward = network
    assert trainer(x_0, t=t, eps=eps).max() < 1e-8
    wrong = "xstart" if mean_type == "epsilon" else "epsilon"
    other = GaussianDiffusionTrainer(nn.Identity(), BETA_1, BETA_T, T, wrong)
    other.model.forward = network
    assert other(x_0, t=t, eps=eps).max() > 0.1


@pytest.mark.parametrize("var_type", ["fixedlarge", "fixedsmall"])
@pytest.mark.parametrize("mean_type", ["epsilon", "xstart", "xprev"])
@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_the_ancestral_step_against_a_conditioned_gaussian(t, mean_type, var_type):
    x_t = noise(3, 2, 3, 8, 8)
    step = partial(sampler(mean_type=mean_type, var_type=var_type).ddpm_step, x_t, torch.full((2,), t), 0, None)
    mean = step(torch.zeros_like)
    deviation = step(torch.ones_like).double() - mean.double()
    x = x_t.double().numpy()
    expected, _ = posterior(to_x_0(mean_type, smooth(x, t), x, t), x, t)
    np.testing.assert_allclose(mean.numpy(), expected, rtol=1e-4, atol=1e-4)
    _, variance = posterior(0.0, 0.0, max(t, 1))
    if var_type == "fixedlarge" and t:
        variance = BETAS[t]
    np.testing.assert_allclose(deviation.numpy(), np.sqrt(variance), rtol=1e-3, atol=1e-6)


def numpy_ddim(x, taus, eta=0.0, draws=None, mean_type="epsilon", label=None, guidance=0.0):
    for i in reversed(range(len(taus))):
        t, t_prev = taus[i], taus[i - 1] if i else 0
        prediction = smooth(x, t, label)
        if guidance:
            prediction = (1 + guidance) * prediction - guidance * smooth(x, t, -1)
        x_0 = to_x_0(mean_type, prediction, x, t)
        eps = (x - np.sqrt(ABAR[t]) * x_0) / np.sqrt(1 - ABAR[t])
        a, a_prev = ABAR[t], ABAR[t_prev]
        sigma = eta * np.sqrt((1 - a_prev) / (1 - a)) * np.sqrt(1 - a / a_prev)
        x = np.sqrt(a_prev) * np.clip(x_0, -1, 1) + np.sqrt(1 - a_prev - sigma**2) * eps
        if draws is not None:
            x = x + sigma * next(draws)
    return x


@pytest.mark.parametrize("mean_type", ["epsilon", "xstart"])
def test_default_sampler_is_ddim_50(mean_type):
    x_T = noise(4, 3, 3, 8, 8)
    expected = numpy_ddim(x_T.double().numpy(), [20 * i + 1 for i in range(50)], mean_type=mean_type)
    result = sampler(mean_type=mean_type)(x_T)
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-4)


def test_ddim_with_noise_and_labels_and_guidance():
    x_T, draws = noise(5, 2, 3, 8, 8), noise(6, 10, 2, 3, 8, 8)
    taus = [100 * i + 1 for i in range(10)]
    given = iter(draws)
    ours = sampler(steps=10, eta=0.7)(x_T, noise=lambda x: next(given))
    expected = numpy_ddim(x_T.double().numpy(), taus, eta=0.7, draws=iter(draws.double().numpy()))
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-4)
    guided = sampler(steps=10, guidance=1.5)(x_T, torch.tensor([3, 3]))
    np.testing.assert_allclose(guided.numpy(), numpy_ddim(x_T.double().numpy(), taus, label=3, guidance=1.5), atol=1e-4)


def test_ancestral_sampling_against_numpy():
    """T = 20 steps of p(x_{t-1} | x_t): x_0 not clipped on the way, no noise at t = 0, the image clipped."""
    steps = 20
    betas = np.linspace(BETA_1, BETA_T, steps)
    abar = np.cumprod(1 - betas)
    x_T, draws = noise(7, 2, 3, 8, 8), noise(8, steps, 2, 3, 8, 8)
    given = iter(draws)
    ours = GaussianDiffusionSampler(Smooth(), BETA_1, BETA_T, steps, sampler="ddpm")(x_T, noise=lambda x: next(given))
    assert len(list(given)) == 1, "one draw per step but the last"
    x, drawn = x_T.double().numpy(), iter(draws.double().numpy())
    for t in reversed(range(steps)):
        # DDPM algorithm 2 writes the mean through eps; sigma^2 = beta_t, at t = 0 unused
        x = (x - betas[t] / np.sqrt(1 - abar[t]) * smooth(x, t)) / np.sqrt(1 - betas[t])
        if t:
            x = x + np.sqrt(betas[t]) * next(drawn)
    np.testing.assert_allclose(ours.numpy(), np.clip(x, -1, 1), atol=1e-4)


def test_ddim_timesteps():
    assert ddim_timesteps(1000, 50) == [20 * i + 1 for i in range(50)]
    assert ddim_timesteps(1000, 30) == [33 * i + 1 for i in range(30)]
    for steps in range(1, 101):
        taus = ddim_timesteps(100, steps)
        assert len(set(taus)) == steps
        assert 0 <= taus[0] < taus[-1] < 100 or steps == 1
    with pytest.raises(ValueError, match="steps"):
        ddim_timesteps(10, 11)


class Linear(nn.Module):
    """The optimal network for x_0 ~ N(0, std^2), whose probability-flow ODE is solved by scaling."""

    def __init__(self, std):
        super().__init__()
        self.variance = std**2

    def forward(self, x, t, labels=None):
        a = torch.from_numpy(ABAR).to(x)[t][:, None, None, None]
        return (1 - a).sqrt() * x / (a * self.variance + 1 - a)


@pytest.mark.parametrize("std", [0.3, 0.6])
def test_dpmpp_solves_the_probability_flow_ode_to_second_order(std):
    """x_t / sqrt(abar_t std^2 + 1 - abar_t) is constant along the exact solution."""
    x_T = 0.3 * noise(10, 2, 3, 8, 8).clamp(-2, 2)
    scale = np.sqrt(ABAR * std**2 + 1 - ABAR)
    exact = x_T.double().numpy() * scale[0] / scale[-1]

    def error(kind, steps):
        solver = GaussianDiffusionSampler(Linear(std), BETA_1, BETA_T, T, sampler=kind, steps=steps)
        return np.abs(solver(x_T).numpy() - exact).max() / np.abs(exact).max()

    assert error("dpmpp", 20) < 0.02
    assert error("dpmpp", 20) < error("ddim", 50)
    assert error("dpmpp", 20) / error("dpmpp", 40) > 2.5, "first order would give 2"


def test_dpmpp_against_the_published_form():
    """Algorithm 2 written with its own symbols, from lambda, in float64; x keeps eps where x_0 is clamped."""
    x_T, steps = noise(11, 2, 3, 8, 8), 7
    every = np.log(ABAR / (1 - ABAR)) / 2
    taus = [int(np.argmin(np.abs(every - x))) for x in np.linspace(every[-1], every[0], steps + 1)]
    assert taus[0] == 999 and taus[-1] == 0
    alpha, sigma = np.sqrt(ABAR[taus]), np.sqrt(1 - ABAR[taus])
    lam = np.log(alpha) - np.log(sigma)
    x, buffer = x_T.double().numpy(), []
    for i in range(1, steps + 1):
        eps = smooth(x, taus[i - 1])
        buffer.append(np.clip(to_x_0("epsilon", eps, x, taus[i - 1]), -1, 1))
        x = alpha[i - 1] * buffer[-1] + sigma[i - 1] * eps
        h = lam[i] - lam[i - 1]
        D = buffer[-1]
        if 1 < i < steps:
            r = (lam[i - 1] - lam[i - 2]) / h
            D = (1 + 1 / (2 * r)) * buffer[-1] - 1 / (2 * r) * buffer[-2]
        x = sigma[i] / sigma[i - 1] * x - alpha[i] * (np.exp(-h) - 1) * D
    ours = sampler(sampler="dpmpp", steps=steps)(x_T)
    np.testing.assert_allclose(ours.numpy(), x, atol=1e-4)


def test_all_timesteps_stay_finite():
    images = GaussianDiffusionSampler(Smooth(), BETA_1, BETA_T, 30, steps=30, eta=1.0)(noise(9, 2, 3, 8, 8))
    assert torch.isfinite(images).all()


def test_a_gaussian_is_sampled_right():
    """For x_0 ~ N(0.2, 0.1^2) the optimal network is linear, and ancestral samples must have that mean and spread."""
    mean, std = 0.2, 0.1
    abar = torch.from_numpy(ABAR).float()

    class Optimal(nn.Module):
        def forward(self, x, t, labels=None):
            a = abar[t][:, None, None, None]
            return (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * std**2 + 1 - a)

    torch.manual_seed(0)
    ddpm = GaussianDiffusionSampler(Optimal(), BETA_1, BETA_T, T, sampler="ddpm", var_type="fixedsmall")
    images = ddpm(torch.randn(64, 3, 8, 8))
    assert images.mean().item() == pytest.approx(mean, abs=0.005)
    assert images.std().item() == pytest.approx(std, rel=0.05)


def test_wrong_names_are_refused():
    with pytest.raises(ValueError, match="mean_type"):
        GaussianDiffusionTrainer(Smooth(), BETA_1, BETA_T, T, "eps")
    with pytest.raises(ValueError, match="var_type"):
        sampler(var_type="learned")
    with pytest.raises(ValueError, match="sampler"):
        sampler(sampler="euler")


class Gaussian(nn.Module):
    """E[eps | x_t] where pixels of x_0 are normal with a mean and a deviation, times a factor."""

    def __init__(self, mean, deviation):
        super().__init__()
        self.mean, self.deviation, self.factor = mean, deviation, nn.Parameter(torch.ones(()))

    def forward(self, x, t, labels=None):
        abar = torch.from_numpy(ABAR)[t][:, None, None, None]
        variance = abar * self.deviation**2 + 1 - abar
        return (self.factor * (1 - abar).sqrt() * (x - abar.sqrt() * self.mean) / variance).float()


@pytest.mark.parametrize("t", [400, 450, 700, 999])
def test_the_ambient_loss_is_least_at_the_true_mean(t):
    """And sees no more of x_0 than x_n: with another x_0 of the same x_n nothing changes."""
    n, mean, deviation = 400, 0.2, 0.5
    x_0 = mean + deviation * noise(0, 20_000, 1, 2, 2)
    eps, eps_n = noise(1, *x_0.shape), noise(2, *x_0.shape)
    net = Gaussian(mean, deviation)
    trainer = AmbientTrainer(net, BETA_1, BETA_T, T, ambient_t=n, seed=0)
    steps = torch.full((len(x_0),), t)
    loss = trainer(x_0, None, steps, eps, eps_n)
    (slope,) = torch.autograd.grad(loss.mean(), net.factor)
    size = trainer(x_0, None, steps, eps, eps_n).square().mean().sqrt().item()
    assert abs(slope) < 0.02 * max(size, 1e-3)

    a_n, s_n = np.sqrt(ABAR[n]), np.sqrt(1 - ABAR[n])
    other = x_0 + 0.3
    assert torch.allclose(trainer(other, None, steps, eps, eps_n - a_n / s_n * 0.3), loss, atol=1e-4)
    if t == n:
        assert torch.allclose(loss, eps.square(), atol=1e-4)  # nothing to learn
        return
    # the formula of the paper, in float64
    a_t, s_t = np.sqrt(ABAR[t]), np.sqrt(1 - ABAR[t])
    c = a_t / a_n
    eta = np.sqrt(s_t**2 - c**2 * s_n**2)
    x_n = a_n * x_0.double() + s_n * eps_n.double()
    x_t = c * x_n + eta * eps.double()
    predicted = mean + a_t * deviation**2 / (a_t**2 * deviation**2 + s_t**2) * (x_t - a_t * mean)
    published = ((eta**2 / s_t**2 * (a_t * predicted - x_t) + x_t) / c - x_n) ** 2
    np.testing.assert_allclose(loss.detach(), c**2 / eta**2 * published, rtol=2e-3, atol=2e-3)


def test_the_ambient_loss_is_the_usual_one_below_its_t():
    x_0, eps, eps_n = noise(0, 6, 3, 8, 8), noise(1, 6, 3, 8, 8), noise(2, 6, 3, 8, 8)
    t = torch.tensor([0, 10, 100, 200, 299, 300])
    for mean_type in ("epsilon", "xstart", "xprev"):
        usual = GaussianDiffusionTrainer(Smooth(), BETA_1, BETA_T, T, mean_type)(x_0, None, t, eps)
        trainer = AmbientTrainer(Smooth(), BETA_1, BETA_T, T, mean_type, ambient_t=300, seed=0)
        ambient = trainer(x_0, None, t, eps, eps_n)
        assert torch.allclose(ambient[:5], usual[:5], atol=1e-6)
        assert not torch.allclose(ambient[5], usual[5], atol=1e-2)

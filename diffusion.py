"""The mathematics of diffusion: schedule, q(x_t | x_0), training loss, samplers. It knows no files.

Notation of Ho et al. 2020 (DDPM) and Song et al. 2021 (DDIM), with 0-based t:
x_t = sqrt(alphas_bar_t) x_0 + sqrt(1 - alphas_bar_t) eps, alphas_bar_t = prod_{s <= t} (1 - beta_s).
"""

import torch
import torch.nn.functional as F
from torch import nn

from utils.seeding import derive_seed, sample_noise

MEAN_TYPES = ("epsilon", "xstart", "xprev")
VAR_TYPES = ("fixedlarge", "fixedsmall")
SAMPLERS = ("ddim", "ddpm", "dpmpp")


def extract(values, t):
    """values[t] as float32 (B, 1, 1, 1), to scale images; values (T,), t (B,)."""
    return values[t].float()[:, None, None, None]


def ddim_timesteps(T, steps):
    """The timesteps DDIM visits, ascending: tau_i = i * (T // steps) + 1, `steps` ints in 0..T-1.

    With steps = T the offset 1 would reach T, so it is dropped there.

    Raises:
        ValueError: steps is not in 1..T."""
    if not 1 <= steps <= T:
        raise ValueError(f"steps is {steps}: must be between 1 and T = {T}")
    stride = T // steps
    offset = min(1, T - 1 - (steps - 1) * stride)
    return [i * stride + offset for i in range(steps)]


def dpmpp_timesteps(alphas_bar, steps):
    """The timesteps DPM-Solver++ visits and, first, the one it ends at: ascending ints from 0 to T-1.

    Those nearest to an even spacing in lambda = log(alpha / sigma), as Lu et al. 2022 (DPM-Solver,
    section 3.4) choose for small images; fewer where the schedule is too coarse, near t = 0.

    Args:
        alphas_bar: (T,) float64, descending.
        steps: calls of the network."""
    lambdas = 0.5 * torch.log(alphas_bar / (1 - alphas_bar))
    even = torch.linspace(lambdas[0].item(), lambdas[-1].item(), steps + 1, dtype=torch.float64)
    return (even[:, None] - lambdas).abs().argmin(dim=1).unique().tolist()


class GaussianDiffusion(nn.Module):
    """A schedule, and the conversions between x_0, x_t, x_{t-1} and eps of training and sampling.

    Args:
        model: called as model(x_t, t, labels), returns what it predicts, (B, 3, H, W).
        beta_1, beta_T, T: first and last variance, and number of timesteps.
        mean_type: what it predicts: epsilon, xstart (x_0) or xprev (mean of q(x_{t-1} | x_t, x_0)).

    Raises:
        ValueError: no such mean_type."""

    def __init__(self, model, beta_1, beta_T, T, mean_type="epsilon"):
        super().__init__()
        if mean_type not in MEAN_TYPES:
            raise ValueError(f"mean_type is {mean_type!r}: must be one of {', '.join(MEAN_TYPES)}")
        self.model, self.T, self.mean_type = model, T, mean_type
        betas = torch.linspace(beta_1, beta_T, T, dtype=torch.float32).double()  # float32 first, as published
        alphas_bar = torch.cumprod(1 - betas, dim=0)
        alphas_bar_prev = F.pad(alphas_bar, [1, 0], value=1.0)[:T]
        self.register_buffer("betas", betas)
        self.register_buffer("alphas_bar", alphas_bar)
        self.register_buffer("posterior_var", betas * (1 - alphas_bar_prev) / (1 - alphas_bar))
        self.register_buffer("posterior_x_0_coef", betas * alphas_bar_prev.sqrt() / (1 - alphas_bar))
        self.register_buffer("posterior_x_t_coef", (1 - betas).sqrt() * (1 - alphas_bar_prev) / (1 - alphas_bar))

    def q_sample(self, x_0, t, eps):
        """x_t ~ q(x_t | x_0) for the noise eps (DDPM eq. 4); all (B, 3, H, W), t (B,)."""
        return extract(self.alphas_bar.sqrt(), t) * x_0 + extract((1 - self.alphas_bar).sqrt(), t) * eps

    def q_posterior_mean(self, x_0, x_t, t):
        """The mean of q(x_{t-1} | x_t, x_0) (DDPM eq. 7); at t = 0 it is x_0."""
        return extract(self.posterior_x_0_coef, t) * x_0 + extract(self.posterior_x_t_coef, t) * x_t

    def predict_x_0(self, prediction, x_t, t):
        """x_0 from what the network predicts, not clipped: inverts q_sample or q_posterior_mean."""
        if self.mean_type == "xstart":
            return prediction
        if self.mean_type == "xprev":
            return (prediction - extract(self.posterior_x_t_coef, t) * x_t) / extract(self.posterior_x_0_coef, t)
        noise = extract((1 - self.alphas_bar).sqrt(), t) * prediction
        return (x_t - noise) / extract(self.alphas_bar.sqrt(), t)

    def predict_eps(self, x_0, x_t, t):
        """eps from x_0 and x_t: the inverse of q_sample."""
        return (x_t - extract(self.alphas_bar.sqrt(), t) * x_0) / extract((1 - self.alphas_bar).sqrt(), t)


class GaussianDiffusionTrainer(GaussianDiffusion):
    """The training loss of DDPM (eq. 14, unweighted), for what `mean_type` says the network predicts."""

    def forward(self, x_0, labels=None, t=None, eps=None):
        """Squared error per element between the network's prediction and its target.

        Args:
            x_0: (B, 3, H, W) in [-1, 1].
            labels: (B,) int64 classes, -1 for no class, or None.
            t: (B,) int64 in 0..T-1; drawn first, uniformly on x_0's device, if not given.
            eps: (B, 3, H, W) standard normal; drawn second if not given.

        Returns (B, 3, H, W) float32, unreduced."""
        if t is None:
            t = torch.randint(self.T, (x_0.shape[0],), device=x_0.device)
        if eps is None:
            eps = torch.randn_like(x_0)
        x_t = self.q_sample(x_0, t, eps)
        return (self.model(x_t, t, labels).float() - self.target(x_0, x_t, t, eps)).square()

    def target(self, x_0, x_t, t, eps):
        """What the network is to predict: (B, 3, H, W)."""
        if self.mean_type == "xprev":
            return self.q_posterior_mean(x_0, x_t, t)
        return eps if self.mean_type == "epsilon" else x_0

    def error_of(self, batch):
        """The squared error of a `training.batches.Batch`."""
        return self(batch.x_0, batch.labels, batch.t, batch.eps)


class AmbientTrainer(GaussianDiffusionTrainer):
    """Ambient diffusion at high noise (Shah et al. 2025): for t >= t_n the network sees only x_n of x_0.

    Let a_t = sqrt(alphas_bar_t), s_t^2 = 1 - alphas_bar_t. For an image x_n = a_n x_0 + s_n eps_n is fixed.
    For t >= t_n, c = a_t / a_n, eta^2 = s_t^2 - c^2 s_n^2, x_t = c x_n + eta eps has q(x_t | x_0),
    and the loss of the paper is |[(eta^2 / s_t^2) (a_t x0_hat - x_t) + x_t] / c - x_n|^2, which the true
    E[x_0 | x_t] minimises. Here it is multiplied by c^2 / eta^2: |(eta / s_t) eps_hat - eps|^2, on the
    scale of the loss at t < t_n, where the factor of the paper would grow as 1 / alphas_bar_t.

    Args:
        ambient_t: t_n.
        seed: of eps_n, which image i of the training set always has."""

    def __init__(self, model, beta_1, beta_T, T, mean_type="epsilon", *, ambient_t, seed):
        super().__init__(model, beta_1, beta_T, T, mean_type)
        self.ambient_t, self.seed = ambient_t, seed

    def forward(self, x_0, labels, t, eps, eps_n):
        """As `GaussianDiffusionTrainer.forward`; eps_n (B, 3, H, W), the noise of x_n."""
        n = torch.full_like(t, self.ambient_t)
        a_t, a_n = extract(self.alphas_bar.sqrt(), t), extract(self.alphas_bar.sqrt(), n)
        c, s_t = a_t / a_n, extract((1 - self.alphas_bar).sqrt(), t)
        eta = (s_t.square() - c.square() * extract(1 - self.alphas_bar, n)).clamp(min=0).sqrt()
        x_n = self.q_sample(x_0, n, eps_n)
        is_high = (t >= self.ambient_t)[:, None, None, None]
        x_t = torch.where(is_high, c * x_n + eta * eps, self.q_sample(x_0, t, eps))
        prediction = self.model(x_t, t, labels).float()
        eps_hat = self.predict_eps(self.predict_x_0(prediction, x_t, t), x_t, t)
        usual = prediction - self.target(x_0, x_t, t, eps)
        return torch.where(is_high, eta / s_t * eps_hat - eps, usual).square()

    def error_of(self, batch):
        """The squared error of a `training.batches.Batch`; a mirrored image has its eps_n mirrored."""
        address, device = derive_seed(self.seed, "ambient"), batch.x_0.device
        eps_n = sample_noise(address, batch.slots.tolist(), batch.x_0.shape[1:], device)()
        eps_n = torch.where(batch.mirrored[:, None, None, None], eps_n.flip(-1), eps_n)
        return self(batch.x_0, batch.labels, batch.t, batch.eps, eps_n)


class GaussianDiffusionSampler(GaussianDiffusion):
    """Images from noise, by DDIM (default: 50 steps, eta 0), DDPM (ancestral), or DPM-Solver++ (2M).

    Args:
        model, beta_1, beta_T, T, mean_type: as trained.
        img_size: height and width of the images.
        var_type: reverse variance of the ancestral step, fixedlarge (beta_t) or fixedsmall (posterior).
        sampler: ddim, ddpm (all T steps) or dpmpp (deterministic, good with few steps).
        steps: network calls of ddim and dpmpp.
        eta: of ddim; 0 is deterministic, 1 has the noise of DDPM.
        guidance: weight w of classifier-free guidance, (1 + w) f(x, c) - w f(x, no class)
            (Ho & Salimans 2022, eq. 6).

    Raises:
        ValueError: no such mean_type, var_type or sampler, or more steps of ddim than there are."""

    def __init__(
        self, model, beta_1, beta_T, T, img_size=32, mean_type="epsilon", var_type="fixedlarge", *,
        sampler="ddim", steps=50, eta=0.0, guidance=0.0,
    ):  # fmt: skip
        super().__init__(model, beta_1, beta_T, T, mean_type)
        if var_type not in VAR_TYPES:
            raise ValueError(f"var_type is {var_type!r}: must be one of {', '.join(VAR_TYPES)}")
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler is {sampler!r}: must be one of {', '.join(SAMPLERS)}")
        self.img_size, self.sampler, self.eta, self.guidance = img_size, sampler, eta, guidance
        if sampler == "ddim":
            self.timesteps = ddim_timesteps(T, steps)
        elif sampler == "dpmpp":
            self.timesteps = dpmpp_timesteps(self.alphas_bar, steps)
        else:
            self.timesteps = list(range(T))
        variance = self.betas if var_type == "fixedlarge" else self.posterior_var
        # posterior_var[0] is 0: the published code takes the next one, to have a finite logarithm
        self.register_buffer("log_var", torch.cat([self.posterior_var[1:2], variance[1:]]).log())

    def predict(self, x_t, t, labels=None):
        """The network's output, guided where `guidance` is not 0; (B, 3, H, W) float32."""
        if labels is None or self.guidance == 0:
            return self.model(x_t, t, labels).float()
        both = self.model(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([labels, torch.full_like(labels, -1)]))
        conditional, unconditional = both.float().chunk(2)
        return (1 + self.guidance) * conditional - self.guidance * unconditional

    def ddpm_step(self, x_t, t, t_prev, labels, noise):
        """x_{t-1} from x_t by ancestral sampling (DDPM alg. 2): x_0 is not clipped, and no noise at t = 0."""
        x_0 = self.predict_x_0(self.predict(x_t, t, labels), x_t, t)
        mean = self.q_posterior_mean(x_0, x_t, t)
        return mean if t_prev is None else mean + (0.5 * extract(self.log_var, t)).exp() * noise(x_t)

    def ddim_step(self, x_t, t, t_prev, labels, noise):
        """x_{t_prev} from x_t (DDIM eq. 12, sigma of eq. 16): x_0 is clamped to [-1, 1], eps is not.

        After the last visited timestep t_prev is 0 and not -1, so the image lands on alphas_bar_0."""
        prediction = self.predict(x_t, t, labels)
        x_0 = self.predict_x_0(prediction, x_t, t)
        eps = prediction if self.mean_type == "epsilon" else self.predict_eps(x_0, x_t, t)
        abar, abar_prev = self.alphas_bar[t], self.alphas_bar[torch.zeros_like(t) if t_prev is None else t_prev]
        sigma = self.eta * ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)).sqrt()
        to_image = (..., None, None, None)
        x_prev = abar_prev.sqrt().float()[to_image] * x_0.clamp(-1, 1)
        # at steps = T the first visited timestep is its own predecessor, and rounding may leave -1e-17
        x_prev = x_prev + (1 - abar_prev - sigma**2).clamp(min=0).sqrt().float()[to_image] * eps
        return x_prev if self.eta == 0 else x_prev + sigma.float()[to_image] * noise(x_t)

    def sample_dpmpp(self, x_t, labels):
        """DPM-Solver++ (2M) of Lu et al. 2022, algorithm 2, from timestep T-1 to 0.

        As in `ddim_step` x_0 is clamped to [-1, 1] and eps is not: x_t becomes alpha x_0 + sigma eps.
        With lambda = log(alpha / sigma), alpha = sqrt(alphas_bar), sigma = sqrt(1 - alphas_bar), h the
        step in lambda and r = h_before / h:
        D = (1 + 1/(2r)) x_0 - 1/(2r) x_0_before,  x <- sigma'/sigma x - alpha' (exp(-h) - 1) D.
        The first step has no x_0_before and is of first order, D = x_0; so is the last, to be stable."""
        abar = self.alphas_bar[self.timesteps]
        alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
        h = -(alpha / sigma).log().diff()  # h[i] > 0: from visited timestep i + 1 down to i
        x_0_before = None
        for i in reversed(range(len(self.timesteps) - 1)):
            t = x_t.new_full((x_t.shape[0],), self.timesteps[i + 1], dtype=torch.long)
            prediction = self.predict_x_0(self.predict(x_t, t, labels), x_t, t)
            x_0 = prediction.clamp(-1, 1)
            x_t = x_t + alpha[i + 1].float() * (x_0 - prediction)
            D = x_0
            if x_0_before is not None and i > 0:
                half_inverse_r = (h[i] / (2 * h[i + 1])).float()
                D = x_0 + half_inverse_r * (x_0 - x_0_before)
            x_t = (sigma[i] / sigma[i + 1]).float() * x_t - (alpha[i] * torch.expm1(-h[i])).float() * D
            x_0_before = x_0
        return x_t

    @torch.no_grad()
    def forward(self, x_T, labels=None, noise=torch.randn_like):
        """Images from noise.

        Args:
            x_T: (B, 3, img_size, img_size) standard normal.
            labels: (B,) int64 classes, -1 for no class, or None.
            noise: called as noise(x) for every stochastic step, returns standard normals of x's shape.

        Returns (B, 3, img_size, img_size), about [-1, 1]; only DDPM's is clipped to it."""
        if self.sampler == "dpmpp":
            return self.sample_dpmpp(x_T, labels)
        step = self.ddim_step if self.sampler == "ddim" else self.ddpm_step
        taus = [x_T.new_full((x_T.shape[0],), tau, dtype=torch.long) for tau in self.timesteps]
        x_t = x_T
        for t, t_prev in zip(reversed(taus), [*reversed(taus[:-1]), None], strict=True):
            x_t = step(x_t, t, t_prev, labels, noise)
        return x_t.clamp(-1, 1) if self.sampler == "ddpm" else x_t

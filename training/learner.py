"""One network in training: its weights, their EMA, Adam, schedule and scaler, and the update that moves them."""

import copy
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distributed
from diffusion import GaussianDiffusionTrainer
from training.adam import Adam

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FP16_SCALE = 2.0**16  # of the loss at the start: halved when a gradient overflows, doubled after FP16_GROWTH good steps
FP16_GROWTH = 2000


@torch.no_grad()
def update_ema(ema, entries, weight):
    """ema <- (1 - weight) ema + weight entries, for lists of tensors, in place; weight is a scalar tensor."""
    torch._foreach_lerp_(ema, entries, [weight] * len(ema))


def clip_divisor(norm, largest):
    """What a gradient of this norm is divided by, so that its norm is at most `largest`; scalar tensor >= 1."""
    return ((norm + 1e-6) / largest).clamp(min=1)


def wrap_network(net, compile, parallel):
    """The network as it is called: through torch.compile if wanted, split over the visible GPUs if wanted."""
    if compile:
        net = torch.compile(net)
    if parallel and torch.cuda.device_count() > 1:
        net = nn.DataParallel(net)
    return net


def wrap_for_training(net, compile, parallel, share_batches):
    """As `wrap_network`; with `share_batches` its gradient is the mean over all processes."""
    network = wrap_network(net, compile, parallel)
    if share_batches and distributed.world_size() > 1:
        network = DistributedDataParallel(network, gradient_as_bucket_view=True)
    return network


def to_host(value):
    """A tensor in host memory, pinned if it comes from a GPU, which then fetches it faster."""
    return value.cpu().pin_memory() if value.device.type == "cuda" else value


def warmup_factor(step, warmup):
    """The share of the learning rate that update number `step` (from 0) gets: linear from 0 over `warmup` steps."""
    return min(step, warmup) / warmup if warmup else 1.0


class Learner:
    """A UNet in training.

    Args:
        net: the UNet, on its device.
        beta_1, beta_T, T, mean_type: of the diffusion.
        lr: Adam's learning rate after the warm-up.
        warmup: steps over which the rate rises linearly from 0 (the first update has lr 0); 0 for none.
        grad_clip: largest norm of the gradient.
        ema_decay: of the EMA weights.
        precision: fp32, bf16 (autocast) or fp16 (autocast and a loss scaler); the loss is float32 in all.
        compile: run the network through torch.compile.
        parallel: split every batch over all visible GPUs of this process.
        share_batches: every process trains this network with its part of the same batches.
        offload: keep everything in host memory except within `on_device`.
    """

    def __init__(
        self,
        net,
        *,
        beta_1,
        beta_T,
        T,
        mean_type,
        lr,
        warmup,
        grad_clip,
        ema_decay,
        precision="fp32",
        compile=False,
        parallel=False,
        share_batches=False,
        offload=False,
    ):
        self.device = next(net.parameters()).device
        if self.device.type == "cuda":
            net = net.to(memory_format=torch.channels_last)  # on CPU the step is no faster and sampling slower with it
        self.net = net
        self.ema = copy.deepcopy(net).eval().requires_grad_(False)
        self.share_batches = share_batches
        network = wrap_for_training(net, compile, parallel, share_batches)
        self.trainer = GaussianDiffusionTrainer(network, beta_1, beta_T, T, mean_type).to(self.device)
        self.optim = Adam(net.parameters(), lr)
        self.parameters = self.optim.parameters
        self.list_tensors()
        self.base_lr = lr
        self.warmup = warmup
        self.dtype = PRECISIONS[precision]
        self.loss_scale = torch.tensor(FP16_SCALE if self.dtype == torch.float16 else 1.0, device=self.device)
        self.good_since_growth = torch.zeros((), dtype=torch.int32, device=self.device)
        self.grad_clip = grad_clip
        self.ema_decay = ema_decay
        self.step = 0
        self.offload = offload
        if offload:
            self._move(to_host)

    @property
    def lr(self):
        """The learning rate of the next update."""
        return self.base_lr * warmup_factor(self.step, self.warmup)

    def losses(self, batch):
        """The loss of every sample, its squared error averaged over C, H and W: (B,) float32."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            squared_error = self.trainer(batch.x_0, batch.labels, batch.t, batch.eps)
        return squared_error.mean(dim=(1, 2, 3))

    def update(self, loss):
        """One step down the gradient of a scalar loss: clip, Adam, schedule, EMA.

        A loss or gradient that is not finite changes nothing but the schedule, and the scale of the loss in fp16. That
        is decided on the device, which is never waited for.

        Returns:
            The loss of the whole batch, detached, and whether the step was applied (bool); scalars.
        """
        for parameter in self.parameters:
            parameter.grad = None
        (self.loss_scale * loss).backward()
        gradients = [parameter.grad for parameter in self.parameters]
        loss = loss.detach()
        if self.share_batches:
            loss = distributed.mean(loss.clone())
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))) / self.loss_scale
        applied = norm.isfinite() & loss.isfinite()
        not_applied = (~applied).float()
        self.optim.lr = self.lr
        self.optim.step(gradients, self.loss_scale * clip_divisor(norm, self.grad_clip), not_applied)
        update_ema(self.ema_entries, self.entries, (1 - self.ema_decay) * applied)
        if self.dtype == torch.float16:
            torch._amp_update_scale_(self.loss_scale, self.good_since_growth, not_applied, 2.0, 0.5, FP16_GROWTH)
        self.step += 1
        return loss, applied

    def list_tensors(self):
        """Collect what the EMA works on."""
        self.entries = list(self.net.state_dict().values())
        self.ema_entries = list(self.ema.state_dict().values())

    @contextmanager
    def on_device(self):
        """Within this the learner can work. With `offload` it waits in host memory before and after."""
        if self.offload:
            self._move(lambda value: value.to(self.device, non_blocking=True))
        yield
        if self.offload:
            self._move(to_host)

    def _move(self, move):
        for parameter in self.parameters:
            parameter.grad = None
        for net in (self.net, self.ema):
            net._apply(move)  # what nn.Module.to does, with any function
        self.optim.move(move)
        self.list_tensors()

    def set_weights(self, net_state, ema_state):
        """Replace the weights and the EMA weights, keeping Adam's state and the schedule."""
        self.net.load_state_dict(net_state)
        self.ema.load_state_dict(ema_state)

    def state_dict(self):
        """Everything that a later `load_state_dict` needs to continue exactly."""
        return {
            "norm_groups": self.net.groups,
            "net_model": self.net.state_dict(),
            "ema_model": self.ema.state_dict(),
            "sched": self.schedule_state(),
            "optim": self.optim.state_dict(),
            "scaler": {"scale": self.loss_scale, "_growth_tracker": self.good_since_growth},
            "step": self.step,
        }

    def schedule_state(self):
        """The schedule as torch's LambdaLR writes it, which is what other programs expect to find in a checkpoint."""
        return {
            "base_lrs": [self.base_lr],
            "last_epoch": self.step,
            "_step_count": self.step + 1,
            "_last_lr": [self.lr],
            "lr_lambdas": [None],
        }

    def load_state_dict(self, state):
        """Continue from a `state_dict`."""
        self.set_weights(state["net_model"], state["ema_model"])
        self.optim.load_state_dict(state["optim"])
        if state["scaler"] and self.dtype == torch.float16:
            self.loss_scale.fill_(state["scaler"]["scale"])
            self.good_since_growth.fill_(state["scaler"]["_growth_tracker"])
        self.step = state["step"]

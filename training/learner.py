"""One network in training: its weights, their EMA, Adam, schedule and scaler, and the update that moves them."""

import copy
import inspect
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.nn.utils import get_total_norm

from diffusion import GaussianDiffusionTrainer
from utils import distributed

# the dtype of autocast; tf32 is a setting of the device, see `training.command.pick_device`
PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FP16_SCALE = 2.0**16  # of the loss at the start: halved when a gradient overflows, doubled after FP16_GROWTH good steps
FP16_GROWTH = 2000
ALIGNMENT = 128  # numbers: 512 bytes, as the allocations of a GPU


class Adam(torch.optim.Adam):
    """torch's Adam, without the decorators that load torch's compiler and that it cannot capture.

    Loading it takes more than a second at every start. `step` is to be called under no_grad.
    """

    add_param_group, state_dict, load_state_dict, step = (
        inspect.unwrap(getattr(torch.optim.Adam, name))
        for name in ("add_param_group", "state_dict", "load_state_dict", "step")
    )


def lay_out(net, values=None):
    """Make a network's weights views of one tensor, so that one operation, or one copy, is of all of them.

    Args:
        net: a network whose state dict is its parameters.
        values: the tensor, from an earlier call for a network of this architecture; None: a new one of its weights.

    Returns:
        The tensor: one-dimensional, with a little room between the parameters, which stays 0.
    """
    parameters = list(net.parameters())
    sizes = [-(-parameter.numel() // ALIGNMENT) * ALIGNMENT for parameter in parameters]
    if values is None:
        padded = [
            F.pad(parameter.data.flatten(), (0, size - parameter.numel()))
            for parameter, size in zip(parameters, sizes, strict=True)
        ]
        values = torch.cat(padded)
    for parameter, part in zip(parameters, values.split(sizes), strict=True):
        parameter.data = part[: parameter.numel()].view(parameter.shape)
    return values


def clip_divisor(norm, largest):
    """What a gradient of this norm is divided by, so that its norm is at most `largest`; scalar tensor >= 1."""
    return ((norm + 1e-6) / largest).clamp(min=1)


def to_host(value):
    """A copy in host memory; one of a GPU's tensor is pinned, so that both ways are fast."""
    return torch.empty_like(value, device="cpu", pin_memory=value.is_cuda).copy_(value, non_blocking=True)


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
        precision: fp32, tf32, bf16 (autocast) or fp16 (autocast and a loss scaler); the loss is float32 in all.
        compile: run the network through torch.compile.
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
        share_batches=False,
        offload=False,
    ):
        self.device = next(net.parameters()).device
        self.net = net
        self.ema = copy.deepcopy(net).eval().requires_grad_(False)
        self.weights, self.ema_weights = lay_out(self.net), lay_out(self.ema)
        self.share_batches = share_batches
        network = torch.compile(net) if compile else net
        if share_batches:
            network = distributed.average_gradients(network)
        self.trainer = GaussianDiffusionTrainer(network, beta_1, beta_T, T, mean_type).to(self.device)
        self.optim = Adam(net.parameters(), lr, fused=True)
        self.parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
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
            Numbers of the step for the log, on the device: "loss" of the whole batch, "applied" (bool), "lr".
        """
        self.clear_gradients()
        (self.loss_scale * loss).backward()
        loss = loss.detach()
        if self.share_batches:
            loss = distributed.total(loss.clone()) / distributed.world_size()
        norm = get_total_norm([parameter.grad for parameter in self.parameters]) / self.loss_scale
        applied = norm.isfinite() & loss.isfinite()
        # fused Adam reads these, as torch's GradScaler sets them: a divisor of the gradient, and whether to do nothing
        self.optim.grad_scale = self.loss_scale * clip_divisor(norm, self.grad_clip)
        self.optim.found_inf = (~applied).float()
        self.optim.param_groups[0]["lr"] = lr = self.lr
        with torch.no_grad():
            self.optim.step()
            self.ema_weights.lerp_(self.weights, (1 - self.ema_decay) * applied)
        if self.dtype == torch.float16:
            self.scale_loss(applied)
        self.step += 1
        return {"loss": loss, "applied": applied, "lr": lr}

    def scale_loss(self, applied):
        """Set the factor of the next loss, as torch's GradScaler does."""
        self.good_since_growth.add_(1).mul_(applied)
        grown = self.good_since_growth == FP16_GROWTH
        self.good_since_growth.mul_(~grown)
        self.loss_scale.mul_(torch.where(applied, 1 + grown.float(), 0.5))

    def clear_gradients(self):
        """Give the gradients' memory back."""
        for parameter in self.parameters:
            parameter.grad = None

    @contextmanager
    def on_device(self):
        """Within this the learner can work. With `offload` it waits in host memory before and after."""
        if self.offload:
            self._move(lambda value: value.to(self.device, non_blocking=True))
        yield
        if self.offload:
            self._move(to_host)

    def _move(self, move):
        """Replace weights, EMA and what Adam keeps by move(tensor)."""
        self.clear_gradients()
        self.weights = lay_out(self.net, move(self.weights))
        self.ema_weights = lay_out(self.ema, move(self.ema_weights))
        for state in self.optim.state.values():
            state |= {name: move(value) for name, value in state.items()}
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the copies to the host go on behind its back

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
        groups = [{**group, "fused": True, "foreach": None} for group in state["optim"]["param_groups"]]
        self.optim.load_state_dict({**state["optim"], "param_groups": groups})
        if state["scaler"] and self.dtype == torch.float16:
            self.loss_scale.fill_(state["scaler"]["scale"])
            self.good_since_growth.fill_(state["scaler"]["_growth_tracker"])
        self.step = state["step"]

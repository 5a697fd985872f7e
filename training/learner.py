"""One network in training: its weights, EMA, optimiser, schedule and scaler, and the update of them."""

import copy
from contextlib import contextmanager

import torch
from torch.nn.utils import get_total_norm, parameters_to_vector, vector_to_parameters

from utils import distributed

# the dtype of autocast; tf32 is a setting of the device, see `training.launch.pick_device`
PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def to_host(value):
    """A copy in host memory; one of a GPU's tensor is pinned, so that both ways are fast."""
    return torch.empty_like(value, device="cpu", pin_memory=value.is_cuda).copy_(value, non_blocking=True)


def warmed_up(lr, step, warmup):
    """The learning rate after `step` updates: linear from 0 over the warm-up, then constant."""
    return lr * (min(step, warmup) / warmup if warmup else 1.0)


def clip_divisor(norm, largest):
    """What gradients of these norms are divided by, so that none is longer than `largest`."""
    return ((norm + 1e-6) / largest).clamp(min=1)


class Learner:
    """A denoising network in training.

    Args:
        net: the network, on its device. Only its parameters that require a gradient train and are moved.
        objective: makes of a network a module whose `error_of(batch)` is the squared error (B, C, H, W).
        lr, grad_clip: learning rate after the warm-up, and largest norm of the gradient.
        warmup: steps over which the rate rises linearly from 0 (the first update has lr 0); 0 for none.
        ema_decay: of the EMA weights; None: there are none, and `ema` is `net`.
        weight_decay: of AdamW; 0: Adam.
        precision: fp32, tf32, bf16 (autocast), fp16 (and a loss scaler); the loss is float32 in all.
        compile: run the network through torch.compile.
        share_batches: every process trains this network with its part of the same batches.
        offload: keep everything in host memory except within `on_device`.
    """

    def __init__(
        self, net, objective, *, lr, warmup, grad_clip, ema_decay, weight_decay=0.0,
        precision="fp32", compile=False, share_batches=False, offload=False,
    ):  # fmt: skip
        self.device = next(net.parameters()).device
        self.net = net
        self.ema = net if ema_decay is None else copy.deepcopy(net).eval().requires_grad_(False)
        # where what trains stands among all parameters
        self.places = [i for i, parameter in enumerate(net.parameters()) if parameter.requires_grad]
        self.parameters = self.trained_in(net)
        kind = torch.optim.AdamW if weight_decay else torch.optim.Adam
        self.optim = kind(self.parameters, lr, weight_decay=weight_decay, fused=True)
        self.base_lr, self.warmup, self.grad_clip, self.ema_decay = lr, warmup, grad_clip, ema_decay
        self.dtype = PRECISIONS[precision]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.share_batches, self.offload = share_batches, offload
        self.step = 0
        self.weights = self.ema_weights = parameters_to_vector(self.parameters).detach()
        if self.ema is not net:
            self.ema_weights = parameters_to_vector(self.trained_in(self.ema)).detach()
        self._move(to_host if offload else lambda value: value)
        network = torch.compile(net) if compile else net
        if share_batches:
            network = distributed.average_gradients(network)
        self.trainer = objective(network).to(self.device)

    def trained_in(self, net):
        """The parameters of `net`, or of its EMA, that train."""
        parameters = list(net.parameters())
        return [parameters[i] for i in self.places]

    @property
    def lr(self):
        """The learning rate of the next update."""
        return warmed_up(self.base_lr, self.step, self.warmup)

    def losses(self, batch):
        """The loss of each sample of a `training.batches.Batch`, a mean squared error: (B,) float32."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            squared_error = self.trainer.error_of(batch)
        return squared_error.mean(dim=(1, 2, 3))

    def update(self, loss, extra=False):
        """One step down the gradient of a scalar loss: clip, Adam, schedule, EMA.

        A loss or gradient that is not finite changes nothing but the schedule, and the scale of the loss
        in fp16. That is decided on the device, which is never waited for.

        extra: the step is one beside those of the schedule, which does not count it.

        Returns numbers of the step for the log, on the device: "loss" of all, "applied" (bool), "lr".
        """
        self.net.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optim)
        loss = loss.detach()
        if self.share_batches:
            loss = distributed.total(loss.clone()) / distributed.world_size()
        norm = get_total_norm([parameter.grad for parameter in self.parameters])
        applied = norm.isfinite() & loss.isfinite()
        # fused Adam reads these, as GradScaler sets them: the gradient's divisor, whether to skip
        self.optim.grad_scale = clip_divisor(norm, self.grad_clip)
        self.optim.found_inf = (~applied).float()
        self.optim.param_groups[0]["lr"] = lr = self.lr
        with torch.no_grad():
            self.optim.step()
            if self.ema is not self.net:
                self.ema_weights.lerp_(self.weights, (1 - self.ema_decay) * applied)
        self.scaler.update()
        self.step += not extra
        return {"loss": loss, "applied": applied, "lr": lr}

    @contextmanager
    def on_device(self):
        """Within this the learner can work. With `offload` it waits in host memory before and after."""
        if self.offload:
            self._move(lambda value: value.to(self.device, non_blocking=True))
        yield
        if self.offload:
            self._move(to_host)

    def _move(self, move):
        """Replace weights, EMA and optimiser state by move(tensor); weights are views of one tensor."""
        self.net.zero_grad()
        self.weights = move(self.weights)
        self.ema_weights = self.weights if self.ema is self.net else move(self.ema_weights)
        vector_to_parameters(self.weights, self.parameters)
        vector_to_parameters(self.ema_weights, self.trained_in(self.ema))
        for state in self.optim.state.values():
            state |= {name: move(value) for name, value in state.items()}
        if self.offload and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the copies to the host go on behind its back

    def set_weights(self, net_state, ema_state):
        """Replace the weights and the EMA weights, keeping the optimiser's state and the schedule."""
        self.net.load_state_dict(net_state)
        self.ema.load_state_dict(ema_state)

    def state_dict(self):
        """Everything that a later `load_state_dict` needs to continue exactly."""
        optim = self.optim.state_dict()
        # by their places among all parameters, as published checkpoints number them
        optim["state"] = {self.places[i]: value for i, value in optim["state"].items()}
        optim["param_groups"][0]["params"] = list(range(len(list(self.net.parameters()))))
        sched = {  # as torch's LambdaLR writes it, which other programs expect in a checkpoint
            "base_lrs": [self.base_lr], "last_epoch": self.step, "_step_count": self.step + 1,
            "_last_lr": [self.lr], "lr_lambdas": [None],
        }  # fmt: skip
        return {
            "net_model": self.net.state_dict(), "ema_model": self.ema.state_dict(), "sched": sched,
            "optim": optim, "scaler": self.scaler.state_dict(), "step": self.step,
        }  # fmt: skip

    def load_state_dict(self, state):
        """Continue from a `state_dict`."""
        self.set_weights(state["net_model"], state["ema_model"])
        (group,), places = state["optim"]["param_groups"], enumerate(self.places)
        saved = state["optim"]["state"]
        values = {i: saved[place] for i, place in places if place in saved}
        group = {**group, "params": list(range(len(self.places)))}
        self.optim.load_state_dict({"state": values, "param_groups": [group]})
        if state["scaler"]:  # of a run in fp16
            self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]

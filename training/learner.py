"""One network in training: its weights, their EMA, Adam, schedule and scaler, and the update that moves them."""

import copy

import torch
from torch import nn

from diffusion import GaussianDiffusionTrainer

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@torch.no_grad()
def update_ema(ema, entries, decay):
    """ema <- decay ema + (1 - decay) entries, for lists of tensors, in place."""
    torch._foreach_lerp_(ema, entries, 1 - decay)


def wrap_network(net, compile, parallel):
    """The network as it is called: through torch.compile if wanted, split over the visible GPUs if wanted."""
    if compile:
        net = torch.compile(net)
    if parallel and torch.cuda.device_count() > 1:
        net = nn.DataParallel(net)
    return net


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
    ):
        self.device = next(net.parameters()).device
        self.net = net = net.to(memory_format=torch.channels_last)
        self.ema = copy.deepcopy(net).eval().requires_grad_(False)
        network = wrap_network(net, compile, parallel)
        self.trainer = GaussianDiffusionTrainer(network, beta_1, beta_T, T, mean_type).to(self.device)
        self.optim = torch.optim.Adam(net.parameters(), lr=lr, fused=True)
        self.base_lr = lr
        self.warmup = warmup
        self.dtype = PRECISIONS[precision]
        self.scales_loss = precision == "fp16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.scales_loss)
        self.entries = list(net.state_dict().values())
        self.ema_entries = list(self.ema.state_dict().values())
        self.grad_clip = grad_clip
        self.ema_decay = ema_decay
        self.step = 0

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
        """One step down the gradient of a scalar loss: clip, Adam, schedule, EMA."""
        for parameter in self.net.parameters():
            parameter.grad = None
        self.optim.param_groups[0]["lr"] = self.lr
        if self.scales_loss:
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optim)
            nn.utils.clip_grad_norm_(self.net.parameters(), self.grad_clip)
            self.scaler.step(self.optim)
            self.scaler.update()
        else:
            loss.backward()
            nn.utils.clip_grad_norm_(self.net.parameters(), self.grad_clip)
            self.optim.step()
        update_ema(self.ema_entries, self.entries, self.ema_decay)
        self.step += 1

    def set_weights(self, net_state, ema_state):
        """Replace the weights and the EMA weights, keeping Adam's state and the schedule."""
        self.net.load_state_dict(net_state)
        self.ema.load_state_dict(ema_state)

    def state_dict(self):
        """Everything that a later `load_state_dict` needs to continue exactly."""
        return {
            "net_model": self.net.state_dict(),
            "ema_model": self.ema.state_dict(),
            "sched": self.schedule_state(),
            "optim": self.optim.state_dict(),
            "scaler": self.scaler.state_dict(),
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
        self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]

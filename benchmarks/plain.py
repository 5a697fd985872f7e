"""The baselines of the step: the network with the plainest layers, and the published procedure written out plainly."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from diffusion import GaussianDiffusionTrainer
from model import AttnBlock, Dropout, UpSample


class PlainSwish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class PlainAttention(nn.Module):
    """Attention by two batched matrix products, with the weights of an `AttnBlock`."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        B, C, H, W = x.shape
        h = self.block.group_norm(x)
        q = self.block.proj_q(h).permute(0, 2, 3, 1).reshape(B, H * W, C)
        k = self.block.proj_k(h).reshape(B, C, H * W)
        v = self.block.proj_v(h).permute(0, 2, 3, 1).reshape(B, H * W, C)
        weights = torch.softmax(torch.bmm(q, k) * C**-0.5, dim=-1)
        h = torch.bmm(weights, v).reshape(B, H, W, C).permute(0, 3, 1, 2)
        return x + self.block.proj(h)


class PlainUpSample(nn.Module):
    """Doubling, then a convolution, with the weights of an `UpSample`."""

    def __init__(self, block):
        super().__init__()
        self.main = block.main

    def forward(self, x, temb, cemb):
        return self.main(F.interpolate(x, scale_factor=2, mode="nearest"))


def plain_copy(net):
    """A copy of a UNet with x * sigmoid(x), bmm attention, nn.Dropout, and doubling as a layer of its own."""
    net = copy.deepcopy(net)
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.SiLU):
                setattr(module, name, PlainSwish())
            elif isinstance(child, AttnBlock):
                setattr(module, name, PlainAttention(child))
            elif isinstance(child, UpSample):
                setattr(module, name, PlainUpSample(child))
            elif isinstance(child, Dropout):
                setattr(module, name, nn.Dropout(child.p))
    return net


class PlainProcedure:
    """One step of the published training: a Python loop over the samples for the memory bank, EMA tensor by tensor."""

    def __init__(self, net, T, mem_ratio=2.0, ema_decay=0.8):
        self.net = net
        self.ema = copy.deepcopy(net)
        self.trainer = GaussianDiffusionTrainer(net, 1e-4, 0.02, T)
        self.optim = torch.optim.Adam(net.parameters(), lr=2e-4, foreach=False, fused=False)
        self.bank = torch.zeros(T)
        self.T, self.mem_ratio, self.ema_decay = T, mem_ratio, ema_decay

    def step(self, images):
        x_0 = images.float() / 127.5 - 1
        t = torch.randint(self.T, (len(x_0),))
        losses = self.trainer(x_0, None, t, torch.randn_like(x_0)).mean(dim=(1, 2, 3))
        kept = [i for i in range(len(x_0)) if self.mem_ratio * losses[i].item() >= self.bank[t[i]].item()]
        for i in range(len(x_0)):
            step = t[i].item()
            self.bank[step] = self.ema_decay * self.bank[step] + (1 - self.ema_decay) * losses[i].item()
        loss = losses[kept].sum() / max(1, len(kept))
        self.optim.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0, foreach=False)
        self.optim.step()
        source, target = self.net.state_dict(), self.ema.state_dict()
        for key in source:
            target[key].data.copy_(target[key].data * 0.9999 + source[key].data * (1 - 0.9999))

"""DDIM-50 of a batch, against 50 bare forwards of the network."""

import torch

from benchmarks.timing import alternate, row
from diffusion import GaussianDiffusionSampler
from model import UNet

T, STEPS, SIZE, BATCH = 1000, 50, 8, 64


def measure(scale=1.0):
    """One row of the table; `scale` < 1 repeats less often, for a trial."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    net = UNet(T=T, ch=32, ch_mult=[1, 2], attn=[1], num_res_blocks=1, dropout=0.1).to(device).eval()
    sampler = GaussianDiffusionSampler(net, 1e-4, 0.02, T, img_size=SIZE, steps=STEPS).to(device)
    x_T = torch.randn(BATCH, 3, SIZE, SIZE, device=device)
    t = torch.full((BATCH,), 500, device=device)

    @torch.no_grad()
    def forwards():
        for _ in range(STEPS):
            net(x_T, t)

    seconds = alternate({"ours": lambda: sampler(x_T), "bare": forwards}, max(1, round(9 * scale)))
    what = f"DDIM-50 / 50 forwards, DIGITS UNet, batch {BATCH}"
    return [row(what, seconds["ours"], seconds["bare"], 1.05, at_most=True)]

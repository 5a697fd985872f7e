"""What a GPU does in a second: the CIFAR-10 step beside diffusers' network, sampling, the search, and an experiment.

`python -m benchmarks --only gpu --scale 0.01` tries the program itself on a CPU, with small networks.
"""

import copy
import time

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.neighbors import K, noise
from benchmarks.step import forward_backward, make_step, undo_small_gains
from benchmarks.timing import alternate, seconds_of
from diffusion import GaussianDiffusionSampler
from model import UNet
from score.memorization import nearest_neighbors
from training.launch import pick_device
from training.learner import PRECISIONS
from utils.errors import DataError

T, SIZE = 1000, 32
CIFAR10 = {"ch": 128, "ch_mult": [1, 2, 2, 2], "attn": [1], "num_res_blocks": 2}
SMALL = {"ch": 32, "ch_mult": [1, 2], "attn": [1], "num_res_blocks": 1}
COMPILE_UNTIL = 240  # seconds after the start: com/gpu.sh is to end within eight minutes
# com/com_c10_v.sh: 10 rounds of 100 epochs on 10 shards of 5,000 images in batches of 128; two averages, three seeds
STEPS, BATCH, EVALUATIONS, GENERATED, TRAINING = 10 * 100 * 10 * (5000 // 128), 128, 6, 65_536, 50_000


def measure(scale=1.0):
    """Rows without targets: images per second, and as ratio their operations as a share of a large bf16 product's rate.

    The operations are those of our network, also beside diffusers' rate. With a scale below 0.1 it is a trial.

    Raises:
        DataError: no GPU and no trial, or diffusers is not installed.
    """
    trial = scale < 0.1
    if not (torch.cuda.is_available() or trial):
        raise DataError("no GPU on this machine: nothing was measured (--scale=0.01 tries the program on the CPU)")
    device = pick_device(None)
    architecture, batch = (SMALL, 2) if trial else (CIFAR10, BATCH)
    repeats, start = (1, -COMPILE_UNTIL) if trial else (10, time.monotonic())
    rows = [product(device, 256 if trial else 8192, repeats)]
    peak = rows[0]["ours"]

    torch.manual_seed(0)
    net = undo_small_gains(UNet(T=T, dropout=0.1, **architecture)).to(device)
    theirs = diffusers_unet(architecture).to(device)
    x, t = torch.randn(batch, 3, SIZE, SIZE, device=device), torch.randint(T, (batch,), device=device)
    with FlopCounterMode(display=False) as counter:
        forward_backward(net, x, t, x)
    flops = counter.get_total_flops() / batch
    rates = {}
    for precision in ("bf16", "tf32", "fp32"):  # the first is compiled even where there is time for one only
        pick_device(device.type, precision)
        works = {
            "step": make_step(net, SIZE, batch, device, precision=precision)[0],
            "forward + backward": call(net, x, t, precision),
            "forward + backward, channels_last": call(in_channels_last(net), in_channels_last(x), t, precision),
            "forward + backward, diffusers": call(theirs, x, t, precision),
        }
        if time.monotonic() - start < COMPILE_UNTIL:
            works["step, compiled"] = make_step(net, SIZE, batch, device, precision=precision, compile=True)[0]
        reset_peak(device)
        for name, seconds in alternate(works, repeats, warmup=3).items():
            rates[name, precision] = batch / seconds
            rows.append(number(f"{name}, {precision}", batch / seconds, "images/s", flops * batch / seconds / peak))
        rows.append(number(f"peak memory of these, {precision}", peak_memory(device), "GiB"))
    rows += sampling(net, device, batch, 3 if trial else 50)
    rows += search(device, scale if trial else 1.0)
    return rows + experiment(rates, {row["what"]: row["ours"] for row in rows})


def number(what, value, unit, share=None):
    """A row of the table without a target; share: of the rate of a large product."""
    return {
        "what": f"{what} ({unit})", "ours": value, "baseline": None, "ratio": share, "target": None, "ok": True,
    }  # fmt: skip


def product(device, size, repeats):
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    seconds = alternate({"product": lambda: a @ b}, repeats, warmup=2)["product"]
    return number(f"bf16 product of {size} x {size}", 2 * size**3 / seconds, "FLOP/s")


def diffusers_unet(architecture):
    """diffusers' network of the same width, blocks and attention, made to be called as ours."""
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise DataError("diffusers is not installed: pip install diffusers==0.42.1, the baseline") from error
    levels = len(architecture["ch_mult"])
    attn = [level in architecture["attn"] for level in range(levels)]
    network = UNet2DModel(
        sample_size=SIZE,
        block_out_channels=[architecture["ch"] * mult for mult in architecture["ch_mult"]],
        layers_per_block=architecture["num_res_blocks"],
        down_block_types=["AttnDownBlock2D" if has else "DownBlock2D" for has in attn],
        up_block_types=["AttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attn)],
        attention_head_dim=None,
        dropout=0.1,
    )
    return Sample(network)


class Sample(nn.Module):
    """A network of diffusers without the dataclass around what it returns."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, t):
        return self.network(x, t, return_dict=False)[0]


def in_channels_last(value):
    return copy.deepcopy(value).to(memory_format=torch.channels_last)


def call(net, x, t, precision):
    """Forward and backward pass in a precision, to be called."""
    dtype = PRECISIONS[precision]

    def work():
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            forward_backward(net, x, t, x)

    return work


def reset_peak(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device):
    """GiB of the GPU at most in use by tensors since `reset_peak`; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def sampling(net, device, batch, steps):
    """DDIM in fp32 and bf16."""
    rows = []
    net.eval()
    for precision in ("fp32", "bf16"):
        pick_device(device.type, precision)
        sampler = GaussianDiffusionSampler(net, 1e-4, 0.02, T, SIZE, steps=steps).to(device)
        x_T, dtype = torch.randn(4 * batch, 3, SIZE, SIZE, device=device), PRECISIONS[precision]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            seconds = alternate({"sample": lambda sampler=sampler, x_T=x_T: sampler(x_T)}, 1)["sample"]
        rows.append(number(f"sampling with {steps} steps, {precision}", len(x_T) / seconds, "images/s"))
    return rows


def search(device, scale):
    """The 50 nearest neighbours at the scale of the paper, with the blocks of all_in.py."""
    numbers = [max(K, round(number * scale)) for number in (GENERATED, TRAINING)]
    generated, training = (noise(number, seed).to(device) for seed, number in enumerate(numbers))
    blocks = {"batch_generated": 1024, "batch_training": 8192}
    nearest_neighbors(generated[:1024], training[:8192], K, **blocks)  # what libraries take once
    reset_peak(device)
    seconds = seconds_of(lambda: nearest_neighbors(generated, training, K, **blocks))
    what = f"search of {numbers[0]:,} x {numbers[1]:,} x {training[0].numel():,}"
    return [number(what, seconds, "s"), number(f"peak memory of the {what}", peak_memory(device), "GiB")]


def experiment(rates, measured):
    """Hours of com/com_c10_v.sh from these rates: training, generation, search; without FID."""
    rows = []
    search_seconds = next(value for what, value in measured.items() if what.startswith("search"))
    for precision in ("fp32", "bf16"):
        sampled = next(v for what, v in measured.items() if what.startswith("sampling") and f", {precision} " in what)
        training = STEPS * BATCH / rates["step", precision]
        evaluation = EVALUATIONS * (GENERATED / sampled + search_seconds)
        rows.append(number(f"com/com_c10_v.sh, training, {precision}", training / 3600, "h"))
        rows.append(number(f"com/com_c10_v.sh, generation and search, {precision}", evaluation / 3600, "h"))
    return rows

"""What a GPU does in a second: the CIFAR-10 step beside diffusers' network, sampling, the search, and an experiment.

`python -m benchmarks --only gpu --scale 0.01` tries the program itself on a CPU, with small networks.
"""

import copy
import time
from functools import partial

import torch
from diffusers import UNet2DModel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.step import CIFAR10, DIGITS, T, forward_backward, make_learner, make_net, make_step, noise
from benchmarks.timing import alternate, row
from diffusion import GaussianDiffusionSampler
from score.memorization import nearest_neighbors
from training.averaging import average_learners
from training.launch import pick_device
from utils.errors import DataError

SIZE, BATCH, SUB_MODELS, LAST = 32, 128, 10, torch.channels_last
COMPILE_UNTIL = 240  # seconds after the start: com/gpu.sh is to end within eight minutes
# com/com_c10_v.sh: 10 rounds of 100 epochs on 10 shards of 5,000 images; two averages, three seeds
STEPS, EVALUATIONS, GENERATED, TRAINING = 10 * 100 * 10 * (5000 // BATCH), 6, 65_536, 50_000


class DiffusersUNet(UNet2DModel):
    """diffusers' network of the same width, blocks and attention, called as ours."""

    def __init__(self, architecture):
        attn = [level in architecture["attn"] for level in range(len(architecture["ch_mult"]))]
        super().__init__(
            sample_size=SIZE,
            block_out_channels=[architecture["ch"] * mult for mult in architecture["ch_mult"]],
            layers_per_block=architecture["num_res_blocks"],
            down_block_types=["AttnDownBlock2D" if has else "DownBlock2D" for has in attn],
            up_block_types=["AttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attn)],
            attention_head_dim=None,
            dropout=0.1,
        )

    def forward(self, x, t):
        return super().forward(x, t, return_dict=False)[0]


def measure(scale):
    """Rows without targets; the baseline of images per second is what the rate of a large bf16 product allows.

    The operations counted are those of our network, also for diffusers'. With a scale below 0.1 it is a trial.

    Raises:
        DataError: no GPU and no trial.
    """
    trial = scale < 0.1
    if not (torch.cuda.is_available() or trial):
        raise DataError("no GPU on this machine: nothing was measured (--scale=0.01 tries the program on the CPU)")
    device = pick_device(None)
    architecture, batch, size = (DIGITS, 2, 256) if trial else (CIFAR10, BATCH, 8192)
    repeats, start = (1, -COMPILE_UNTIL) if trial else (10, time.monotonic())
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    peak = 2 * size**3 / alternate({"product": lambda: a @ a}, repeats, warmup=2)["product"]
    rows = [row(f"bf16 product of {size} x {size} (FLOP/s)", peak)]

    net, theirs = make_net(architecture, device), DiffusersUNet(architecture).to(device)
    x, t = torch.randn(batch, 3, SIZE, SIZE, device=device), torch.randint(T, (batch,), device=device)
    with FlopCounterMode(display=False) as counter:
        forward_backward(net, x, t, x)
    at_peak = peak / (counter.get_total_flops() / batch)  # images per second
    net_last = copy.deepcopy(net).to(memory_format=LAST)
    rates = {}

    def step(**settings):
        return make_step(make_learner(make_net(architecture, device), **settings), SIZE, batch)

    def call(network, x, precision):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            forward_backward(network, x, t, x)

    for precision in ("bf16", "tf32", "fp32"):  # the first is compiled even where there is time for one only
        pick_device(device.type, precision)
        work = partial(train_sub_models, 1, architecture, batch, device, precision=precision)
        rows.append(peak_memory(f"a network in training, {precision}", work, device))
        works = {
            "step": step(precision=precision),
            "forward + backward": partial(call, net, x, precision),
            "forward + backward, channels_last": partial(call, net_last, x.to(memory_format=LAST), precision),
            "forward + backward, diffusers": partial(call, theirs, x, precision),
        }
        if time.monotonic() - start < COMPILE_UNTIL:
            works["step, compiled"] = step(precision=precision, compile=True)
        for name, seconds in alternate(works, repeats, warmup=3).items():
            rates[name, precision] = batch / seconds
            rows.append(row(f"{name}, {precision} (images/s)", batch / seconds, at_peak))

    for where in ("device", "cpu"):
        work = partial(train_sub_models, SUB_MODELS, architecture, batch, device, offload=where == "cpu")
        rows.append(peak_memory(f"{SUB_MODELS} sub-models, --shard_state={where}", work, device))

    net.eval()
    steps = 3 if trial else 50
    for precision in ("fp32", "bf16"):
        pick_device(device.type, precision)
        sampler = GaussianDiffusionSampler(net, 1e-4, 0.02, T, SIZE, steps=steps).to(device)
        x_T = torch.randn(4 * batch, 3, SIZE, SIZE, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            seconds = alternate({"sample": partial(sampler, x_T)}, 1)["sample"]
        rates["sampling", precision] = len(x_T) / seconds
        rows.append(row(f"sampling with {steps} steps, {precision} (images/s)", len(x_T) / seconds))

    found, search_seconds = search(device, scale if trial else 1.0)
    rows += found
    for precision in ("fp32", "bf16"):  # com/com_c10_v.sh from these rates, without FID
        training = STEPS * BATCH / rates["step", precision]
        evaluation = EVALUATIONS * (GENERATED / rates["sampling", precision] + search_seconds)
        rows.append(row(f"com/com_c10_v.sh, training, {precision} (h)", training / 3600))
        rows.append(row(f"com/com_c10_v.sh, generation and search, {precision} (h)", evaluation / 3600))
    return rows


def peak_memory(what, work, device):
    """A row of the GiB that tensors of a GPU take at most during work(), beyond what they took before."""
    if device.type == "cpu":
        work()
        return row(f"peak memory of {what} (GiB)", None)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    return row(f"peak memory of {what} (GiB)", (torch.cuda.max_memory_allocated(device) - before) / 2**30)


def search(device, scale):
    """The 50 nearest neighbours at the scale of the paper, with the blocks of all_in.py: rows, and the seconds."""
    generated, training = (noise(max(50, round(number * scale)), SIZE, device) for number in (GENERATED, TRAINING))
    blocks = {"batch_generated": 1024, "batch_training": 8192}
    what = f"search of {len(generated):,} x {len(training):,} x 3,072"
    memory = peak_memory(f"the {what}", lambda: nearest_neighbors(generated, training, **blocks), device)
    seconds = alternate({"search": lambda: nearest_neighbors(generated, training, **blocks)}, 1, warmup=0)["search"]
    return [row(f"{what} (s)", seconds), memory], seconds


def train_sub_models(number, architecture, batch, device, **settings):
    """Of so many sub-models each trains a step, and they are averaged."""
    learners = {k: make_learner(make_net(architecture, device), **settings) for k in range(number)}
    for learner in learners.values():
        with learner.on_device():
            make_step(learner, SIZE, batch)()
    average_learners(learners, [1] * number)

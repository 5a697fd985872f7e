"""What a GPU does in a second: the CIFAR-10 step, also compiled, diffusers' network, sampling, search.

Each part takes at most some minutes. `python -m benchmarks --only gpu --scale 0.01` tries the program itself on a CPU,
with small networks.
"""

from functools import partial

import torch
from diffusers import UNet2DModel

from benchmarks.baselines import CIFAR10, T, alternate, forward_backward, make_net, make_step, noise_to_search, row
from diffusion import GaussianDiffusionSampler
from score.generate import generate
from score.memorization import nearest_neighbors
from training.averaging import average_learners
from training.launch import pick_device
from training.learner import PRECISIONS
from utils.errors import DataError

SIZE, SUB_MODELS = 32, 10
# com/com_c10_v.sh: 10 rounds of 100 epochs on 10 shards of 5,000 images in batches of 128; 6 evaluations
STEPS, EVALUATIONS, GENERATED = 10 * 100 * 10 * (5000 // 128), 6, 65_536


def setting(scale):
    """The device, the network's shape, images in a batch, and repeats; with a scale below 1 those of a trial."""
    if scale < 1:
        return pick_device(None), {**CIFAR10, "ch": 32, "groups": 8}, 2, 1
    if not torch.cuda.is_available():
        raise DataError("no GPU on this machine: nothing was measured (--scale=0.01 tries the program on the CPU)")
    return pick_device(None), CIFAR10, 128, 10


def gpu(scale):
    """Rows of the step and of sampling, beside diffusers' network."""
    device, architecture, batch, repeats = setting(scale)
    steps, rows = 50 if scale >= 1 else 3, []
    net, theirs = make_net(architecture, device), diffusers_net(architecture["ch"]).to(device)
    x, t = torch.randn(batch, 3, SIZE, SIZE, device=device), torch.randint(T, (batch,), device=device)
    sampler = GaussianDiffusionSampler(net, 1e-4, 0.02, T, SIZE, steps=steps).to(device)
    for precision in ("bf16", "fp32"):
        pick_device(device.type, precision)
        dtype = PRECISIONS[precision]
        works = {
            "step": make_step(architecture, SIZE, batch, device, precision=precision)[1],
            "ours": partial(forward_backward, net, x, t, dtype),
            "theirs": partial(forward_backward, theirs, x, t, dtype),
        }
        rate = {name: batch / seconds for name, seconds in alternate(works, repeats, warmup=3).items()}
        sample = partial(generate, sampler, 4 * batch, 4 * batch, seed=0, dtype=dtype)
        samples = 4 * batch / alternate({"sampling": sample}, 1)["sampling"]
        hours = (STEPS * 128 / rate["step"] + EVALUATIONS * GENERATED / samples) / 3600
        rows += [
            row(f"step, {precision} (images/s)", rate["step"]),
            row(f"forward + backward, {precision}: ours / diffusers (images/s)", rate["ours"], rate["theirs"]),
            row(f"sampling with {steps} steps, {precision} (images/s)", samples),
            row(f"com/com_c10_v.sh from these rates, without search and FID, {precision} (h)", hours),
        ]
    return rows


def gpu_search(scale):
    """A row of the search as all_in.py runs it."""
    device = setting(scale)[0]
    generated, training = noise_to_search(scale, GENERATED, 50_000, device)
    search = partial(nearest_neighbors, generated, training, batch_generated=1024, batch_training=8192)
    seconds = alternate({"search": search}, 1)["search"]
    return [row(f"search of {len(generated):,} x {len(training):,} x 3,072 (s)", seconds)]


def gpu_compiled(scale):
    """Rows of the step through torch.compile, against the step without."""
    device, architecture, batch, repeats = setting(scale)
    rows = []
    for precision in ("bf16", "tf32", "fp32"):
        pick_device(device.type, precision)
        make = partial(make_step, architecture, SIZE, batch, device, precision=precision)
        works = {"compiled": make(compile=scale >= 1)[1], "step": make()[1]}
        rates = [batch / seconds for seconds in alternate(works, repeats, warmup=3).values()]
        rows.append(row(f"step, {precision}: compiled / not (images/s)", *rates))
    return rows


def gpu_memory(scale):
    """Rows of the memory of sub-models, on the device and in host memory."""
    device, architecture, batch, _ = setting(scale)
    rows = []
    for place in ("device", "cpu"):
        memory = memory_of_sub_models(architecture, batch, device, offload=place == "cpu")
        rows.append(row(f"peak memory of {SUB_MODELS} sub-models, --shard_state={place} (GiB)", memory))
    return rows


def diffusers_net(ch):
    """diffusers' network with the width, blocks and attention of the CIFAR-10 UNet, called as ours."""
    net = UNet2DModel(
        block_out_channels=[ch, 2 * ch, 2 * ch, 2 * ch], layers_per_block=2,
        down_block_types=["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
        attention_head_dim=None, dropout=0.1,
    )  # fmt: skip
    net.register_forward_hook(lambda net, inputs, output: output.sample)
    return net


def memory_of_sub_models(architecture, batch, device, offload):
    """GiB of a GPU's memory that sub-models take at most in a step and an average; None on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    learners = {}
    for k in range(SUB_MODELS):
        learners[k], step = make_step(architecture, SIZE, batch, device, offload=offload)
        with learners[k].on_device():
            step()
    average_learners(learners, [1] * SUB_MODELS)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**30 if device.type == "cuda" else None

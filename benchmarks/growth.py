"""How cost grows, where the time of a step goes, and how far it is from the machine's limits, as tables:

python -m benchmarks.growth [--paper]
"""

if __name__ == "__main__":  # before the imports that take seconds
    from utils import startup

    startup.prepare()

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.__main__ import machine
from benchmarks.neighbors import K, natural, noise
from benchmarks.step import NETWORKS, T, forward_backward, make_net, make_step
from benchmarks.timing import alternate, seconds_of
from score.compare import markdown_table
from score.memorization import nearest_neighbors
from training.allocator import keep_freed_memory
from utils import distributed, startup

PAPER = (65_536, 50_000)


def search():
    """Seconds of a search of uniform noise and of natural images for several N and M."""
    rows = []
    for N, M in [(1024, 50_000), (2048, 50_000), (4096, 50_000), (4096, 25_000), (4096, 12_500)]:
        rows.append([f"{N:,}", f"{M:,}", *(f"{seconds_of_search(make, N, M):.2f}" for make in (noise, natural))])
    return ["generated N", "training M", "noise s", "natural images s"], rows


def seconds_of_search(make, N, M):
    generated, training = make(N, 1), make(M, 2)
    return seconds_of(lambda: nearest_neighbors(generated, training, K))


def paper():
    """The search at the scale of the paper, once."""
    rows = [[name, f"{seconds_of_search(make, *PAPER):.0f}"] for name, make in (("noise", noise), ("natural", natural))]
    return [f"{PAPER[0]:,} x {PAPER[1]:,}", "seconds"], rows


def step():
    """Milliseconds of one IET-AGC step against the batch size."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for name, (architecture, size, batch_size, _) in NETWORKS.items():
        net = make_net(architecture, device)
        for batch in (batch_size // 4, batch_size // 2, batch_size, 2 * batch_size, 4 * batch_size):
            our_step, _, _ = make_step(net, size, batch, device)
            seconds = alternate({"step": our_step}, 5, warmup=2)["step"]
            rows.append([name.split(",")[0], str(batch), f"{1e3 * seconds:.1f}", f"{1e3 * seconds / batch:.2f}"])
    return ["network", "batch", "ms per step", "ms per image"], rows


def floor():
    """What multiplications and memory traffic must take at the machine's measured rates."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    a, b = torch.randn(2048, 2048, device=device), torch.randn(2048, 2048, device=device)
    source = torch.randn(50_000_000, device=device)
    target = torch.empty_like(source)
    seconds = alternate({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, 9, warmup=2)
    flops_per_second = 2 * 2048**3 / seconds["product"]
    bytes_per_second = 2 * 4 * len(source) / seconds["copy"]
    rows = [
        ["matrix product, float32, 2048", f"{flops_per_second / 1e9:.0f} GFLOP/s"],
        ["copy", f"{bytes_per_second / 1e9:.1f} GB/s read and written"],
    ]
    for name, (architecture, size, batch_size, _) in NETWORKS.items():
        net = make_net(architecture, device)
        x = torch.randn(batch_size, 3, size, size, device=device)
        t = torch.randint(T, (batch_size,), device=device)
        with FlopCounterMode(display=False) as counter:
            forward_backward(net, x, t, torch.zeros_like(x))
        parameters = sum(p.numel() for p in net.parameters() if p.requires_grad)
        # norm: read g; Adam: read p, g, m, v and write p, m, v; EMA: read p and e, write e; float32
        update_bytes = 4 * (1 + 7 + 3) * parameters
        flops = counter.get_total_flops()
        rows += [
            [f"{name}: forward + backward", f"{flops / 1e9:.1f} GFLOP, {1e3 * flops / flops_per_second:.1f} ms"],
            [
                f"{name}: clip, Adam, EMA of {parameters / 1e6:.1f} M parameters",
                f"{update_bytes / 1e6:.0f} MB, {1e3 * update_bytes / bytes_per_second:.1f} ms",
            ],
        ]
    return ["floor", ""], rows


def time_by_operation():
    """The operations that take most of an IET-AGC step."""
    rows = []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, (architecture, size, batch_size, _) in NETWORKS.items():
        our_step, _, _ = make_step(make_net(architecture, device), size, batch_size, device)
        for _ in range(3):
            our_step()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        with profile(activities=activities) as profiler:
            for _ in range(5):
                our_step()
        which = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        times = {event.key: getattr(event, which) for event in profiler.key_averages()}
        total = sum(times.values())
        for key in sorted(times, key=times.get, reverse=True)[:12]:
            rows.append([name.split(",")[0], key, f"{100 * times[key] / total:.1f} %"])
    return ["network", "operation", "share of the step"], rows


def main(arguments=None):
    parser = startup.Parser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--paper", action="store_true", help="also search at the scale of the paper")
    options = parser.parse_args(arguments)
    keep_freed_memory()
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    tables = [floor, time_by_operation, step, search, *([paper] if options.paper else [])]
    for table in distributed.bar(tables, desc="growth"):
        head, rows = table()
        print(f"\n{table.__doc__.strip()}\n\n{markdown_table(head, rows)}", end="")


if __name__ == "__main__":
    startup.run(main)

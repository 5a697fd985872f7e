"""The experiment on a GPU: the networks of many trainings stacked, and one step of all of them as a CUDA graph.

    python -m experiments.stacked --minutes=20

What bash com/results.sh has not completed is trained from its beginning: with the flags, images, orders and starting
weights of main_fed.py, and other timesteps and noise. What is measured goes to stacked.json beside measured.json, which
counts where both are there. Arms that need another step (dropout, large batches, IET-AGC+, ambient diffusion) are left
to main_fed.py. A training that does not reach its end in time leaves nothing behind.
"""

import argparse
import functools
import itertools
import multiprocessing
import os
import time
from contextlib import chdir
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.overrides import TorchFunctionMode

from dataset import load_dataset
from diffusion import GaussianDiffusionSampler, GaussianDiffusionTrainer
from experiments import runs
from experiments.arms import ARMS, ROOT
from training import checkpoint, flags
from training.averaging import weighted_average
from training.batches import ShardBatches, normalize
from training.shards import make_shards
from utils import distributed, startup
from utils.files import lock_directory, make_directory, write_json
from utils.images import to_uint8
from utils.seeding import derive_seed, sample_noise

WARM_UP = 3  # steps before a CUDA graph is captured
AT_ONCE = 2**22  # pixels of the images in a call of the stacked networks


class ConvolutionByMatmul(TorchFunctionMode):
    """F.conv2d as one matrix product, of which many networks are one batch."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.conv2d:
            return function(*args, **(kwargs or {}))
        x, weight, bias, (s, _), (padding, _) = args[:5]
        B, k = len(x), weight.shape[-1]
        windows = F.pad(x, [padding] * 4).unfold(2, k, s).unfold(3, k, s)  # (B, C, h, w, k, k)
        h, w = windows.shape[2:4]
        # all images are one matrix
        columns = windows.permute(1, 4, 5, 0, 2, 3).reshape(-1, B * h * w)
        out = weight.flatten(1) @ columns + bias[:, None]
        return out.view(-1, B, h, w).transpose(0, 1).contiguous()


class Stack(nn.Module):
    """N networks of one shape as one: called with images in N equal parts, one of each network.

    Args:
        net: a `model.UNet` of that shape; what it does not train is the same in all.
        weights: (N, P), rows of `row_of`.
    """

    def __init__(self, net, weights):
        super().__init__()
        self.net, self.weights = net.eval(), weights
        self.shapes = {name: p.shape for name, p in net.named_parameters() if p.requires_grad}

    def forward(self, x, t, labels=None):
        """As `model.UNet.forward`: x (N * B, 3, H, W), t (N * B,)."""
        parts = self.weights.split([shape.numel() for shape in self.shapes.values()], dim=1)
        values = {name: part.unflatten(1, self.shapes[name]) for name, part in zip(self.shapes, parts, strict=True)}
        with ConvolutionByMatmul(), sdpa_kernel(SDPBackend.MATH):
            one = vmap(lambda values, x, t: functional_call(self.net, values, (x, t)))
            N = len(self.weights)
            return one(values, x.unflatten(0, (N, -1)), t.unflatten(0, (N, -1))).flatten(0, 1)


def row_of(net):
    """The weights that a network trains, one after the other: (P,)."""
    return parameters_to_vector(p for p in net.parameters() if p.requires_grad).detach()


def state_of(net, row):
    """The state dict of a network with the weights of a row; the network is given them."""
    vector_to_parameters(row.clone(), (p for p in net.parameters() if p.requires_grad))
    return {name: value.cpu() for name, value in net.state_dict().items()}


class StackedLearner:
    """N networks in training that step at the same time, each as a `training.learner.Learner` does.

    Args:
        net: a `model.UNet` of their shape, on the device.
        weights, ema_weights: (N, P), where they start.
        agc: an `AntiGradientControl`.
        uses_agc: bool (N,): of which networks it skips samples.
        diffusion: keyword arguments of `GaussianDiffusionTrainer`.
        images: uint8 (slots, 3, H, W), on the device.
        lr, warmup, grad_clip, ema_decay: as for `Learner`.
    """

    def __init__(self, net, weights, ema_weights, agc, uses_agc, diffusion, images, lr, warmup, grad_clip, ema_decay):
        self.weights, self.ema_weights = nn.Parameter(weights.clone()), ema_weights.clone()
        self.agc, self.uses_agc, self.images = agc, uses_agc, images
        self.banks = agc.bank.expand(len(weights), -1).clone()
        self.trainer = GaussianDiffusionTrainer(Stack(net, self.weights), **diffusion).to(weights.device)
        self.base_lr, self.warmup, self.grad_clip, self.ema_decay = lr, warmup, grad_clip, ema_decay
        self.lr = torch.zeros((), device=weights.device)
        self.optim = torch.optim.Adam([self.weights], self.lr, fused=True, capturable=weights.is_cuda)
        self.index = self.graph = None

    def update(self, index, t, eps):
        """A step of all networks; index (N, B) slots, t (N, B), eps (N, B, 3, H, W)."""
        x_0 = normalize(self.images[index.flatten()])
        losses = self.trainer(x_0, None, t.flatten(), eps.flatten(0, 1)).mean(dim=(1, 2, 3)).view_as(t)
        judge = vmap(lambda bank, losses, t: functional_call(self.agc, {"bank": bank}, (losses, t)))
        controlled, _ = judge(self.banks, losses, t)
        self.optim.zero_grad()
        torch.where(self.uses_agc, controlled, losses.mean(dim=1)).sum().backward()
        with torch.no_grad():
            norm = self.weights.grad.norm(dim=1, keepdim=True)
            self.weights.grad /= ((norm + 1e-6) / self.grad_clip).clamp(min=1)
            self.optim.step()
            self.ema_weights.lerp_(self.weights, 1 - self.ema_decay)

    def draw_and_update(self):
        """`update` on the slots `self.index`, with fresh timesteps and noise."""
        t = torch.randint(self.agc.T, self.index.shape, device=self.index.device)
        eps = torch.randn(*self.index.shape, *self.images.shape[1:], device=self.index.device)
        self.update(self.index, t, eps)

    def train(self, table, step):
        """A step on each of the slots (steps, N, B); every network has made `step` of them before."""
        table = table.to(self.images.device)
        for position, index in enumerate(table, start=step):
            self.lr.fill_(self.base_lr * min(1.0, position / self.warmup))
            if self.index is None:
                self.index = index.clone()
            self.index.copy_(index)
            if not index.is_cuda:
                self.draw_and_update()
            elif position < WARM_UP:
                torch.cuda.synchronize()
                with torch.cuda.stream(torch.cuda.Stream()):
                    self.draw_and_update()
                torch.cuda.synchronize()
            else:
                if self.graph is None:
                    self.graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(self.graph):
                        self.draw_and_update()
                self.graph.replay()

    def average(self, rows, sizes):
        """The ensemble step of IET on the networks of a slice, which have `sizes` images."""
        for part in (self.weights.data, self.ema_weights):
            models = {k: {"row": row} for k, row in enumerate(part[rows])}
            part[rows] = weighted_average(models, sizes)["row"]


class Member:
    """A training in a stack: its K networks are rows of it from `row` on, and its images in slots from `slot` on."""

    def __init__(self, run, row, slot):
        values = runs.values_of(run.flags)
        self.run, self.K, self.slot, self.rows = run, values.client_num, slot, slice(row, row + values.client_num)
        self.uses_agc, self.averaged = values.anti_grad == "skip", values.client_num > 1 and values.total_round > 1
        self.data = data = flags.call(values, load_dataset, values.dataset)
        split = (values.client_num, flags.split_of(values), values.seed, data.slot_image, values.duplicates_in)
        self.shards = lambda r: make_shards(data.train.labels, *split, r)
        self.reshards = values.reshard
        make_batches = functools.partial(flags.call, values, ShardBatches, data.train.images, None, device="cpu")
        self.batches = [make_batches(index, shard=k) for k, index in enumerate(self.shards(0))]
        self.sizes = [len(batches.index) for batches in self.batches]
        # all shards of the experiment have as many steps
        self.steps_per_round = values.local_epoch * self.batches[0].steps_per_epoch
        self.steps, self.one_round = values.total_round * self.steps_per_round, values.total_round == 1
        # the steps after which it waits for others, and those after which it is measured
        self.stop = values.save_step if self.one_round else self.steps_per_round
        self.every = values.save_step if self.one_round else values.save_round * self.steps_per_round
        self.starts_from = values.check_dir
        self.points = []  # what was measured, as in measured.json

    def start(self, net):
        """The weights and EMA weights that all its networks start from, by way of a network: two rows (P,)."""
        if not self.starts_from:
            return [row_of(net), row_of(net)]
        state, rows = checkpoint.load(self.starts_from), []
        for use_ema in (False, True):
            checkpoint.load_weights(net, checkpoint.weights(state, use_ema, self.starts_from), self.starts_from)
            rows.append(row_of(net))
        return rows

    def table(self, first, last):
        """The slots of the steps from `first` to before `last`, all of one round: (steps, K, B)."""
        if self.reshards:
            for batches, index in zip(self.batches, self.shards(first // self.steps_per_round), strict=True):
                batches.use(index)
        steps = range(first, last)
        return self.slot + torch.stack([torch.stack([b.slots(step) for b in self.batches]) for step in steps])

    def due(self, step):
        """What is measured after a step: [({"steps": n, ...}, rows of the networks whose mean prediction it is)]."""
        row, about = self.rows.start, {"steps": self.K * step, "sequential": step}
        if step > self.steps or (step % self.every and step < self.steps) or (step == 0 and not self.starts_from):
            return []
        if not self.one_round:
            return [(about, [row])]
        rows = list(range(row, self.rows.stop))
        return [(about, rows), ({"steps": step, "sequential": step, "network": "sub-model"}, rows[:1])]


@functools.cache
def noise(seed, number, img_size):
    """The x_T of `score.generate.generate`."""
    return sample_noise(seed, range(number), (3, img_size, img_size), "cpu")()


@torch.no_grad()
def sample(net, rows, x_T, settings):
    """Images of ensembles of networks, whose predictions are averaged.

    Args:
        net: as for `Stack`.
        rows: (E, K, P), of E ensembles of K networks.
        x_T: (E, N, 3, H, W).
        settings: keyword arguments of `GaussianDiffusionSampler`.

    Returns:
        uint8 (E, N, 3, H, W) on the CPU.
    """
    E, K = rows.shape[:2]
    stack = Stack(net, rows.flatten(0, 1))

    def mean_prediction(x, t, labels=None):
        x, t = (value.unflatten(0, (E, -1)).repeat_interleave(K, dim=0).flatten(0, 1) for value in (x, t))
        return stack(x, t).unflatten(0, (E, K, -1)).mean(dim=1).flatten(0, 1)

    sampler = GaussianDiffusionSampler(mean_prediction, **settings).to(rows.device)
    parts = x_T.split(max(1, AT_ONCE // (E * K * x_T[0, 0, 0].numel())), dim=1)
    made = [to_uint8(sampler(part.to(rows.device).flatten(0, 1))).cpu().unflatten(0, (E, -1)) for part in parts]
    return torch.cat(made, dim=1)


def train_together(planned, wanted, device, pool, deadline):
    """Train runs whose networks have one shape, and measure them in a pool of processes: stacked.json of each.

    wanted: paths of checkpoints that other runs start from; those of these runs are written.
    deadline: in seconds of time.time(), after which it stops.
    """
    members, row, slot = [], 0, 0
    for run in planned:
        members.append(member := Member(run, row, slot))
        row, slot = row + member.K, slot + len(member.data.train.images)
    starts = []
    for member in members:
        values = runs.values_of([*member.run.flags, "--anti_grad=skip"])
        torch.manual_seed(derive_seed(values.seed, "weights"))
        starts += [member.start(flags.unet(values))] * member.K
    weights, ema_weights = (torch.stack(rows).to(device) for rows in zip(*starts, strict=True))
    uses_agc = torch.tensor([member.uses_agc for member in members for _ in range(member.K)], device=device)
    images = torch.cat([member.data.train.images for member in members]).to(device)
    net, agc, settings = flags.unet(values).to(device), flags.agc(values, values.T).to(device), flags.sampler(values)
    diffusion = flags.arguments(values, GaussianDiffusionTrainer)
    learner = flags.call(values, StackedLearner, net, weights, ema_weights, agc, uses_agc, diffusion, images)
    torch.manual_seed(derive_seed("stacked", *(run.seed for run in planned)))
    step, last, size = 0, max(member.steps for member in members), images.shape[-1]
    with distributed.bar(total=last, desc=f"{row} networks, {size}x{size}", unit="step") as bar:
        while True:
            due = [(member, *point) for member in members for point in member.due(step)]
            for K in {len(rows) for *_, rows in due}:
                same = [point for point in due if len(point[-1]) == K]
                rows = torch.tensor([rows for *_, rows in same], device=device)
                x_T = torch.stack([noise(member.run.seed, member.run.images, size) for member, *_ in same])
                for (member, about, _), made in zip(
                    same, sample(net, learner.ema_weights[rows], x_T, settings), strict=True
                ):
                    member.points.append((about, pool.apply_async(measure, (made,))))
            if step == last or time.time() > deadline:
                break
            until = min((step // member.stop + 1) * member.stop for member in members)
            learner.train(torch.cat([member.table(step, until) for member in members], dim=1), step)
            bar.update(until - step)
            step = until
            for member in members:
                if member.averaged and step % member.stop == 0:
                    learner.average(member.rows, member.sizes)
                path = member.run.directory / "log" / checkpoint.round_name(step // member.steps_per_round)
                if step % member.steps_per_round == 0 and path in wanted and not path.exists():
                    k = member.rows.start
                    raw, ema = state_of(net, learner.weights[k]), state_of(net, learner.ema_weights[k])
                    path.parent.mkdir(parents=True, exist_ok=True)
                    checkpoint.save(path, {"global_model": raw, "global_ema_model": ema, "norm_groups": net.groups})
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    about = {"complete": True, "device": f"{name}, {len(weights)} networks at once"}
    for member in members:
        if member.steps <= step:
            points = [about | found.get() for about, found in member.points]
            result = {"flags": member.run.flags, "points": points, **about}
            member.run.directory.mkdir(parents=True, exist_ok=True)
            write_json(member.run.directory / runs.FILES[0], result)


def measure(images):
    """`runs.measure` on one thread."""
    torch.set_num_threads(1)
    return runs.measure(images)


def can_stack(run):
    """Whether the step of a run is the one that is stacked."""
    values = runs.values_of(run.flags)
    plus = values.exchange != "off" or values.augment_near_threshold
    return not (plus or values.dropout or values.ambient_t or values.batch_size != runs.TRAINING["batch_size"])


def shape_of(run):
    """What the runs of a stack have in common; those that start from others come after them."""
    values = runs.values_of(run.flags)
    return values.img_size, bool(values.check_dir), values.client_num


def options_of(arguments):
    """The options of a command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = startup.Parser("python -m experiments.stacked", description=__doc__, formatter_class=raw)
    parser.add_argument("--minutes", type=float, default=60, help="train nothing after so long")
    parser.add_argument("--scale", type=float, default=1.0, help="below 1: fewer steps and images, for a trial")
    parser.add_argument("--arms", help=f"with commas, some of {','.join(ARMS)}; default: all")
    parser.add_argument("--out", type=os.path.expanduser, default="results", help="directory of all that is written")
    parser.add_argument("--device", default="cuda", help="of the trainings")
    return parser.parse_args(arguments)


def main(arguments=None):
    options, start = options_of(arguments), time.time()
    out, device = Path(options.out).resolve(), torch.device(options.device)
    make_directory(out, "out")
    arms = options.arms.split(",") if options.arms else None
    with lock_directory(out, "out"), chdir(ROOT):
        every = runs.plan(out, options.scale)
        wanted = {Path(path) for run in every if (path := runs.values_of(run.flags).check_dir)}
        missing = [run for run in runs.plan(out, options.scale, arms) if can_stack(run)]
        missing = sorted((run for run in missing if not runs.measured(run)["complete"]), key=shape_of)
        with multiprocessing.get_context("spawn").Pool(os.cpu_count(), runs.begin_worker) as pool:
            for _, runs_of_shape in itertools.groupby(missing, shape_of):
                ready = [
                    r for r in runs_of_shape if not (path := runs.values_of(r.flags).check_dir) or Path(path).exists()
                ]
                if ready and time.time() < start + 60 * options.minutes:
                    train_together(ready, wanted, device, pool, start + 60 * options.minutes)


if __name__ == "__main__":
    startup.run(main)

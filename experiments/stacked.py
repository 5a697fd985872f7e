"""The experiment on a GPU, by bash com/results.sh --stacked: many trainings as one stack of networks.

One training step of all networks is one CUDA graph. A training has the flags, images, orders and
starting weights that it has with main_fed.py, and other timesteps and noise, which depend on what else
is in the stack. What is measured goes to stacked.json. Arms whose step is another (lr, dropout, large
batches, IET-AGC+, ambient diffusion) are left to main_fed.py. A training that does not come to its end
in time leaves nothing behind.
"""

import functools
import itertools
import multiprocessing
import os
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.overrides import TorchFunctionMode

from diffusion import GaussianDiffusionSampler, GaussianDiffusionTrainer
from experiments import runs
from experiments.images import load
from training import build
from training.averaging import weighted_average
from training.learner import clip_divisor, warmed_up
from training.weights import load_checkpoint, load_weights, round_name, save_checkpoint, weights_in
from utils.bar import progress_bar
from utils.errors import warn
from utils.files import write_json
from utils.images import normalize, to_uint8
from utils.seeding import derive_seed, sample_noise

WARM_UP = 3  # steps before a CUDA graph is captured
AT_ONCE = 2**22  # pixels of the images in a call of the stacked networks
# in what arms that are trained together may differ
MAY_DIFFER = {"client_num", "local_epoch", "steps", "anti_grad", "split", "duplicates_in", "reshard", "one_round"}
MAY_DIFFER |= {"from", "img_size", "num_train", "duplicates", "copies"}


class ConvolutionByMatmul(TorchFunctionMode):
    """F.conv2d as a product of matrices, one for many networks; faster than cuDNN's grouped one."""

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

    net: a `model.UNet` of that shape, whose frozen parts all have; weights: (N, P), rows of `row_of`."""

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


class StackedLearner:
    """N networks in training that step at the same time, each as a `training.learner.Learner` does.

    Args:
        net: a `model.UNet` of their shape, on the device.
        weights, ema_weights: (N, P), where they start.
        uses_agc, at_random: bool (N,): of which networks `agc` skips samples, and of which as many are
            left out at random.
        diffusion: keyword arguments of `GaussianDiffusionTrainer`.
        images: uint8 (slots, 3, H, W), on the device.
        lr, warmup, grad_clip, ema_decay: as for `Learner`."""

    def __init__(
        self, net, weights, ema_weights, agc, uses_agc, at_random, diffusion, images, lr, warmup, grad_clip, ema_decay
    ):
        self.net, self.weights, self.ema_weights = net, nn.Parameter(weights.clone()), ema_weights.clone()
        self.agc, self.uses_agc, self.at_random, self.images = agc, uses_agc, at_random, images
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
        controlled, keep = judge(self.banks, losses, t)
        by_chance = keep.gather(1, torch.rand_like(losses).argsort(dim=1))
        mean_of_those = torch.where(by_chance, losses, 0.0).sum(dim=1) / keep.sum(dim=1).clamp(min=1)
        plain = torch.where(self.at_random, mean_of_those, losses.mean(dim=1))
        self.optim.zero_grad()
        torch.where(self.uses_agc, controlled, plain).sum().backward()
        with torch.no_grad():
            norm = self.weights.grad.norm(dim=1, keepdim=True)
            self.weights.grad /= clip_divisor(norm, self.grad_clip)
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
            self.lr.fill_(warmed_up(self.base_lr, position, self.warmup))
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

    def checkpoint_of(self, row):
        """The weights of a row as a checkpoint of averages."""
        states = []
        for part in (self.weights.data, self.ema_weights):
            vector_to_parameters(part[row].clone(), (p for p in self.net.parameters() if p.requires_grad))
            states.append({name: value.cpu() for name, value in self.net.state_dict().items()})
        return {"global_model": states[0], "global_ema_model": states[1], "norm_groups": self.net.groups}


class Member:
    """A training in a stack: its K networks are rows from `row` on, its images slots from `slot` on."""

    def __init__(self, run, row, slot):
        values = runs.values_of(run.flags)
        self.run, self.K, self.slot, self.rows = run, values.client_num, slot, slice(row, row + values.client_num)
        self.anti_grad, self.checkpoint = values.anti_grad, None
        self.data = data = load(**run.data)
        self.slots = lambda r: build.slots(values, data, r)
        self.reshards, images = values.reshard, data.train.images
        slots = enumerate(self.slots(1))
        self.batches = [build.batches(values, data, images, part, "cpu", shard=k) for k, part in slots]
        self.sizes = [len(batches.slots) for batches in self.batches]
        self.steps_per_round = run.steps_per_round // self.K  # all shards of the experiment have as many
        self.steps = run.rounds * self.steps_per_round
        # the steps after which it waits for others, and those after which it is measured
        self.stop = values.save_step or self.steps_per_round
        self.every = values.save_round * self.stop
        self.points = []  # what was measured, as in measured.json

    def start(self, net):
        """The weights and EMA weights that its networks start from, by way of a network: (P,) each."""
        path, rows = self.run.start, []
        state = load_checkpoint(path) if path else None
        for use_ema in (False, True):
            if path:
                load_weights(net, weights_in(state, use_ema, path), path)
            rows.append(row_of(net))
        return rows

    def table(self, first, last):
        """The slots of the steps from `first` to before `last`, all of one round: (steps, K, B)."""
        if self.reshards:
            of_round = self.slots(first // self.steps_per_round + 1)
            for batches, slots in zip(self.batches, of_round, strict=True):
                batches.use(slots)
        steps = range(first, last)
        return self.slot + torch.stack([torch.stack([b.slots_of(step) for b in self.batches]) for step in steps])

    def due(self, step):
        """What is measured after a step: [({"steps": n, ...}, rows of networks that are averaged)]."""
        row, about = self.rows.start, {"steps": self.K * step, "sequential": step}
        if step > self.steps or (step % self.every and step < self.steps) or (step == 0 and not self.run.start):
            return []
        if self.run.rounds > 1:
            return [(about, [row])]
        rows = list(range(row, self.rows.stop))
        return [(about, rows), ({"steps": step, "sequential": step, "network": "sub-model"}, rows[:1])]


@functools.cache
def noise(seed, number, img_size):
    """The x_T of `score.generate.generate`."""
    return sample_noise(seed, range(number), (3, img_size, img_size), "cpu")()


@torch.no_grad()
def sample(net, rows, x_T, settings):
    """Images of E ensembles of K networks, rows (E, K, P) of a `Stack`: uint8 (E, N, 3, H, W), on CPU.

    x_T: (E, N, 3, H, W); settings: keyword arguments of `GaussianDiffusionSampler`."""
    E, K = rows.shape[:2]
    stack = Stack(net, rows.flatten(0, 1))

    def mean_prediction(x, t, labels=None):
        x, t = (value.unflatten(0, (E, -1)).repeat_interleave(K, dim=0).flatten(0, 1) for value in (x, t))
        return stack(x, t).unflatten(0, (E, K, -1)).mean(dim=1).flatten(0, 1)

    sampler = GaussianDiffusionSampler(mean_prediction, **settings).to(rows.device)
    parts = x_T.split(max(1, AT_ONCE // (E * K * x_T[0, 0, 0].numel())), dim=1)
    made = [to_uint8(sampler(part.to(rows.device).flatten(0, 1))).cpu().unflatten(0, (E, -1)) for part in parts]
    return torch.cat(made, dim=1)


def make_stack(planned, device):
    """The `Member`s that a stack of some runs has, and its `StackedLearner`."""
    members, starts, row, slot = [], [], 0, 0
    for run in planned:
        members.append(member := Member(run, row, slot))
        row, slot = row + member.K, slot + len(member.data.train.images)
        values = runs.values_of([*run.flags, "--anti_grad=skip"])
        torch.manual_seed(derive_seed(values.seed, "weights"))
        starts += [member.start(build.unet(values))] * member.K
    weights, ema_weights = (torch.stack(rows).to(device) for rows in zip(*starts, strict=True))
    controls = [member.anti_grad for member in members for _ in range(member.K)]
    masks = [torch.tensor([control == kind for control in controls], device=device) for kind in ("skip", "random")]
    images = torch.cat([member.data.train.images for member in members]).to(device)
    net, agc = build.unet(values).to(device), build.agc(values, values.T).to(device)
    return members, StackedLearner(
        net, weights, ema_weights, agc, *masks, build.diffusion_settings(values), images, lr=values.lr,
        warmup=values.warmup, grad_clip=values.grad_clip, ema_decay=values.ema_decay,
    )  # fmt: skip


def sample_due(members, learner, step):
    """What is measured after a step: yields (member, {"steps": n, ...}, uint8 images (N, 3, H, W))."""
    due = [(member, *point) for member in members for point in member.due(step)]
    settings = build.sampler_settings(runs.values_of(members[0].run.flags))
    for K in sorted({len(rows) for *_, rows in due}, reverse=True):  # as `runs.work`: ensembles first
        same = [point for point in due if len(point[-1]) == K]
        weights = torch.stack([learner.ema_weights[rows] for *_, rows in same])
        x_T = torch.stack([noise(m.run.seed, m.run.images, settings["img_size"]) for m, *_ in same])
        images = sample(learner.net, weights, x_T, settings)
        yield from ((member, about, made) for (member, about, _), made in zip(same, images, strict=True))


def train_together(planned, wanted, device, pool, deadline):
    """Train runs whose networks have one shape, and measure them in a pool: stacked.json of each.

    wanted: paths of checkpoints that others start from, to be written; deadline: of time.time()."""
    members, learner = make_stack(planned, device)
    torch.manual_seed(derive_seed("stacked", *(run.seed for run in planned)))
    step, last = 0, max(member.steps for member in members)
    with progress_bar(total=last, desc=f"{len(learner.weights)} networks", unit="step") as bar:
        while True:
            for member, about, images in sample_due(members, learner, step):
                member.points.append((about, pool.apply_async(runs.measure, (member.run, images.clone()))))
            if step == last or time.time() > deadline:
                break
            until = min((step // member.stop + 1) * member.stop for member in members)
            learner.train(torch.cat([member.table(step, until) for member in members], dim=1), step)
            bar.update(until - step)
            step = until
            for member in members:
                if member.run.rounds > 1 and step % member.stop == 0:
                    learner.average(member.rows, member.sizes)
                    path = member.run.directory / "log" / round_name(step // member.stop)
                    if path in wanted:
                        member.checkpoint = path, learner.checkpoint_of(member.rows.start)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    about = {"complete": True, "device": f"{name}, {len(learner.weights)} networks at once", "stacked": True}
    for member in members:
        if member.steps > step or not learner.weights[member.rows].isfinite().all():
            warn(f"{member.run.arm}, seed {member.run.seed}: out of time or not finite, left for another time")
            continue
        points = [of_point | found.get() for of_point, found in member.points]
        if member.checkpoint:
            save_checkpoint(*member.checkpoint)
        write_json(member.run.directory / runs.FILES[0], {"flags": member.run.flags, "points": points, **about})


def can_stack(run):
    """Whether the step of a run is the one that is stacked."""
    return set(runs.EXPERIMENTS[run.experiment].ARMS[run.arm]) <= MAY_DIFFER


def shape_of(run):
    """What the runs of a stack have in common. Those that start from others come after them."""
    values = runs.values_of(run.flags)
    return values.img_size, bool(run.start), values.client_num


def work_all(planned, wanted, device, deadline):
    """Train and measure what can be stacked of the runs that are not complete, as `train_together`."""
    missing = sorted((r for r in planned if can_stack(r) and not runs.measured(r)["complete"]), key=shape_of)
    with multiprocessing.get_context("spawn").Pool(min(16, os.cpu_count()), runs.begin_worker) as pool:
        for _, group in itertools.groupby(missing, shape_of):
            ready = [run for run in group if not run.start or run.start.exists()]
            if ready and time.time() < deadline:
                train_together(ready, wanted, device, pool, deadline)

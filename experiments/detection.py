"""Do skip counts reveal repeated and memorised training images? Against the plain loss of an image."""

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from diffusion import GaussianDiffusionTrainer
from experiments.runs import flags_of, last_measured, last_round, load_network
from files import atomic_write
from score.report import copy_counts
from seeding import generator
from training import flags
from training.batches import normalize

TIMESTEPS = 32
DETECTORS = {
    "skip count": lambda run, training: last_measured(run)["skips"].astype(float),
    "low loss": lambda run, training: -mean_losses(run, training),
}


def roc_auc(scores, labels):
    """Area under the ROC curve of scores (N,) for labels (N,) bool, ties counting one half; None if all are equal."""
    return float(roc_auc_score(labels, scores)) if 0 < labels.sum() < len(labels) else None


@torch.no_grad()
def per_image_loss(net, images, trainer_settings, seed):
    """The training loss of every image, averaged over TIMESTEPS timesteps from 0 to T with the same noise for all.

    images: uint8 (N, 3, H, W). Returns (N,) float64.
    """
    trainer = GaussianDiffusionTrainer(net, **trainer_settings)
    x_0, total = normalize(images), torch.zeros(len(images), dtype=torch.float64)
    stream = generator("cpu", seed, "per-image loss")
    for i in range(TIMESTEPS):
        t = torch.full((len(x_0),), round((i + 0.5) * trainer.T / TIMESTEPS), dtype=torch.int64)
        eps = torch.randn(x_0.shape[1:], generator=stream).expand_as(x_0)
        total += trainer(x_0, None, t, eps).mean(dim=(1, 2, 3)).double()
    return (total / TIMESTEPS).numpy()


def mean_losses(run, training):
    """`per_image_loss` under the raw weights that a training ended with; kept beside it."""
    r = last_round(run)
    path = run.directory / "measured" / f"round{r}_losses.npy"
    if not path.exists():
        net, _ = load_network(run, r, False)
        losses = per_image_loss(net, training, flags.diffusion(flags_of(run)), run.seed)
        with atomic_write(path) as file:
            np.save(file, losses)
    return np.load(path)


def copies_of(found, group):
    """How often generated images copy each training image, int64 (M,).

    found: what `Judge` kept of them; group: (M,) which distinct image a training image is.
    """
    nearest, ratio = torch.from_numpy(found["nearest"]).long(), torch.from_numpy(found["ratio"])
    return copy_counts(nearest, ratio, group.max() + 1)[torch.from_numpy(group)]


def copied_images(run, group):
    """Which training images (M,) a training copies in the end."""
    return (copies_of(last_measured(run), group) > 0).numpy()


def detection(runs, judge):
    """{arm: {label: {detector: [AUC per seed]}}}; None where a label is on no image or on all.

    Labels: `repeated` images of the training set, those `memorised by default` training with the same seed in the end,
    and those `memorised by itself`. Skip counts are those of the whole training, losses those at its end.
    """
    repeated = np.bincount(judge.group)[judge.group] > 1
    default = {run.seed: copied_images(run, judge.group) for run in runs if run.arm.name == "default"}
    found = {}
    for run in runs:
        labels = {"repeated": repeated, "memorised by itself": copied_images(run, judge.group)}
        if run.seed in default:
            labels["memorised by default"] = default[run.seed]
        for detector, score in DETECTORS.items():
            scores = score(run, judge.training)
            for label, which in labels.items():
                of_arm = found.setdefault(run.arm.name, {}).setdefault(label, {})
                of_arm.setdefault(detector, []).append(roc_auc(scores, which))
    return found

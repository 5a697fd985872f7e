"""Do skip counts reveal repeated and memorised training images? Against the plain loss of an image."""

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from diffusion import GaussianDiffusionTrainer
from experiments.runs import last_arrays, last_point, load_network, real_images, values_of
from training import flags
from training.batches import normalize
from utils.files import atomic_write
from utils.seeding import generator

TIMESTEPS = 32
COPIED = 0.15  # a generated image copies its nearest training image if its ratio is below


def roc_auc(scores, labels):
    """Area under the ROC curve of scores (N,) for labels (N,) bool, ties counting one half; None if all are equal."""
    return float(roc_auc_score(labels, scores)) if 0 < labels.sum() < len(labels) else None


@torch.no_grad()
def per_image_loss(trainer, images, seed):
    """The training loss of every image, averaged over TIMESTEPS timesteps from 0 to T with the same noise for all.

    images: uint8 (N, 3, H, W). Returns (N,) float64.
    """
    x_0, total = normalize(images), torch.zeros(len(images), dtype=torch.float64)
    stream = generator("cpu", seed, "per-image loss")
    for i in range(TIMESTEPS):
        t = torch.full((len(x_0),), round((i + 0.5) * trainer.T / TIMESTEPS), dtype=torch.int64)
        eps = torch.randn(x_0.shape[1:], generator=stream).expand_as(x_0)
        total += trainer(x_0, None, t, eps).mean(dim=(1, 2, 3)).double()
    return (total / TIMESTEPS).numpy()


def last_losses(run):
    """`per_image_loss` of all training images under the last raw weights that were measured; kept beside them."""
    r = last_point(run)["round"]
    path = run.directory / "measured" / f"round{r}_losses.npy"
    if not path.exists():
        net, _ = load_network(run, r, False)
        trainer = flags.call(values_of(run.flags), GaussianDiffusionTrainer, net)
        losses = per_image_loss(trainer, real_images(run.data.name)[0], run.seed)
        with atomic_write(path) as file:
            np.save(file, losses)
    return np.load(path)


def detection(runs):
    """Rows {"arm", "images", "skip count": [AUC per seed], "low loss": [...]}; None where a label is on none or on all.

    "images" are those `repeated` in the training set, those `memorised by default` training with the same seed in the
    end, and those `memorised by itself`. Skip counts are those of the whole training, losses those at its end.
    """
    group = real_images(runs[0].data.name)[1]
    repeated = np.bincount(group)[group] > 1
    found = {(run.arm.name, run.seed): last_arrays(run) for run in runs}
    copied = {key: np.isin(group, arrays["nearest"][arrays["ratio"] < COPIED]) for key, arrays in found.items()}
    rows = {}
    for run in runs:
        own, default = (run.arm.name, run.seed), ("default", run.seed)
        labels = {"repeated": repeated, "memorised by itself": copied[own]}
        if default in copied:
            labels["memorised by default"] = copied[default]
        skips, losses = found[own]["skips"].astype(float), last_losses(run)
        for label, which in labels.items():
            row = rows.setdefault((run.arm.name, label), {"skip count": [], "low loss": []})
            row["skip count"].append(roc_auc(skips, which))
            row["low loss"].append(roc_auc(-losses, which))
    return [{"arm": arm, "images": label, **row} for (arm, label), row in rows.items()]

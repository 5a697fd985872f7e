"""The gap of the denoising loss between training and held-out images, and membership inference by it."""

import torch

from utils import distributed
from utils.bar import progress_bar
from utils.seeding import generator

TIMESTEPS = 20  # at most
FALSE_POSITIVES = 0.01


def denoising_gap(trainer, training, heldout, seed, batch_size):
    """Losses of training and held-out images by t, and how well they tell these apart, as JSON values.

    The attack of Yeom et al. 2018 and Carlini et al. 2023: an image is taken for a training image if its
    loss is low.

    Args:
        trainer: a `GaussianDiffusionTrainer` on its device, which is left in evaluation mode.
        training, heldout: (images, labels): (N, 3, H, W) uint8 and (N,) int64, or None without classes.
        seed: of eps.
        batch_size: images per call of the network.

    Returns:
        "t" and the mean losses "training" and "heldout" at each of them; the numbers of "images" of
        both; "auc" and "tpr", the true positive rate where 1 % of the held-out images are taken for
        training images, of the losses averaged over t; "best_t", at which the AUC is largest, with its
        "best_auc" and "best_tpr"."""
    losses = [losses_by_t(trainer, *images, seed, batch_size) for images in (training, heldout)]
    of_training, of_heldout = losses
    by_t = [membership(*columns) for columns in zip(of_training.T, of_heldout.T, strict=True)]
    t = timesteps(trainer.T)
    best = max(range(len(t)), key=lambda i: by_t[i]["auc"])
    return {
        "t": t, "training": of_training.mean(dim=0).tolist(), "heldout": of_heldout.mean(dim=0).tolist(),
        "images": [len(rows) for rows in losses],
        **membership(of_training.mean(dim=1), of_heldout.mean(dim=1)), "best_t": t[best],
        **{f"best_{name}": value for name, value in by_t[best].items()},
    }  # fmt: skip


def timesteps(T):
    """At most `TIMESTEPS` of 0..T-1, in the middle of as many equal parts."""
    number = min(TIMESTEPS, T)
    return [(2 * i + 1) * T // (2 * number) for i in range(number)]


@torch.no_grad()
def losses_by_t(trainer, images, labels, seed, batch_size):
    """The training loss of each image at each of the `timesteps`: (N, S) float64; all have eps at t.

    Every process takes its share of the images, and all are given the whole."""
    trainer.eval()
    device, times = trainer.betas.device, timesteps(trainer.T)
    eps = torch.randn(len(times), *images.shape[1:], generator=generator("cpu", seed, "gap")).to(device)
    share = range(len(images))[distributed.share(len(images))]
    losses = torch.empty(len(share), len(times), dtype=torch.float64)
    with progress_bar(total=len(share), desc="losses", unit="image") as bar:
        for start in range(0, len(share), batch_size):
            rows = share[start : start + batch_size]
            x_0 = images[rows.start : rows.stop].to(device).float() / 127.5 - 1
            of_rows = None if labels is None else labels[rows.start : rows.stop].to(device)
            for i, t in enumerate(times):
                t = torch.full((len(x_0),), t, device=device)
                loss = trainer(x_0, of_rows, t, eps[i].expand_as(x_0)).mean(dim=(1, 2, 3))
                losses[start : start + len(rows), i] = loss.double().cpu()
            bar.update(len(rows))
    return distributed.join_rows(losses)


def membership(of_training, of_heldout):
    """ "auc" and "tpr" of telling training from held-out images by their losses (N,) and (L,).

    AUC: of pairs of both, the share in which the training image has the lower loss, ties counting half.
    TPR: the share of training images below the threshold that at most `FALSE_POSITIVES` of the held-out
    ones are below."""
    from scipy.stats import mannwhitneyu  # a second that others need not wait

    pairs = mannwhitneyu(of_heldout, of_training, method="asymptotic").statistic
    threshold = of_heldout.sort().values[int(FALSE_POSITIVES * len(of_heldout))]
    tpr = (of_training < threshold).double().mean().item()
    return {"auc": float(pairs) / (len(of_training) * len(of_heldout)), "tpr": tpr}

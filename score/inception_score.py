"""Inception score (Salimans et al. 2016)."""

import torch


def inception_score(probs, splits=10):
    """exp(E_x KL(p(y|x) || p(y))) over consecutive splits of the images: (mean, population standard deviation).

    probs: (N, classes) class probabilities, one row an image, in the order of the images. Split k holds the images
    from k N // splits up to (k + 1) N // splits, p(y) is the mean over the split, and 0 log 0 = 0. The score lies
    between 1 and the number of classes. Computed in float64. Raises ValueError if there are fewer images than splits.

    E_x KL(p(y|x) || p(y)) = E_x sum_y p(y|x) log p(y|x) - sum_y p(y) log p(y), which needs one pass over the split.
    """
    N = len(probs)
    if splits > N:
        raise ValueError(f"the inception score of {splits} splits needs at least {splits} images, got {N}")
    scores = []
    for k in range(splits):
        p = probs[k * N // splits : (k + 1) * N // splits].double()
        marginal = p.mean(dim=0)
        divergence = torch.xlogy(p, p).sum(dim=1).mean() - torch.xlogy(marginal, marginal).sum()
        scores.append(divergence.exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()

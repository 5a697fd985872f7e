"""Copies in feature space: an exact search by cosine similarity, and the published statistics of it.

For SSCD (Pizzi et al. 2022, arXiv:2202.10261), CLIP, Inception, and the correlation of pixels. Somepalli
et al. 2023 (DCR, arXiv:2305.20086) call a generated image a copy where its largest similarity to a
training image is above 0.5.
"""

import numpy as np
import torch
import torch.nn.functional as F

from score.features import clip_features
from score.memorization import (
    NEIGHBORS,
    closer_than_third,
    group_of,
    largest_group,
    memorization_ratio,
    others_left_out,
    shares_below,
)
from utils import distributed
from utils.bar import progress_bar

BINS = 40  # of a histogram


@torch.no_grad()
def clip_scores(clip, images, captions, batch_size=64):
    """100 times the cosine similarity of CLIP's features of every image and its caption: (N,) float32.

    clip: of `load_clip`; images: (N, 3, H, W) uint8; captions: N texts."""
    (model, tokenizer), scores = clip, []
    for start in range(0, len(images), batch_size):
        texts = list(captions[start : start + batch_size])
        limit = model.config.text_config.max_position_embeddings
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        text = model.text_projection(model.text_model(**tokens.to(model.device)).pooler_output)
        image = clip_features(model, images[start : start + batch_size])
        scores.append(100 * F.cosine_similarity(image, text).cpu())
    return torch.cat(scores)


def unit_features(space, images):
    """The features of a batch of images in a `FeatureSpace`, (B, D) float32, of length 1."""
    return F.normalize(space.features(images).float())


@torch.no_grad()
def embed(space, images):
    """The features, in a `FeatureSpace`, of images (N, 3, H, W) uint8: (N, D) float32, of length 1."""
    share = images[distributed.share(len(images))]
    batches = (share if len(share) else images[:1]).split(space.batch_size)
    bar = progress_bar(batches, "embedding", unit="batch", delay=1)
    rows = torch.cat([unit_features(space, batch) for batch in bar])
    return distributed.join_rows(rows[: len(share)])


@torch.no_grad()
def most_similar(queries, keys, k, batch_queries=1024, batch_keys=8192, groups=None):
    """The k largest cosine similarities of every query to the keys, and whose they are.

    Every pair is compared, in float32 without TF32: a similarity is exact to some 1e-6.

    queries, keys: (N, D) and (M, D), of length 1, on one device. k: all M if there are fewer.
    batch_queries, batch_keys: per matrix product; memory grows with them, never with N * M.
    groups: of the keys, as for `score.memorization.neighbors_of_groups`.

    Returns `others_left_out` of similarity (N, k) float32, descending, and index (N, k) int64."""
    searched = k + largest_group(groups) - 1
    allowed, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    rows = []
    for block in queries.split(batch_queries):
        best = block.new_empty(len(block), 0)
        index = torch.empty(len(block), 0, dtype=torch.int64, device=block.device)
        for start in range(0, len(keys), batch_keys):
            product = block @ keys[start : start + batch_keys].T
            end = start + product.shape[1]
            numbers = torch.arange(start, end, device=block.device).expand_as(product)
            both = torch.cat([best, product], dim=1).topk(min(searched, end), dim=1)
            best, index = both.values, torch.cat([index, numbers], dim=1).gather(1, both.indices)
        rows.append(others_left_out(best, index, groups, k))
    torch.backends.cuda.matmul.allow_tf32 = allowed
    return tuple(torch.cat(column) for column in zip(*rows, strict=True))


def statistics(similarity, prefix, threshold=None):
    """Mean, deviation, percentiles and share of copies of (N,) similarities, by their published names.

    threshold: of a `FeatureSpace`; without one there is no share of copies."""
    values = similarity.double().cpu().numpy()
    percentiles = {f"{prefix}_{q}pc": float(np.percentile(values, q)) for q in (75, 90, 95)}
    above = {} if threshold is None else {f"{prefix}_gt_05pc": float((values > threshold).mean())}
    moments = {f"{prefix}_mean": float(values.mean()), f"{prefix}_std": float(values.std())}
    return moments | percentiles | above


def squared_distance(similarity):
    """Of features of length 1, from their cosine similarity."""
    return (2 - 2 * similarity.double()).clamp(min=0)


def memorized(similarity):
    """`closer_than_third` of features of length 1, from their similarities (N, k): bool (N,)."""
    return closer_than_third(squared_distance(similarity))


def histogram(similarity):
    """The share of (N,) similarities in each of BINS intervals from 0 to 1; below 0 counts as 0."""
    return (torch.histc(similarity.float().clamp(0, 1).cpu(), BINS, 0, 1) / len(similarity)).tolist()


def evaluate_similarity(space, images, training, prompt_images=None, floors=None, groups=None):
    """All numbers of a set of images in a feature space, as JSON values: "similarity" in result.json.

    Args:
        space: a `FeatureSpace`.
        images, training: (N, 3, H, W) and (M, 3, H, W), uint8; training images without repeats.
        prompt_images: of `measure_similarity`.
        floors: {name: (images, their prompt_images)}, measured in the place of generated images.
        groups: of the training images, as for `score.memorization.neighbors_of_groups`.

    Returns:
        numbers: those of `measure_similarity`, with the features, and `statistics` and `histogram` of
            the largest similarity of every training image to those of other groups.
        floors: {name: the numbers of `measure_similarity`, with the features}.
        neighbors: (similarity, index) of the images, as `most_similar` returns them."""
    training = embed(space, training)

    def measure(images, prompt_images):
        features = embed(space, images)
        found = measure_similarity(features, training, space.threshold, prompt_images, groups)
        numbers, neighbors = found
        of_space = {"features": space.name, "preprocess": space.preprocess}
        of_space |= {"weights_sha256": space.weights_hash} if space.weights_hash else {}
        return of_space | numbers, neighbors

    numbers, neighbors = measure(images, prompt_images)
    # the largest is itself; where there is no other group it is all there is
    itself, *others = most_similar(training, training, 2, groups=groups)[0].T
    among_training = itself if not others else torch.where(others[0].isnan(), itself, others[0])
    numbers |= statistics(among_training, "bg", space.threshold)
    numbers["bg_histogram"] = histogram(among_training)
    return numbers, {name: measure(*of_floor)[0] for name, of_floor in (floors or {}).items()}, neighbors


def measure_similarity(features, training, threshold=None, prompt_images=None, groups=None):
    """The numbers of a set of images in a feature space, as JSON values, and nearest training images.

    features, training: (N, D) and (M, D), of length 1. threshold: of the `FeatureSpace`. prompt_images:
    (N,) int64, the training image that each prompt is the caption of, -1 for none; None: no prompts.
    groups: as for `evaluate_similarity`.

    Returns:
        numbers: `statistics` and `histogram` of the largest similarities; f_mem, mq_fraction and
            mq_curve as in `score.memorization`, of squared distances of features; own_image: of the
            images whose prompt is the caption of a training image, the share whose nearest it is, or
            one of its group.
        neighbors: (similarity, index), (N, k), as `most_similar` returns them."""
    similarity, index = most_similar(features, training, NEIGHBORS, groups=groups)
    numbers = statistics(similarity[:, 0], "sim", threshold)
    numbers["sim_histogram"] = histogram(similarity[:, 0])
    numbers |= shares_below(memorization_ratio(squared_distance(similarity)))
    numbers["f_mem"] = memorized(similarity).double().mean().item()
    if prompt_images is not None and (prompt_images >= 0).any():
        is_nearest = group_of(index[:, 0].cpu(), groups) == group_of(prompt_images, groups)
        numbers["own_image"] = is_nearest[prompt_images >= 0].double().mean().item()
    return numbers, (similarity, index)


def detection(scores, copies):
    """How well scores (N,) tell which images are copies, (N,) bool: means of both kinds, and the AUC.

    None stands for what has no value, where all images are copies, or none is."""
    numbers = {"copies": int(copies.sum()), "mean_of_copies": None, "mean_of_others": None, "auc": None}
    for name, part in (("mean_of_copies", scores[copies]), ("mean_of_others", scores[~copies])):
        if len(part):
            numbers[name] = part.mean().item()
    if 0 < numbers["copies"] < len(copies):
        from sklearn.metrics import roc_auc_score  # takes a second

        numbers["auc"] = float(roc_auc_score(copies.numpy(), scores.numpy()))
    return numbers

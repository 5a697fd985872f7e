"""Copies in feature space: embeddings, an exact search by cosine similarity, and the published statistics of it.

For SSCD (Pizzi et al. 2022, arXiv:2202.10261), CLIP, Inception, and the correlation of pixels. Somepalli et al. 2023
(DCR, arXiv:2305.20086) call a generated image a copy where its largest similarity to a training image is above 0.5.
"""

import zipfile

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from score.inception import Inception
from score.memorization import THRESHOLDS, closer_than_third, memorization_ratio, memorized_quantity
from utils import distributed
from utils.bar import progress_bar
from utils.errors import DataError, UsageError, one_line

FEATURES = ("sscd", "inception", "clip", "pixels")
COPY = 0.5  # similarity above which an image counts as a copy
NEIGHBORS = 50
BINS = 40  # of a histogram
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# (shorter side, side of the centre, mean, standard deviation): as in the published scripts, and as SSCD's authors say
PREPROCESS = {
    "published": (256, 224, (0.5,) * 3, (0.5,) * 3),
    "recommended": (288, 288, *IMAGENET),
}
CLIP_NORMALIZE = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class GeM(nn.Module):
    """Generalised mean over the positions of an image: (B, C, H, W) to (B, C, 1, 1)."""

    def __init__(self, p=3.0):
        super().__init__()
        self.p = p

    def forward(self, x):
        return x.clamp(min=1e-6).pow(self.p).mean(dim=(2, 3), keepdim=True).pow(1 / self.p)


def load_sscd(path, allow_torchscript=False):
    """SSCD's network, which embeds preprocessed images: ResNet-50, GeM pooling and a linear layer.

    Args:
        path: sscd_disc_mixup.torchvision.pt or another with weights of that form, or a TorchScript file.
        allow_torchscript: TorchScript files hold code, which is run.

    Raises:
        DataError: no such file, or it holds something else.
        UsageError: it is TorchScript, and that is not allowed.
    """
    from torchvision.models import resnet50  # takes a second

    if zipfile.is_zipfile(path) and any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()):
        if not allow_torchscript:
            what = "is TorchScript, which runs code: take the .torchvision.pt file, or trust it by --allow_torchscript"
            raise UsageError(f"--sscd={path}: {what}")
        return torch.jit.load(path, map_location="cpu").float().eval()
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        weights = {name.removeprefix("backbone."): value for name, value in weights.items()}
        network = resnet50(num_classes=len(weights["fc.weight"]))
        network.avgpool = GeM()
        network.load_state_dict(weights)
        return network.eval().requires_grad_(False)
    except Exception as error:  # a damaged or hostile file can make the unpickler raise anything
        what = f"cannot be read as SSCD's weights for torchvision ({one_line(error)[:200]})"
        raise DataError(f"--sscd={path}: {what}") from error


def preprocess(images, shorter, side, mean, std):
    """uint8 (B, 3, H, W): the shorter side resized, the centre cut out, normalised: float32 (B, 3, side, side)."""
    H, W = images.shape[-2:]
    size = [max(side, round(shorter * length / min(H, W))) for length in (H, W)]
    x = F.interpolate(images.float() / 255, size, mode="bilinear", antialias=True)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in (mean, std))
    return (x[:, :, top : top + side, left : left + side].clamp(0, 1) - mean) / std


def load_clip(folder, device="cpu"):
    """transformers' CLIPModel in float32 and its tokenizer in a folder, from safetensors only.

    Raises:
        DataError: missing or damaged files, or weights of another model.
        UsageError: transformers is not installed.
    """
    try:
        from transformers import CLIPModel, CLIPTokenizer  # takes seconds
    except ImportError as error:
        raise UsageError(f"--clip needs {error.name}: pip install -r requirements-text.txt") from error
    try:
        settings = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
        model, info = CLIPModel.from_pretrained(folder, **settings)
        if wrong := [*info["missing_keys"], *info["unexpected_keys"]]:
            raise ValueError(f"weights of another model: {len(wrong)} such as {min(wrong)} do not fit")
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        if max(tokenizer.get_vocab().values()) >= model.config.text_config.vocab_size:
            raise ValueError("its tokenizer has more tokens than the vocab_size of the model")
        return model.float().to(device).eval().requires_grad_(False), tokenizer
    except Exception as error:  # of files that are missing or damaged
        raise DataError(f"--clip={folder}: cannot be read as CLIP ({one_line(error)[:200]})") from error


def make_embedding(features, device, *, sscd=None, how="published", allow_torchscript=False, inception=None, clip=None):
    """A function of uint8 images (B, 3, H, W) that returns their features (B, D) float32, not yet normalised.

    Args:
        features: one of FEATURES; pixels: values less their mean, over their deviation, so that the
            similarity is their correlation.
        sscd, how, allow_torchscript: SSCD's file, which of PREPROCESS, and of `load_sscd`.
        inception: file of Inception weights.
        clip: folder of `load_clip`.
    """
    if features == "pixels":
        return lambda images: F.layer_norm(images.to(device).float(), images.shape[1:]).flatten(1)
    if features == "inception":
        network = Inception(inception, device)
        return lambda images: network(images)[0]
    if features == "clip":
        model = load_clip(clip, device)[0]
        return lambda images: image_features(model, images)
    network = load_sscd(sscd, allow_torchscript).to(device)
    return lambda images: network(preprocess(images.to(device), *PREPROCESS[how]))


def image_features(model, images):
    """CLIP's features of uint8 images (B, 3, H, W): (B, D)."""
    side = model.config.vision_config.image_size
    pixels = preprocess(images.to(model.device), side, side, *CLIP_NORMALIZE)
    return model.visual_projection(model.vision_model(pixels).pooler_output)


@torch.no_grad()
def clip_scores(clip, images, captions, batch_size=64):
    """100 times the cosine similarity of CLIP's features of every image and its caption: (N,) float32.

    clip: of `load_clip`; images: (N, 3, H, W) uint8; captions: N texts.
    """
    (model, tokenizer), scores = clip, []
    for start in range(0, len(images), batch_size):
        texts = list(captions[start : start + batch_size])
        limit = model.config.text_config.max_position_embeddings
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt").to(model.device)
        text = model.text_projection(model.text_model(**tokens).pooler_output)
        image = image_features(model, images[start : start + batch_size])
        scores.append(100 * F.cosine_similarity(image, text).cpu())
    return torch.cat(scores)


@torch.no_grad()
def embed(embedding, images, batch_size=64):
    """The features of images (N, 3, H, W) uint8, of length 1: (N, D) float32. The processes share the work."""
    part = images[distributed.share(len(images))]
    blocks = progress_bar((part if len(part) else images[:1]).split(batch_size), "embedding", unit="batch", delay=1)
    rows = torch.cat([F.normalize(embedding(block).float()) for block in blocks])
    return distributed.join_rows(rows[: len(part)])


@torch.no_grad()
def most_similar(queries, keys, k, batch_queries=1024, batch_keys=8192):
    """The k largest cosine similarities of every query to the keys, and whose they are.

    Every pair is compared, in float32 without TF32: a similarity is exact to some 1e-6.

    Args:
        queries, keys: (N, D) and (M, D), of length 1, on one device.
        k: all M if there are fewer.
        batch_queries, batch_keys: per matrix product; memory grows with them, never with N * M.

    Returns:
        similarity (N, k) float32, descending, and index (N, k) int64.
    """
    allowed, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    rows = []
    for block in queries.split(batch_queries):
        best, index = block.new_empty(len(block), 0), torch.empty(len(block), 0, dtype=torch.int64, device=block.device)
        for start in range(0, len(keys), batch_keys):
            product = block @ keys[start : start + batch_keys].T
            numbers = torch.arange(start, start + product.shape[1], device=block.device).expand_as(product)
            both = torch.cat([best, product], dim=1).topk(min(k, start + product.shape[1]), dim=1)
            best, index = both.values, torch.cat([index, numbers], dim=1).gather(1, both.indices)
        rows.append((best, index))
    torch.backends.cuda.matmul.allow_tf32 = allowed
    return tuple(torch.cat(column) for column in zip(*rows, strict=True))


def copy_threshold(features):
    """The similarity above which an image counts as a copy, or None of pixels: unrelated ones may be as alike."""
    return None if features == "pixels" else COPY


def statistics(similarity, prefix, threshold=COPY):
    """Mean, standard deviation, percentiles and the share of copies of (N,) similarities, by their published names.

    threshold: of `copy_threshold`; None: no share of copies.
    """
    values = similarity.double().cpu().numpy()
    percentiles = {f"{prefix}_{q}pc": float(np.percentile(values, q)) for q in (75, 90, 95)}
    above = {} if threshold is None else {f"{prefix}_gt_05pc": float((values > threshold).mean())}
    return {f"{prefix}_mean": float(values.mean()), f"{prefix}_std": float(values.std()), **percentiles, **above}


def squared_distance(similarity):
    """Of features of length 1, from their cosine similarity."""
    return (2 - 2 * similarity.double()).clamp(min=0)


def memorized(similarity):
    """`closer_than_third` of features of length 1, from their similarities (N, k): bool (N,)."""
    return closer_than_third(squared_distance(similarity))


def histogram(similarity):
    """The share of (N,) similarities in each of BINS intervals from 0 to 1, a list; the first has those below 0 too."""
    return (torch.histc(similarity.float().clamp(0, 1).cpu(), BINS, 0, 1) / len(similarity)).tolist()


def measures(queries, training, own=None, threshold=COPY):
    """Criteria of one set of images in feature space, as JSON values, and their nearest training images.

    Args:
        queries, training: features (N, D) and (M, D), of length 1.
        own: (N,) int64, the training image that each prompt is the caption of, -1 for none; None: no prompts.
        threshold: of `copy_threshold`.

    Returns:
        numbers: `statistics` and `histogram` of the largest similarities; f_mem, mq_fraction and mq_curve as in
            `score.memorization`, of squared distances of features; own_image: of the images with an own training image,
            the share whose nearest it is.
        found: (similarity, index), (N, k), as `most_similar` returns them.
    """
    similarity, index = most_similar(queries, training, NEIGHBORS)
    numbers = statistics(similarity[:, 0], "sim", threshold) | {"sim_histogram": histogram(similarity[:, 0])}
    ratio = memorization_ratio(squared_distance(similarity))
    for name, thresholds in (("mq_fraction", THRESHOLDS), ("mq_curve", range(101))):
        numbers[name] = {str(p): count / len(ratio) for p, count in memorized_quantity(ratio, thresholds).items()}
    numbers["mq_curve"] = list(numbers["mq_curve"].values())
    numbers["f_mem"] = memorized(similarity).double().mean().item()
    if own is not None and (own >= 0).any():
        numbers["own_image"] = (index[:, 0].cpu() == own)[own >= 0].double().mean().item()
    return numbers, (similarity, index)


def detection(scores, copies):
    """How well scores (N,) tell which images are copies, (N,) bool: means of both kinds, and the AUC, as JSON values.

    None stands for what has no value, where all images are copies, or none is.
    """
    numbers = {"copies": int(copies.sum()), "mean_of_copies": None, "mean_of_others": None, "auc": None}
    for name, part in (("mean_of_copies", scores[copies]), ("mean_of_others", scores[~copies])):
        if len(part):
            numbers[name] = part.mean().item()
    if 0 < numbers["copies"] < len(copies):
        from sklearn.metrics import roc_auc_score  # takes a second

        numbers["auc"] = float(roc_auc_score(copies.numpy(), scores.numpy()))
    return numbers


def background(training, threshold=COPY):
    """`statistics` of the second largest similarity of every training image to all of them: the largest is itself."""
    similarity = most_similar(training, training, 2)[0][:, -1]
    return statistics(similarity, "bg", threshold) | {"bg_histogram": histogram(similarity)}

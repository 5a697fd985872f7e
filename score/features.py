"""Feature spaces: what images are compared in, by Frechet distances and in the search for copies alike.

To add one, write a function that returns a `FeatureSpace`, call it in `feature_space`, and name it in COPIES,
FRECHET or both; `training.build` passes on the flag of its weights.
"""

import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from score.inception import DIMENSION, WEIGHTS_HASH, inception_features, inception_logits, load_inception
from utils.errors import DataError, UsageError, one_line
from utils.files import content_hash, file_hash

COPIES = ("sscd", "inception", "clip", "pixels")  # the spaces that copies are searched for in
# the spaces of Frechet distances: {what flags and files say: the space}
FRECHET = {"inception": "inception", "pixels": "pooled pixels"}
COPY = 0.5  # similarity of SSCD above which an image counts as a copy
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# (shorter side, side of the centre, mean, deviation) of the published scripts and of SSCD's authors
PREPROCESS = {"published": (256, 224, (0.5,) * 3, (0.5,) * 3), "recommended": (288, 288, *IMAGENET)}
CLIP_NORMALIZE = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class FeatureSpace:
    """What uint8 images (B, 3, H, W) are compared by; the last five are for Frechet distances."""

    name: str  # in flags and files
    features: Callable  # of images, returns (B, D) float32 on the device
    device: torch.device | str = "cpu"
    batch_size: int = 64  # images per call
    threshold: float | None = None  # similarity above which an image is a copy, where one is known
    preprocess: str | None = None  # one of PREPROCESS, where there is a choice
    dimension: int | None = None  # D
    distance: str | None = None  # what result.json calls the distance
    title: str | None = None  # what a bar says
    weights_hash: str | None = None  # SHA-256 of the weights, in hex, if there are any
    logits: Callable | None = None  # of features, returns (B, C) of classes, for the Inception score


def feature_space(
    name, device, batch_size=64, inception=None, clip=None, sscd=None, how="published", torchscript=False
):
    """The `FeatureSpace` of a name, one of `COPIES` or of the values of `FRECHET`.

    Args:
        device, batch_size: of its network, and images per call of it.
        sscd, how, torchscript: SSCD's file, which of PREPROCESS, and whether it may be TorchScript.
        inception, clip: file of `score.inception.find_weights`, and folder of `load_clip`.

    Raises:
        DataError, UsageError: the weights cannot be read."""
    settings = {"device": device, "batch_size": batch_size}
    if name == "pooled pixels":
        return POOLED_PIXELS
    if name == "inception":
        return inception_space(inception, **settings)
    if name == "clip":
        features = partial(clip_features, load_clip(clip, device)[0])
        return FeatureSpace(name, features, weights_hash=content_hash(clip), **settings)
    if name == "sscd":
        network = load_sscd(sscd, torchscript).to(device)
        features = partial(sscd_features, network, device, how)
        of_sscd = {"threshold": COPY, "preprocess": how, "weights_hash": file_hash(sscd)}
        return FeatureSpace(name, features, **of_sscd, **settings)
    if name == "pixels":
        return FeatureSpace(name, partial(standardised, device), **settings)
    raise ValueError(f"{name}: no feature space")


def standardised(device, images):
    """uint8 images (B, 3, H, W) -> (B, 3*H*W): values less their mean, over their deviation.

    Their cosine similarity is the correlation of pixels: unrelated images may be as alike as copies."""
    return F.layer_norm(images.to(device).float(), images.shape[1:]).flatten(1)


def inception_space(weights, device="cpu", batch_size=50):
    """The space of FID and the Inception score; weights: file of `load_inception`.

    Warns if it is not the published file, since its FID cannot be compared with published ones."""
    weights_hash = file_hash(weights)
    if not weights_hash.startswith(WEIGHTS_HASH):
        what = "not the published Inception weights, FID is comparable to itself only"
        warnings.warn(f"{weights}: {what}", stacklevel=2)
    network, class_weight = load_inception(weights, device)
    features = partial(inception_features, network, device)
    logits = partial(inception_logits, class_weight)
    frechet = {"dimension": DIMENSION, "distance": "fid", "title": "Inception", "logits": logits}
    return FeatureSpace("inception", features, device, batch_size, weights_hash=weights_hash, **frechet)


def pooled(images):
    """uint8 images (N, 3, H, W) -> float32 (N, 192): pixels in [0, 1], average-pooled to (3, 8, 8).

    Where 8 does not divide the size the windows overlap by a pixel, and smaller images have pixels
    repeated (torch's adaptive average pooling)."""
    return F.adaptive_avg_pool2d(images.float() / 255, 8).flatten(1)


POOLED_PIXELS = FeatureSpace("pixels", pooled, batch_size=1024, dimension=192, distance="fpd", title="pooled pixels")


class GeM(nn.Module):
    """Generalised mean over the positions of an image: (B, C, H, W) to (B, C, 1, 1)."""

    def __init__(self, p=3.0):
        super().__init__()
        self.p = p

    def forward(self, x):
        return x.clamp(min=1e-6).pow(self.p).mean(dim=(2, 3), keepdim=True).pow(1 / self.p)


def load_sscd(path, allow_torchscript=False):
    """SSCD's network, which embeds preprocessed images: ResNet-50, GeM pooling and a linear layer.

    path: sscd_disc_mixup.torchvision.pt, or weights of that form, or TorchScript, if it is allowed.

    Raises:
        DataError: no such file, or it holds something else.
        UsageError: it is TorchScript, which holds code, and that is not allowed."""
    from torchvision.models import resnet50  # takes a second

    names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
    if any(name.endswith("/constants.pkl") for name in names):  # it is TorchScript
        if not allow_torchscript:
            advice = "take the .torchvision.pt file, or trust it by --allow_torchscript"
            raise UsageError(f"--sscd={path}: is TorchScript, which runs code: {advice}")
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


def sscd_features(network, device, how, images):
    """SSCD's features of uint8 images (B, 3, H, W): (B, D); how: one of PREPROCESS."""
    return network(preprocessed(images.to(device), *PREPROCESS[how]))


def preprocessed(images, shorter, side, mean, std):
    """uint8 (B, 3, H, W) -> float32 (B, 3, side, side): resized, the centre cut out, normalised."""
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
        UsageError: transformers is not installed."""
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


def clip_features(model, images):
    """CLIP's features of uint8 images (B, 3, H, W): (B, D)."""
    side = model.config.vision_config.image_size
    pixels = preprocessed(images.to(model.device), side, side, *CLIP_NORMALIZE)
    return model.visual_projection(model.vision_model(pixels).pooler_output)

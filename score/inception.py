"""The 2015 Inception network that FID and the Inception score are defined by.

Structure and weights are those of pytorch-fid, so that the numbers agree with `python -m pytorch_fid`.
"""

import socket
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from utils import distributed
from utils.errors import DataError, one_line

WEIGHTS_NAME = "pt_inception-2015-12-05-6726825d.pth"
FID_WEIGHTS_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS_NAME}"
WEIGHTS_HASH = "6726825d"  # the first digits of the SHA-256 of the published file
DIMENSION = 2048  # of the features
CLASSES = 1008
CONNECT_SECONDS = 3


def find_weights(path=None):
    """Path of the weights: `path` if given, else torch hub's cache, else pytorch-fid's download into it.

    The download is kept only if its SHA-256 begins with 6726825d.

    Raises:
        DataError: `path` is no file, or the weights cannot be had: it shows within seconds."""
    if path is not None:
        if not Path(path).is_file():
            raise DataError(f"--inception_weights={path}: no such file")
        return Path(path)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_NAME
    if not cached.is_file():
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(CONNECT_SECONDS)  # torch's download has none
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            shown = distributed.is_main() and sys.stderr.isatty()
            torch.hub.download_url_to_file(FID_WEIGHTS_URL, str(cached), WEIGHTS_HASH, progress=shown)
        except Exception as error:  # of sockets, of HTTP, of the disk, or another hash
            what = f"the Inception weights are not in {cached.parent} and can't be downloaded ({one_line(error)})"
            advice = "copy the file there, or name it with --inception_weights"
            last = "or use --fid_features=pixels, which needs none"
            raise DataError(f"{WEIGHTS_NAME}: {what}: {advice}, {last}") from None
        finally:
            socket.setdefaulttimeout(before)
    return cached


def load_inception(weights_path, device="cpu"):
    """Inception v3 without its last layer, and the weight of that, (1008, 2048); or a DataError."""
    network = build_network()
    try:
        network.load_state_dict(torch.load(weights_path, map_location="cpu", weights_only=True))
    except Exception as error:  # a damaged or hostile file can make the unpickler raise anything
        what = f"not the Inception weights of pytorch-fid ({one_line(error)[:300]})"
        raise DataError(f"{weights_path}: {what}") from None
    network.requires_grad_(False).eval().to(device)
    class_weight, network.fc = network.fc.weight, nn.Identity()
    # Convolutions run 1.3 times as fast in this layout, also on a CPU.
    return network.to(memory_format=torch.channels_last), class_weight


def inception_features(network, device, images):
    """uint8 images (B, 3, H, W) on any device -> features (B, 2048) on the network's device.

    The images are scaled to [0, 1], resized to 299 x 299 bilinearly with neither aligned corners nor
    antialiasing, and scaled to [-1, 1]."""
    x = images.to(device).float() / 255
    x = 2 * F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False) - 1
    # in full float32 whatever --precision says: the FID is compared with others
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
        return network(x.contiguous(memory_format=torch.channels_last))


def inception_logits(class_weight, features):
    """Features (B, 2048) -> logits (B, 1008): the features times the final weight, without its bias."""
    # in float64, which is never rounded to TF32
    return F.linear(features.double(), class_weight.double()).float()


def build_network():
    """pytorch-fid's variant of torchvision's Inception v3, with random weights and 1,008 classes."""
    # these take a second, which commands without Inception need not wait
    from pytorch_fid.inception import FIDInceptionA, FIDInceptionC, FIDInceptionE_1, FIDInceptionE_2
    from torchvision.models import inception

    def last_block(in_channels):
        return FIDInceptionE_1(in_channels) if in_channels == 1280 else FIDInceptionE_2(in_channels)

    blocks = [inception.BasicConv2d, FIDInceptionA, inception.InceptionB, FIDInceptionC]
    blocks += [inception.InceptionD, last_block, inception.InceptionAux]
    settings = {"num_classes": CLASSES, "aux_logits": False, "init_weights": False}
    return inception.Inception3(inception_blocks=blocks, **settings)

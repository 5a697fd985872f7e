"""What a fine-tuning was run with, taken from its log directory for the evaluation of its UNet."""

from pathlib import Path

import torch

from text_to_image.pipeline import FROZEN, settings_of_run
from training.flags import PATH_FLAGS
from training.recorded import recorded_flags
from utils.errors import UsageError
from utils.files import content_hash
from utils.images import fingerprint


def take_flags(values, unet_folder):
    """Give flags of the pipeline and the images that were not given the values of a UNet's training.

    Raises:
        UsageError: images are to be generated, and no pipeline is known, or --resolution is another."""
    logdir, settings = unet_folder.parent.parent, settings_of_run(unet_folder) or {}
    recorded, resolution = recorded_flags(logdir), settings.get("resolution", values.resolution)
    if values["resolution"].present and values.resolution != resolution and not values.samples:
        what = f"the UNet of {logdir} was trained with {resolution}"
        raise UsageError(f"--resolution={values.resolution}: {what}: leave the flag out")
    names = [*PATH_FLAGS, "captions", "resolution", "cache_dir", "caption_mode"]
    for name in names + ([] if values.samples else ["pretrained"]):
        if not values[name].present and name in recorded:
            values[name].parse(recorded[name])
    if not values.pretrained and not values.samples:
        raise UsageError(f"give --pretrained: {logdir} does not say of which pipeline --unet={values.unet} is")


def check_pipeline_of_training(values, folder, unet_folder):
    """Raise a UsageError unless a UNet was trained with this pipeline, or it is unknown with which."""
    logdir, settings = unet_folder.parent.parent, settings_of_run(unet_folder) or {}
    parts, known = FROZEN, settings.get("pipeline (sha256)")
    is_another = known not in (None, content_hash(folder, *FROZEN))
    if unet_folder.is_file():  # a LoRA, which needs the UNet that it started from
        parts, known = (*FROZEN, "unet"), settings.get("unet (sha256)")
        is_another = is_another or known not in (None, content_hash(folder / "unet"))
    if is_another:
        first = Path(recorded_flags(logdir).get("pretrained", ""))
        parts = [part for part in parts if (first / part).is_dir()]
        parts = [part for part in parts if content_hash(first, part) != content_hash(folder, part)]
        others = " and ".join(parts) or "pipeline"
        what = f"{logdir}/run.json says that its UNet was trained with another {others}"
        advice = "give the pipeline of that training, or --unet a copy of"
        raise UsageError(f"--pretrained={values.pretrained}: {what}: {advice} {unet_folder} that lies elsewhere")


def differences(values, unet_folder, data):
    """What is to be said where the `CaptionedImages` may not be those of a UNet's training, or None."""
    of_run = settings_of_run(unet_folder) or {}
    if not {"pipeline (sha256)", "training images (sha256)"} <= of_run.keys():
        what = "no run.json beside it says which pipeline and images it was trained with"
        return f"--unet={values.unet}: {what}: these may be others"
    now = content_of(data)
    others = [name.partition(" (")[0] for name, sha in now.items() if of_run.get(name, sha) != sha]
    what = f"not the {' and '.join(others)} of the training"
    return f"--data_root={values.data_root}: {what}" if others else None


def content_of(data):
    """What run.json says of the `CaptionedImages` of a training."""
    captions = torch.frombuffer(bytearray(repr(data.captions).encode()), dtype=torch.uint8)
    return {"training images (sha256)": fingerprint(data.images), "captions (sha256)": fingerprint(captions)}

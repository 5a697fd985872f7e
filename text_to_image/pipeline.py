"""Stable Diffusion in diffusers' format: read from a folder without running what is in it, trained, sampled, saved."""

import hashlib
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from training.batches import normalize
from utils import distributed
from utils.errors import DataError, UsageError
from utils.files import file_hash, read_json, writable
from utils.safe_files import one_line

FILES = ("*.json", "*/*.json", "*/*.txt", "*/*.safetensors")  # what is downloaded: nothing that can run
PREDICTIONS = ("epsilon", "v_prediction")
ROUND = r"checkpoint_round(\d+)"


def libraries():
    """diffusers and transformers: imported where they are needed, since that takes seconds."""
    try:
        import diffusers
        import transformers
    except ImportError as error:
        raise UsageError(f"text_to_image needs {error.name}: pip install -r requirements-text.txt") from error
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    return diffusers, transformers


def find_folder(name, download=False):
    """The folder that `--pretrained` names: itself, or the files of a model of the Hugging Face hub.

    Raises:
        DataError: it is neither here nor in the hub's cache, and not to be downloaded, or not Stable Diffusion.
    """
    folder = Path(name)
    if not folder.is_dir():
        import huggingface_hub

        try:
            folder = Path(
                huggingface_hub.snapshot_download(str(name), allow_patterns=FILES, local_files_only=not download)
            )
        except Exception as error:  # of the network, the hub, or a name that cannot be one of its
            what = f"cannot be downloaded ({one_line(error)})" if download else "no such folder"
            raise DataError(f"--pretrained={name}: {what}: name a folder in diffusers' format") from error
    if not (folder / "model_index.json").is_file():
        raise DataError(f"--pretrained={name}: no model_index.json in it: name a folder in diffusers' format")
    kind = read_json(folder / "model_index.json").get("_class_name")
    if kind != "StableDiffusionPipeline":
        raise DataError(f"--pretrained={name}: is a {kind}: give a StableDiffusionPipeline (1.x or 2.x)")
    return folder


def load_pipeline(folder, unet_folder):
    """diffusers' StableDiffusionPipeline, on the CPU in float32; its VAE and text encoder are frozen.

    Args:
        folder: of `find_folder`.
        unet_folder: of the UNet.

    Raises:
        DataError: a part is missing, damaged, or only there as a pickle; the scheduler's prediction is unknown.
    """
    diffusers, transformers = libraries()
    unet = load_unet(unet_folder)
    vae = read_part(diffusers.AutoencoderKL, folder / "vae", low_cpu_mem_usage=False).eval().requires_grad_(False)
    text_encoder = read_part(transformers.CLIPTextModel, folder / "text_encoder").eval().requires_grad_(False)
    settings = read_json(folder / "scheduler" / "scheduler_config.json")
    if settings.get("prediction_type", "epsilon") not in PREDICTIONS:
        raise DataError(f"{folder}/scheduler: prediction_type must be {' or '.join(PREDICTIONS)}")
    scheduler = getattr(diffusers, str(settings.get("_class_name")), None)
    if not (isinstance(scheduler, type) and issubclass(scheduler, diffusers.SchedulerMixin)):
        raise DataError(f"{folder}/scheduler: {settings.get('_class_name')} is no scheduler of diffusers")
    try:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except Exception as error:  # of files that are no JSON, or lack something
        raise DataError(f"{folder}/tokenizer: cannot be read ({one_line(error)})") from error
    pipeline = diffusers.StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler.from_config(settings), None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_unet(folder):
    """diffusers' UNet2DConditionModel in a folder, on the CPU in float32; raises a DataError."""
    return read_part(libraries()[0].UNet2DConditionModel, folder, low_cpu_mem_usage=False)


def read_part(kind, folder, **settings):
    """A network of a pipeline, from safetensors only, with every one of its weights in the file."""
    settings |= {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    try:
        network, info = kind.from_pretrained(folder, **settings)
    except Exception as error:  # a damaged file can make the libraries raise anything
        raise DataError(f"{folder}: cannot be read ({one_line(error)[:300]}); pickles are refused") from error
    if info["missing_keys"]:
        raise DataError(f"{folder}: the weights lack {min(info['missing_keys'])} of its {kind.__name__}")
    return network


def find_unet(name):
    """The folder of a UNet that `--unet` names: itself, its unet/, or the newest round of a log directory.

    Raises:
        DataError: there is none.
    """
    folder = Path(name)
    rounds = {int(m[1]): path for path in folder.glob("*") if (m := re.fullmatch(ROUND, path.name))}
    for place in (folder, folder / "unet", *(rounds[r] / "unet" for r in sorted(rounds, reverse=True))):
        if (place / "config.json").is_file():
            return place
    raise DataError(f"--unet={name}: no UNet in diffusers' format in it: name a folder with checkpoint_round*/unet")


def save_unet(unet, weights, folder):
    """Write `folder`/unet as diffusers does, with weights for this UNet; it is there as a whole or not at all."""
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.tmp")
    with writable(folder, "check the directory and its space"):
        shutil.rmtree(temporary, ignore_errors=True)
        unet.save_config(temporary / "unet")
        weights = {name: value.cpu().contiguous() for name, value in weights.items()}
        save_file(weights, temporary / "unet" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        if folder.exists():  # of a start that has been killed since: the same weights
            shutil.rmtree(folder)
        temporary.rename(folder)


def remove_unets(logdir):
    """Remove what `save_unet` has written in a log directory."""
    for path in Path(logdir).glob("checkpoint_round*/unet"):
        with writable(path, "it was to be removed, check the directory"):
            shutil.rmtree(path)
            if not any(path.parent.iterdir()):
                path.parent.rmdir()


def content_hash(folder, *parts):
    """SHA-256 of the names and contents of the files in a folder, or in those of its sub-folders, in hex."""
    digest = hashlib.sha256()
    for path in sorted(path for part in parts or [""] for path in (Path(folder) / part).iterdir() if path.is_file()):
        digest.update(f"{path.relative_to(folder)} {file_hash(path)}\n".encode())
    return digest.hexdigest()


@torch.no_grad()
def latent_moments(vae, images):
    """Mean and standard deviation of the latents of images (B, 3, H, W) uint8: (B, 2, C, h, w) float32."""
    latents = vae.encode(normalize(images.to(vae.device))).latent_dist
    return torch.stack([latents.mean, latents.std], dim=1)


def encode_images(vae, images, batch_size=16):
    """`latent_moments` of images (N, 3, H, W) and of their mirror images: (N, 2, 2, C, h, w) float16 on the CPU."""
    blocks = distributed.bar(images.split(batch_size), "encoding images", unit="batch", delay=1)
    both = [torch.stack([latent_moments(vae, x), latent_moments(vae, x.flip(-1))], dim=1).half().cpu() for x in blocks]
    return torch.cat(both)


@torch.no_grad()
def encode_captions(pipeline, captions, batch_size=64):
    """The text encoder's last hidden states of B captions: (B, L, D) float16, on the text encoder's device."""
    tokens = pipeline.tokenizer(
        captions,
        padding="max_length",
        truncation=True,
        max_length=pipeline.tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids.to(pipeline.text_encoder.device)
    return torch.cat([pipeline.text_encoder(block)[0].half() for block in tokens.split(batch_size)])


class LatentTrainer(nn.Module):
    """The squared error of a text-conditioned UNet on latents, for epsilon or v as the scheduler says.

    Args:
        unet: diffusers' UNet2DConditionModel.
        scheduler: diffusers' DDPMScheduler.
        parts: compute a batch in so many parts, each with its own activations, which the backward pass makes again:
            the result is that of the whole batch.
    """

    def __init__(self, unet, scheduler, parts=1):
        super().__init__()
        self.unet, self.scheduler, self.parts = unet, scheduler, parts

    def forward(self, x_0, text, t, eps):
        """x_0, eps (B, C, h, w); text (B, L, D); t (B,) int64. Returns (B, C, h, w) float32, unreduced."""
        x_t = self.scheduler.add_noise(x_0, eps, t)
        target = eps
        if self.scheduler.config.prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(x_0, eps, t)
        if self.parts == 1:
            prediction = self.predict(x_t, t, text)
        else:
            parts = zip(*(value.chunk(self.parts) for value in (x_t, t, text)), strict=True)
            prediction = torch.cat([recompute(self.predict, *part, use_reentrant=False) for part in parts])
        return (prediction.float() - target).square()

    def predict(self, x_t, t, text):
        return self.unet(x_t, t, text, return_dict=False)[0]


@torch.no_grad()
def generate(pipeline, prompts, latents, steps, guidance, streams=None, text_noise=0.0):
    """Images (B, 3, H, W) in [0, 1] of B prompts, from standard normal latents (B, C, h, w).

    Args:
        steps, guidance: of diffusers; guidance above 1 takes two predictions, without the prompt and with it.
        streams: B generators on the CPU, for the noise of the scheduler and of the text.
        text_noise: standard deviation of noise on the text states, with and without the prompt.
    """
    text = pipeline.encode_prompt(prompts, pipeline.device, 1, guidance > 1)
    if text_noise:
        text = [
            None if states is None else states + text_noise * torch.stack([noise_like(states[0], s) for s in streams])
            for states in text
        ]
    settings = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": streams, "output_type": "pt"}
    settings |= {"prompt_embeds": text[0], "negative_prompt_embeds": text[1]}
    height, width = (pipeline.vae_scale_factor * side for side in latents.shape[-2:])
    return pipeline(height=height, width=width, latents=latents.to(pipeline.device), **settings).images.float()


def noise_like(states, stream):
    """Standard normal noise of a tensor's shape, drawn on the CPU."""
    return torch.randn(states.shape, generator=stream).to(states)

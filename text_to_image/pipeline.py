"""Stable Diffusion in diffusers' format: read without running what is in it, trained, sampled, saved."""

import contextlib
import copy
import json
import logging
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from utils.bar import progress_bar
from utils.errors import DataError, UsageError, one_line
from utils.files import writable
from utils.images import non_finite_images, normalize
from utils.safe_files import read_text
from utils.seeding import generator, sample_noise

FILES = ("*.json", "*/*.json", "*/*.txt", "*/*.safetensors")  # what is downloaded: nothing that can run
FROZEN = ("vae", "text_encoder", "tokenizer", "scheduler")  # the parts that are not trained
PREDICTIONS = ("epsilon", "v_prediction")
# that take Stable Diffusion from noise to image, besides diffusers' KarrasDiffusionSchedulers
SCHEDULERS = ("LCMScheduler", "TCDScheduler", "SASolverScheduler", "DDIMParallelScheduler", "DDPMParallelScheduler")
# what else than latents, time and text a UNet can be told: nothing here knows what to say
CONDITIONS = "class_embed_type num_class_embeds addition_embed_type time_cond_proj_dim".split()
CONDITIONS += ["encoder_hid_dim", "encoder_hid_dim_type"]
ROUND = r"checkpoint_round(\d+)"
CHECKPOINT = r"(?:best_)?checkpoint_(round|step)(\d+)"  # all folders that a run makes for UNets or LoRAs
LORA_FILE = "pytorch_lora_weights.safetensors"  # as diffusers calls it
LATENT_SIDE = 8  # diffusers' pipeline makes images of multiples of it, whatever the VAE can do


def libraries():
    """diffusers and transformers: imported where they are needed, since that takes seconds."""
    try:
        import diffusers
        import peft  # noqa: F401, which diffusers loads a LoRA with
        import transformers
    except ImportError as error:
        raise UsageError(f"text_to_image needs {error.name}: pip install -r requirements-text.txt") from error
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity(logging.CRITICAL)  # what fails is an exception, too
        library.utils.logging.disable_progress_bar()
    return diffusers, transformers


def find_folder(name, download=False):
    """The folder that `--pretrained` names: itself, or that of a model of the hub; or a DataError."""
    folder = Path(name)
    if folder.is_file():
        how = "with diffusers, StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
        raise DataError(f"--pretrained={name}: is a file: convert it {how}, and give the folder")
    if not folder.is_dir():
        import huggingface_hub

        try:
            settings = {"allow_patterns": FILES, "local_files_only": not download}
            folder = Path(huggingface_hub.snapshot_download(str(name), **settings))
        except Exception as error:  # of the network, the hub, or a name that cannot be one of its
            what = "no such folder:"
            if download:
                what = f"cannot be downloaded ({one_line(error)}):"
            elif re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(name)):  # as the hub's names are
                what = "no such folder, and no model of the hub that was downloaded: add --download to fetch it, or"
            raise DataError(f"--pretrained={name}: {what} name a folder in diffusers' format") from error
    if not (folder / "model_index.json").is_file():
        advice = "name a folder in diffusers' format"
        if (folder / "config.json").is_file():
            advice = "it holds one part of a pipeline, give the whole (a UNet alone is for --unet)"
        for inside in sorted([*folder.glob("*/model_index.json"), *folder.glob("snapshots/*/model_index.json")]):
            advice = f"give {inside.parent}"
        raise DataError(f"--pretrained={name}: no model_index.json in it: {advice}")
    kind = read_config(folder / "model_index.json").get("_class_name")
    if kind != "StableDiffusionPipeline":
        what = "Stable Diffusion 1.x and 2.x are supported, XL and flow matching are not"
        raise DataError(f"--pretrained={name}: is a {kind}: give a StableDiffusionPipeline: {what}")
    return folder


def load_pipeline(folder, unet_folder):
    """diffusers' StableDiffusionPipeline, on the CPU in float32, with a frozen VAE and text encoder.

    Raises:
        DataError: a part is missing, damaged, only there as a pickle, or does not fit the others."""
    diffusers, transformers = libraries()
    scheduler = read_scheduler(folder / "scheduler")
    unet = load_unet(unet_folder)
    vae = read_part(diffusers.AutoencoderKL, folder / "vae", low_cpu_mem_usage=False).eval().requires_grad_(False)
    text_encoder = read_part(transformers.CLIPTextModel, folder / "text_encoder").eval().requires_grad_(False)
    try:
        kind = transformers.CLIPTokenizer
        tokenizer = kind.from_pretrained(folder / "tokenizer", local_files_only=True)
    except Exception as error:  # of files that are no JSON, or lack something
        raise DataError(f"{folder}/tokenizer: cannot be read ({one_line(error)})") from error
    # a tokenizer that does not say what the text encoder takes would pad to 10^30 tokens
    limit = text_encoder.config.max_position_embeddings
    tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    check_fit(folder, unet_folder, unet, vae, text_encoder, tokenizer)
    pipeline = diffusers.StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def check_fit(folder, unet_folder, unet, vae, text_encoder, tokenizer):
    """Raise a DataError where parts of a pipeline are not made for each other, which names both."""
    for name in CONDITIONS:
        if unet.config.get(name) is not None:
            what = f"its {name} is {unet.config[name]}, so it wants more than latents, time and text"
            advice = f"as {folder} gives it: give a UNet of Stable Diffusion 1.x or 2.x"
            raise DataError(f"{unet_folder}: {what}, {advice}")
    tokens, width = max(tokenizer.get_vocab().values()) + 1, unet.config.cross_attention_dim
    if isinstance(width, (list, tuple)) and len(set(width)) == 1:  # the same in all its blocks
        width = width[0]
    channels = f"latent_channels of {folder}/vae", vae.config.latent_channels
    encoder = f"{folder}/text_encoder"
    for of, name, value, (other, wanted) in (
        (unet_folder, "in_channels", unet.config.in_channels, channels),
        (unet_folder, "out_channels", unet.config.out_channels, channels),
        (unet_folder, "cross_attention_dim", width, (f"hidden_size of {encoder}", text_encoder.config.hidden_size)),
        (f"{folder}/vae", "in_channels", vae.config.in_channels, ("channels of an image", 3)),
        (f"{folder}/vae", "out_channels", vae.config.out_channels, ("channels of an image", 3)),
    ):
        if value != wanted:
            raise DataError(f"{of}: its {name} is {value}, the {other} {wanted}: give one that fits the other")
    if tokens > text_encoder.config.vocab_size:
        what = f"has {tokens} tokens, the vocab_size of {encoder} is {text_encoder.config.vocab_size}"
        raise DataError(f"{folder}/tokenizer: {what}: give one that fits the other")


def read_scheduler(folder):
    """diffusers' scheduler in a folder, if Stable Diffusion can be sampled by it; or a DataError."""
    diffusers, _ = libraries()
    settings = read_config(folder / "scheduler_config.json")
    name, prediction = settings.get("_class_name"), settings.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise DataError(f"{folder}: prediction_type must be {' or '.join(PREDICTIONS)}")
    kind = getattr(diffusers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise DataError(f"{folder}: {name} is no scheduler of diffusers")
    try:
        scheduler = kind.from_config(settings)
    except Exception as error:  # of settings that the class does not know
        what = f"{name} cannot be made of its settings ({one_line(error)[:200]})"
        raise DataError(f"{folder}: {what}") from error
    alphas = getattr(scheduler, "alphas_cumprod", None)
    known = {*SCHEDULERS, *diffusers.schedulers.KarrasDiffusionSchedulers.__members__}
    if alphas is None or name not in known or settings.get("use_flow_sigmas"):
        what = f"{name} has not the betas of noise that Stable Diffusion is trained with"
        raise DataError(f"{folder}: {what}: give a scheduler such as DDIMScheduler or PNDMScheduler")
    T = scheduler.config.num_train_timesteps
    if len(alphas) != T or not ((alphas >= 0) & (alphas <= 1)).all():
        raise DataError(f"{folder}: its betas are not {T} numbers in [0, 1], one for each of num_train_timesteps")
    if prediction == "epsilon" and (settings.get("rescale_betas_zero_snr") or alphas[-1] == 0):
        what = "its last timestep is noise alone (zero terminal SNR), of which epsilon says nothing"
        advice = "give a pipeline of v_prediction, or betas without rescale_betas_zero_snr"
        raise DataError(f"{folder}: {what}: {advice}")
    return scheduler


def as_scheduler(kind, scheduler, use):
    """A scheduler of the class `kind` with a scheduler's noise, or a DataError; use: what it is for."""
    name = type(scheduler).__name__
    try:
        made = getattr(libraries()[0], kind).from_config(scheduler.config)
    except Exception as error:  # of settings that the class does not know
        what = f"cannot be made of the pipeline's {name} ({one_line(error)})"
        raise DataError(f"{kind}, for {use}, {what}") from error
    ours, theirs = made.alphas_cumprod, scheduler.alphas_cumprod
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-6):
        what = f"{kind}, for {use}, has other betas than the pipeline's {name} has"
        advice = "write beta_schedule, beta_start and beta_end into scheduler_config.json"
        raise DataError(f"{what}: {advice}, or give another scheduler")
    return made


def check_steps(scheduler, steps):
    """Raise a UsageError where a scheduler cannot take so many steps: it is tried, without a network."""
    T = scheduler.config.num_train_timesteps
    reason = f"give at most {T}"
    if steps <= T:
        x, scheduler, reason = torch.zeros(1, 1, 1, 1), copy.deepcopy(scheduler), None
        try:
            scheduler.set_timesteps(steps)
            for t in scheduler.timesteps:
                x = scheduler.step(scheduler.scale_model_input(x, t), t, x).prev_sample
        except Exception as error:  # such as an index beyond the last timestep
            reason = f"cannot take so many ({one_line(error)[:200]}), give another number"
    if reason:
        name, offset = type(scheduler).__name__, scheduler.config.get("steps_offset", 0)
        what = f"the pipeline's {name} has {T} timesteps and steps_offset {offset}"
        raise UsageError(f"--sample_steps={steps}: {what}: {reason}")


def load_unet(folder):
    """diffusers' UNet2DConditionModel in a folder, on the CPU in float32; raises a DataError."""
    return read_part(libraries()[0].UNet2DConditionModel, folder, low_cpu_mem_usage=False)


def read_part(kind, folder, **settings):
    """A network of a pipeline in float32, from safetensors only, which must hold exactly its weights."""
    settings |= {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    try:
        network, info = kind.from_pretrained(folder, **settings)
    except Exception as error:  # a damaged file can make the libraries raise anything
        variants = [path.name for path in sorted(Path(folder).glob("*model.*.safetensors"))]
        if variants and not list(Path(folder).glob("*model.safetensors")):
            ours = f"{variants[0].split('.')[0]}.safetensors"
            raise DataError(f"{folder}: holds {variants[0]} only: rename it to {ours}, or add that file") from error
        raise DataError(f"{folder}: cannot be read ({one_line(error)[:300]}); pickles are refused") from error
    if info["missing_keys"]:
        raise DataError(f"{folder}: the weights lack {min(info['missing_keys'])} of its {kind.__name__}")
    if info["unexpected_keys"]:
        what = f"{min(info['unexpected_keys'])} in the weights has no place in its {kind.__name__}"
        raise DataError(f"{folder}: {what}: config.json beside it is of another network")
    return network.float()


def read_config(path):
    """The dict in a JSON file of a pipeline; raises a DataError."""
    try:
        return dict(json.loads(read_text(path)))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({one_line(error)}): fetch it again") from error


def find_unet(name):
    """The folder of a UNet, or a LoRA's file, that `--unet` names: itself, or in it the newest.

    In the log directory of a LoRA's training it is a LoRA."""
    folder = Path(name)
    if folder.is_file() and folder.suffix == ".safetensors":
        return folder
    rounds = {int(m[1]): path for path in folder.glob("*") if (m := re.fullmatch(ROUND, path.name))}
    for place in (folder, *(rounds[r] for r in sorted(rounds, reverse=True))):
        is_lora = (settings_of_run(place / "unet") or {}).get("lora_rank")
        for unet in (place,) if is_lora else (place, place / "unet"):
            if (unet / "config.json").is_file():
                return unet
        if (place / LORA_FILE).is_file():
            return place / LORA_FILE
    what = f"no UNet in diffusers' format in it, and no {LORA_FILE}"
    if not folder.exists():
        what = "no such file or folder"
    raise DataError(f"--unet={name}: {what}: name a folder with checkpoint_round*, or a LoRA's file")


def settings_of_run(unet_folder):
    """The settings in the run.json of the log directory of a UNet, a dict; None where there is none."""
    path = Path(unet_folder).parent.parent / "run.json"
    settings = read_config(path).get("settings") if path.is_file() else None
    return settings if isinstance(settings, dict) else None


def save_unet(unet, weights, folder):
    """Write `folder`/unet as diffusers does, with these weights: it is there whole or not at all."""
    place, temporary = Path(folder) / "unet", Path(folder) / ".unet.tmp"
    weights = {name: value.cpu().contiguous() for name, value in weights.items()}
    try:
        with writable_weights(folder):
            shutil.rmtree(temporary, ignore_errors=True)
            unet.save_config(temporary)
            save_file(weights, temporary / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
            shutil.rmtree(place, ignore_errors=True)  # of a start that was killed: the same weights
            temporary.rename(place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def writable_weights(folder):
    """As `utils.files.writable`, also for safetensors, whose errors of the disk are no OSError."""
    with writable(folder, "check the directory and its space"):
        try:
            yield
        except SafetensorError as error:
            raise OSError(one_line(error)) from error


def unets_in(logdir, pattern):
    """The paths of UNets, or LoRAs, in the folders of a log directory whose names match a pattern."""
    folders = [path for path in sorted(Path(logdir).glob("*")) if re.fullmatch(pattern, path.name)]
    places = [folder / name for folder in folders for name in ("unet", LORA_FILE)]
    return [place for place in places if place.exists()]


def remove_unets(logdir, pattern=CHECKPOINT, but=()):
    """Remove the UNets, or LoRAs, that a run has written in folders of a log directory, but in those named."""
    for path in unets_in(logdir, pattern):
        if path.parent.name in but:
            continue
        with writable(path, "it was to be removed, check the directory"):
            path.unlink() if path.is_file() else shutil.rmtree(path)
            if not any(path.parent.iterdir()):
                path.parent.rmdir()


@torch.no_grad()
def latent_moments(vae, images):
    """Mean and deviation of the latents of images (B, 3, H, W) uint8: (B, 2, C, h, w) float32."""
    latents = vae.encode(normalize(images.to(vae.device))).latent_dist
    return torch.stack([latents.mean, latents.std], dim=1)


def vae_batch(images):
    """How many of images (N, 3, H, W) the VAE takes at once: memory as of 16 with 256 x 256 pixels."""
    return max(1, min(16, 16 * 256**2 // images[0, 0].numel()))


def encode_images(vae, images, batch_size=None):
    """`latent_moments` of images (N, 3, H, W) and of their mirror images: (N, 2, 2, C, h, w) float16."""
    blocks = images.split(batch_size or vae_batch(images))
    blocks = progress_bar(blocks, "encoding images", unit="batch", delay=1)
    both = ([latent_moments(vae, x), latent_moments(vae, x.flip(-1))] for x in blocks)
    moments = torch.cat([torch.stack(pair, dim=1).half().cpu() for pair in both])
    if bad := int(non_finite_images(moments).sum()):
        raise DataError(f"the VAE's latents of {bad} of {len(images)} images are not finite in float16: give another")
    return moments


@torch.no_grad()
def encode_captions(pipeline, captions, batch_size=64):
    """The text states of B captions, as in sampling: (B, L, D) float16, on the text encoder's device."""
    device, blocks = pipeline.text_encoder.device, range(0, len(captions), batch_size)
    texts = [list(captions[start : start + batch_size]) for start in blocks]
    states = torch.cat([pipeline.encode_prompt(block, device, 1, False)[0].half() for block in texts])
    if not states.isfinite().all():
        raise DataError("the text encoder's states of captions are not finite in float16: give another --pretrained")
    return states


class LatentTrainer(nn.Module):
    """The squared error of a text-conditioned UNet on latents, for epsilon or v as the scheduler says.

    Args:
        unet, scheduler: diffusers' UNet2DConditionModel and DDPMScheduler.
        parts: compute a batch in so many parts, each with its own activations, which the backward pass
            makes again: the result is that of the whole batch."""

    def __init__(self, unet, scheduler, parts=1):
        super().__init__()
        self.unet, self.scheduler, self.parts = unet, scheduler, parts

    def forward(self, x_0, text, t, eps):
        """x_0, eps (B, C, h, w); text (B, L, D); t (B,) int64: (B, C, h, w) float32, unreduced."""
        x_t = self.scheduler.add_noise(x_0, eps, t)
        target = eps
        if self.scheduler.config.prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(x_0, eps, t)
        if self.parts == 1:
            return (self.predict(x_t, t, text).float() - target).square()
        parts = zip(*(value.chunk(self.parts) for value in (x_t, t, text)), strict=True)
        prediction = torch.cat([recompute(self.predict, *part, use_reentrant=False) for part in parts])
        return (prediction.float() - target).square()

    def error_of(self, batch):
        return self(batch.x_0, batch.labels, batch.t, batch.eps)

    def predict(self, x_t, t, text):
        return self.unet(x_t, t, text, return_dict=False)[0]


@torch.no_grad()
def generate(pipeline, prompts, latents, steps, guidance, streams=None, text_noise=0.0, dtype=torch.float32):
    """Images (B, 3, H, W) in [0, 1], or NaN, of B prompts, from standard normal latents (B, C, h, w).

    Args:
        steps, guidance: of diffusers; guidance above 1 takes predictions without the prompt and with it.
        streams: B generators on the CPU, for the noise of the scheduler and of the text.
        text_noise: standard deviation of noise on the text states, with and without the prompt.
        dtype: of the UNet's autocast; all else is in float32."""
    text = pipeline.encode_prompt(prompts, pipeline.device, 1, guidance > 1)
    if text_noise:
        text = [states if states is None else states + text_noise * noise_like(states, streams) for states in text]
    settings = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": streams}
    settings |= {"prompt_embeds": text[0], "negative_prompt_embeds": text[1], "output_type": "latent"}
    height, width = (pipeline.vae_scale_factor * side for side in latents.shape[-2:])
    with autocast_unet(pipeline, dtype):
        latents = pipeline(height=height, width=width, latents=latents.to(pipeline.device), **settings).images
    images = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0]
    images = images.where(images.isfinite(), torch.nan)  # clamped, an infinity would pass for white
    return (images * 0.5 + 0.5).clamp(0, 1).contiguous()


def generate_numbered(pipeline, texts, indices, *, seed, resolution, steps, guidance, text_noise, dtype):
    """`generate` of the prompts of numbered images: image i depends on its prompt, the seed and i.

    texts: of all images; resolution: the side of an image in pixels."""
    side = resolution // pipeline.vae_scale_factor
    streams = [generator("cpu", seed, "image", i) for i in indices]
    shape = (pipeline.unet.config.in_channels, side, side)
    latents = torch.stack([torch.randn(shape, generator=stream) for stream in streams])
    prompts = [texts[i] for i in indices]
    return generate(pipeline, prompts, latents, steps, guidance, streams, text_noise, dtype)


def preview(pipeline, unet, prompts, seed, resolution, steps, guidance, dtype):
    """Images of prompts by a UNet, from the same noise at all times: (B, 3, H, W) in [-1, 1]."""
    pipeline.unet, side = unet, resolution // pipeline.vae_scale_factor
    latents = sample_noise(seed, range(len(prompts)), (unet.config.in_channels, side, side), "cpu")()
    x = generate(pipeline, prompts, latents, steps, guidance, dtype=dtype)
    return 2 * x - 1


@contextlib.contextmanager
def autocast_unet(pipeline, dtype):
    """Within it the pipeline's UNet computes in a dtype, and gives its predictions in float32."""
    unet, forward = pipeline.unet, pipeline.unet.forward
    autocast = torch.autocast(pipeline.device.type, dtype, enabled=dtype != torch.float32)

    def cast(*inputs, **settings):
        with autocast:
            return (forward(*inputs, **settings)[0].float(),)

    unet.forward = cast
    try:
        yield
    finally:
        del unet.forward  # that of the class is there again


def noise_like(states, streams):
    """Standard normal noise of a tensor's shape (B, ...), drawn by B streams on the CPU."""
    return torch.stack([torch.randn(states.shape[1:], generator=stream) for stream in streams]).to(states)

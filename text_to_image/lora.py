"""LoRA of a UNet, by peft: products B A of small matrices, added to the weights of some of its layers.

The mean of the shards' B_k A_k is not the mean of B times that of A. It is where all shards have one A,
which is frozen (FFA-LoRA, Sun et al. 2024): several shards train B only, and their average is exact.
"""

import copy
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import nn

from text_to_image.pipeline import LORA_FILE, libraries
from utils.errors import DataError, UsageError, one_line
from utils.files import atomic_write
from utils.seeding import derive_seed

LAYERS = (nn.Linear, nn.Conv2d)  # those that can have a LoRA; autocast has their weights in its dtype


class Adapter(nn.Module):
    """A UNet with a LoRA, of which its state dict is; copies share all parameters that do not train."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, *inputs, **settings):
        return self.unet(*inputs, **settings)

    def __deepcopy__(self, memo):
        shared = {id(value): value for value in self.unet.parameters() if not value.requires_grad}
        return Adapter(copy.deepcopy(self.unet, memo | shared))

    def state_dict(self):
        return {name: value for name, value in self.unet.state_dict().items() if "lora_" in name}

    def load_state_dict(self, state):
        self.unet.load_state_dict({**self.unet.state_dict(), **state})


def add_lora(unet, *, rank, alpha, targets, freeze_a, seed, dtype):
    """Freeze a UNet and add a LoRA to it: A is normal, B zero, both float32.

    Args:
        alpha: the LoRA adds alpha / rank B A.
        targets: what the names of the layers end in that get one.
        freeze_a: only B trains.
        dtype: of autocast, in which the frozen weights are kept that it would cast at every step.

    Raises:
        UsageError: no such layers, or the rank is larger than theirs.
    """
    check_layers(unet, rank, targets)
    from peft import LoraConfig

    torch.manual_seed(derive_seed(seed, "lora"))
    unet.requires_grad_(False)
    settings = {"r": rank, "lora_alpha": alpha, "target_modules": targets}
    unet.add_adapter(LoraConfig(**settings, init_lora_weights="gaussian"))
    for name, module in unet.named_modules():
        if freeze_a and name.endswith("lora_A"):
            module.requires_grad_(False)
        if isinstance(module, LAYERS) and "lora_" not in name:
            module.to(dtype)


def check_layers(unet, rank, targets):
    """Raise a UsageError where `--lora_targets` or `--lora_rank` do not fit a UNet."""
    layers = {name: module for name, module in unet.named_modules() if name}
    for target in targets or [""]:
        found = [name for name in layers if f".{name}".endswith(f".{target}")]
        if not found:
            what = "no layer of the UNet is called so, or so after a dot, as to_k, ff.net.2 or conv1 are"
            raise UsageError(f"--lora_targets={target}: {what}")
        for name in found:
            module = layers[name]
            if not isinstance(module, LAYERS):
                what = f"{name} is of type {type(module).__name__}: name linear layers and convolutions"
                raise UsageError(f"--lora_targets={target}: {what}")
            shape = module.weight.flatten(1).shape
            if rank > min(shape):
                what = f"the weights of {name} are {shape[0]} x {shape[1]}: give at most {min(shape)}"
                raise UsageError(f"--lora_rank={rank}: {what}")


def save_lora(adapter, weights, folder):
    """Write weights of an `Adapter` as a LoRA that diffusers loads, with alpha / rank taken into B."""
    from peft import get_peft_model_state_dict

    config = adapter.unet.peft_config["default"]
    scale = config.lora_alpha / config.r
    weights = {name: scale * value if "lora_B" in name else value for name, value in weights.items()}
    weights = get_peft_model_state_dict(adapter.unet, weights)
    renamed = libraries()[0].utils.convert_state_dict_to_diffusers(weights)
    # only attention layers have other names in diffusers, which reads no file with names of both kinds
    if not any("lora_A" in name for name in renamed):
        weights = renamed
    with atomic_write(Path(folder) / LORA_FILE) as file:
        named = {f"unet.{name}": value.cpu().contiguous() for name, value in weights.items()}
        file.write(save(named, metadata={"format": "pt"}))


def with_alphas(tensors):
    """The tensors of a file of kohya's, {name: value}, with every layer's alpha / rank taken into B."""
    tensors = dict(tensors)
    for name in [name for name in tensors if name.endswith(".alpha")]:
        layer = name.removesuffix(".alpha")
        up, down = f"{layer}.lora_up.weight", f"{layer}.lora_down.weight"
        if up in tensors:
            tensors[up] = tensors[up].float() * (tensors.pop(name).item() / len(tensors[down]))
    return tensors


def load_lora(pipeline, path, scale):
    """Add the LoRA in a file to a pipeline, times a scale; a DataError if not all of it has a place."""
    settings = {"weight_name": path.name, "use_safetensors": True, "local_files_only": True}
    source = path.parent
    advice = "give the LoRA's own --pretrained; of Stable Diffusion 1.x and 2.x they are supported"
    try:
        in_file = load_file(path)
        if any(name.endswith(".alpha") for name in in_file):  # some of which diffusers loses
            source, settings = with_alphas(in_file), {}
        tensors, _ = pipeline.lora_state_dict(copy.copy(source), **settings)  # a dict is emptied
        pipeline.load_lora_weights(source, adapter_name="lora", **settings)
        pipeline.set_adapters("lora", scale)
    except Exception as error:  # a damaged file can make the libraries raise anything
        what = f"cannot be loaded as a LoRA of the pipeline ({one_line(error)[:200]})"
        raise DataError(f"{path}: {what}: {advice}") from error
    if any("dora_scale" in name for name in in_file):
        what = "is a DoRA, whose dora_scale diffusers leaves out"
        raise DataError(f"{path}: {what}: give a LoRA without it")
    parts = pipeline.unet, pipeline.text_encoder
    number = sum("lora_" in name for part in parts for name, _ in part.named_parameters())
    if number != len(tensors):
        what = f"only {number} of its {len(tensors)} tensors have a place in the pipeline"
        raise DataError(f"{path}: {what}: {advice}")

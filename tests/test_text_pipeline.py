"""Pipelines in and out, and the loss, against diffusers' pieces and formulas written out."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.text_files import copy_pipeline, saved_pipeline, tiny_pipeline
from text_to_image.pipeline import (
    LatentTrainer,
    content_hash,
    encode_captions,
    encode_images,
    find_folder,
    find_unet,
    generate,
    libraries,
    load_pipeline,
    save_unet,
)
from utils.errors import DataError

diffusers, transformers = libraries()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_tokenizer_is_that_of_clip():
    """The reference is the tokenizer that OpenAI has published with its list of merges."""
    path = Path(importlib.util.find_spec("clip").origin).parent / "simple_tokenizer.py"
    spec = importlib.util.spec_from_file_location("simple_tokenizer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    reference, tokenizer = module.SimpleTokenizer(), tiny_pipeline().tokenizer
    for text in ("a photo of a cat", "An Image of ÄÖ, naïve café", "yo-yo 2024!! don't 🐶", "CLOCK FACE three-thirty"):
        assert tokenizer(text).input_ids == [49406, *reference.encode(text), 49407]


def test_what_is_saved_is_loaded(folder):
    pipeline = load_pipeline(find_folder(folder), folder / "unet")
    saved = tiny_pipeline()
    for name in ("unet", "vae", "text_encoder"):
        assert equal(getattr(pipeline, name), getattr(saved, name)), name
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert isinstance(pipeline.scheduler, diffusers.DDIMScheduler)
    frozen = [*pipeline.vae.parameters(), *pipeline.text_encoder.parameters()]
    assert not any(parameter.requires_grad for parameter in frozen)


def test_text_encoder_in_the_layout_of_older_transformers(folder, tmp_path):
    """They put text_model. before all names, and saved the positions."""
    folder = copy_pipeline(folder, tmp_path)
    path = folder / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{name}": value for name, value in load_file(path).items()}
    weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(weights, path, metadata={"format": "pt"})
    assert equal(load_pipeline(folder, folder / "unet").text_encoder, tiny_pipeline().text_encoder)


def test_a_folder_that_is_no_pipeline(folder, tmp_path):
    with pytest.raises(DataError, match=r"--pretrained=nothing: no such folder: name a folder in diffusers' format"):
        find_folder("nothing")
    with pytest.raises(DataError, match=r"no model_index\.json in it"):
        find_folder(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    with pytest.raises(DataError, match="is a StableDiffusionXLPipeline: give a StableDiffusionPipeline"):
        find_folder(tmp_path)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_are_missing_or_pickled(folder, tmp_path, part):
    folder = copy_pipeline(folder, tmp_path)
    (path,) = (folder / part).glob("*.safetensors")
    weights = load_file(path)
    left_out = min(weights)
    save_file({name: value for name, value in weights.items() if name != left_out}, path, metadata={"format": "pt"})
    with pytest.raises(DataError, match=f"{part}: the weights lack {left_out}"):
        load_pipeline(folder, folder / "unet")
    path.unlink()
    torch.save(weights, folder / part / "diffusion_pytorch_model.bin")
    torch.save(weights, folder / part / "pytorch_model.bin")
    with pytest.raises(DataError, match=f"{part}: cannot be read .*; pickles are refused"):
        load_pipeline(folder, folder / "unet")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction_type": "sample"}, "prediction_type must be epsilon or v_prediction"),
        ({"_class_name": "logging"}, "logging is no scheduler of diffusers"),
    ],
)
def test_a_scheduler_that_is_unknown(folder, tmp_path, change, message):
    folder = copy_pipeline(folder, tmp_path)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=message):
        load_pipeline(folder, folder / "unet")


class Constant(torch.nn.Module):
    """A network that predicts 0.5 everywhere, times a weight."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x_t, t, text, return_dict):
        self.x_t = x_t
        return (0.5 * self.weight * torch.ones_like(x_t),)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_loss_is_that_of_the_formula(prediction):
    scheduler = diffusers.DDPMScheduler.from_config({**tiny_pipeline().scheduler.config, "prediction_type": prediction})
    x_0, eps = torch.randn(2, 3, 4, 8, 8).unbind()
    t = torch.tensor([0, 500, 999])
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    a = (1 - betas).cumprod(0)[t][:, None, None, None]
    x_t, v = a.sqrt() * x_0 + (1 - a).sqrt() * eps, a.sqrt() * eps - (1 - a).sqrt() * x_0
    net = Constant()
    error = LatentTrainer(net, scheduler)(x_0, torch.zeros(3, 77, 64), t, eps)
    target = eps.double() if prediction == "epsilon" else v
    torch.testing.assert_close(net.x_t.double(), x_t, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(error.double(), (0.5 - target).square(), rtol=1e-4, atol=1e-4)


def test_a_batch_in_parts_has_the_gradient_of_the_whole():
    pipeline = tiny_pipeline()
    scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
    x_0, eps = torch.randn(2, 4, 4, 8, 8).unbind()
    text, t = torch.randn(4, 77, 64), torch.tensor([1, 2, 500, 900])
    gradients = []
    for parts in (1, 3):
        trainer = LatentTrainer(pipeline.unet, scheduler, parts)
        losses = trainer(x_0, text, t, eps).mean(dim=(1, 2, 3))
        (losses * torch.tensor([1.0, 0.0, 2.0, 0.5])).sum().backward()
        gradients.append([parameter.grad for parameter in pipeline.unet.parameters()])
        pipeline.unet.zero_grad()
    for whole, in_parts in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, in_parts, rtol=1e-3, atol=1e-5)


def test_moments_are_those_of_image_and_mirror_image():
    vae = tiny_pipeline().vae.eval()
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    moments = encode_images(vae, images, batch_size=2)
    assert moments.shape == (3, 2, 2, 4, 8, 8) and moments.dtype == torch.float16
    for view, x in enumerate((images, images.flip(-1))):
        latents = vae.encode(x / 127.5 - 1).latent_dist
        torch.testing.assert_close(moments[:, view, 0].float(), latents.mean, rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(moments[:, view, 1].float(), latents.std, rtol=1e-2, atol=1e-3)


def test_text_states_are_those_of_the_pipeline():
    pipeline = tiny_pipeline()
    ours = encode_captions(pipeline, ["a cat", "a dog with " + "many " * 100])
    theirs, _ = pipeline.encode_prompt(["a cat", "a dog with " + "many " * 100], "cpu", 1, False)
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-2, atol=1e-3)


def test_an_image_depends_on_its_own_noise_and_prompt_alone():
    pipeline, latents = tiny_pipeline(), torch.randn(2, 4, 8, 8)
    both = generate(pipeline, ["a cat", "a dog"], latents, steps=2, guidance=3.0)
    alone = generate(pipeline, ["a dog"], latents[1:], steps=2, guidance=3.0)
    assert both.shape == (2, 3, 16, 16) and both.min() >= 0 and both.max() <= 1
    torch.testing.assert_close(both[1:], alone, rtol=1e-3, atol=1e-3)


def test_the_newest_unet_of_a_log_directory(tmp_path):
    unet = tiny_pipeline().unet
    for r in (5, 10):
        save_unet(unet, unet.state_dict(), tmp_path / f"checkpoint_round{r}")
    save_unet(unet, unet.state_dict(), tmp_path / "checkpoint_round10")  # again, as a continued run does
    assert find_unet(tmp_path) == tmp_path / "checkpoint_round10" / "unet" == find_unet(tmp_path / "checkpoint_round10")
    assert equal(diffusers.UNet2DConditionModel.from_pretrained(find_unet(tmp_path), low_cpu_mem_usage=False), unet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_round10", "checkpoint_round5"]
    with pytest.raises(DataError, match="no UNet in diffusers' format in it"):
        find_unet(tmp_path / "nothing")


def test_content_hash_is_of_names_and_contents(folder, tmp_path):
    folder = copy_pipeline(folder, tmp_path)
    before = content_hash(folder, "tokenizer", "vae"), content_hash(folder / "vae")
    (folder / "unet" / "config.json").write_text("{}")
    assert before == (content_hash(folder, "tokenizer", "vae"), content_hash(folder / "vae"))
    (folder / "vae" / "config.json").write_text("{}")
    after = content_hash(folder, "tokenizer", "vae"), content_hash(folder / "vae")
    assert before[0] != after[0] and before[1] != after[1]

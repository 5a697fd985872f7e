"""Pipelines in and out, and the loss, against diffusers' pieces and formulas written out."""

import copy
import importlib.util
import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.text_files import copy_pipeline, saved_pipeline, tiny_pipeline
from text_to_image.pipeline import (
    LatentTrainer,
    as_scheduler,
    check_fit,
    check_steps,
    encode_captions,
    encode_images,
    find_folder,
    find_unet,
    generate,
    libraries,
    load_pipeline,
    read_part,
    read_scheduler,
    save_unet,
)
from utils.errors import DataError, UsageError
from utils.files import content_hash
from utils.images import non_finite_images

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
    (tmp_path / "one.safetensors").touch()
    for name, message in (
        ("./nothing", "no such folder: name a folder in diffusers' format"),
        ("someone/nothing", "no such folder, and no model of the hub that was downloaded: add --download to fetch it"),
        (tmp_path / "one.safetensors", "is a file: convert it with diffusers"),
        (folder.parent, f"no model_index.json in it: give {folder}"),
        (folder / "unet", "no model_index.json in it: it holds one part of a pipeline"),
    ):
        with pytest.raises(DataError, match=f"--pretrained={name}: {message}"):
            find_folder(name)
    with pytest.raises(DataError, match=r"no model_index\.json in it"):
        find_folder(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(DataError, match=r"cannot be read as JSON .*: fetch it again"):
        find_folder(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}', "utf-8-sig")
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
    save_file(weights | {"lora.down": torch.ones(1)}, path, metadata={"format": "pt"})
    with pytest.raises(DataError, match=f"{part}: lora.down in the weights has no place in its"):
        load_pipeline(folder, folder / "unet")
    path.rename(path.with_suffix(".fp16.safetensors"))
    with pytest.raises(DataError, match=f"{part}: holds {path.stem}.fp16.safetensors only: rename it to {path.name}"):
        load_pipeline(folder, folder / "unet")
    path.with_suffix(".fp16.safetensors").unlink()
    torch.save(weights, folder / part / "diffusion_pytorch_model.bin")
    torch.save(weights, folder / part / "pytorch_model.bin")
    with pytest.raises(DataError, match=f"{part}: cannot be read .*; pickles are refused"):
        load_pipeline(folder, folder / "unet")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction_type": "sample"}, "prediction_type must be epsilon or v_prediction"),
        ({"_class_name": "logging"}, "logging is no scheduler of diffusers"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler has not the betas"),
        ({"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler has not the betas"),
        ({"_class_name": "DDIMInverseScheduler"}, "DDIMInverseScheduler has not the betas"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "UniPCMultistepScheduler has not the"),
        ({"beta_schedule": "none"}, "DDIMScheduler cannot be made of its settings"),
        ({"trained_betas": [0.1] * 500}, "its betas are not 1000 numbers in"),
        ({"trained_betas": [-0.1] * 1000}, "its betas are not 1000 numbers in"),
        ({"rescale_betas_zero_snr": True, "prediction_type": "epsilon"}, "its last timestep is noise alone"),
        ({"trained_betas": [0.1] * 999 + [1.0], "prediction_type": "epsilon"}, "its last timestep is noise alone"),
    ],
)
def test_a_scheduler_that_is_not_for_stable_diffusion(tmp_path, change, message):
    write_scheduler(tmp_path, **change)
    with pytest.raises(DataError, match=message):
        read_scheduler(tmp_path)


def changed(config, change):
    """A configuration with other values; without diffusers' note of those that are defaults, which it would restore."""
    return {key: value for key, value in config.items() if key != "_use_default_values"} | change


def write_scheduler(folder, **change):
    (folder / "scheduler_config.json").write_text(
        json.dumps(changed(tiny_pipeline().scheduler.config, {"_class_name": "DDIMScheduler"} | change))
    )


def test_training_has_the_noise_of_the_sampler(tmp_path):
    for name in ("PNDMScheduler", "EulerDiscreteScheduler", "LCMScheduler"):
        write_scheduler(tmp_path, _class_name=name)
        scheduler = read_scheduler(tmp_path)
        trained = as_scheduler("DDPMScheduler", scheduler, "training")
        torch.testing.assert_close(trained.alphas_cumprod, scheduler.alphas_cumprod)
    write_scheduler(tmp_path, rescale_betas_zero_snr=True)  # with v it is fine
    assert as_scheduler("DDPMScheduler", read_scheduler(tmp_path), "training").alphas_cumprod[-1] == 0
    for settings in (
        {"_class_name": "LCMScheduler", "steps_offset": 1},  # whose default betas are not those of DDPM
        {"_class_name": "PNDMScheduler", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    ):
        (tmp_path / "scheduler_config.json").write_text(json.dumps(settings))
        for kind in ("DDPMScheduler", "DPMSolverMultistepScheduler"):
            with pytest.raises(DataError, match=f"{kind}, for training, has other betas than the pipeline's"):
                as_scheduler(kind, read_scheduler(tmp_path), "training")
    write_scheduler(tmp_path, _class_name="EulerDiscreteScheduler", beta_schedule="linear", trained_betas=None)
    as_scheduler("DPMSolverMultistepScheduler", read_scheduler(tmp_path), "--scheduler=dpm")


@pytest.mark.parametrize(
    ("change", "steps", "message"),
    [
        ({}, 1001, "DDIMScheduler has 1000 timesteps and steps_offset 1: give at most 1000"),
        ({}, 1000, "DDIMScheduler has 1000 timesteps and steps_offset 1: cannot take so many"),
        ({"num_train_timesteps": 20}, 50, "DDIMScheduler has 20 timesteps and steps_offset 1: give at most 20"),
        ({"_class_name": "PNDMScheduler"}, 2, "PNDMScheduler has 1000 timesteps"),
        ({"_class_name": "LCMScheduler"}, 60, "LCMScheduler has 1000 timesteps and steps_offset 1: cannot take so"),
        ({}, 999, None),
        ({"steps_offset": 0}, 1000, None),
        ({"_class_name": "EulerAncestralDiscreteScheduler"}, 20, None),
        ({"_class_name": "HeunDiscreteScheduler"}, 20, None),
    ],
)
def test_steps_that_the_scheduler_cannot_take(tmp_path, change, steps, message):
    write_scheduler(tmp_path, **change)
    scheduler = read_scheduler(tmp_path)
    before = scheduler.num_inference_steps
    if message is None:
        check_steps(scheduler, steps)
    else:
        with pytest.raises(UsageError, match=f"--sample_steps={steps}: the pipeline's {message}"):
            check_steps(scheduler, steps)
    assert scheduler.num_inference_steps == before, "it was tried on a copy"


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("unet", {"in_channels": 9}, "u: its in_channels is 9, the latent_channels of f/vae 4"),
        ("unet", {"out_channels": 8}, "u: its out_channels is 8, the latent_channels of f/vae 4"),
        ("unet", {"cross_attention_dim": 96}, "cross_attention_dim is 96, the hidden_size of f/text_encoder 64"),
        ("unet", {"cross_attention_dim": (64, 64, 96)}, "the hidden_size of f/text_encoder 64"),
        ("unet", {"num_class_embeds": 10}, "its num_class_embeds is 10, so it wants more than latents, time and text"),
        ("unet", {"class_embed_type": "timestep"}, "its class_embed_type is timestep"),
        ("unet", {"addition_embed_type": "text"}, "its addition_embed_type is text"),
        ("unet", {"time_cond_proj_dim": 8}, "its time_cond_proj_dim is 8"),
        ("unet", {"encoder_hid_dim": 64, "encoder_hid_dim_type": "text_proj"}, "its encoder_hid_dim is 64"),
        ("vae", {"latent_channels": 16}, "u: its in_channels is 4, the latent_channels of f/vae 16"),
        ("vae", {"in_channels": 4}, "f/vae: its in_channels is 4, the channels of an image 3"),
        ("text_encoder", {"hidden_size": 96}, "u: its cross_attention_dim is 64, the hidden_size of f/text_encoder 96"),
        ("text_encoder", {"vocab_size": 49407}, "f/tokenizer: has 49408 tokens, the vocab_size of f/text_encoder is"),
        ("unet", {"cross_attention_dim": (64, 64, 64)}, None),
        ("text_encoder", {"vocab_size": 50000}, None),
    ],
)
def test_parts_that_do_not_fit_each_other(part, change, message):
    parts = {name: getattr(tiny_pipeline(), name) for name in ("unet", "vae", "text_encoder", "tokenizer")}
    kind, config = type(parts[part]), parts[part].config
    if part == "text_encoder":
        parts[part] = kind(type(config)(**{**config.to_dict(), **change}))
    else:
        parts[part] = kind.from_config(changed(config, change))
    if message is None:
        check_fit("f", "u", **parts)
    else:
        with pytest.raises(DataError, match=message):
            check_fit("f", "u", **parts)


def test_what_was_saved_in_half_precision_is_loaded_in_float32(folder, tmp_path):
    pipeline = copy.deepcopy(tiny_pipeline())
    for name, dtype in (("unet", torch.bfloat16), ("vae", torch.float16), ("text_encoder", torch.float16)):
        getattr(pipeline, name).to(dtype).save_pretrained(tmp_path / name)
        loaded = read_part(type(getattr(pipeline, name)), tmp_path / name)
        assert {value.dtype for value in loaded.state_dict().values()} <= {torch.float32, torch.int64}, name
        for key, value in getattr(pipeline, name).state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value.float()), key


def test_a_tokenizer_without_a_length_takes_that_of_the_text_encoder(folder, tmp_path):
    folder = copy_pipeline(folder, tmp_path)
    path = folder / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for length, expected in ((None, 77), (20, 20)):
        path.write_text(json.dumps({k: v for k, v in (config | {"model_max_length": length}).items() if v is not None}))
        assert encode_captions(load_pipeline(folder, folder / "unet"), ["a cat"]).shape == (1, expected, 64)


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


def test_text_states_with_a_mask_are_those_of_the_pipeline():
    """Some text encoders' configurations ask for it."""
    pipeline = copy.deepcopy(tiny_pipeline())
    plain = encode_captions(pipeline, ["a cat"]).float()
    pipeline.text_encoder.config.use_attention_mask = True
    ours = encode_captions(pipeline, ["a cat"])
    tokens = pipeline.tokenizer(["a cat"], padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        theirs = pipeline.text_encoder(tokens.input_ids, tokens.attention_mask)[0]
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-2, atol=1e-3)
    assert (ours - plain).abs().max() > 0.1


def test_encodings_that_are_not_finite_are_refused():
    pipeline = copy.deepcopy(tiny_pipeline())
    pipeline.text_encoder.final_layer_norm.weight.data *= 1e6
    with pytest.raises(DataError, match="the text encoder's states of captions are not finite in float16"):
        encode_captions(pipeline, ["a cat"])
    pipeline.vae.quant_conv.weight.data *= 1e8
    with pytest.raises(DataError, match="the VAE's latents of 2 of 2 images are not finite in float16"):
        encode_images(pipeline.vae, torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_only_the_unet_is_in_low_precision(dtype):
    """The VAE's decoder would overflow in float16."""
    pipeline, seen = copy.deepcopy(tiny_pipeline()), []
    pipeline.vae.decoder.conv_in.weight.data *= 1e6

    def note(name):
        return lambda module, inputs, output: seen.append((name, output[0].dtype, torch.is_autocast_enabled("cpu")))

    for name in ("unet", "text_encoder"):
        getattr(pipeline, name).register_forward_hook(note(name))
    pipeline.unet.conv_out.register_forward_hook(note("inside"))
    images = generate(pipeline, ["a cat", "a dog"], torch.randn(2, 4, 8, 8), 2, 3.0, dtype=dtype)
    assert images.isfinite().all() and "forward" not in vars(pipeline.unet)
    assert set(seen) == {
        ("unet", torch.float32, False), ("text_encoder", torch.float32, False), ("inside", dtype, True),
    }  # fmt: skip


def test_an_image_depends_on_its_own_noise_and_prompt_alone():
    pipeline, latents = tiny_pipeline(), torch.randn(2, 4, 8, 8)
    both = generate(pipeline, ["a cat", "a dog"], latents, steps=2, guidance=3.0)
    alone = generate(pipeline, ["a dog"], latents[1:], steps=2, guidance=3.0)
    assert both.shape == (2, 3, 16, 16) and both.min() >= 0 and both.max() <= 1
    torch.testing.assert_close(both[1:], alone, rtol=1e-3, atol=1e-3)


def test_an_infinity_does_not_pass_for_white(monkeypatch):
    decoded = torch.zeros(3, 3, 16, 16)
    decoded[0, 0, 0, 0], decoded[1, 0, 0, 0] = torch.inf, -torch.inf
    pipeline = tiny_pipeline()
    monkeypatch.setattr(pipeline.vae, "decode", lambda latents, return_dict: (decoded,))
    x = generate(pipeline, ["a cat"] * 3, torch.zeros(3, 4, 8, 8), steps=1, guidance=1)
    assert non_finite_images(x).tolist() == [True, True, False] and x[2].eq(0.5).all()


def test_the_newest_unet_of_a_log_directory(tmp_path):
    unet = tiny_pipeline().unet
    for r in (5, 10):
        save_unet(unet, unet.state_dict(), tmp_path / f"checkpoint_round{r}")
    save_unet(unet, unet.state_dict(), tmp_path / "checkpoint_round10")  # again, as a continued run does
    assert find_unet(tmp_path) == tmp_path / "checkpoint_round10" / "unet" == find_unet(tmp_path / "checkpoint_round10")
    assert equal(diffusers.UNet2DConditionModel.from_pretrained(find_unet(tmp_path), low_cpu_mem_usage=False), unet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_round10", "checkpoint_round5"]
    with pytest.raises(DataError, match="no such file or folder"):
        find_unet(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no UNet in diffusers' format in it"):
        find_unet(tmp_path / "empty")


def test_a_unet_for_which_there_is_no_room_is_one_line(tmp_path):
    unet = tiny_pipeline().unet
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    save_unet(unet, unet.state_dict(), tmp_path)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))  # as a disk with a megabyte left
        with pytest.raises(DataError, match=r"cannot be written .*File too large.*: check the directory and its space"):
            save_unet(unet, unet.state_dict(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["unet"], "no temporary folder stays"
    assert equal(diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet", low_cpu_mem_usage=False), unet)


def test_content_hash_is_of_names_and_contents(folder, tmp_path):
    folder = copy_pipeline(folder, tmp_path)
    before = content_hash(folder, "tokenizer", "vae"), content_hash(folder / "vae")
    (folder / "unet" / "config.json").write_text("{}")
    (folder / "vae" / ".DS_Store").write_text("of a system that shows folders")
    assert before == (content_hash(folder, "tokenizer", "vae"), content_hash(folder / "vae"))
    (folder / "vae" / "config.json").write_text("{}")
    after = content_hash(folder, "tokenizer", "vae"), content_hash(folder / "vae")
    assert before[0] != after[0] and before[1] != after[1]

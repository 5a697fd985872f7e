"""LoRA: against a plain loop of peft, dense weights, and plain diffusers."""

import copy
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from absl.flags import FlagValues, IllegalFlagValueError
from safetensors.torch import load_file, save_file

from tests.commands import ROOT, check, run_module
from tests.text_files import (
    CAPTIONS,
    copy_pipeline,
    save_captions,
    save_images,
    saved_pipeline,
    tiny_pipeline,
)
from text_to_image import build, flags
from text_to_image.data import CaptionBatches, TextStates, load_folder
from text_to_image.lora import Adapter, add_lora, load_lora, save_lora
from text_to_image.pipeline import LORA_FILE, encode_images, find_unet, libraries, remove_unets
from training.averaging import average_learners
from training.flags import check as check_flags
from training.flags import parse
from utils.errors import DataError, UsageError
from utils.seeding import derive_seed, generator

diffusers, _ = libraries()
TRAIN, ALL_IN = "text_to_image.main_fed", "text_to_image.all_in"
FLAGS = [
    "--train", "--pretrained=pipeline", "--data_root=images", "--captions=captions.json",
    "--resolution=16", "--batch_size=4", "--warmup=2", "--sample_step=0", "--device=cpu",
    "--log_step=1", "--lora_rank=4",
]  # fmt: skip
PLUS = [
    "--client_num=3", "--local_steps=3", "--total_round=3", "--mem_ratio=1.0", "--exchange=ring",
    "--bank_bins=4", "--augment_near_threshold", "--bar=50", "--lora_alpha=8", "--lr=1e-2",
    "--save_step=1", "--keep=99",
]  # fmt: skip
TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
SETTINGS = {"rank": 4, "alpha": 4, "targets": TARGETS, "freeze_a": False, "seed": 12}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("lora")
    saved_pipeline(directory)
    save_images(directory / "images")
    save_captions(directory / "captions.json", CAPTIONS)
    return directory


@pytest.fixture(scope="module")
def plus(directory):
    run_module(TRAIN, *FLAGS, *PLUS, "--logdir=plus", cwd=directory)
    return directory / "plus"


def adapted(**changes):
    """An `Adapter` of the tiny pipeline's UNet, whose B are as large as after some training."""
    unet = copy.deepcopy(tiny_pipeline().unet)
    add_lora(unet, **{**SETTINGS, "dtype": torch.float32, **changes})
    for name, value in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.1)
    return Adapter(unet)


def values_of(*argv):
    values = FlagValues()
    flags.define(values)
    assert parse(values, ["program", *argv]) == []
    check_flags(values)
    return values


def batch(number=2):
    return torch.randn(number, 4, 8, 8), torch.randint(1000, (number,)), torch.randn(number, 77, 64)


def products(weights, scale=1.0):
    """{layer: scale B A} in float64, of names as peft's or diffusers'."""
    ends = {".lora_A.default.weight": ".lora_B.default.weight", ".lora.down.weight": ".lora.up.weight"}
    found = {}
    for name, A in weights.items():
        for down, up in ends.items():
            if name.endswith(down):
                layer = name.removesuffix(down)
                product = scale * weights[layer + up].double() @ A.double()
                found[layer.removeprefix("unet.")] = product.numpy()
    return found


def distance(ours, theirs):
    """Of dense weights, relative to their length."""
    square = sum(((ours[name] - theirs[name]) ** 2).sum() for name in theirs)
    return (square / sum((value**2).sum() for value in theirs.values())) ** 0.5


def saved(logdir):
    return load_file(find_unet(logdir))


def last_line(module, *flags, cwd):
    return run_module(module, *flags, cwd=cwd, code=2).stderr.splitlines()[-1]


def test_one_shard_without_control_is_a_plain_training_loop_of_peft(directory):
    flags = ["--client_num=1", "--anti_grad=off", "--local_steps=5", "--total_round=1", "--logdir=plain"]
    run_module(TRAIN, *FLAGS, *flags, cwd=directory)
    from peft import LoraConfig, get_peft_model_state_dict

    data = load_folder(directory / "images", directory / "captions.json", 16)
    pipeline = copy.deepcopy(tiny_pipeline())
    states = TextStates(pipeline, [texts[0] for texts in data.captions], directory / "cache", "")
    batches = CaptionBatches(
        data.images, encode_images(pipeline.vae, data.images), data.captions, states, torch.arange(16),
        torch.device("cpu"), scaling_factor=0.18215, often=None, batch_size=4, T=1000, seed=12,
    )  # fmt: skip
    scheduler, unet = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config), pipeline.unet
    unet.requires_grad_(False)
    torch.manual_seed(derive_seed(12, "lora"))
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=TARGETS))
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.999), weight_decay=0.01, eps=1e-8)
    for step in range(5):
        optimizer.param_groups[0]["lr"] = 1e-4 * min(step, 2) / 2
        latents, states, t, noise, *_ = batches(step)
        prediction = unet(scheduler.add_noise(latents, noise, t), t, states).sample
        torch.nn.functional.mse_loss(prediction, scheduler.get_velocity(latents, noise, t)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    ours = saved(directory / "plain")
    theirs = diffusers.utils.convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    assert ours.keys() == {f"unet.{name}" for name in theirs}
    for name, value in theirs.items():
        torch.testing.assert_close(ours[f"unet.{name}"], value, rtol=1e-3, atol=1e-6, msg=name)
    assert all(ours[name].abs().max() > 1e-4 for name in ours)


def test_average_is_the_mean_of_dense_weights(plus):
    """The shards' files are of before the last average: 6, 5 and 5 images, alpha / rank 2."""
    files = [plus / f"state/shard{k}_step9.pt" for k in range(3)]
    shards = [torch.load(file, weights_only=True)["net_model"] for file in files]
    parts, sizes = [products(shard, scale=2.0) for shard in shards], [6, 5, 5]
    mean = {name: np.average([part[name] for part in parts], 0, sizes) for name in parts[0]}
    ours = products(saved(plus))
    assert ours.keys() == mean.keys() and len(ours) == 32
    assert distance(ours, mean) < 1e-7 < 1e-2 < distance(parts[0], mean)
    for name, value in shards[0].items():
        equal = [torch.equal(value, shard[name]) for shard in shards[1:]]
        assert all(equal) if "lora_A" in name else not any(equal), name


def test_averaging_a_and_b_one_by_one_is_something_else():
    """Were A not frozen."""
    start, flags = adapted(), values_of("--pretrained=p", "--lr=1e-2", "--warmup=0")
    learners = [build.learner(flags, copy.deepcopy(start), None) for _ in range(2)]
    for learner in learners:
        x, t, text = batch()
        for _ in range(5):
            learner.update((learner.net(x, t, text, return_dict=False)[0] - x).square().mean())
    parts = [products(learner.net.state_dict()) for learner in learners]
    mean = {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]}
    one_by_one, _ = average_learners(dict(enumerate(learners)), [1, 1])
    assert distance(products(one_by_one), mean) > 1e-2


@pytest.mark.parametrize("freeze_a", [False, True])
def test_the_base_is_there_once(freeze_a):
    """Whatever the number of shards and EMA weights; offloading moves only what trains."""
    start = adapted(freeze_a=freeze_a)
    flags = values_of("--pretrained=p", "--ema_decay=0.5", "--shard_state=cpu")
    learners = [build.learner(flags, copy.deepcopy(start), None) for _ in range(3)]
    networks = [net.unet for learner in learners for net in (learner.net, learner.ema)]
    networks = [dict(unet.named_parameters()) for unet in networks]
    for name in networks[0]:
        places = {parameters[name].data_ptr() for parameters in networks}
        assert len(places) == (6 if "lora_B" in name or ("lora_A" in name and not freeze_a) else 1), name
    assert learners[0].net.state_dict().keys() == start.state_dict().keys()
    assert len(start.state_dict()) == 64 and len(learners[0].weights) < 40_000


def test_the_frozen_weights_are_kept_in_the_precision_they_are_used_in():
    """To the last bit as float32 weights do, which autocast casts at every step."""
    (x, t, text), outputs = batch(), []
    for kept in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        net = adapted(dtype=kept)
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(net(x, t, text, return_dict=False)[0])
        outputs[-1].float().square().sum().backward()
        outputs.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.requires_grad]))
    assert net.unet.conv_in.weight.dtype == torch.bfloat16
    assert net.unet.conv_norm_out.weight.dtype == torch.float32
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])


def test_a_run_that_was_killed_ends_as_one_that_was_not(directory, plus):
    """Some files of a run are removed: shards have done 5, 5 and 4 of its 9 steps."""
    folder = shutil.copytree(plus, directory / "killed")
    gone = ["average_round[23]", "shard?_step[6-9]", "shard2_step5"]
    for path in [path for name in gone for path in folder.glob(f"state/{name}.pt")]:
        path.unlink()
    remove_unets(folder)
    done = run_module(TRAIN, *FLAGS, *PLUS, "--logdir=killed", cwd=directory)
    assert "continuing in killed: 1 rounds and 14 steps done" in done.stdout
    ours, theirs = saved(folder), saved(plus)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_two_processes_make_the_averages_of_one(directory, plus):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, "-m", TRAIN, *FLAGS, *PLUS, "--logdir=two", "--shard_state=cpu"]
    check(command, directory, 0, {"PYTHONPATH": str(ROOT)})
    ours, theirs = saved(directory / "two"), saved(plus)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_everything_else_at_once(directory):
    """EMA, bf16, gradient checkpointing, a batch in parts, other layers, previews."""
    flags = [
        "--client_num=1", "--local_steps=2", "--total_round=1", "--ema_decay=0.5", "--precision=bf16",
        "--accumulate=2", "--gradient_checkpointing", "--lora_freeze_a", "--lora_targets=conv1,ff.net.2",
        "--sample_step=2", "--sample_steps=2", "--sample_size=3", "--logdir=all", "--warmup=0",
    ]  # fmt: skip
    run_module(TRAIN, *FLAGS, *flags, cwd=directory)
    state = torch.load(directory / "all/state/average_round1.pt", weights_only=True)
    raw, ema = state["global_model"], state["global_ema_model"]
    names = saved(directory / "all").keys()
    assert len(names) == len(ema) and all("conv1" in name or "ff.net.2" in name for name in names)
    for name in ema:
        assert torch.equal(raw[name], ema[name]) == ("lora_A" in name)
    assert len(list((directory / "all/sample").iterdir())) == 2
    whole = [flag for flag in FLAGS if "lora" not in flag]
    line = last_line(TRAIN, *whole, *flags[:3], "--logdir=all", cwd=directory)
    assert "--lora_rank=0: the run in all was started with 4" in line
    remove_unets(directory / "all")
    assert not (directory / "all/checkpoint_round1").exists()


PLAIN = """
import sys, numpy as np, torch
from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained("pipeline", safety_checker=None)
latents = torch.from_numpy(np.load("latents.npy"))
settings = {"height": 16, "width": 16, "num_inference_steps": 3, "output_type": "np", "latents": latents}
base = pipeline([f"picture number {i}" for i in range(3)], **settings).images
pipeline.load_lora_weights("plus/checkpoint_round3")
lora = pipeline([f"picture number {i}" for i in range(3)], **settings).images
np.save("plain.npy", np.stack([lora, base]))
assert not {"text_to_image", "training", "score", "utils"} & set(sys.modules)
"""


def test_plain_diffusers_makes_the_images_of_all_in(directory, plus):
    streams = [generator("cpu", 12, "image", i) for i in range(3)]
    noise = torch.stack([torch.randn(4, 8, 8, generator=stream) for stream in streams])
    np.save(directory / "latents.npy", noise)
    (directory / "plain.py").write_text(PLAIN)
    check([sys.executable, "plain.py"], directory, 0, {})
    lora, base = (np.load(directory / "plain.npy") * 255).round().transpose(0, 1, 4, 2, 3)
    flags = ["--features=pixels", "--prompts=all", "--num_images=3", "--sample_steps=3"]
    folders = [f"--{kind}_dir=evaluated/{kind}" for kind in ("generate", "similar", "grid")]
    run_module(ALL_IN, "--unet=plus", "--device=cpu", *flags, *folders, cwd=directory)
    for name, expected in (("generate", lora), ("generate/base", base)):
        images = np.load(directory / "evaluated" / name / "generate.npy").astype(int)
        assert np.abs(images - expected).max() <= 1, name
    assert np.abs(lora - base).max() > 10
    result = json.loads((directory / "evaluated/grid/result.json").read_text())
    assert result["checkpoint"] == "plus/checkpoint_round3" and result["training"]["lora_rank"] == 4


@pytest.fixture(scope="module")
def other(directory):
    """The pipeline with another UNet."""
    folder = copy_pipeline(directory / "pipeline", directory / "other")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file(weights | {"conv_in.bias": weights["conv_in.bias"] + 1}, path, metadata={"format": "pt"})
    return folder


def test_images_of_a_lora_are_of_its_base(directory, other, tmp_path):
    """Those of one base are not taken for those of another."""
    adapter, images = adapted(), []
    save_lora(adapter, adapter.state_dict(), tmp_path)
    flags = ["--data_root=images", "--captions=captions.json", "--resolution=16", "--features=pixels"]
    flags += [f"--unet={tmp_path / LORA_FILE}", "--num_images=2", "--sample_steps=2", "--device=cpu"]
    flags += [f"--{kind}_dir={tmp_path / kind}" for kind in ("generate", "similar", "grid")]
    for pipeline in ("pipeline", other):
        run_module(ALL_IN, f"--pretrained={pipeline}", *flags, cwd=directory)
        images.append(np.load(tmp_path / "generate/generate.npy"))
    assert not np.array_equal(*images)


def test_a_lora_of_another_training(directory, plus, other):
    flags = ["--unet=plus", f"--pretrained={other}", "--features=pixels", "--device=cpu"]
    line = last_line(ALL_IN, *flags, cwd=directory)
    what = "plus/run.json says that its UNet was trained with another unet: give"
    assert f"--pretrained={other}: {what}" in line


def kohya(weights, alphas):
    """As kohya's scripts name and scale them; the layers have the alphas in turn."""
    named, alpha_of = {}, {}
    for name, value in weights.items():
        layer, _, end = name.removeprefix("unet.").rpartition(".lora.")
        layer = f"lora_unet_{layer.replace('.', '_')}"
        alpha = alpha_of.setdefault(layer, alphas[len(alpha_of) % len(alphas)])
        named[f"{layer}.lora_{end}"] = value * (value.shape[1] / alpha if end.startswith("up") else 1)
        named[f"{layer}.alpha"] = torch.tensor(float(alpha))
    return named


def test_loras_of_others(tmp_path):
    """Kohya's format, a file of any name; what does not fit is refused in one line."""
    adapter, (x, t, text) = adapted(alpha=8), batch()
    save_lora(adapter, adapter.state_dict(), tmp_path)
    ours = load_file(tmp_path / LORA_FILE)
    save_file(kohya(ours, [1]), tmp_path / "kohya.safetensors")
    save_file(kohya(ours, [1, 4, 0.5]), tmp_path / "several.safetensors")
    files = [tmp_path / f"{name}.safetensors" for name in ("kohya", "several")]
    with torch.no_grad():
        expected = adapter(x, t, text, return_dict=False)[0]
        for path, scale in (files[0], 1), (files[1], 1), (tmp_path, 0.5):
            pipeline = copy.deepcopy(tiny_pipeline())
            load_lora(pipeline, find_unet(path), scale)
            found = pipeline.unet(x, t, text).sample
            assert torch.allclose(found, expected, atol=1e-5) == (scale == 1), (path, scale)
    theirs = kohya(ours, [1])
    alphas = [name for name in theirs if name.endswith(".alpha")]
    scales = {name.replace("alpha", "dora_scale"): torch.ones(1, 9) for name in alphas}
    no_lora, some = "cannot be loaded as a LoRA of the pipeline", "tensors have a place in the pipeline"
    for weights, message in (
        (ours | {min(ours): torch.zeros(4, 99)}, no_lora),
        ({k.replace("to_k", "to_kk"): value for k, value in ours.items()}, f"only 48 of its 64 {some}"),
        (ours | {"text_encoder_2.to_k.lora.down.weight": torch.ones(4, 9)}, f"only 64 of its 65 {some}"),
        (theirs | scales, "is a DoRA, whose dora_scale diffusers leaves out: give a LoRA without it"),
        (None, no_lora),
    ):
        path = tmp_path / "other.safetensors"
        save_file(weights, path) if weights else path.write_text("no tensors")
        with pytest.raises(DataError, match=f"{path}: .*{message}"):
            load_lora(copy.deepcopy(tiny_pipeline()), path, 1.0)


@pytest.mark.parametrize("targets", [["to_k", "conv1", "ff.net.2", "proj_in"], ["conv2"], ["to_v", "to_out.0"]])
def test_layers_of_every_kind_are_loaded(targets, tmp_path):
    """diffusers loads no file in which some layers are named as its own, and others as peft's."""
    adapter, (x, t, text) = adapted(targets=targets), batch()
    save_lora(adapter, adapter.state_dict(), tmp_path)
    pipeline = copy.deepcopy(tiny_pipeline())
    load_lora(pipeline, tmp_path / LORA_FILE, 1.0)
    with torch.no_grad():
        expected = adapter(x, t, text, return_dict=False)[0]
        assert torch.allclose(pipeline.unet(x, t, text).sample, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ["to_k", "to_x"]}, "--lora_targets=to_x: no layer of the UNet is called so"),
        ({"targets": []}, "--lora_targets=: no layer of the UNet is called so"),
        ({"targets": ["attn1"]}, "--lora_targets=attn1: .* is of type Attention: name linear layers and"),
        ({"rank": 65}, "--lora_rank=65: the weights of .*to_k are 128 x 64: give at most 64"),
    ],
)
def test_layers_that_do_not_fit(changes, message):
    with pytest.raises(UsageError, match=message):
        adapted(**changes)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--unet=a"], "--unet: a LoRA starts from the UNet of --pretrained"),
        (["--unet_from_scratch"], "--unet_from_scratch: a LoRA starts from the UNet of --pretrained"),
        (["--lora_rank=0", "--lora_freeze_a"], "--lora_freeze_a does nothing without --lora_rank"),
        (["--lora_rank=0", "--lora_targets=to_k"], "--lora_targets does nothing without --lora_rank"),
    ],
)
def test_flags_that_contradict_each_other(given, message):
    with pytest.raises(UsageError, match=message):
        values_of(*FLAGS, *given)


def test_in_a_log_directory_of_a_lora_it_is_found(directory, plus, tmp_path):
    """Not the whole UNet of an earlier run."""
    folder = shutil.copytree(plus, tmp_path / "log")
    unet = shutil.copytree(directory / "pipeline/unet", folder / "checkpoint_round3/unet")
    lora = folder / "checkpoint_round3" / LORA_FILE
    assert find_unet(folder) == find_unet(folder / "checkpoint_round3") == lora
    assert find_unet(unet) == unet


@pytest.mark.parametrize("flag", ["--lora_alpha=inf", "--lora_scale=inf", "--lora_scale=nan"])
def test_scales_are_finite(flag):
    with pytest.raises(IllegalFlagValueError, match=f"{flag[2:12]}.* finite"):
        values_of(*FLAGS, flag)


def test_no_training_starts_from_a_lora(directory, plus):
    whole = [flag for flag in FLAGS if "lora" not in flag]
    line = last_line(TRAIN, *whole, "--unet=plus", "--logdir=no", cwd=directory)
    assert f"{TRAIN}: error: --unet=plus: is the file of a LoRA, from which no training starts" in line
    flags = ["--lora_scale=0.5", "--features=pixels", "--device=cpu", "--data_root=images"]
    line = last_line(ALL_IN, "--pretrained=pipeline", *flags, cwd=directory)
    assert "--lora_scale=0.5: it is of a LoRA, and --unet names none: leave it out" in line

"""text_to_image.main_fed as users run it."""

import json
import shutil
import signal
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from score.fid import compute_statistics, frechet_distance
from tests.commands import ROOT, environment, forking_python, read_jsonl, run_module, run_with
from tests.text_files import CAPTIONS, copy_pipeline, save_captions, save_images, saved_pipeline, tiny_pipeline
from text_to_image.data import CaptionBatches, TextStates, load_folder
from text_to_image.pipeline import encode_images, libraries
from training.shards import partition
from utils.files import file_hash
from utils.name_lists import write_names, write_table

MODULE = "text_to_image.main_fed"
FLAGS = [
    "--train", "--pretrained=pipeline", "--data_root=images", "--captions=captions.json", "--resolution=16",
    "--batch_size=4", "--lr=1e-3", "--warmup=2", "--sample_step=0", "--device=cpu", "--log_step=1",
]  # fmt: skip
THREE = ["--client_num=3", "--local_steps=3", "--total_round=2", "--mem_ratio=1.0", "--duplication=dup_both"]
PLUS = [
    "--client_num=3", "--local_steps=3", "--total_round=2", "--mem_ratio=1.0", "--exchange=ring", "--bank_bins=4",
    "--augment_near_threshold", "--bar=50",
]  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("main_fed")
    saved_pipeline(directory)
    save_images(directory / "images")
    save_captions(directory / "captions.json", CAPTIONS)
    return directory


def weights(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def copy_unet(directory, folder):
    shutil.copytree(directory / "pipeline/unet", folder / "unet")


def test_one_shard_without_control_is_a_plain_training_loop_of_diffusers(directory):
    run_module(
        MODULE, *FLAGS, "--client_num=1", "--anti_grad=off", "--local_steps=5", "--total_round=1", "--logdir=plain",
        cwd=directory,
    )  # fmt: skip
    diffusers, _ = libraries()
    from diffusers.optimization import get_constant_schedule_with_warmup

    data = load_folder(directory / "images", directory / "captions.json", 16)
    pipeline = tiny_pipeline()
    states = TextStates(pipeline, [texts[0] for texts in data.captions], directory / "cache", "")
    batches = CaptionBatches(
        data.images, encode_images(pipeline.vae, data.images), data.captions, states, torch.arange(16),
        torch.device("cpu"), scaling_factor=0.18215, often=None, batch_size=4, T=1000, seed=12,
    )  # fmt: skip
    scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
    unet = diffusers.UNet2DConditionModel.from_config(pipeline.unet.config)
    unet.load_state_dict(pipeline.unet.state_dict())
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01, eps=1e-8)
    schedule = get_constant_schedule_with_warmup(optimizer, num_warmup_steps=2)
    for step in range(5):
        latents, states, t, noise, *_ = batches(step)
        prediction = unet(scheduler.add_noise(latents, noise, t), t, states).sample
        loss = torch.nn.functional.mse_loss(prediction, scheduler.get_velocity(latents, noise, t))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    trained = weights(directory / "plain" / "checkpoint_round1")
    assert trained.keys() == unet.state_dict().keys()
    for name, value in unet.state_dict().items():
        torch.testing.assert_close(trained[name], value, rtol=1e-3, atol=1e-5, msg=name)
    start = pipeline.unet.state_dict()
    assert max((trained[name] - start[name]).abs().max().item() for name in start) > 1e-3


@pytest.fixture(scope="module")
def straight(directory):
    run_module(MODULE, *FLAGS, *THREE, "--logdir=straight", cwd=directory)
    return directory / "straight"


def test_average_is_the_mean_of_the_shards(straight):
    """Their files hold their weights before the last average: 6, 5 and 5 images."""
    shards = [torch.load(straight / f"state/shard{k}_step6.pt", weights_only=True) for k in range(3)]
    assert [int((shard["skip_counts"] >= 0).sum()) for shard in shards] == [16] * 3
    for name, value in weights(straight / "checkpoint_round2").items():
        parts = [shard["net_model"][name].double().numpy() for shard in shards]
        np.testing.assert_allclose(value.numpy(), np.average(parts, axis=0, weights=[6, 5, 5]), rtol=1e-5, atol=1e-7)
        assert not np.array_equal(parts[0], parts[1]), name


def test_skips_are_counted_per_image_and_the_banks_filled(straight):
    average = torch.load(straight / "state/average_round2.pt", weights_only=True)
    logged = sum(line["skipped"] * 4 for line in read_jsonl(straight / "metrics.jsonl"))
    assert average["index_array"].shape == (16,) and average["index_array"].sum() == round(logged)
    for k in range(3):
        bank = torch.load(straight / f"state/shard{k}_step6.pt", weights_only=True)["bank"]
        assert bank.shape == (1000,) and 12 <= (bank > 0).sum() <= 24


@pytest.fixture(scope="module")
def other(directory):
    """The pipeline with a scheduler of epsilon."""
    folder = copy_pipeline(directory / "pipeline", directory / "other")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace("v_prediction", "epsilon"))
    return folder


@pytest.mark.parametrize(
    ("module", "flags"), [(MODULE, FLAGS), ("text_to_image.all_in", ["--features=pixels", "--device=cpu"])]
)
def test_the_pipeline_is_that_of_the_training(directory, straight, other, module, flags):
    """A UNet that predicts v makes noise with a scheduler of epsilon."""
    flags = [*flags, "--unet=straight", f"--pretrained={other}", "--generate_dir=no", "--logdir=no"]
    line = run_module(module, *flags, cwd=directory, code=2).stderr.splitlines()[-1]
    what = "straight/run.json says that its UNet was trained with another scheduler: give the pipeline of that training"
    assert f"--pretrained={other}: {what}" in line and not (directory / "no").exists()


def test_an_evaluation_says_whether_its_data_is_that_of_the_training(directory, straight):
    flags = ["--unet=straight", "--device=cpu", "--features=pixels", "--num_images=2", "--sample_steps=2"]
    flags += [f"--{name}_dir=evaluated/{name}" for name in ("generate", "similar", "grid")]
    module, about = "text_to_image.all_in", "--data_root=images: not the captions of the training"
    line = run_module(module, *flags, "--resolution=32", cwd=directory, code=2).stderr.splitlines()[-1]
    assert "--resolution=32: the UNet of straight was trained with 16: leave the flag out" in line
    save_captions(directory / "others.json", {name: texts[:1] for name, texts in CAPTIONS.items()})
    for captions, is_said in (("captions.json", False), ("others.json", True)):
        said = run_module(module, *flags, f"--captions={captions}", cwd=directory).stderr
        result = json.loads((directory / "evaluated/grid/result.json").read_text())
        assert (about in said) == is_said == (about in (result["settings_warning"] or ""))
        assert (about in (directory / "evaluated/grid/report.html").read_text()) == is_said


@pytest.fixture(scope="module")
def plus(directory):
    run_module(MODULE, *FLAGS, *PLUS, "--logdir=plus", cwd=directory)
    return directory / "plus"


def test_iet_agc_plus(plus):
    """After round 1 shards exchange an image each in place of an average; samples near the threshold make steps."""
    first, second = (torch.load(plus / f"state/average_round{r}.pt", weights_only=True) for r in (1, 2))
    assert not first["averaged"] and second["averaged"]
    before, after = partition(torch.zeros(16), 3, "contiguous", 12), second["slots"]
    assert sorted(torch.cat(after).tolist()) == list(range(16))
    for k in range(3):
        assert len(set(before[k].tolist()) - set(after[k].tolist())) == 1
        assert set(after[k].tolist()) - set(before[k].tolist()) <= set(before[k - 1].tolist())
    shards = [torch.load(plus / f"state/shard{k}_step6.pt", weights_only=True) for k in range(3)]
    assert all(shard["bank"].shape == (4,) for shard in shards)
    adam = [state["step"].item() for shard in shards for state in shard["optim"]["state"].values()]
    assert max(adam) > 6  # steps on augmented images are besides those of the schedule
    assert all(shard["step"] == 6 for shard in shards)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_was_killed_ends_as_one_that_was_not(directory, straight, plus, number):
    settings, expected = {signal.SIGKILL: (THREE, straight), signal.SIGTERM: (PLUS, plus)}[number]
    flags = [*FLAGS, *settings, "--save_step=1", f"--logdir=killed{number}"]
    command = [forking_python(), "-m", MODULE, *flags]
    env = environment(PYTHONPATH=str(ROOT))
    process = subprocess.Popen(command, cwd=directory, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while not list((directory / f"killed{number}").glob("state/shard1_step*.pt")):
        assert process.poll() is None, process.communicate()
    process.send_signal(number)
    process.communicate()
    assert process.returncode == (143 if number == signal.SIGTERM else -9)
    done = run_module(MODULE, *flags, cwd=directory)
    assert "continuing in" in done.stdout
    ours, theirs = (weights(folder / "checkpoint_round2") for folder in (directory / f"killed{number}", expected))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_two_processes_make_the_averages_of_one(directory, straight):
    run_with(2, MODULE, *FLAGS, *THREE, "--logdir=two", "--shard_state=cpu", cwd=directory)
    ours, theirs = weights(directory / "two" / "checkpoint_round2"), weights(straight / "checkpoint_round2")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_everything_else_at_once(directory):
    """EMA, bf16, gradient checkpointing, a batch in parts, random weights, changed captions, previews."""
    flags = [
        "--client_num=1", "--local_steps=2", "--total_round=1", "--ema_decay=0.5", "--precision=bf16", "--accumulate=2",
        "--gradient_checkpointing", "--unet_from_scratch", "--caption_mode=randwordadd", "--caption_prob=1",
        "--text_noise=0.1", "--text_mixup=1", "--sample_step=2", "--sample_steps=2", "--sample_size=3", "--logdir=all",
    ]  # fmt: skip
    run_module(MODULE, *FLAGS, *flags, cwd=directory)
    state = torch.load(directory / "all/state/average_round1.pt", weights_only=True)
    for name, value in weights(directory / "all" / "checkpoint_round1").items():
        assert torch.equal(value, state["global_ema_model"][name])
    assert not torch.equal(state["global_ema_model"]["conv_in.weight"], state["global_model"]["conv_in.weight"])
    start = tiny_pipeline().unet.state_dict()["conv_in.weight"]
    assert (state["global_model"]["conv_in.weight"] - start).abs().mean() > 0.01
    assert sorted(path.name for path in (directory / "all/sample").iterdir()) == [
        "average_round1.png",
        "shard0_step2.png",
    ]


def test_images_on_the_way_that_are_not_finite_are_named(directory, tmp_path):
    """They are black; the first 16 held-out images equal training images, and fpd is to all of them."""
    folder = copy_pipeline(directory / "pipeline", tmp_path)
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["decoder.conv_out.bias"].fill_(float("nan"))
    save_file(weights, path, metadata={"format": "pt"})
    save_images(tmp_path / "heldout", [f"other{i}.png" for i in range(20)])
    flags = [f"--pretrained={folder}", f"--heldout={tmp_path / 'heldout'}", f"--logdir={tmp_path / 'log'}"]
    flags += ["--client_num=1", "--local_steps=1", "--total_round=1", "--watch_step=1", "--watch_images=3"]
    flags += ["--features=pixels", "--sample_steps=2"]
    said = run_module(MODULE, *FLAGS, *flags, cwd=directory).stderr
    text = "3 of 3 images of --watch_step hold values that are not finite, black here"
    assert said.count(f"warning: {text}") == 1
    files = sorted((tmp_path / "heldout").iterdir())
    real = np.stack([np.asarray(Image.open(path)) for path in files])
    sets = torch.zeros(3, 3, 16, 16, dtype=torch.uint8), torch.from_numpy(real).permute(0, 3, 1, 2)
    expected = frechet_distance(*(values for images in sets for values in compute_statistics(images)))
    (found,) = json.loads((tmp_path / "log/best.json").read_text())["measurements"]
    assert found["fpd"] == pytest.approx(expected)


def test_lists_of_names_and_groups(directory):
    """13 images are kept, of which five are drawn as one: 9 groups, 5 in a shard and 4 in the other."""
    write_names(directory / "keep.txt", [f"{i:02}.png" for i in range(16) if i not in (2, 7, 15)])
    table = [["a", f"{i:02}.png"] for i in (0, 2, 3, 4, 12, 14)]
    write_table(directory / "groups.csv", ("group", "image"), table)
    flags = ["--keep_list=keep.txt", "--groups=groups.csv", "--split=together", "--balance_groups"]
    flags += ["--client_num=2", "--reshard", "--local_steps=3"]
    flags += ["--mem_ratio=0.5", "--arr_ema_decay=0", "--bank_bins=1"]  # many are skipped, and counted
    run_module(MODULE, *FLAGS, *flags, "--total_round=2", "--logdir=whole", cwd=directory)
    run_module(MODULE, *FLAGS, *flags, "--total_round=1", "--logdir=halves", cwd=directory)
    settings = json.loads((directory / "halves/run.json").read_text())["settings"]
    assert settings["groups (sha256)"] == file_hash(directory / "groups.csv")
    subset = np.load(directory / "halves/subset.npy")
    assert subset.tolist() == [0, 1, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14]
    paths = [directory / f"halves/state/shard{k}_step3.pt" for k in range(2)]
    shards = [torch.load(path, weights_only=True) for path in paths]
    seen = [set(shard["skip_counts"].nonzero().flatten().tolist()) for shard in shards]
    assert all(seen) and not seen[0] & seen[1]
    group = {0, 2, 3, 10, 12}
    assert min(len(group & slots) for slots in seen) == 0
    assert all(len(slots - group) <= 5 for slots in seen)
    for name, value in weights(directory / "halves/checkpoint_round1").items():
        parts = [shard["net_model"][name].double().numpy() for shard in shards]
        mean = np.average(parts, axis=0, weights=[5, 4])
        np.testing.assert_allclose(value.numpy(), mean, rtol=1e-5, atol=1e-7)
    run_module(MODULE, *FLAGS, *flags, "--total_round=2", "--logdir=halves", cwd=directory)
    ours, theirs = (weights(directory / f"{log}/checkpoint_round2") for log in ("halves", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    evaluation = ["--features=pixels", "--num_images=2", "--sample_steps=2", "--device=cpu"]
    evaluation += [f"--{name}_dir=kept/{name}" for name in ("generate", "similar", "grid")]
    said = run_module("text_to_image.all_in", "--unet=whole", *evaluation, cwd=directory).stderr
    assert "of the training" not in said


def test_a_fresh_start_removes_the_unets_of_the_run_before(directory):
    """With --overwrite; what others have put beside them stays."""
    flags = [*FLAGS, "--client_num=1", "--local_steps=1", "--logdir=fresh"]
    run_module(MODULE, *flags, "--total_round=2", "--save_round=1", cwd=directory)
    for name in ("my_checkpoint_v1", "best_checkpoint_round1", "best_checkpoint_round1_kept"):
        copy_unet(directory, directory / "fresh" / name)
    run_module(MODULE, *flags, "--total_round=1", "--fresh", "--overwrite", cwd=directory)
    names = sorted(path.parent.name for path in (directory / "fresh").glob("*/unet"))
    assert names == ["best_checkpoint_round1_kept", "checkpoint_round1", "my_checkpoint_v1"]


@pytest.mark.parametrize("earlier", ["without a record", "finished"])
def test_unets_of_an_earlier_run_are_not_taken_for_this_one(directory, straight, earlier):
    folder = directory / f"left {earlier}"
    copy_unet(directory, folder / "checkpoint_round3")
    if earlier == "finished":
        for name in ("run.json", "train.json", "metrics.jsonl", "flagfile.txt", "subset.npy"):
            shutil.copy(straight / name, folder)
    flags = [*FLAGS, *THREE, f"--logdir={folder}"]
    line = run_module(MODULE, *flags, cwd=directory, code=1).stderr.splitlines()[-1]
    what = "what the run needs beside it to be continued is missing or damaged"
    assert f"{folder}/checkpoint_round3/unet: {what}: choose another --logdir, or start over" in line


def test_a_fresh_start_alone_removes_nothing(directory):
    copy_unet(directory, directory / "theirs" / "checkpoint_round7")
    flags = ["--client_num=1", "--local_steps=1", "--total_round=1", "--logdir=theirs", "--fresh"]
    line = run_module(MODULE, *FLAGS, *flags, cwd=directory, code=2).stderr.splitlines()[-1]
    what = "theirs/checkpoint_round7/unet is of an earlier run: add --overwrite to delete that run"
    assert f"--fresh: {what}" in line
    assert (directory / "theirs/checkpoint_round7/unet/config.json").exists()


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--resolution=17"], 2, "--resolution=17: pipeline has a VAE that makes images 2 times as small, so give"),
        (["--local_epoch=3"], 2, "Unknown command line flag 'local_epoch'"),
        (["--client_num=17"], 2, "--client_num=17: more shards than the 16 images"),
        (["--client_num=5"], 2, "--batch_size=4 is larger than the 3 images of shard 1"),
        (["--split=together"], 2, "--split=together needs --groups"),
        (["--balance_groups"], 2, "--balance_groups needs --groups"),
        (
            ["--balance_groups", "--groups=x", "--duplication=dup_both"],
            2,
            "--balance_groups and --duplication=dup_both",
        ),
        (["--split=together", "--groups=x", "--exchange=ring"], 2, "--exchange=ring parts groups"),
        (["--keep_list=nothing.txt"], 1, "--keep_list=nothing.txt: cannot be read"),
        (["--captions=nothing.json"], 1, "--captions=nothing.json: cannot be read"),
        (["--pretrained=images"], 1, "--pretrained=images: no model_index.json in it"),
        (["--lr=1e-4", "--logdir=straight", *THREE], 2, "--lr=0.0001: the run in straight was started with 0.001"),
        (["--watch_step=2"], 2, "--watch_step: no image is held out"),
        (["--resolution=12"], 2, "--resolution=12: pipeline has a VAE that makes images 2 times as small, so give"),
        (["--bank_bins=1001"], 2, "--bank_bins=1001: the pipeline's scheduler has 1000 timesteps, give fewer"),
        (["--sample_step=5", "--sample_steps=1000"], 2, "--sample_steps=1000: the pipeline's DDIMScheduler has 1000"),
    ],
)
def test_what_a_person_can_correct_is_one_line(directory, straight, flags, code, message):
    given = [*FLAGS, "--logdir=bad", "--cache_dir=not_made", *flags]
    result = run_module(MODULE, *given, cwd=directory, code=code)
    line = result.stderr.splitlines()[-1]
    assert line.startswith(f"{MODULE}: error: {message}") and "Traceback" not in result.stderr
    assert not (directory / "not_made").exists(), "no image was encoded before"

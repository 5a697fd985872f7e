"""EMA weights that are still their random start: said when a training begins, and wherever they are evaluated."""

import json

import pytest
import torch

from tests.commands import eval_flags, run, run_module, run_with
from tests.networks import TINY_FLAGS, tiny_learner
from tests.text_files import CAPTIONS, save_captions, save_images, saved_pipeline
from text_to_image.all_in import ema_warning
from training.logdir import ema_start, random_start
from utils.files import write_json

STILL = "of the EMA weights are still the random start of the training"
WILL = "of the EMA weights will still be the random start"
EVAL = ["--fid_features=pixels", "--num_images=4", "--batch_size=4"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """12 steps with an EMA of 0.9: 0.9 ** 12 = 28.2 % is the start."""
    directory = tmp_path_factory.mktemp("young")
    flags = ["--total_steps=12", "--save_step=6", "--keep=9", "--ema_decay=0.9", "--logdir=log"]
    result = run("main.py", "--train", *TINY_FLAGS, *flags, cwd=directory)
    assert f"after all 12 steps 28.2% {WILL}" in result.stdout and result.stderr.count("arning") == 0
    return directory


def evaluate(directory, out, *flags):
    """(what all_in.py says, its result.json, its page)."""
    said = run("all_in.py", *TINY_FLAGS, *EVAL, *eval_flags(directory / out), *flags, cwd=directory)
    grid = directory / out / "grid"
    page = (grid / "report.html").read_text() if (grid / "report.html").exists() else ""
    return said.stderr, json.loads((grid / "result.json").read_text()), page


def test_the_share_is_what_the_updates_leave_of_the_start():
    """Weights at 0 with a start of 1: what the EMA then is, is the share."""
    learner = tiny_learner(ema_decay=0.9)
    with torch.no_grad():
        learner.ema_weights.fill_(1.0)
        learner.weights.zero_()
    learner.optim.step = lambda: None
    for _ in range(7):
        learner.update(sum(parameter.sum() for parameter in learner.parameters))
    run_of = {"settings": {"ema_decay": 0.9}, "changes": []}
    assert learner.ema_weights[0].item() == pytest.approx(random_start(run_of, 7), rel=1e-5)


def test_a_changed_decay_counts_from_its_step_on():
    change = {"flag": "ema_decay", "before": 0.99, "after": 0.5, "step": 30}
    run_of = {"settings": {"ema_decay": 0.5, "client_num": 3}, "changes": [{"flag": "lr"}, change]}
    assert random_start(run_of, 12) == pytest.approx(0.99**10 * 0.5**2)
    assert random_start(run_of, 4) == pytest.approx(0.99**4)
    assert random_start({"settings": {"ema_decay": 0.0}, "changes": []}, 1) == 0


def test_evaluation_warns_on_terminal_page_and_in_the_result(trained):
    said, result, page = evaluate(trained, "ema", "--unet_dir=log")
    assert result["ema_warning"].startswith(f"log/ckpt12.pt: 28.2% {STILL}")
    assert said.count(f"warning: {result['ema_warning']}") == 1 and result["ema_warning"] in page
    said, result, page = evaluate(trained, "raw", "--unet_dir=log", "--use_ema=False")
    assert result["ema_warning"] is None and STILL not in said + page


def test_stages_one_by_one_and_several_checkpoints_warn_too(trained):
    both = "--unet_dir=log/ckpt6.pt,log/ckpt12.pt"
    generate = [*TINY_FLAGS, *EVAL, *eval_flags(trained / "stages"), both, "--stages=generate"]
    said = run("all_in.py", *generate, cwd=trained).stderr
    assert f"log/ckpt6.pt: 53.1% {STILL}" in said and f"log/ckpt12.pt: 28.2% {STILL}" in said
    said, result, page = evaluate(trained, "stages", "--stages=score,memorise,report")
    assert said.count(STILL) == 2 and result["ema_warning"] in said and result["ema_warning"] in page
    said, result, _ = evaluate(trained, "gap", "--unet_dir=log", "--stages=gap")
    assert f"28.2% {STILL}" in said and f"28.2% {STILL}" in result["ema_warning"]


def test_eval_of_main_warns_too(trained):
    said = run("main.py", "--eval", *TINY_FLAGS, *EVAL, "--logdir=log", cwd=trained).stderr
    result = json.loads((trained / "log/eval_ckpt12.json").read_text())
    assert f"28.2% {STILL}" in result["ema_warning"] and f"warning: {result['ema_warning']}" in said


def test_an_exported_file_knows_its_share(trained):
    for flags, name in ((["--use_ema"], "ema"), (["--use_ema=False"], "raw")):
        run_module("training.export", *flags, "log/ckpt12.pt", f"{name}.safetensors", cwd=trained)
    said, result, _ = evaluate(trained, "exported", "--unet_dir=ema.safetensors")
    assert f"ema.safetensors: 28.2% {STILL}" in said and result["ema_warning"] in said
    said, result, _ = evaluate(trained, "exported_raw", "--unet_dir=raw.safetensors")
    assert result["ema_warning"] is None and STILL not in said


def test_what_does_not_say_its_training_is_not_warned_of(trained, tmp_path):
    (tmp_path / "ckpt12.pt").write_bytes((trained / "log/ckpt12.pt").read_bytes())
    said, result, _ = evaluate(tmp_path, "alone", "--unet_dir=ckpt12.pt")
    assert result["ema_warning"] is None and STILL not in said
    write_json(tmp_path / "run.json", {"settings": {"script": "main"}})  # of a version that recorded less
    assert ema_start(tmp_path / "ckpt12.pt") is None


def test_an_old_ema_is_not_warned_of(tmp_path):
    flags = ["--total_steps=12", "--ema_decay=0.7", "--logdir=log"]  # 0.7 ** 12 = 1.4 %
    result = run("main.py", "--train", *TINY_FLAGS, *flags, cwd=tmp_path)
    said, result_json, _ = evaluate(tmp_path, "old", "--unet_dir=log")
    assert WILL not in result.stdout and STILL not in said and result_json["ema_warning"] is None


@pytest.mark.parametrize(("split", "steps"), [("stratified", 8), ("all", 24)])
def test_averages_keep_the_share_of_their_shards(split, steps, tmp_path):
    """3 shards of 16 images, or of all 48, batches of 8, 2 epochs a round, 2 rounds; alone and by two processes."""
    train = ["--train", "--client_num=3", f"--split={split}", "--local_epoch=2", "--total_round=2", "--ema_decay=0.95"]
    share = f"{0.95**steps:.1%}"
    result = run_with(2 if split == "all" else 1, "main_fed.py", *TINY_FLAGS, *train, "--logdir=log", cwd=tmp_path)
    assert result.stdout.count(f"after all {steps} steps {share} {WILL}") == 1
    said, found, _ = evaluate(tmp_path, "fed", "--unet_dir=log")
    assert f"log/global_ckpt_round2.pt: {share} {STILL}" in said and share in found["ema_warning"]
    shard = ema_start(tmp_path / f"log/state/shard0_step{steps}.pt")
    assert shard == ema_start(tmp_path / "log/global_ckpt_round2.pt") == pytest.approx(0.95**steps)


def test_a_start_from_a_checkpoint_is_not_random(trained):
    train = ["--train", "--client_num=2", "--local_epoch=1", "--total_round=1", "--check_dir=log/ckpt12.pt"]
    result = run("main_fed.py", *TINY_FLAGS, *train, "--logdir=tuned", cwd=trained)
    said, found, _ = evaluate(trained, "from_checkpoint", "--unet_dir=tuned")
    assert WILL not in result.stdout and STILL not in said and found["ema_warning"] is None


def test_text_to_image_says_it_of_a_unet_from_scratch_only(tmp_path):
    saved_pipeline(tmp_path)
    save_images(tmp_path / "images")
    save_captions(tmp_path / "captions.json", CAPTIONS)
    shared = "--pretrained=pipeline --data_root=images --captions=captions.json --resolution=16 --batch_size=4".split()
    train = "--train --client_num=1 --local_steps=2 --total_round=2 --save_round=1 --sample_step=0 --warmup=0".split()
    for name, flags, is_young in (
        ("young", ["--unet_from_scratch", "--ema_decay=0.9"], True),
        ("tuned", ["--ema_decay=0.9"], False),
        ("without", ["--unet_from_scratch"], False),
    ):
        result = run_module("text_to_image.main_fed", *shared, *train, *flags, f"--logdir={name}", cwd=tmp_path)
        assert (f"after all 4 steps {0.9**4:.1%} {WILL}" in result.stdout) == is_young
    evaluate = [*shared, "--features=pixels", "--num_images=2", "--sample_steps=2", *eval_flags(tmp_path / "out")]
    for unet, share in (("young", 0.9**4), ("young/checkpoint_round1", 0.9**2), ("tuned", None), ("without", None)):
        result = run_module("text_to_image.all_in", *evaluate, f"--unet={unet}", cwd=tmp_path)
        found = json.loads((tmp_path / "out/grid/result.json").read_text())["ema_warning"]
        page = (tmp_path / "out/grid/report.html").read_text()
        if share:
            assert f"{share:.1%} {STILL}" in found and found in page and result.stderr.count(f"warning: {found}") == 1
        else:
            assert found is None and STILL not in result.stderr + page


@pytest.mark.parametrize(("kind", "steps"), [("round2", 8), ("step3", 3)])
def test_the_best_of_a_text_conditioned_training(tmp_path, kind, steps):
    name = f"best_checkpoint_{kind}"
    settings = {"unet_from_scratch": True, "local_steps": 4, "ema_decay": 0.9}
    write_json(tmp_path / "run.json", {"settings": settings})
    assert f"{name}: {0.9**steps:.1%} of the EMA weights" in ema_warning(tmp_path / name / "unet")

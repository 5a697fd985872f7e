"""Flags: what published commands use is accepted by all scripts, and what cannot be is one clear line."""

import pytest

from tests.commands import run
from tests.networks import TINY_FLAGS

SCRIPTS = ("main.py", "main_fed.py", "all_in.py")
PUBLISHED = (
    "train eval ch ch_mult attn num_res_blocks dropout beta_1 beta_T T mean_type var_type dataset lr grad_clip "
    "total_steps img_size warmup batch_size num_workers ema_decay parallel logdir sample_size sample_step save_step "
    "eval_step num_images fid_use_torch fid_cache num_labels use_labels mem_ratio arr_ema_decay check_dir mid_T "
    "local_epoch total_round client_num save_round seed Fed unet_dir generate_dir similar_dir grid_dir batch_A batch_B "
    "use_ema"
).split()
OURS = (
    "data_root device precision compile legacy_labels split anti_grad anti_grad_weight label_dropout guidance stages "
    "sampler sample_steps eta samples save_png inception_weights fid_reference fid_features num_train download"
).split()


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_flag(script, tmp_path):
    text = run(script, "--help", cwd=tmp_path, code=1).stdout
    for name in (*PUBLISHED, *OURS):
        assert f"--{name}:" in text or f"--[no]{name}:" in text, name
    for name in ("mid_T", "Fed"):
        assert f"{name}: no effect" in text.replace("[no]", "")


@pytest.mark.parametrize("script", SCRIPTS)
def test_published_syntax_is_accepted(script, tmp_path):
    """Single dashes, --no, bare booleans, a repeated flag that replaces the default: all read, then T is refused."""
    flags = "--noeval -train -Fed=False -ch_mult=1 --ch_mult=2 --attn 1 --parallel -num_workers 4 --mid_T=500".split()
    result = run(script, *flags, "--T=10", "--sample_steps=50", cwd=tmp_path, code=2)
    assert result.stderr == f"{script}: error: --sample_steps=50: with --T=10 at most 10\n"


@pytest.mark.parametrize("name", ["DIGITS", "CIFAR10", "CIFAR100", "AFHQ_DOG"])
def test_config_files_are_read(name, tmp_path):
    from tests.commands import ROOT

    flags = [f"--flagfile={ROOT}/config/{name}.txt", "--data_root=nowhere", "--img_size=9"]
    assert "--img_size=9" in run("main.py", "--train", *flags, cwd=tmp_path, code=2).stderr


BAD_FLAGS = {
    "--lr=0": "--lr=0.0: must be > 0",
    "--lr=fast": "--lr=fast",
    "--dropout=1": "--dropout=1.0: must be in [0, 1)",
    "--T=1": "--T=1",
    "--beta_1=0.5": "--beta_1=0.5 is above --beta_T=0.02",
    "--attn=1": "--attn=1: --ch_mult has 1 levels",
    "--ch=40": "--ch=40: must be a multiple of 32",
    "--mean_type=noise": "--mean_type=noise",
    "--use_labels": "--use_labels needs --num_labels",
    "--guidance=1": "--guidance=1.0 needs --use_labels",
    "--use_labels --num_labels=3": "--num_labels=3: digits has 10 classes",
    "--use_labels --num_labels=10 --legacy_labels --guidance=1": "--guidance needs a null class",
    "--stages=generate,paint": "--stages",
    "--device=tpu": "--device=tpu is not available",
    "--num_train=5000": "--num_train=5000",
    "--nonsense": "nonsense",
    "stray": "'stray' is no flag",
    "--flagfile=missing.txt": "missing.txt",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_wrong_flags_are_one_line(flags, tmp_path):
    result = run("main.py", "--train", *TINY_FLAGS, "--logdir=log", *flags.split(), cwd=tmp_path, code=2)
    assert BAD_FLAGS[flags] in result.stderr
    assert result.stderr.startswith("main.py: error: ") and result.stderr.count("\n") == 1
    assert not list(tmp_path.glob("log/*.pt"))


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("main.py", "", "nothing to do: add --train and/or --eval"),
        ("main_fed.py", "", "nothing to do: add --train"),
        (
            "main_fed.py",
            "--train --client_num=6 --batch_size=9",
            "--batch_size=9 is larger than the 8 images of shard 0",
        ),
        ("main_fed.py", "--train --client_num=49", "--client_num=49: more shards than the 48 images"),
        ("main.py", "--train --batch_size=49", "--batch_size=49 is larger than the 48 images"),
        ("all_in.py", "--fid_features=pixels", "--unet_dir: name a checkpoint"),
        ("all_in.py", "--stages=", "--stages"),
    ],
)
def test_contradictions_are_one_line(script, flags, message, tmp_path):
    result = run(script, *TINY_FLAGS, *flags.split(), cwd=tmp_path, code=2)
    assert message in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("main.py", "--train --dataset=cifar10 --img_size=32", "data"),
        ("main_fed.py", "--train --client_num=3 --check_dir=missing.pt", "missing.pt: no such checkpoint"),
        ("all_in.py", "--fid_features=pixels --unet_dir=missing.pt", "missing.pt: no such checkpoint"),
        ("all_in.py", "--fid_features=pixels --samples=missing.npy", "missing.npy"),
        ("main.py", "--eval --fid_features=pixels", "holds no ckpt*.pt"),
        ("main.py", "--train --logdir=/proc/nowhere", "--logdir=/proc/nowhere: cannot be written"),
    ],
)
def test_wrong_files_are_one_line(script, flags, message, tmp_path):
    result = run(script, *TINY_FLAGS, *flags.split(), cwd=tmp_path, code=1)
    assert message in result.stderr and result.stderr.count("\n") == 1

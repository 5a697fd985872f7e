"""Flags: what published commands use is accepted by all scripts, and what cannot be is one clear line."""

import pytest

from tests.commands import ROOT, run

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
    text = run(script, "--help", cwd=tmp_path).stdout
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
    flags = [f"--flagfile={ROOT}/config/{name}.txt", "--data_root=nowhere", "--img_size=9"]
    assert "--img_size=9" in run("main.py", "--train", *flags, cwd=tmp_path, code=2).stderr

"""Flags: what published commands use is accepted by all scripts, and what cannot be is one clear line.

`python -m tests.test_flags` writes docs/FLAGS.md anew.
"""

import re

import pytest
from absl.flags import FLAGS

from tests.commands import ROOT, run
from training import flags

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

DOCUMENT = ROOT / "docs/FLAGS.md"
HEAD = """# All flags

<!-- made by python -m tests.test_flags of training/flags.py: change that -->

All three scripts accept all of them, with one dash or two, and read them from files with `--flagfile`. Lists repeat
their flag: `--ch_mult=1 --ch_mult=2`. A switch is turned off by `--noNAME` or `--NAME=false`. Where the paper's own
commands have another value than the default, it stands beside it.
"""
COLUMNS = "| flag | default | paper | values | meaning |\n|---|---|---|---|---|"
# what the paper's own commands gave where that is no default
PAPER = {
    "ch_mult": "AFHQ: 1, 2, 2, 2, 4", "img_size": "AFHQ: 64", "batch_size": "AFHQ: 60",
    "use_labels": "CIFAR-100: true", "num_labels": "CIFAR-100: 100", "use_ema": "false",
}  # fmt: skip


def values_of(flag):
    """What may be given, in words."""
    if flag.flag_type() == "bool":
        return "true, false"
    words = getattr(flag.parser, "enum_values", None)
    return ", ".join(words) if words else flag.parser.syntactic_help.removeprefix("a ") or "text"


def document():
    """A table for every part of training/flags.py; what stands there in a comment at the margin is its heading."""
    source = (ROOT / "training/flags.py").read_text()
    text = HEAD
    for heading, part in re.findall(r"^# ([^\n]+)\n(.*?)(?=^# |\Z)", source, re.MULTILINE | re.DOTALL):
        found = [FLAGS[name] for name in re.findall(r'^[\w.]*DEFINE_\w+\(\s*"(\w+)"', part, re.MULTILINE)]
        if found:
            text += f"\n## {heading[0].upper()}{heading[1:]}\n\n{COLUMNS}\n"
        for flag in found:
            default = (flag.default_as_str or "").strip("'[]")
            meaning = re.sub(r"^<[^>]*>: |;\n.*", "", flag.help)  # what absl puts around it
            cells = (f"`{flag.name}`", default, PAPER.get(flag.name, ""), values_of(flag), meaning)
            text += f"| {' | '.join(cells)} |\n"
    return text


def test_the_document_of_all_flags():
    text = document()
    for flag in FLAGS.get_key_flags_for_module(flags.__name__):
        assert f"\n| `{flag.name}` | " in text, f"{flag.name}: no comment at the margin stands over it"
    assert DOCUMENT.read_text() == text, "python -m tests.test_flags writes it anew"


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
    flags = [f"--flagfile={ROOT}/config/{name}.txt", "--data_root=nowhere", "--img_size=9"]
    assert "--img_size=9" in run("main.py", "--train", *flags, cwd=tmp_path, code=2).stderr


if __name__ == "__main__":
    DOCUMENT.write_text(document())

"""Flags: what published commands use is accepted by all scripts, and what cannot be is one clear line.

`python -m tests.test_flags` writes docs/FLAGS.md anew.
"""

import json
import re

import pytest

from tests.commands import ROOT, run, values_of
from training import build, flags
from utils.errors import UsageError

SCRIPTS = ("main.py", "main_fed.py", "all_in.py")
PUBLISHED = (
    "train eval ch ch_mult attn num_res_blocks dropout beta_1 beta_T T mean_type var_type dataset lr grad_clip "
    "total_steps img_size warmup batch_size num_workers ema_decay parallel logdir sample_size sample_step save_step "
    "eval_step num_images fid_use_torch fid_cache num_labels use_labels mem_ratio arr_ema_decay check_dir mid_T "
    "local_epoch total_round client_num save_round seed Fed unet_dir generate_dir similar_dir grid_dir batch_A batch_B "
    "use_ema"
).split()
OURS = (
    "data_root device data_device precision compile legacy_labels split anti_grad anti_grad_weight label_dropout "
    "guidance stages sampler sample_steps eta samples save_png inception_weights fid_reference fid_features num_train "
    "download"
).split()

DOCUMENT = ROOT / "docs/FLAGS.md"
HEAD = """# All flags

<!-- made by python -m tests.test_flags of training/flags.py: change that -->

All three scripts accept all of them, with one dash or two, and read them from files with `--flagfile`. Lists repeat
their flag: `--ch_mult=1 --ch_mult=2`. A switch is turned off by `--noNAME`. Of several words the bold one is the
default. In brackets stands what the paper's own commands give, where that is another value.
"""
COLUMNS = "| flag | default | meaning |\n|---|---|---|"
# what the paper's own commands gave where that is no default
PAPER = {
    "ch_mult": "AFHQ: 1, 2, 2, 2, 4", "img_size": "AFHQ: 64", "batch_size": "AFHQ: 60",
    "use_labels": "CIFAR-100: true", "num_labels": "CIFAR-100: 100", "use_ema": "paper: false",
}  # fmt: skip


def default_of(flag):
    """The default, among the words that may be given if only these may, and the paper's value."""
    default = (flag.default_as_str or "").strip("'[]")
    words = getattr(flag.parser, "enum_values", None) or [default]
    text = ", ".join(f"**{word}**" if word == default and len(words) > 1 else word for word in words)
    return f"{text} ({PAPER[flag.name]})".strip() if flag.name in PAPER else text


def document():
    """A table for each of the groups."""
    text, values = HEAD, values_of("test")
    for heading, group in flags.GROUPS.items():
        text += f"\n## {heading[0].upper()}{heading[1:]}\n\n{COLUMNS}\n"
        for flag in (values[definition.name] for definition in group):
            meaning = re.sub(r"^<[^>]*>: |;\n.*", "", flag.help)  # what absl puts around it
            text += f"| `{flag.name}` | {default_of(flag)} | {meaning} |\n"
    return text


def test_the_document_of_all_flags():
    assert DOCUMENT.read_text() == document(), "python -m tests.test_flags writes it anew"


@pytest.mark.parametrize(
    ("script", "flag"), [("main.py", "--help"), ("main_fed.py", "--helpshort"), ("all_in.py", "--helpfull")]
)
def test_help_explains_every_flag(script, flag, tmp_path):
    text = run(script, flag, cwd=tmp_path).stdout
    for name in (*PUBLISHED, *OURS):
        assert f"--{name}:" in text or f"--[no]{name}:" in text, name
    for name in ("mid_T", "Fed", "parallel"):
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


@pytest.fixture
def values():
    """All flags at their defaults."""
    return values_of("test")


def parsed(values, *words):
    assert flags.parse(values, ["main.py", *map(str, words)]) == []
    return values


ONE_TWO = b"--ch_mult=1\n--ch_mult=2\n"


@pytest.mark.parametrize(
    ("words", "levels"),
    [
        ("", [1, 2, 2, 2]),
        ("--flagfile=a", [1, 2]),
        ("--flagfile=a --ch_mult=1 --ch_mult=1", [1, 1]),
        ("-flagfile a -ch_mult 1 --ch_mult 1", [1, 1]),
        ("--flagfile a -ch_mult=3 --lr 1e-3 --ch_mult=4", [3, 4]),
        ("--flagfile=a --flagfile=b", [3]),
        ("--flagfile=a --flagfile=a", [1, 2]),
        ("--flagfile=c", [5]),
        ("--flagfile=a --flagfile=d", [1, 2]),
        ("--ch_mult=7 --flagfile=a", [1, 2]),
        ("--ch_mult=7 --flagfile=a --ch_mult=8", [8]),
        ("--flagfile=a --lr=1", [1, 2]),
    ],
)
def test_a_later_list_replaces_an_earlier_one(words, levels, values, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    contents = {"a": ONE_TWO, "b": b"-ch_mult\n3", "c": b"--flagfile=a\n--ch_mult=5", "d": b"--lr=1"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    assert parsed(values, *words.split()).ch_mult == levels
    assert bool(values["ch_mult"].present) == bool(words)
    assert values.attn == [1]


LINES = "# réglages\n  # indented\n\n   \n// too\n--lr=1e-3  \n\t--logdir=über all#1\n--notrain\n"


@pytest.mark.parametrize(
    "data",
    [
        LINES.encode(),
        LINES.encode("utf-8-sig"),
        LINES.replace("\n", "\r\n").encode(),
        LINES.replace("\n", "\r").encode(),
    ],
)
def test_flagfiles_of_all_editors(data, values, tmp_path):
    (tmp_path / "a").write_bytes(data)
    parsed(values, "--train", f"--flagfile={tmp_path / 'a'}")
    assert (values.lr, values.logdir, values.train) == (1e-3, "über all#1", False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("directory", "Is a directory"),
        ("--lr=1".encode("utf-16"), "not a text file .* in UTF-8"),
        (b"--flagfile=b", "it includes itself"),
    ],
)
def test_flagfiles_that_cannot_be_read(content, message, values, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b").write_text("--lr=2\n--flagfile=a\n")
    if content == "directory":
        (tmp_path / "a").mkdir()
    elif content:
        (tmp_path / "a").write_bytes(content)
    with pytest.raises(UsageError, match=f"--flagfile=a: .*{message}") as error:
        parsed(values, "--flagfile=a")
    assert "\n" not in str(error.value)


NAMES = ["a=b", "'\"", "#", "日本", "-x", "\\", "a,b", "%s{}", "--lr=1"]


@pytest.mark.parametrize("name", NAMES)
def test_a_flagfile_keeps_names(name, values, tmp_path):
    parsed(values, f"--logdir={name}", "--samples", name, "--ch_mult=1", "--stages=score,grid")
    text = flags.as_flagfile(values)
    (tmp_path / name).write_text(text, encoding="utf-8")
    again = values_of("test", f"--flagfile={tmp_path / name}")
    assert (again.logdir, again.samples, again.ch_mult, again.stages) == (name, name, [1], ["score", "grid"])
    assert json.loads(json.dumps(flags.as_dict(again))) == flags.as_dict(values)


def test_the_split_is_that_of_the_papers_experiments(values):
    for name, split in (("cifar10_rand", "random"), ("afhq", "contiguous"), ("cifar100", "stratified")):
        assert build.split(parsed(values, f"--dataset={name}")) == split


def test_a_tilde_is_a_home_directory_in_every_path(values, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = "data_root check_dir logdir unet_dir samples generate_dir similar_dir grid_dir fid_cache inception_weights"
    for name in paths.split():
        assert parsed(values, f"--{name}=~/x")[name].value == f"{tmp_path}/x"
    assert parsed(values, "--logdir", "~root").logdir not in ("~root", f"{tmp_path}")
    assert parsed(values, "--logdir=a/~").logdir == "a/~"
    (tmp_path / "flags").write_text("--lr=3")
    assert parsed(values, "--flagfile=~/flags").lr == 3


def test_images_that_no_network_makes_may_have_any_size():
    flags.check(values_of("all_in.py", "--samples=made", "--img_size=100"))
    with pytest.raises(UsageError, match="4 levels of --ch_mult need a multiple of 8"):
        flags.check(values_of("all_in.py", "--img_size=100"))


if __name__ == "__main__":
    DOCUMENT.write_text(document())

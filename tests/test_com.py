"""The bash scripts, with flags that make everything tiny, on small data sets in the real formats."""

import json
import os
from importlib.metadata import version

import pytest
from packaging.requirements import Requirement

from tests.commands import ROOT, check, environment, run_bash
from tests.dataset_files import write_afhq, write_cifar10, write_cifar100
from tests.text_files import CAPTIONS, save_captions, save_images, tiny_pipeline

TINY = [
    "--ch=32", "--num_res_blocks=1", "--batch_size=8", "--T=20", "--sample_steps=2", "--num_images=12", "--device=cpu",
    "--sample_step=0", "--fid_features=pixels", "--local_epoch=1", "--total_round=2", "--client_num=2",
]  # fmt: skip
SETS = {
    "com_c10_v.sh": lambda root: write_cifar10(root, train_per_class=2, test_per_class=1),
    "com_c100_v.sh": lambda root: write_cifar100(root, train_per_class=1, test_per_class=1),
    "com_afhq_v.sh": lambda root: write_afhq(root, 16),
}


@pytest.mark.parametrize(
    ("line", "lacks"),
    [
        ("-r other.txt\n\nTorch >= 2.6  # why\nshellcheck-py", None),
        ("numpy<1", f"numpy<1 (it has {version('numpy')})"),
        ("torch\nno-such-package", "no-such-package (it has none)"),
    ],
)
def test_setup_takes_an_environment_within_the_ranges(line, lacks, tmp_path):
    """Where none is, it would make one, of this python3, which is too old."""
    (tmp_path / "needed.txt").write_text(line)
    (tmp_path / "python3").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python3").chmod(0o755)
    (tmp_path / "use.sh").write_text(f"source {ROOT}/com/setup.sh\necho use $PYTHON\n")
    path = f"{tmp_path}:{environment()['PATH']}"
    env = {"REQUIREMENTS": os.path.relpath(tmp_path / "needed.txt", ROOT), "PATH": path}
    result = run_bash(tmp_path / "use.sh", cwd=tmp_path, code=1 if lacks else 0, **env)
    if lacks:
        assert f"the active environment lacks {lacks} of" in result.stderr and "3.11 or newer" in result.stderr
    else:
        assert result.stdout == "use python\n"


def test_constraints_are_within_the_ranges():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#")
    lines = [line for name in ("", "-dev") for line in (ROOT / f"requirements{name}.txt").read_text().splitlines()]
    needed = [Requirement(line.partition("#")[0]) for line in lines if line[0] not in "-#"]
    assert all(pins[requirement.name] in requirement.specifier for requirement in needed)
    assert pins.keys() == {requirement.name for requirement in needed}


def settings(tmp_path, **more):
    return {"DATA_ROOT": str(tmp_path / "data"), "LOG_DIR": str(tmp_path / "log"), **more}


def write_modules(directory):
    """Modules of the caller's, with names of others that nothing may import in their place."""
    for name in ("errors.py", "torch.py", "pathlib.py", "utils.py", "training.py", "score.py"):
        (directory / name).write_text("raise SystemExit('imported from the directory of the caller')")


@pytest.mark.parametrize("script", SETS)
def test_iet_agc_experiments(script, tmp_path):
    SETS[script](tmp_path / "data")
    seeds = "1 2" if script == "com_c10_v.sh" else "1"
    env = settings(tmp_path, SEEDS=seeds, CHECKPOINTS="global_ckpt_round2.pt")
    flags = [*TINY, "--img_size=16", f"--fid_cache={tmp_path}/stats.npz"]
    first = run_bash(f"com/{script}", *flags, cwd=tmp_path, **env)
    assert "| global_ckpt_round2 |" in first.stdout
    paths = sorted(tmp_path.glob("log/eval/global_ckpt_round2/seed*/grid/result.json"))
    results = [json.loads(path.read_text()) for path in paths]
    assert results[0]["weights"] == "raw" and results[0]["N"] == 12
    if script != "com_c10_v.sh":
        return
    assert " ± " in first.stdout and results[0]["images_sha256"] != results[1]["images_sha256"]

    before = {path: path.stat().st_mtime_ns for path in paths}
    again = run_bash(f"com/{script}", *flags, cwd=tmp_path, **env)
    assert again.stdout.count("done before") == 3, "training and two evaluations are skipped"
    assert before == {path: path.stat().st_mtime_ns for path in paths}


def test_default_experiment(tmp_path):
    write_cifar10(tmp_path / "data", train_per_class=2, test_per_class=1)
    env = settings(tmp_path, SEEDS="1", CHECKPOINTS="ckpt2.pt ckpt4.pt", PROCESSES="2")
    flags = [*TINY, "--img_size=16", "--total_steps=4", "--save_step=2", f"--fid_cache={tmp_path}/stats.npz"]
    result = run_bash("com/default.sh", *flags, cwd=tmp_path, **env)
    assert "| ckpt2 " in result.stdout and "| ckpt4 " in result.stdout
    assert json.loads((tmp_path / "log/eval/table.json").read_text()).keys() == {"ckpt2", "ckpt4"}


def files_of_the_project():
    """All but what Python, pytest and ruff keep there."""
    ours = lambda path: not {"__pycache__", ".pytest_cache", ".ruff_cache", ".git", ".venv"} & set(path.parts)  # noqa: E731
    return {path for path in ROOT.rglob("*") if ours(path)}


@pytest.mark.parametrize(
    ("written", "meant"), [("~/a b", "{home}/a b"), ("~", "{home}"), ("a~", "a~"), ("~$(id)", "~$(id)")]
)
def test_settings_with_a_tilde(written, meant, tmp_path):
    """As from a file of settings, where no shell has seen it."""
    command = f'source \'{ROOT}/com/setup.sh\'; VALUE="$1"; expand VALUE; printf %s "$VALUE"'
    result = check(["bash", "-c", command, "bash", written], tmp_path, 0, {"HOME": str(tmp_path)})
    assert result.stdout == meant.format(home=tmp_path)


def test_an_equals_sign_in_the_log_directory(tmp_path):
    """Labels are told from paths; streams may be closed."""
    script = f"source '{ROOT}/com/common.sh'; LOG_DIR=$1; SEEDS=1; LAUNCH=(true); evaluate 'ckpt1.pt' --unet_dir >&-"
    grid = tmp_path / "lr=1e-3 é/eval/ckpt1/seed1/grid"
    grid.mkdir(parents=True)
    (grid / "result.json").write_text(json.dumps({"N": 4, "checkpoint": None, "seconds": {}}))
    check(["bash", "-c", script, "bash", "lr=1e-3 é"], tmp_path, 0, {})
    assert json.loads((tmp_path / "lr=1e-3 é/eval/table.json").read_text()).keys() == {"ckpt1"}


def test_slurm(tmp_path):
    """With stand-ins for what only a cluster has: a job of one machine with two GPUs' processes."""
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho localhost\n")
    (tmp_path / "srun").write_text('#!/bin/sh\nshift\nexec "$@"\n')
    for name in ("scontrol", "srun"):
        (tmp_path / name).chmod(0o755)
    env = environment()
    env = {"PATH": f"{tmp_path}:{env['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "here"}
    env |= {"SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_ID": str(10_000 + os.getpid() % 10_000)}
    flags = ["main_fed.py", "--train", "--dataset=digits", "--img_size=8", "--num_train=32", *TINY]
    run_bash("com/slurm.sbatch", *flags, f"--logdir={tmp_path / 'log'}", cwd=tmp_path, **env)
    assert (tmp_path / "log/global_ckpt_round2.pt").exists()


def test_demo(tmp_path):
    """Everything that com/demo.sh runs, with fewer steps and images: in the caller's directory, whatever is there."""
    before = files_of_the_project()
    write_modules(tmp_path)
    flags = ["--T=20", "--sample_steps=2", "--num_images=20", "--sample_step=0", "--fid_cache=stats.npz"]
    result = run_bash("com/demo.sh", *flags, cwd=tmp_path, DEMO_STEPS="8", DEMO_ROUNDS="2", DEMO_SAVE_STEP="3")
    assert "| default " in result.stdout and "| iet_agc " in result.stdout
    assert files_of_the_project() == before and (tmp_path / "stats.npz").exists()
    (tmp_path / "results/demo").rename(tmp_path / "demo")
    table = json.loads((tmp_path / "demo/table.json").read_text())
    steps = [json.loads((tmp_path / f"demo/{name}/train.json").read_text())["steps"] for name in ("default", "iet_agc")]
    assert steps == [8, 8]
    evaluations = sorted((tmp_path / "demo/default").glob("eval_*"))
    fpds = [json.loads((path / "grid/result.json").read_text())["fpd"] for path in evaluations]
    is_as_good = [fpd <= table["iet_agc"]["fpd"]["mean"] for fpd in fpds]
    steps = [path.name.removeprefix("eval_ckpt") for path in evaluations]
    stopped = [f"default, {step} steps" for step, good in zip(steps, is_as_good, strict=True) if good]
    assert list(table) == ["default", *stopped, "iet_agc"]
    assert True not in is_as_good[:-1] and (stopped or len(evaluations) == 2), "it goes on to the first that is"
    assert {"MQ@15", "fpd", "train s"} <= table["default"].keys()
    assert (tmp_path / "demo/memorised.png").stat().st_size > 0


def test_text_demo(tmp_path):
    """As test_demo, of com/demo_text.sh."""
    before = files_of_the_project()
    write_modules(tmp_path)
    flags = ["--sample_steps=1", "--num_images=8", "--batch_size=4", "--device=cpu"]
    result = run_bash("com/demo_text.sh", *flags, cwd=tmp_path, DEMO_STEPS="8", DEMO_ROUNDS="2")
    out = tmp_path / "results/demo_text"
    assert files_of_the_project() == before
    table = json.loads((out / "table.json").read_text())
    names = "default", "iet_agc", "lora_default", "lora_iet_agc"
    rows = {"default, round 1", *(f"{name}, round 2" for name in names)}
    assert table.keys() == rows | {"held-out", "base model", "round trip", "training, of each other"}
    assert all(f"| {label}" in result.stdout for label in table)
    assert {"own image", "f_mem of features", "similarity", "fpd to held-out"} <= table["default, round 2"].keys()
    assert [json.loads((out / name / "train.json").read_text())["steps"] for name in names] == [8] * 4
    assert (out / "demo_text.png").stat().st_size > 0


def test_published_text_experiment(tmp_path):
    """com/com_laion_v.sh, where everything is in its default place but the weights of SSCD and CLIP."""
    write_modules(tmp_path)
    tiny_pipeline().save_pretrained(tmp_path / "stable-diffusion-2-1")
    folder = save_images(tmp_path / "data/laion_10k/train")
    save_captions(folder.with_name("captions.json"), CAPTIONS)
    flags = ["--resolution=16", "--client_num=2", "--local_steps=2", "--total_round=1", "--batch_size=2", "--lr=1e-4",
             "--num_images=6", "--sample_steps=1", "--sample_step=0", "--features=pixels", "--device=cpu"]  # fmt: skip
    env = {"LOG_DIR": str(tmp_path / "log"), "CHECKPOINTS": "checkpoint_round1", "SSCD": "", "CLIP": ""}
    first = run_bash("com/com_laion_v.sh", *flags, cwd=tmp_path, **env)
    assert "| checkpoint_round1 |" in first.stdout
    result = json.loads((tmp_path / "log/eval/checkpoint_round1/seed1/grid/result.json").read_text())
    assert result["N"] == 6 and result["training"]["mem_ratio"] == 1.25
    again = run_bash("com/com_laion_v.sh", *flags, cwd=tmp_path, **env)
    assert again.stdout.count("done before") == 2

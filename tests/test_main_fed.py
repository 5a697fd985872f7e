"""main_fed.py as users run it."""

import json
import re

import numpy as np
import pytest
import torch

from dataset import load_dataset
from tests.commands import read_jsonl, run, run_with
from tests.faults import differences
from tests.networks import TINIER, TINY_FLAGS, tiny_unet
from training.logdir import ema_start
from training.shards import exchange, partition
from utils.name_lists import write_table

SETTINGS = [*TINY_FLAGS, "--client_num=3", "--local_epoch=2", "--total_round=2", "--log_step=4"]


def load(path):
    return torch.load(path, weights_only=True)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("main_fed")
    flags = ["--sample_step=8", "--sample_size=4", "--arr_ema_decay=0.2", "--mem_ratio=1.0", "--logdir=log"]
    run("main_fed.py", "--train", *SETTINGS, *flags, cwd=directory)
    return directory / "log"


def test_checkpoint_is_the_contract(trained):
    for r in (1, 2):
        state = load(trained / f"global_ckpt_round{r}.pt")
        assert {"global_model", "global_ema_model", "index_array"} <= state.keys()
        tiny_unet(T=20).load_state_dict(state["global_model"])
        assert state["index_array"].dtype == torch.int64 and state["index_array"].shape == (48,)


def test_average_is_the_mean_of_the_shards(trained):
    """The shards' files hold their weights before the last average: 16 images each."""
    shards = [load(trained / f"state/shard{k}_step8.pt") for k in range(3)]
    state = load(trained / "global_ckpt_round2.pt")
    for ours, theirs in (("global_model", "net_model"), ("global_ema_model", "ema_model")):
        for key, value in state[ours].items():
            mean = np.mean([shard[theirs][key].double().numpy() for shard in shards], axis=0)
            np.testing.assert_allclose(value.numpy(), mean, rtol=1e-6, atol=1e-8)
    assert not torch.equal(shards[0]["net_model"]["head.weight"], shards[1]["net_model"]["head.weight"])


def test_skips_are_counted_per_image(trained):
    """With mem_ratio 1 many samples fall below the running mean, and every one is counted at its image."""
    counts = load(trained / "global_ckpt_round2.pt")["index_array"]
    records = [r for r in read_jsonl(trained / "metrics.jsonl") if "skipped" in r]
    steps = np.diff([0, *[record["step"] for record in records]])
    logged = sum(record["skipped"] * 8 * n for record, n in zip(records, steps, strict=True))
    assert counts.sum() == round(logged) > 0
    assert counts.max() <= 4, "an image is seen once an epoch"
    banks = [load(trained / f"state/shard{k}_step8.pt")["bank"] for k in range(3)]
    assert all(bank.shape == (20,) and bank.max() > 0 for bank in banks)


def test_logs(trained):
    records = read_jsonl(trained / "metrics.jsonl")
    assert {(record["round"], record["shard"]) for record in records} == {(r, k) for r in (1, 2) for k in range(3)}
    assert records[-1]["step"] == 24
    events = b"".join(path.read_bytes() for path in trained.glob("events.out.tfevents.*"))
    for tag in (b"skips_per_image", b"memory_bank_over_t/shard2/round2", b"shard1/skipped", b"average_round1"):
        assert tag in events, tag
    assert {"loss", "lr", "images_per_second", "skipped"} <= records[0].keys()
    for name in ("average_round1", "average_round2", "shard1_step8", "shard0_step16"):
        assert (trained / f"sample/{name}.png").exists(), name
    assert json.loads((trained / "train.json").read_text())["steps"] == 24


def test_one_shard_without_control_and_one_round_is_main(tmp_path):
    run("main.py", "--train", *TINY_FLAGS, "--total_steps=12", "--logdir=main", cwd=tmp_path)
    flags = ["--client_num=1", "--local_epoch=2", "--total_round=1", "--anti_grad=off", "--logdir=fed"]
    run("main_fed.py", "--train", *TINY_FLAGS, *flags, cwd=tmp_path)
    main, fed = load(tmp_path / "main/ckpt12.pt"), load(tmp_path / "fed/global_ckpt_round1.pt")
    assert equal(main["net_model"], fed["global_model"])
    assert equal(main["ema_model"], fed["global_ema_model"])


def test_continued_run_ends_like_a_straight_one(trained, tmp_path):
    flags = [*SETTINGS, "--arr_ema_decay=0.2", "--mem_ratio=1.0", "--logdir=log"]
    run("main_fed.py", "--train", *flags, "--total_round=1", cwd=tmp_path)
    result = run("main_fed.py", "--train", *flags, cwd=tmp_path)
    assert "1 rounds and 12 steps done" in result.stdout
    straight, continued = (load(path / "global_ckpt_round2.pt") for path in (trained, tmp_path / "log"))
    for name in ("global_model", "global_ema_model"):
        assert equal(straight[name], continued[name])
    assert torch.equal(straight["index_array"], continued["index_array"])


@pytest.mark.parametrize("arm", [["--anti_grad=off"], ["--client_num=1"]])
def test_all_arms_of_the_ablation_do_the_same_number_of_steps(arm, tmp_path):
    """Those of the other two arms are counted above."""
    run("main_fed.py", "--train", *SETTINGS, "--total_round=1", *arm, "--logdir=log", cwd=tmp_path)
    assert json.loads((tmp_path / "log/train.json").read_text())["steps"] == 12


def test_ascend_split_and_labels(tmp_path):
    flags = ["--anti_grad=ascend", "--anti_grad_weight=0.1", "--split=random", "--use_labels", "--num_labels=10"]
    run("main_fed.py", "--train", *SETTINGS, "--total_round=1", *flags, "--logdir=log", cwd=tmp_path)
    assert "cond_embedding.timembedding.0.weight" in load(tmp_path / "log/global_ckpt_round1.pt")["global_model"]


@pytest.mark.parametrize("kind", ["published", "pytorch-ddpm"])
def test_fine_tuning_starts_from_a_checkpoint(kind, trained, tmp_path):
    """With a learning rate of nearly 0, what comes out is what went in; rounds count from 1 again."""
    source = load(trained / "global_ckpt_round2.pt")
    if kind == "published":
        source = {
            "global_model": source["global_model"],
            "global_ema_model": source["global_ema_model"],
            "index_array": np.zeros(150_000),
        }
    elif kind == "pytorch-ddpm":
        names = {"global_model": "net_model", "global_ema_model": "ema_model"}
        source = {
            names[name]: {key: value for key, value in source[name].items() if ".cemb_proj." not in key}
            for name in names
        } | {"step": 3, "sched": {}, "optim": {}, "x_T": torch.zeros(1)}
    torch.save(source, tmp_path / "start.pt")
    flags = ["--check_dir=start.pt", "--total_round=1", "--local_epoch=1", "--lr=1e-30", "--logdir=log"]
    run("main_fed.py", "--train", *SETTINGS, *flags, cwd=tmp_path)
    state = load(tmp_path / "log/global_ckpt_round1.pt")
    start = source.get("global_model", source.get("net_model"))
    ema_start = source.get("global_ema_model", source.get("ema_model"))
    assert all(torch.allclose(state["global_model"][key], start[key]) for key in start)
    assert torch.allclose(state["global_ema_model"]["head.weight"], ema_start["head.weight"], atol=1e-4)


def test_a_start_of_another_diffusion_is_said(trained, tmp_path):
    start = trained / "global_ckpt_round2.pt"
    flags = ["--total_round=1", "--local_epoch=1", "--beta_T=0.5", f"--check_dir={start}", "--logdir=log"]
    said = run("main_fed.py", "--train", *SETTINGS, *flags, cwd=tmp_path).stderr
    assert f"{start}: was trained otherwise: here --beta_T=0.5, not 0.02" in said


def write_groups(path, sizes):
    """Groups of so many of the 48 digits, one after the other."""
    names, rows = iter(load_dataset("digits", "", 8, 48).train.names), []
    for group, size in enumerate(sizes):
        rows += [[group, next(names)] for _ in range(size)]
    write_table(path, ("group", "image"), rows)


def test_balanced_groups_weigh_as_one_in_the_average(tmp_path):
    write_groups(tmp_path / "groups.csv", sizes=(20,))
    flags = ["--groups=groups.csv", "--balance_groups", "--client_num=2", "--batch_size=4", "--lr=1e-2"]
    run("main_fed.py", "--train", *SETTINGS, *flags, "--total_round=1", "--logdir=log", cwd=tmp_path)
    shards = [load(tmp_path / f"log/state/shard{k}_step6.pt")["net_model"] for k in range(2)]
    state = load(tmp_path / "log/global_ckpt_round1.pt")
    for name, value in state["global_model"].items():
        parts = [shard[name].double().numpy() for shard in shards]
        mean = np.average(parts, axis=0, weights=[15, 14])  # groups
        np.testing.assert_allclose(value.numpy(), mean, rtol=1e-6, atol=1e-8)
    assert ema_start(tmp_path / "log/global_ckpt_round1.pt") == pytest.approx(0.9999**6)
    run_json = json.loads((tmp_path / "log/run.json").read_text())["settings"]
    assert (run_json["balance_groups"], run_json["split"]) == (True, "together")
    flags[1] = "--split=together"
    said = run("main_fed.py", "--train", *SETTINGS, *flags, "--logdir=log", cwd=tmp_path, code=2).stderr
    assert "balance_groups=False: the run in log was started with True (what it has saved" in said


ARMS = {
    "IET-AGC+": ["--exchange=ring", "--augment_near_threshold", "--bar=4", "--mem_ratio=0.9", "--bank_bins=2"],
    "reshuffled copies, ambient": [
        "--reshard", "--ambient_t=8", "--num_train=36", "--duplicates=3", "--copies=5", "--duplicates_in=cluster",
    ],
    "local SGD": ["--split=all", "--total_round=3", "--local_epoch=1"],
    "whole groups": ["--groups=groups.csv", "--split=together", "--reshard", "--batch_size=4"],
    "groups drawn as one": ["--groups=groups.csv", "--balance_groups", "--reshard", "--batch_size=4"],
}  # fmt: skip


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_continues_exactly(arm, tmp_path):
    """From the middle of a round after an exchange, or a new partition, and with another number of processes."""
    write_groups(tmp_path / "groups.csv", sizes=(12, 5, 2))
    flags = [*SETTINGS, *TINIER, "--total_round=4", *ARMS[arm], "--save_step=2", "--keep=50", "--logdir=log"]
    run("main_fed.py", "--train", *flags, cwd=tmp_path)
    log = tmp_path / "log"
    rounds = len(list(log.glob("global_ckpt_round*.pt")))
    per_round = max(int(path.stem.split("step")[1]) for path in log.glob("state/shard0_step*.pt")) // rounds
    expected = {path.name: load(path) for path in log.glob("**/*.pt")}
    for path in log.glob("**/*.pt"):
        number = int(re.search(r"(\d+)\.pt", path.name)[1])
        if number > (1 if "round" in path.name else per_round + 2 * ("shard1" in path.name)):
            path.unlink()
    result = run_with(2, "main_fed.py", "--train", *flags, cwd=tmp_path)
    assert "1 rounds and" in result.stdout
    for path in log.glob("**/*.pt"):
        again = {name: value for name, value in load(path).items() if name != "seconds"}
        assert differences({name: expected[path.name][name] for name in again}, again) == [], path.name


def test_iet_agc_plus_exchanges_after_odd_rounds_and_averages_after_even_ones(tmp_path):
    run(
        "main_fed.py",
        "--train",
        *SETTINGS,
        *ARMS["IET-AGC+"],
        "--total_round=4",
        "--keep=9",
        "--logdir=log",
        cwd=tmp_path,
    )
    rounds = [load(tmp_path / f"log/global_ckpt_round{r}.pt") for r in (1, 2, 3, 4)]
    sizes = [len(shard) for shard in rounds[0]["slots"]]
    before = partition(load_dataset("digits", "", 8, 48).train.labels, 3, "stratified", 12)
    for r, state in enumerate(rounds, start=1):
        assert sorted(torch.cat(state["slots"]).tolist()) == list(range(48))
        assert [len(shard) for shard in state["slots"]] == sizes
        counts = sum(load(tmp_path / f"log/state/shard{k}_step{4 * r}.pt")["round_counts"] for k in range(3))
        after = exchange(before, counts, 0.25) if r in (1, 3) else before
        assert all(map(torch.equal, state["slots"], after)), r
        assert counts.sum() > 0
        before = after
    optim = [load(tmp_path / f"log/state/shard0_step{4 * r}.pt")["optim"]["state"][1]["step"] for r in (1, 4)]
    assert optim[1] > 16, "Adam has made augmented steps beside those of the schedule"


def test_impossible_arms_are_refused_in_a_line(tmp_path):
    write_groups(tmp_path / "groups.csv", sizes=(40,))
    groups = "--groups=groups.csv"
    for flags, what in (
        (["--exchange=ring", "--client_num=1"], "--exchange=ring needs several shards"),
        (
            ["--reshard", "--num_train=47", "--duplicates=1", "--copies=3", "--client_num=2", "--batch_size=5"],
            "--reshard: shards would change their sizes",
        ),
        (["--exchange=ring", "--reshard"], "--exchange=ring needs several shards"),
        (["--reshard", "--split=stratified"], "--reshard makes random shards"),
        (["--augment_near_threshold", "--anti_grad=off"], "--augment_near_threshold needs --anti_grad=skip"),
        (["--split=together"], "--split=together needs --groups"),
        (["--balance_groups"], "--balance_groups needs --groups"),
        (["--balance_groups", groups, "--split=all"], "--balance_groups: --split=all may part a group"),
        (["--split=together", groups, "--exchange=ring"], "--exchange=ring parts groups"),
        (["--split=together", groups, "--duplicates_in=cluster"], "--duplicates_in=cluster: --groups"),
        (["--split=together", groups], "--batch_size=8 is larger than the 4 images of shard 1"),
        (["--alter_copies"], "--alter_copies needs --duplicates and --copies"),
        (["--bank_bins=21"], "--bank_bins=21: too large for --T=20"),
        (["--ambient_t=20"], "--ambient_t=20: too large for --T=20"),
    ):
        result = run("main_fed.py", "--train", *SETTINGS, *flags, "--logdir=log", cwd=tmp_path, code=2)
        assert what in result.stderr and not (tmp_path / "log").exists()

"""Watching a training: its numbers are those of all_in.py, the training is not touched, kills change nothing."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from score.generate import generate
from score.report import watch_section
from tests.commands import ROOT, environment, eval_flags, read_jsonl, run, run_module, run_with, values_of
from tests.faults import differences
from tests.test_distributed import without_timings
from tests.text_files import CAPTIONS, save_captions, save_images, saved_pipeline
from training import build
from training.logger import read_metrics
from training.watch import Watch
from utils.errors import UsageError
from utils.seeding import derive_seed

NETWORK = [
    "--ch=16", "--ch_mult=1", "--attn=0", "--num_res_blocks=1", "--T=20", "--sample_steps=2", "--batch_size=8",
    "--device=cpu",
]  # fmt: skip
TRAINING = ["--train", *NETWORK, "--lr=2e-3", "--warmup=0", "--sample_step=0", "--ema_decay=0.9", "--logdir=log"]
DIGITS = ["--dataset=digits", "--num_train=48"]
PIXELS = ["--fid_features=pixels", "--device=cpu"]
TWO = ["--client_num=2", "--mem_ratio=1.0"]
WATCHED = ["--watch_step=6", "--watch_images=20"]
RUNS = {  # 24 steps each
    "default": ["main.py", "--total_steps=24", "--log_step=2", "--save_step=9", "--keep=1", "--img_size=16"],
    "averages": [
        "main_fed.py", "--client_num=2", "--local_epoch=1", "--total_round=4", "--save_round=3", "--keep=1",
        "--log_step=2", "--img_size=8", "--mem_ratio=1.0",
    ],
    "shards": [
        "main_fed.py", "--client_num=3", "--local_epoch=4", "--total_round=1", "--log_step=2", "--img_size=8",
        "--save_step=3",
    ],
}  # fmt: skip
LAST = {"default": "ckpt24.pt", "averages": "global_ckpt_round4.pt", "shards": "global_ckpt_round1.pt"}


def command(kind):
    script, *flags = RUNS[kind]
    return script, *TRAINING, *DIGITS, *flags


def load(path):
    return without_timings(torch.load(path, weights_only=True))


def best_of(directory):
    return json.loads((directory / "log/best.json").read_text())


@pytest.fixture(scope="module", params=list(RUNS))
def watched(request, tmp_path_factory):
    """A kind of run, and the directory with the log directory of one that was watched."""
    directory = tmp_path_factory.mktemp(request.param)
    result = run(*command(request.param), *WATCHED, cwd=directory)
    assert "of it for --watch_step" in result.stdout
    is_small = "--img_size=8" in RUNS[request.param]
    assert ("SWD is not defined for images of 8 pixels: best.json is by fpd" in result.stderr) == is_small
    return request.param, directory


def test_a_watched_training_is_the_same_to_the_last_bit(watched, tmp_path):
    kind, directory = watched
    run(*command(kind), cwd=tmp_path)
    assert not list(tmp_path.glob("log/*best*"))
    last = LAST[kind]
    assert differences(load(directory / "log" / last), load(tmp_path / "log" / last)) == []
    with_loss = [line for line in read_metrics(directory / "log") if "loss" in line]
    without = read_metrics(tmp_path / "log")
    if kind == "shards":  # a line more where they wait for each other
        shared = {line["step"] for line in without}
        with_loss = [line for line in with_loss if line["step"] in shared]
    assert without_timings(with_loss) == without_timings(without)
    assert json.loads((tmp_path / "log/train.json").read_text()).keys() == {"steps", "seconds"}


def test_the_best_is_measured_by_all_in_as_the_training_did(watched, tmp_path):
    kind, directory = watched
    record, log = best_of(directory), directory / "log"
    assert record["criterion"] == ("swd" if kind == "default" else "fpd")
    assert [found["step"] for found in record["measurements"]] == [6, 12, 18, 24]
    allowed = [found for found in record["measurements"] if found["mq30_above_floor"] <= 0.02]
    best = min(allowed, key=lambda found: found[record["criterion"]])
    assert record["best"] == best | {"checkpoint": record["checkpoint"]}
    names = record["checkpoint"].split(",")
    assert sorted(path.name for path in log.glob("best_*")) == names and len(names) == (3 if kind == "shards" else 1)
    flags = [*NETWORK, f"--unet_dir={log}", "--best", "--num_images=20", "--fid_features=pixels", *eval_flags(tmp_path)]
    run("all_in.py", *flags, "--fid_reference=heldout", cwd=tmp_path)
    result = json.loads((tmp_path / "grid/result.json").read_text())
    numbers = {"mq30_above_floor": result["pixels"]["mq_above_floor"]["30"], "f_mem": result["pixels"]["f_mem"]}
    numbers |= {name: result[name] for name in ("fpd", "swd") if name in result}
    assert {name: value for name, value in best.items() if name != "step"} == numbers
    assert result["watched"] == record["measurements"]
    page = (tmp_path / "grid/report.html").read_text()
    assert "While it trained" in page and page.count("over the steps of training") == 2


def test_metrics_and_seconds_of_a_watched_training(watched):
    directory = watched[1]
    lines = [line for line in read_jsonl(directory / "log/metrics.jsonl") if "watch_seconds" in line]
    of_watch = [{k: v for k, v in line.items() if k not in ("time", "watch_seconds")} for line in lines]
    assert of_watch == best_of(directory)["measurements"]
    record = json.loads((directory / "log/train.json").read_text())
    assert record["watch_seconds"] == pytest.approx(sum(line["watch_seconds"] for line in lines), abs=0.001)
    assert record["watch_share"] == pytest.approx(record["watch_seconds"] / record["seconds"], rel=0.02)
    assert record["steps"] == 24 and record["stopped_when_copying"] is False


def test_a_killed_training_measures_the_same_again(watched, tmp_path):
    kind, directory = watched
    script, *flags = command(kind)
    for number, measurements in ((signal.SIGTERM, 1), (signal.SIGKILL, 3)):
        with (tmp_path / "out").open("w") as out:
            line = [sys.executable, str(ROOT / script), *flags, *WATCHED]
            process = subprocess.Popen(line, cwd=tmp_path, env=environment(), stdout=out, stderr=out)
            path = tmp_path / "log/best.json"
            while process.poll() is None and not (
                path.exists() and len(json.loads(path.read_text())["measurements"]) >= measurements
            ):
                time.sleep(0.01)
            time.sleep(0.2)
            process.send_signal(number)
            process.wait()
    assert process.returncode == -signal.SIGKILL, (tmp_path / "out").read_text()
    run(script, *flags, *WATCHED, cwd=tmp_path)
    logs = directory / "log", tmp_path / "log"
    assert (logs[0] / "best.json").read_bytes() == (logs[1] / "best.json").read_bytes()
    for name in (*best_of(directory)["checkpoint"].split(","), LAST[kind]):
        assert differences(*(load(log / name) for log in logs)) == []
    found = [[line for line in read_metrics(log) if "watch_seconds" in line] for log in logs]
    for line in (*found[0], *found[1]):
        del line["time"], line["watch_seconds"]
    assert found[0] == found[1]


@pytest.mark.parametrize("watched", ["shards"], indirect=True)
def test_processes_measure_together(watched, tmp_path):
    _, directory = watched
    run_with(2, *command("shards"), *WATCHED, cwd=tmp_path)
    found, expected = best_of(tmp_path), best_of(directory)
    for one, other in zip(found["measurements"], expected["measurements"], strict=True):
        assert one == pytest.approx(other, rel=1e-9)  # sums of features in another order
    assert found["checkpoint"] == expected["checkpoint"] and found["about"] == expected["about"]
    names = found["checkpoint"].split(",")
    assert sorted(path.name for path in tmp_path.glob("log/best_*")) == names


def test_shards_that_exchange_images_wait_for_the_next_average(tmp_path):
    flags = ["--client_num=2", "--local_epoch=1", "--total_round=4", "--img_size=8", "--exchange=ring"]
    run("main_fed.py", *TRAINING, *DIGITS, *flags, *WATCHED, cwd=tmp_path)
    averaged = [r for r in range(1, 5) if (r + 1) % 2 or r == 4]
    assert [found["step"] for found in best_of(tmp_path)["measurements"]] == [6 * r for r in averaged]


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A directory whose training images are what an untrained network generates, so that it copies at once."""
    directory = tmp_path_factory.mktemp("copied")
    values = values_of("test", *NETWORK, "--img_size=8")
    torch.manual_seed(derive_seed(values.seed, "weights"))
    net = build.unet(values).eval()
    images = generate(build.sampler(values, net), num_images=20, batch_size=20, seed=values.seed)
    random = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=random)
    for folder, part in (("images", torch.cat([images, noise[:12]])), ("heldout", noise[12:])):
        (directory / folder).mkdir()
        for i, image in enumerate(part):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(directory / folder / f"{i:02}.png")
    return directory


@pytest.mark.parametrize(
    ("script", "flags", "last"),
    [
        ("main.py", ["--total_steps=40", "--save_step=0"], "ckpt8.pt"),
        ("main_fed.py", [*TWO, "--total_round=9", "--save_round=9", "--local_epoch=1"], "global_ckpt_round2.pt"),
        ("main_fed.py", [*TWO, "--total_round=1", "--local_epoch=9"], "state/shard1_step4.pt"),
    ],
)  # fmt: skip
def test_a_training_that_copies_ends(script, flags, last, copied):
    logdir = f"log_{Path(last).name}"
    flags = [*TRAINING, *flags, "--dataset=folder", "--data_root=images", "--heldout=heldout", "--img_size=8"]
    flags += ["--lr=1e-9", "--watch_step=4", "--watch_images=20", f"--logdir={logdir}"]
    for start in range(3):  # the second time there is nothing to do, the third its last save has failed
        if start == 2 and "round2" in last:
            for path in [copied / logdir / last, *(copied / logdir / "state").glob("*round2*")]:
                path.unlink(missing_ok=True)
        result = run(script, *flags, "--stop_when_copying", cwd=copied)
        assert "8 steps done" in result.stdout and "and no more, since it copies" in result.stdout
        record = json.loads((copied / logdir / "train.json").read_text())
        assert record["stopped_when_copying"] is True and record["steps"] == 8
        assert (copied / logdir / last).exists()
        best = json.loads((copied / logdir / "best.json").read_text())
        assert [found["mq30_above_floor"] for found in best["measurements"]] == [1.0, 1.0]
        assert best["checkpoint"] is None and not list((copied / logdir).glob("best_*"))
    if "--total_round=1" in flags:
        assert not list((copied / logdir).glob("**/*round1.pt")), "the only round is not at its end"
    error = run("all_in.py", f"--unet_dir={logdir}", "--best", *PIXELS, cwd=copied, code=1).stderr
    what = "names no checkpoint, since no measurement had MQ@30 at most two points above its floor"
    assert f"{logdir}/best.json: {what}" in error


def test_a_round_that_was_left_is_not_averaged(copied):
    """A training that has copied, stopped within a round, and is started with --stop_when_copying."""
    flags = [*TRAINING, *TWO, "--total_round=3", "--local_epoch=1", "--save_step=1", "--keep=9", "--watch_step=4"]
    flags += ["--dataset=folder", "--data_root=images", "--heldout=heldout", "--img_size=8", "--lr=1e-9"]
    flags += ["--watch_images=20", "--logdir=left"]
    run("main_fed.py", *flags, cwd=copied)
    log = copied / "left"
    for name in ("global_ckpt_round3.pt", "state/shard0_step6.pt", "state/shard1_step5.pt", "state/shard1_step6.pt"):
        (log / name).unlink()
    before = (log / "global_ckpt_round2.pt").read_bytes()
    for total_round in (3, 9):
        result = run("main_fed.py", *flags, f"--total_round={total_round}", "--stop_when_copying", cwd=copied)
        assert "9 steps done" in result.stdout and "and no more, since it copies" in result.stdout
        assert sorted(path.name for path in log.glob("global_*")) == [f"global_ckpt_round{r}.pt" for r in (1, 2)]
        measurements = json.loads((log / "best.json").read_text())["measurements"]
        assert [found["step"] for found in measurements if found["step"] <= 9] == [4, 8]
    assert (log / "global_ckpt_round2.pt").read_bytes() == before
    run("main_fed.py", *flags, cwd=copied)
    assert json.loads((log / "train.json").read_text())["steps"] == 12 and (log / "global_ckpt_round3.pt").exists()


@pytest.mark.parametrize(
    ("script", "flags", "said"),
    [
        ("main.py", ["--watch_step=2"], "--watch_step: no image of digits is held out: name a folder"),
        ("main_fed.py", ["--watch_step=2", "--client_num=2"], "--watch_step: no image of digits is held out"),
        ("main.py", ["--stop_when_copying"], "--stop_when_copying needs --watch_step"),
    ],
)  # fmt: skip
def test_what_cannot_be_watched_is_refused(script, flags, said, tmp_path):
    result = run(script, *TRAINING, "--dataset=digits", "--img_size=8", *flags, cwd=tmp_path, code=2)
    assert said in result.stderr.splitlines()[-1] and not list(tmp_path.iterdir())


def test_best_needs_a_watched_training(tmp_path):
    error = run("all_in.py", f"--unet_dir={tmp_path}", "--best", *PIXELS, cwd=tmp_path, code=1).stderr
    assert error.splitlines()[-1].endswith("no such file: name a log directory whose training had --watch_step")


class Lines:
    """Takes what a logger is told."""

    def watched(self, found, seconds):
        pass


def make_watch(numbers, kept, about=None, every=10):
    """A `Watch` to which networks are names of measurements, and which keeps names in a list."""

    def tidy(logdir, names):
        kept[:] = [name for name in kept if name in names]

    def save(logdir, state):
        kept.append(state)
        return state

    measured = {step: {"mq30_above_floor": above, "swd": swd} for step, (above, swd) in numbers.items()}
    return Watch(
        lambda networks: measured[networks[0]], every=every, stops=True, criterion="swd", about=about or {},
        save=save, tidy=tidy,
    )  # fmt: skip


def test_which_is_the_best_and_when_it_is_over_by_hand(tmp_path):
    numbers = {10: (0.0, 5.0), 20: (0.02, 4.0), 30: (0.021, 3.0), 40: (0.05, 2.0), 50: (0.049, 1.0), 60: (0.05, 1.0)}
    numbers[70] = (0.07 - 0.02, 1.0)  # 0.05 but for rounding
    kept, best, over = [], [], []
    watch = make_watch(numbers, kept)
    watch.begin(tmp_path, 0)
    for step in numbers:
        assert not watch.is_due(step - 1) and watch.is_due(step)
        watch(step, [step], [f"step{step}"], Lines())
        assert not watch.is_due(step) and kept == [f"step{watch.best['step']}"]
        best.append(watch.best["step"])
        over.append(watch.is_over)
    assert best == [10] + [20] * 6 and over == [False] * 6 + [True]

    again = make_watch(numbers, kept)
    again.begin(tmp_path, 69)
    assert len(again.measurements) == 6 and not again.is_over and again.is_due(75) and again.best["step"] == 20
    again.begin(tmp_path, 70)
    assert again.is_over and not again.is_due(79) and again.is_due(80)
    off = make_watch(numbers, kept, every=0)
    off.begin(tmp_path, 70)
    assert not off.is_over and not off.is_due(80)


def test_the_best_of_steps_that_are_made_again_stays(tmp_path):
    """Its file is there, whether or not a GPU makes the same weights again."""
    kept = []
    watch = make_watch({10: (0.0, 5.0), 20: (0.0, 4.0)}, kept)
    watch.begin(tmp_path, 0)
    for step in (10, 20):
        watch(step, [step], [f"step{step}"], Lines())
    again = make_watch({20: (0.0, 4.5), 30: (0.0, 3.0)}, kept)
    again.begin(tmp_path, 15)
    assert [found["step"] for found in again.measurements] == [10] and again.is_due(20)
    again(20, [20], ["other"], Lines())
    assert kept == ["step20"] and again.best["swd"] == 4.0
    again(30, [30], ["step30"], Lines())
    assert kept == ["step30"]


def test_what_was_measured_with_other_settings_is_not_gone_on_with(tmp_path):
    kept = []
    watch = make_watch({10: (0.0, 5.0)}, kept, about={"images": 7, "seed": 1})
    watch.begin(tmp_path, 0)
    watch(10, [10], ["step10"], Lines())
    with pytest.raises(UsageError, match=r"best\.json: measured with other images: give those of then"):
        make_watch({}, kept, about={"images": 8, "seed": 1}).begin(tmp_path, 10)
    assert kept == ["step10"]


@pytest.mark.parametrize("kind", ["default", "averages"])
def test_nothing_is_written_where_the_watching_is_refused(kind, tmp_path):
    script, *flags = command(kind)
    run(script, *flags, *WATCHED, cwd=tmp_path)
    files = [path for path in (tmp_path / "log").rglob("*") if path.is_file() and path.name != ".lock"]
    before = {path: path.read_bytes() for path in files}
    changed = ["--watch_images=30", "--dropout=0.3", "--allow_change"]
    error = run(script, *flags, *WATCHED, *changed, cwd=tmp_path, code=2).stderr
    assert "measured with other watch_images" in error
    assert {path: path.read_bytes() for path in files} == before


def test_curves_of_several_trainings_side_by_side(tmp_path):
    """One of them was not watched, one has two repeats."""

    def measurements(rise):
        rows = ((step, rise * step / 30, 90 - step) for step in (10, 20, 30))
        return [{"step": s, "mq30_above_floor": above, "fpd": 1.0, "swd": swd} for s, above, swd in rows]

    assert watch_section({"a": [None], "b": [None, None]}) == []
    for label, repeats in {"a": [None], "b": [measurements(0.1), measurements(0.2)]}.items():
        for i, found in enumerate(repeats):
            path = tmp_path / f"{label}{i}"
            path.mkdir()
            (path / "result.json").write_text(json.dumps({"N": 10, "watched": found, "fpd": 1.0, "flags": {}}))
    run_module("score.compare", "a=a0", "b=b0", "b=b1", "--html=page.html", cwd=tmp_path)
    page = (tmp_path / "page.html").read_text()
    assert "MQ@30 above floor over the steps of training. b: 0.1 at the end" in page
    assert "SWD over the steps of training. b: 60 at the end" in page


MODULE, EVALUATION = "text_to_image.main_fed", "text_to_image.all_in"
PIPELINE = [
    "--pretrained=pipeline", "--data_root=images", "--captions=captions.json", "--resolution=16", "--batch_size=4",
    "--sample_steps=2", "--features=pixels", "--device=cpu",
]  # fmt: skip
FINE_TUNING = ["--train", *PIPELINE, "--lr=1e-3", "--warmup=2", "--sample_step=0", "--log_step=1"]


def test_a_fine_tuning_is_watched(tmp_path):
    saved_pipeline(tmp_path)
    save_captions(tmp_path / "captions.json", CAPTIONS)
    names = list(CAPTIONS)
    save_images(tmp_path / "all", [*names, *(f"other{i}.png" for i in range(20))])
    for folder, chosen in (("images", names), ("others", [path.name for path in tmp_path.glob("all/other*")])):
        (tmp_path / folder).mkdir()
        for name in chosen:
            (tmp_path / "all" / name).rename(tmp_path / folder / name)

    rounds = ["--client_num=2", "--local_steps=2", "--total_round=3", "--save_round=3"]
    watched = ["--watch_step=4", "--watch_images=10", "--heldout=others"]
    said = run_module(MODULE, *FINE_TUNING, *rounds, *watched, "--logdir=log", cwd=tmp_path).stderr
    assert "20 held-out images: with less than 500 the floors are rough" in said
    run_module(MODULE, *FINE_TUNING, *rounds, "--logdir=plain", cwd=tmp_path)
    logs = tmp_path / "log", tmp_path / "plain"
    ends = [load(log / "state/average_round3.pt") for log in logs]
    assert differences(*ends) == []
    record = best_of(tmp_path)
    assert [found["step"] for found in record["measurements"]] == [4, 8, 12] and record["criterion"] == "swd"
    best = min(record["measurements"], key=lambda found: found["swd"])
    assert record["checkpoint"] == f"best_checkpoint_round{best['step'] // 4}"
    folders = sorted(path.name for path in (tmp_path / "log").glob("*checkpoint_round*"))
    assert folders == [record["checkpoint"], "checkpoint_round3"]

    flags = [*PIPELINE, "--unet=log", "--best", "--num_images=10", "--heldout=others", *eval_flags(tmp_path)]
    run_module(EVALUATION, *flags, cwd=tmp_path)
    result = json.loads((tmp_path / "grid/result.json").read_text())
    share, floor = (of["similarity"]["mq_fraction"]["30"] for of in (result, result["holdout"]))
    numbers = {"mq30_above_floor": share - floor, "f_mem": result["similarity"]["f_mem"]}
    numbers |= {"fpd": result["heldout_fpd"], "swd": result["heldout_swd"]}
    assert {name: value for name, value in best.items() if name != "step"} == numbers
    assert result["checkpoint"] == f"log/{record['checkpoint']}"
    assert "While it trained" in (tmp_path / "grid/report.html").read_text()

    never_averaged = [*watched, "--total_round=1"], "give a --total_round above 1"
    for wrong, said in (never_averaged, (["--watch_step=4"], "no image is held out")):
        flags = [*FINE_TUNING, *rounds, *wrong, "--logdir=no"]
        assert said in run_module(MODULE, *flags, cwd=tmp_path, code=2).stderr.splitlines()[-1]
    assert not (tmp_path / "no").exists()

"""Images that are held back and made again, against every try of every image made by itself."""

import json

import numpy as np
import pytest
import torch

from dataset import load_dataset
from diffusion import GaussianDiffusionSampler
from score import generate
from score.reject import TRIES, add_to_record, held_back, hold_back
from tests.commands import eval_flags, run, run_module, run_with
from tests.networks import TINY_FLAGS, tiny_unet, visible
from tests.test_all_in import call, result_of
from tests.test_all_in import checkpoint as checkpoint
from utils.images import to_uint8
from utils.name_lists import GROUP_COLUMNS, write_table
from utils.seeding import derive_seed, sample_noise

N = 12
FLAGS = [*TINY_FLAGS, "--fid_features=pixels", f"--num_images={N}", "--stages=generate,memorise,report"]


def first_good(margins):
    """Of (N, TRIES) margins, the numbers of the first not below 0, else -1, and of the delivered."""
    tries = [next((t for t, x in enumerate(row) if x >= 0), -1) for row in margins]
    return tries, [t if t >= 0 else int(np.argmax(row)) for t, row in zip(tries, margins, strict=True)]


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_the_first_try_that_is_good_enough_else_the_best(batch):
    margins = np.random.default_rng(0).normal(-1.3, 1, (100, TRIES)).round(1)  # with ties
    tries, delivered = first_good(margins)
    assert {-1, 0, 1, TRIES - 1} <= set(tries)

    def make(numbers, t):  # pixels that say which try of which image they are
        images = torch.tensor([[i, t, 0] for i in numbers], dtype=torch.uint8).reshape(-1, 3, 1, 1)
        return images, images[:, 1, 0, 0] % 2 == 0

    def margin(images):
        return torch.from_numpy(margins)[tuple(images[:, :2, 0, 0].T.long())]

    record = {}
    for numbers in (range(100)[start : start + batch] for start in range(0, 100, batch)):
        images, even, of_try, seconds = hold_back(make, margin)(numbers)
        assert images[:, :2, 0, 0].tolist() == [[i, delivered[i]] for i in numbers]
        assert even.tolist() == [delivered[i] % 2 == 0 for i in numbers]
        assert of_try.tolist() == [tries[i] for i in numbers] and (seconds[:, 0] >= seconds[:, 1]).all()
        add_to_record(record, of_try, seconds)
    nothing = hold_back(make, margin)(range(0))
    assert [rows.shape for rows in nothing] == [(0, 3, 1, 1), (0,), (0,), (0, 2)]
    found = held_back(record)["held_back"]
    assert found["share"] == np.mean(margins[:, 0] < 0) and found["after_tries"] == tries.count(-1)
    assert found["made"] == sum(TRIES if t < 0 else t + 1 for t in tries)
    assert held_back({}) == {}


@pytest.fixture(scope="module")
def every_try(tmp_path_factory):
    """(N, TRIES) images of a plain loop, one by one, their ratios by numpy, and the file of groups."""
    net, directory = visible(tiny_unet(1, T=20)), tmp_path_factory.mktemp("groups")
    sampler = GaussianDiffusionSampler(net, 1e-4, 0.02, 20, img_size=8, steps=4)
    seeds = [12, *(derive_seed(12, "try", t) for t in range(1, TRIES))]
    images = [[sampler(sample_noise(seed, [i], (3, 8, 8), "cpu")()) for seed in seeds] for i in range(N)]
    images = to_uint8(torch.stack([torch.cat(row) for row in images])).numpy()
    training, groups = load_dataset("digits", ".", 8, num_train=48).train, np.arange(48) // 3
    rows = [[group, name, 1, "", ""] for group, name in zip(groups, training.names, strict=True)]
    write_table(directory / "groups.csv", GROUP_COLUMNS, rows)
    a, b = (x.reshape(-1, 192).astype("f8") for x in (images, training.images.numpy()))
    distance = ((a[:, None] - b) ** 2).sum(-1)
    first = distance.argmin(axis=1)
    d = [np.append(row[j], row[groups != groups[j]]) for row, j in zip(distance, first, strict=True)]
    ratio = np.array([row[0] / row.mean() for row in d]).reshape(N, TRIES)
    return images, ratio, directory / "groups.csv"


def test_held_back_whatever_the_batch_and_the_processes(checkpoint, every_try, tmp_path, monkeypatch):
    images, ratio, groups = every_try
    P = round(float(100 * np.quantile(ratio, 0.93)), 2)
    tries, delivered = first_good(100 * ratio - P)
    assert -1 in tries and len(set(tries)) > 3
    flags = [*FLAGS, f"--unet_dir={checkpoint}", f"--groups={groups}", f"--reject_below={P}"]

    def check_images(name):
        made = np.load(tmp_path / name / "generate/generate.npy").astype(int)
        record = json.loads((tmp_path / name / "generate/generate.json").read_text())
        assert record["held_back"]["tries"] == tries
        assert np.abs(made - images[np.arange(N), delivered]).max() <= 1
        found = result_of(tmp_path / name)["held_back"]
        assert found["after_tries"] == tries.count(-1)
        assert found["share"] == np.mean(100 * ratio[:, 0] < P)
        assert found["seconds_per_image"] > found["seconds_per_image_without"] > 0
        return record

    run("all_in.py", *flags, *eval_flags(tmp_path / "one"), cwd=tmp_path)
    assert check_images("one")["origin"]["reject_below"] == P
    curve = result_of(tmp_path / "one")["pixels"]["mq_curve"]
    assert [round(N * share) for share in curve[: int(P) + 1]] <= [tries.count(-1)] * (int(P) + 1)
    near = result_of(tmp_path / "one")["near_duplicates"]
    of_flags = [flag for flag in flags if "reject_below" not in flag]
    run("all_in.py", *of_flags, "--stages=memorise", *eval_flags(tmp_path / "one"), cwd=tmp_path)
    assert result_of(tmp_path / "one")["near_duplicates"] == near, "that of the images, whatever flags are given"
    run_with(2, "all_in.py", *flags, "--batch_size=5", *eval_flags(tmp_path / "two"), cwd=tmp_path)
    check_images("two")
    page = (tmp_path / "one/grid/report.html").read_text()
    assert f"Images with a ratio below {P} % were held back and made again" in page
    assert f"All others meet MQ@{P} by construction" in page

    stopped = eval_flags(tmp_path / "stopped")
    call(*flags, "--num_images=3", *stopped)
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(generate, "sync", lambda _: iter_or_stop(stops))
        stops = iter([None, None])
        call(*flags, "--batch_size=2", *stopped)
    call(*flags, "--batch_size=4", *stopped)
    assert check_images("stopped")["held_back"]["timed"] == N

    plain = [flag for flag in flags if not flag.startswith("--reject")]
    call(*plain, *eval_flags(tmp_path / "plain"))
    made = np.load(tmp_path / "plain/generate/generate.npy").astype(int)
    assert np.abs(made - images[:, 0]).max() <= 1 and "held_back" not in result_of(tmp_path / "plain")
    record = json.loads((tmp_path / "plain/generate/generate.json").read_text())
    assert "held_back" not in record and not {"reject_below", "groups_sha256"} & record["origin"].keys()
    found = run_module("score.compare", "plain=plain/grid", "held=one/grid", cwd=tmp_path)
    assert f"differ in held back: plain: none; held: {P}" in found.stderr
    assert found.stderr.count("\n") == 1 and "held back" in found.stdout


def iter_or_stop(stops):
    """Raises KeyboardInterrupt when there are no more."""
    if next(stops, "stop") == "stop":
        raise KeyboardInterrupt


def test_samples_cannot_be_made_again(tmp_path):
    result = run("all_in.py", *FLAGS, "--samples=x.npy", "--reject_below=30", cwd=tmp_path, code=2)
    assert "--reject_below makes images again, not those of --samples: leave it out" in result.stderr

"""The finder of copies: its search, scores and groups against brute force, its files, and odd folders."""

import csv
import dataclasses
import itertools
import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import cdist

from duplicates import near_pairs, say_time
from score.duplicates import (
    MIRROR,
    NEAR,
    NEIGHBORS,
    UNIT,
    Features,
    Pixels,
    aligned_distance,
    count_near,
    greedy_groups,
    scored_pairs,
    search,
)  # fmt: skip
from score.features import feature_space
from tests.commands import run
from tests.test_own_images import write_images

SIDE = 32


def scenes(n, seed=0, side=SIDE):
    """Smooth pictures (n, side, side, 3), uint8, no two alike."""
    noise = np.random.default_rng(seed).standard_normal((n, side, side, 3))
    smooth = gaussian_filter(noise, (0, 3, 3, 0), mode="wrap")
    return (128 + 50 * smooth / smooth.std()).clip(0, 255).astype(np.uint8)


def alterations(image, seed=0):
    """{kind: an altered copy of a picture}."""
    noise = 3 * np.random.default_rng(seed).standard_normal(image.shape)
    return {
        "noise": (image + noise).clip(0, 255).astype(np.uint8),
        "brighter": (1.1 * image + 10).clip(0, 255).astype(np.uint8),
        "mirrored": image[:, ::-1].copy(),
        "shifted": np.roll(image, (2, -2), (0, 1)),
        "mirrored and shifted": np.roll(image[:, ::-1], (-2, 2), (0, 1)),
    }


def as_tensor(pixels):
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def with_copies(n=150):
    """Pictures, of which the first five stand there in five altered forms, too, and where those are."""
    images = scenes(n)
    altered = [copy for i in range(5) for copy in alterations(images[i], i).values()]
    return np.concatenate([images, altered]), {(i, n + 5 * i + j) for i in range(5) for j in range(5)}


def brute_force_lists(compared, is_key, is_mirrored):
    """Distances (N, 50) of codes to other training images, by scipy."""
    keys = compared.keys.flatten(1).double().numpy()
    queries = compared.queries[is_mirrored][1].flatten(1).double().numpy()
    d = cdist(queries, keys, "sqeuclidean") / 255**2
    np.fill_diagonal(d, np.inf)
    d[:, ~is_key] = np.inf
    return np.sort(d, axis=1)[:, :NEIGHBORS]


@pytest.mark.parametrize("block", [40, 1000])
def test_the_search_is_exact(block):
    images, _ = with_copies()
    is_key = torch.arange(len(images)) % 4 != 3
    compared = Pixels(as_tensor(images), torch.arange(len(images)))
    for is_mirrored, lists in enumerate(search(compared, is_key, block=block)):
        expected = brute_force_lists(compared, is_key.numpy(), is_mirrored)
        assert np.allclose(lists.sq_distance.numpy(), expected, rtol=0, atol=1e-9)
        rows = np.arange(len(images))[:, None]
        is_itself = (lists.index.numpy() == rows) & np.isfinite(lists.sq_distance.numpy())
        assert not is_itself.any() and is_key[lists.index].all()


def numpy_distance(a, b, shift=2):
    """The least squared distance of moved crops, loop by loop."""

    def crop(image, top, left):
        cut = image[top : top + SIDE - 2 * shift, left : left + SIDE - 2 * shift].astype(float)
        cut = cut.reshape(cut.shape[0] // 2, 2, cut.shape[1] // 2, 2, 3).mean(axis=(1, 3))
        cut = cut - cut.mean()
        return cut / np.linalg.norm(cut)

    places, least = (0, shift, 2 * shift), 4.0
    for top, left in itertools.product(places, places):
        least = min(least, ((crop(a, shift, shift) - crop(b, top, left)) ** 2).sum())
        least = min(least, ((crop(a, top, left) - crop(b, shift, shift)) ** 2).sum())
    return least


def test_scores_and_pairs_against_brute_force():
    images, copies = with_copies()
    is_key = torch.ones(len(images), dtype=torch.bool)
    compared = Pixels(as_tensor(images), torch.arange(len(images)))
    found = search(compared, is_key)
    pairs, score = scored_pairs(compared, found, is_key)
    assert score.equal(score.sort().values) and (pairs[:, 0] < pairs[:, 1]).all()
    assert len({tuple(pair) for pair in pairs.tolist()}) == len(pairs)
    near = {tuple(pair) for pair in pairs[score < 0.3].tolist()}
    assert copies <= near
    of_one = [{i, *(150 + 5 * i + j for j in range(5))} for i in range(5)]
    assert all(any({a, b} <= members for members in of_one) for a, b in near)

    scale = UNIT * brute_force_lists(compared, is_key.numpy(), False).mean(axis=1)
    scale = np.maximum(scale, np.sort(scale)[(len(scale) - 1) // 2] / 4)
    for (a, b), s in zip(pairs[:40].tolist(), score[:40].tolist(), strict=True):
        plain = numpy_distance(images[a], images[b])
        mirrored = MIRROR * numpy_distance(images[a][:, ::-1], images[b])
        assert s == pytest.approx(min(plain, mirrored) / min(scale[a], scale[b]), abs=1e-5)


def test_most_of_more_copies_than_neighbours_are_found():
    image = scenes(1)[0]
    rng = np.random.default_rng(1)
    noisy = (image + 3 * rng.standard_normal((120, *image.shape))).clip(0, 255).astype(np.uint8)
    images = as_tensor(np.concatenate([scenes(300, seed=5), noisy]))
    is_key = torch.ones(420, dtype=torch.bool)
    compared = Pixels(images, torch.arange(len(images)))
    pairs, score = scored_pairs(compared, search(compared, is_key), is_key)
    nearest = greedy_groups(pairs[score < 0.3], score[score < 0.3], range(420))
    assert set(nearest) <= set(range(300, 420)) and len(nearest) >= 110


def test_tiny_copies_are_found_moved_by_a_pixel():
    images = scenes(100, side=8)
    moved = np.roll(images[:4], (1, -1), (1, 2))
    images = as_tensor(np.concatenate([images, moved, moved[:, :, ::-1]]))
    is_key = torch.ones(len(images), dtype=torch.bool)
    compared = Pixels(images, torch.arange(len(images)))
    pairs, score = scored_pairs(compared, search(compared, is_key), is_key)
    near = {tuple(pair) for pair in pairs[score < 0.3].tolist()}
    assert {(i, 100 + i) for i in range(4)} | {(i, 104 + i) for i in range(4)} <= near


def test_a_flat_image_is_like_no_other():
    flat = torch.stack([torch.full((3, SIDE, SIDE), level, dtype=torch.uint8) for level in (0, 255)])
    assert aligned_distance(flat[:1], flat[1:], 2).tolist() == [2.0]


def test_features_find_what_pixels_find():
    images, copies = with_copies()
    is_key = torch.ones(len(images), dtype=torch.bool)
    compared = Features(as_tensor(images), torch.arange(len(images)), feature_space("pixels", "cpu"))
    pairs, score = scored_pairs(compared, search(compared, is_key, block=64), is_key)
    near = {tuple(pair) for pair in pairs[score < 0.3].tolist()}
    plain = {(i, j) for i, j in copies if (j - 150) % 5 in (0, 1, 2)}  # not those that are shifted
    assert plain <= near


def test_the_time_of_a_search_is_of_all_its_queries(capsys):
    """Small images are searched for moved in nine ways, each mirrored too."""

    def nearest(queries, keys, k, below=None):
        time.sleep(0.05)
        return (torch.zeros(len(queries), k),)

    n, keys = 40960, torch.zeros(8192, 1)
    for number in (2, 18):
        say_time(SimpleNamespace(keys=keys, queries=[None] * number, nearest=nearest), n, 0)
        minutes = float(capsys.readouterr().out.partition("some ")[2].split()[0])
        assert minutes == pytest.approx(0.05 * 10**2 * number / 60, rel=0.2, abs=0.06)


def test_near_copies_among_generated_images_are_counted():
    images, _ = with_copies()
    assert count_near(as_tensor(np.concatenate([images[150:], scenes(20, seed=8)])), as_tensor(images[:150])) == 25


def test_equal_images_are_near_whatever_they_show():
    training, _ = with_copies(20)
    training[3] = 0
    images = np.stack([training[3], training[5], *scenes(3, seed=9)])
    assert count_near(as_tensor(images), as_tensor(training)) == 2
    assert count_near(as_tensor(images), as_tensor(training[5:6])) == 1


def test_near_copies_of_images_that_stand_there_often_are_counted_as_the_finder_does():
    """All 50 neighbours of such an image are copies too: without a scale of the others there would be none."""
    noise = np.random.default_rng(0)
    often = np.repeat(scenes(2, seed=5), 60, axis=0)
    copies = (often + 3 * noise.standard_normal(often.shape)).clip(0, 255).astype(np.uint8)
    training = as_tensor(np.concatenate([scenes(200), copies[:55], copies[60:115]]))
    generated = as_tensor(np.concatenate([copies[55:60], copies[115:], scenes(6, seed=7)]))
    M, images = len(training), torch.cat([training, generated])
    is_key = torch.arange(len(images)) < M
    compared = Pixels(images, torch.arange(len(images)))
    pairs, score = scored_pairs(compared, search(compared, is_key), is_key)
    found = {first for first in pairs[score < NEAR, 0].tolist() if first >= M}
    assert count_near(generated, training) == len(found) == 10


def test_groups_do_not_chain():
    pairs, score = torch.tensor([[0, 1], [1, 2], [2, 3]]), torch.tensor([0.1, 0.2, 0.25], dtype=torch.float64)
    assert greedy_groups(pairs, score, range(4)) == {1: (0, 0.1), 3: (2, 0.25)}
    rng = np.random.default_rng(0)
    edges = np.unique(np.sort(rng.integers(0, 60, (150, 2)), axis=1), axis=0)
    edges = torch.from_numpy(edges[edges[:, 0] != edges[:, 1]])
    weights, order = torch.from_numpy(rng.random(len(edges))), rng.permutation(60).tolist()
    nearest = greedy_groups(edges, weights, order)
    weight = {frozenset(edge): w for edge, w in zip(edges.tolist(), weights.tolist(), strict=True)}
    kept = set(range(60)) - set(nearest)
    assert not any({a, b} <= kept for a, b in edges.tolist())
    for image, (to, s) in nearest.items():
        assert to in kept and s == min(w for edge, w in weight.items() if image in edge and edge - {image} <= kept)


# ---- the script


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def find(tmp_path, out, *flags, code=0):
    command = ["--dataset=folder", "--data_root=images", f"--duplicates_dir={out}", *flags]
    return run("duplicates.py", *command, cwd=tmp_path, code=code)


def test_a_folder_is_searched(tmp_path):
    """Exact, altered and larger copies, odd names, labels that differ, leaks; what is trained on then."""
    images = scenes(40)
    names = [f'{"cat" if i % 2 else "dog"}/{i:02d}, "x".png' for i in range(40)]
    write_images(tmp_path / "images", images, names)
    Image.fromarray(images[3]).save(tmp_path / "images/dog/again.png")
    Image.fromarray(images[6]).resize((96, 96), Image.Resampling.BICUBIC).save(tmp_path / "images/dog/large.png")
    write_images(tmp_path / "images/dog", [alterations(images[8])["mirrored"]], ["mirrored.png"])
    leak = alterations(images[9])["noise"]
    write_images(tmp_path / "others", np.concatenate([scenes(5, seed=9), images[10:11], leak[None]]))
    before = {path: path.read_bytes() for path in sorted((tmp_path / "images").rglob("*.png"))}

    said = find(tmp_path, "out", "--heldout=others").stdout
    assert "keep.txt keeps 40 of 43 training images" in said and "2 of 7 held-out images" in said
    pairs = rows_of(tmp_path / "out/pairs.csv")
    assert list(pairs[0]) == ["score", "kind", "part", "image", "other"]
    sure = {(row["kind"], row["part"], row["image"], row["other"]) for row in pairs if row["kind"] != "similar"}
    assert sure == {
        ("exact", "train", names[3], "dog/again.png"), ("near", "train", names[6], "dog/large.png"),
        ("near", "train", names[8], "dog/mirrored.png"),
        ("exact", "heldout", "005.png", names[10]), ("near", "heldout", "006.png", names[9]),
    }  # fmt: skip
    assert [float(row["score"]) for row in pairs] == sorted(float(row["score"]) for row in pairs)
    groups = rows_of(tmp_path / "out/groups.csv")
    kept = {row["image"] for row in groups if row["kept"] == "yes"}
    assert kept == {names[3], "dog/large.png", names[8]} and len(groups) == 6
    keep = (tmp_path / "out/keep.txt").read_text().splitlines()
    dropped = {row["image"] for row in groups if row["kept"] == "no"}
    assert len(keep) == 40 and not dropped & set(keep) and dropped == {"dog/again.png", names[6], "dog/mirrored.png"}
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert (result["groups"], result["conflicts"], result["leaked"], result["not_kept"]) == (3, 1, 2, 3)
    page = (tmp_path / "out/duplicates.html").read_text()
    assert "Different labels." in page and "held out" not in dropped
    assert page.count("2 images, exact: ") == 1, "the mirrored copy, at a distance of 0, is no exact one"
    after = {path: path.read_bytes() for path in sorted((tmp_path / "images").rglob("*.png"))}
    assert after == before, "a training image was changed"

    network = ["--ch=8", "--ch_mult=1", "--attn=0", "--num_res_blocks=1", "--img_size=8", "--batch_size=8"]
    lists = ["--keep_list=out/keep.txt", "--dataset=folder", "--data_root=images"]
    trained = run(
        "main.py", "--train", *lists, *network, "--total_steps=2", "--warmup=1", "--sample_step=0", cwd=tmp_path
    )
    assert "40 images" in trained.stdout


def test_a_search_goes_on_and_takes_in_more_images(tmp_path):
    """All files are those of a whole run, whether images were there before or not."""
    images, _ = with_copies(60)
    order = np.random.default_rng(0).permutation(len(images))
    write_images(tmp_path / "images", images[:50], [f"{i:03d}.png" for i in order[:50]])
    find(tmp_path, "out")
    write_images(tmp_path / "images", images[50:], [f"{i:03d}.png" for i in order[50:]])
    said = find(tmp_path, "out").stdout
    assert "50 of them known from an earlier search" in said
    find(tmp_path, "whole")
    for name in ("pairs.csv", "groups.csv", "keep.txt"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    (tmp_path / "images/000.png").unlink()
    assert "all are searched again" in find(tmp_path, "out").stderr
    (tmp_path / "out/search.npz").write_bytes(b"no archive")
    assert "searching again" in find(tmp_path, "out").stderr


def test_a_search_with_other_weights_is_not_gone_on_with(tmp_path, capsys):
    images, _ = with_copies(20)
    given = as_tensor(images), torch.arange(len(images)), len(images)
    pixels = feature_space("pixels", "cpu")
    for weights, again in (("one", False), ("one", False), ("two", True)):
        near_pairs(*given, dataclasses.replace(pixels, weights_hash=weights), tmp_path / "search.npz")
        assert ("searched again" in capsys.readouterr().err) == again


def test_no_file_of_others_and_no_correction_is_replaced(tmp_path):
    write_images(tmp_path / "images", scenes(4))
    for name in ("result.json", "keep.txt"):
        (tmp_path / "foreign").mkdir(exist_ok=True)
        (tmp_path / "foreign" / name).write_text("{}")
        assert f"foreign/{name}: not written by duplicates.py" in find(tmp_path, "foreign", code=1).stderr
        (tmp_path / "foreign" / name).unlink()
    for _ in range(2):
        find(tmp_path, "out")
    keep = tmp_path / "out/keep.txt"
    keep.write_text("001.png\n")
    said = find(tmp_path, "out", code=1).stderr
    assert "out/keep.txt: was changed since it was made: move it elsewhere" in said
    record = json.loads((tmp_path / "out/result.json").read_text())
    del record["sha256"]  # as where a call is killed while it writes the lists
    (tmp_path / "out/result.json").write_text(json.dumps(record))
    find(tmp_path, "out")
    assert len(keep.read_text().splitlines()) == 4


@pytest.mark.parametrize("side", [8, 16, 32])
def test_odd_folders(tmp_path, side):
    write_images(tmp_path / "images", scenes(1))
    find(tmp_path, "one", f"--img_size={side}")
    assert rows_of(tmp_path / "one/pairs.csv") == []
    assert (tmp_path / "one/keep.txt").read_text() == "000.png\n"
    if side < 32:
        return
    write_images(tmp_path / "images", np.repeat(scenes(1), 60, axis=0))
    find(tmp_path, "equal")
    assert {row["kind"] for row in rows_of(tmp_path / "equal/pairs.csv")} == {"exact"}
    assert (tmp_path / "equal/keep.txt").read_text() == "000.png\n"
    for flags, said in ((["--near=0.6"], "below --near=0.6"), (["--near=2"], "near"), (["--features=sscd"], "--sscd")):
        error = find(tmp_path, "out", *flags, code=2).stderr
        assert said in error and len(error.strip().splitlines()) == 1
    write_images(tmp_path / "images", scenes(1), ["line\nbreak.png"])
    assert "line break" in find(tmp_path, "out", code=1).stderr
    (tmp_path / "images/line\nbreak.png").write_bytes(b"no image")
    assert "cannot be read as an image" in find(tmp_path, "out", code=1).stderr

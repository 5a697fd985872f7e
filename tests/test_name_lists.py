"""Lists of images by name: what --keep_list and --groups make of a data set, and what they refuse."""

import csv
import json

import numpy as np
import pytest
import torch

from dataset import load_dataset
from tests.commands import run
from tests.test_own_images import NETWORK, TRAINING, noise, write_images
from training.logdir import read_run
from training.shards import partition
from training.weights import load_checkpoint
from utils.errors import DataError
from utils.files import file_hash, write_json
from utils.images import united
from utils.name_lists import read_groups, read_kept, write_names, write_table

NAMES = ["a.png", 'b, "c".png', " d.png ", "caf\u00e9.png", "\udcff.png", "line\nbreak.png"]


def test_names_that_are_written_are_read(tmp_path):
    write_names(tmp_path / "keep.txt", NAMES[1:5])
    assert read_kept(tmp_path / "keep.txt", NAMES).tolist() == [False, True, True, True, True, False]
    with pytest.raises(DataError, match="line break"):
        write_names(tmp_path / "keep.txt", NAMES)
    rows = [[1, name, 1, "", ""] for name in NAMES[2:4]] + [[0, NAMES[5], 1, "", ""], [0, NAMES[0], 0, 0.9, "near"]]
    write_table(tmp_path / "groups.csv", ("group", "image", "kept", "score", "kind"), rows)
    assert read_groups(tmp_path / "groups.csv", NAMES).tolist() == [0, 1, 2, 2, 3, 0]


def test_what_lists_name_wrongly_is_said_in_a_line(tmp_path):
    path = tmp_path / "list"
    for text, wrong in (("a\nx\n", "'x'"), ("x\ny\n", "2 names such as"), ("\n", "keeps none"), ("a\0", "zero bytes")):
        path.write_text(text)
        with pytest.raises(DataError, match=wrong):
            read_kept(path, ["a", "b"])
    tables = {"group,image\n1,a\n2,a\n": "two groups", "a,b\n1,2\n": "no column", "group,image\n1,z\n": "'z'"}
    tables |= {"": "no column 'group'", "group\n": "no column 'image'"}
    tables |= {"group,image\n1,a\n ,b\n": "line 3: b is in no group", "image,group\na\n": "line 2: a is in no group"}
    for text, wrong in tables.items():
        path.write_text(text)
        with pytest.raises(DataError, match=wrong):
            read_groups(path, ["a", "b"])
    path.write_text("held out\na\n")
    assert read_kept(path, ["a", "b"], others=["held out"]).tolist() == [True, False]


def test_only_kept_images_are_trained_on_and_the_others_are_not_held_out(tmp_path):
    whole = load_dataset("digits", "", img_size=8, num_train=50)
    kept = whole.train.names[::3]
    write_names(tmp_path / "keep.txt", kept)
    pairs = [[0, whole.train.names[0], 1, "", ""], [0, whole.train.names[3], 0, 0.9, "near"]]
    write_table(tmp_path / "groups.csv", ("group", "image", "kept", "score", "kind"), pairs)
    lists = {"keep_list": tmp_path / "keep.txt", "groups": tmp_path / "groups.csv"}
    data = load_dataset("digits", "", img_size=8, num_train=50, **lists)
    assert data.train.names.tolist() == kept.tolist()
    assert torch.equal(data.train.images, whole.train.images[::3]) and torch.equal(data.subset, whole.subset[::3])
    assert torch.equal(data.heldout.images, whole.heldout.images)
    assert data.groups[0] == data.groups[1] and len(data.groups.unique()) == len(kept) - 1
    assert data.distinct().groups.shape == data.distinct().subset.shape


def test_images_equal_in_pixels_are_in_one_group(tmp_path):
    """Whatever a table says: of copies, of which it names the first, and of files that it does not name."""
    whole = load_dataset("digits", "", img_size=8, num_train=50, duplicates=5, copies=4)
    repeated = [i for i, name in enumerate(whole.train.names) if f"{name} copy 2" in whole.train.names]
    pairs = [[0, whole.train.names[repeated[0]], 1, "", ""], [0, whole.train.names[repeated[1]], 0, 0.1, "near"]]
    write_table(tmp_path / "groups.csv", ("group", "image", "kept", "score", "kind"), pairs)
    data = load_dataset("digits", "", img_size=8, num_train=50, duplicates=5, copies=4, groups=tmp_path / "groups.csv")
    assert sorted(data.groups.bincount().tolist()) == [1] * 45 + [4] * 3 + [8]
    slots = partition(data.train.labels, 4, "together", 0, groups=data.groups)
    assert all(len({k for k, rows in enumerate(slots) if number in data.groups[rows]}) == 1 for number in data.groups)
    assert united(torch.tensor([0, 0, 1, 2, 3]), torch.tensor([0, 1, 1, 2, 2])).tolist() == [0, 0, 0, 1, 1]


def test_every_slot_has_a_name_of_its_own():
    data = load_dataset("digits", "", img_size=8, num_train=50, duplicates=2, copies=3)
    names = data.train.names
    assert len(set(names)) == len(names) == 54
    numbers = np.array([int(name.split(" ")[0]) for name in names])
    assert np.array_equal(numbers, data.subset.numpy())


def test_default_training_draws_groups_as_one_and_continues_exactly(tmp_path):
    """All in one group but 8 altered copies, which a continued run and an evaluation know."""
    copies = {"duplicates": 3, "copies": 4, "alter_copies": True}
    data = load_dataset("digits", "", img_size=8, num_train=30, **copies)
    table = [[0, name] for name in data.train.names[:-8]]
    write_table(tmp_path / "groups.csv", ("group", "image"), table)
    flags = ["--train", "--dataset=digits", "--img_size=8", "--num_train=30", *NETWORK[:-1], *TRAINING]
    flags += ["--duplicates=3", "--copies=4", "--alter_copies"]
    flags += ["--groups=groups.csv", "--balance_groups"]
    said = run("main.py", *flags, "--logdir=whole", cwd=tmp_path).stdout
    assert "39 images, 1 steps per epoch" in said
    run("main.py", *flags, "--total_steps=3", "--logdir=halves", cwd=tmp_path)
    assert "3 of 4 steps done" in run("main.py", *flags, "--logdir=halves", cwd=tmp_path).stdout
    paths = (tmp_path / f"{name}/ckpt4.pt" for name in ("whole", "halves"))
    whole, halves = (load_checkpoint(path)["net_model"] for path in paths)
    assert all(torch.equal(whole[name], value) for name, value in halves.items())
    line = run("main.py", *flags, "--nobalance_groups", "--logdir=whole", cwd=tmp_path, code=2).stderr
    assert "--balance_groups=False: the run in whole was started with True (--allow_change" in line
    line = run("main.py", *flags, "--batch_size=10", "--logdir=no", cwd=tmp_path, code=2).stderr
    assert len(line.splitlines()) == 1 and "--batch_size=10 is larger than the 9 groups of" in line
    measuring = ["--num_images=12", "--fid_features=pixels", "--sample_steps=2", "--device=cpu"]
    run("all_in.py", "--unet_dir=whole", *measuring, cwd=tmp_path)
    result = json.loads((tmp_path / "results/grid/result.json").read_text())
    assert result["training_set_size"] == 39
    assert result["groups"]["sha256"] == file_hash(tmp_path / "groups.csv"), "not measured by the groups of training"


def test_a_run_of_an_earlier_version_altered_no_copies(tmp_path):
    write_json(tmp_path / "run.json", {"settings": {"script": "main", "lr": 1}})
    settings = read_run(tmp_path / "run.json")["settings"]
    assert (settings["alter_copies"], settings["balance_groups"], settings["lr"]) == (False, False, 1)


def test_a_run_remembers_its_lists(tmp_path):
    write_images(tmp_path / "images", noise(30))
    write_names(tmp_path / "keep.txt", [f"{i:03d}.png" for i in range(0, 30, 2)])
    flags = ["--train", "--dataset=folder", "--data_root=images", "--logdir=log", *NETWORK, *TRAINING]
    run("main.py", *flags, "--keep_list=keep.txt", cwd=tmp_path)
    settings = read_run(tmp_path / "log/run.json")["settings"]
    assert settings["keep_list (sha256)"] == file_hash(tmp_path / "keep.txt")
    assert "--keep_list=keep.txt" in (tmp_path / "log/flagfile.txt").read_text()
    kept = (tmp_path / "keep.txt").read_text()
    (tmp_path / "keep.txt").write_text(kept + "001.png\n")
    said = run("main.py", *flags, "--keep_list=keep.txt", cwd=tmp_path, code=2).stderr
    assert "training images (sha256)" in said and len(said.strip().splitlines()) == 1
    (tmp_path / "keep.txt").write_text(kept)
    measuring = ["--unet_dir=log", "--num_images=12", "--fid_features=pixels", "--sample_steps=2", "--device=cpu"]
    run("all_in.py", *measuring, cwd=tmp_path)
    with (tmp_path / "results/similar/nearest.csv").open(newline="") as file:
        nearest = {row["nearest training image"] for row in csv.DictReader(file)}
    assert nearest and not any(int(name[:3]) % 2 for name in nearest)

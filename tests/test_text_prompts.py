"""Prompts: which captions, whose they are, and what is put into them."""

import json

import numpy as np
import pytest
import torch

from tests.text_files import tiny_pipeline
from text_to_image.data import CaptionedImages
from text_to_image.prompts import distinct, make_prompts, owners, read_prompts
from utils.errors import DataError

IMAGES = torch.arange(6)[:, None, None, None].expand(6, 3, 2, 2).to(torch.uint8)
CAPTIONS = [[f"caption {i}", f"other words {i}"] for i in range(6)]
DATA = CaptionedImages(IMAGES, CAPTIONS, ["a"] * 6, [f"{i}.png" for i in range(6)])


def test_a_repeated_image_is_there_once_with_all_captions():
    data = distinct(CaptionedImages(IMAGES[[0, 1, 0, 2]], CAPTIONS[:4], list("abcd"), list("wxyz")))
    assert torch.equal(data.images, IMAGES[:3]) and data.paths == ["w", "x", "z"] and data.classes == ["a", "b", "d"]
    assert data.captions == [CAPTIONS[0] + CAPTIONS[2], CAPTIONS[1], CAPTIONS[3]]


def test_drawn_captions_do_not_depend_on_their_number():
    prompts, source = make_prompts(DATA, None, 600, None, "first", seed=3)
    assert source == [texts[0] for texts in CAPTIONS] and prompts.texts == [source[i] for i in prompts.own]
    assert make_prompts(DATA, None, 50, "random", "first", seed=3)[0].texts == prompts.texts[:50]
    assert make_prompts(DATA, None, 50, "random", "first", seed=4)[0].texts != prompts.texts[:50]
    counts = np.bincount(prompts.own, minlength=6)
    assert counts.min() > 60 and counts.sum() == 600


def test_captions_in_turn_and_of_a_file(tmp_path):
    prompts, _ = make_prompts(DATA, None, None, "all", "first", seed=3)
    assert prompts.own.tolist() == list(range(6)) and prompts.texts[4] == "caption 4"
    path = tmp_path / "prompts.txt"
    path.write_text("other words 3\n\na cat\n")
    prompts, _ = make_prompts(DATA, None, 3, path, "first", seed=3)
    assert prompts.texts == ["other words 3", "a cat", "other words 3"] and prompts.own.tolist() == [3, -1, 3]
    (tmp_path / "prompts.json").write_text(json.dumps(["a", {"prompt": "b"}]))
    assert read_prompts(tmp_path / "prompts.json") == ["a", "b"]
    for content in ("[]", "[1]", "{", '[{"text": "a"}]'):
        (tmp_path / "prompts.json").write_text(content)
        with pytest.raises(DataError, match=r"prompts\.json"):
            read_prompts(tmp_path / "prompts.json")
    for name, content in (
        ("captions.json", '{"1.png": ["one", "1"], "2.png": "two"}'),
        ("metadata.jsonl", '{"file_name": "1.png", "text": "one"}\n{"file_name": "2.png", "text": "two"}\n'),
    ):
        (tmp_path / name).write_text(content)
        assert read_prompts(tmp_path / name) == ["one", "two"], "first captions"
    (tmp_path / "prompts.json").write_text('"abc"')
    with pytest.raises(DataError, match=r"prompts\.json.*no list of texts"):
        read_prompts(tmp_path / "prompts.json")
    (tmp_path / "prompts.json").write_text('[{"prompt": "a", "caption": "b", "image": 3}]')
    assert read_prompts(tmp_path / "prompts.json") == ["a"], "as all_in writes it"
    (tmp_path / "captions.json").write_text('{"1.png": []}')
    with pytest.raises(DataError, match=r"--prompts=.*captions\.json"):
        read_prompts(tmp_path / "captions.json")
    assert owners(["same", "one"], [["same"], ["same", "one"]]) == [-1, 1]


def test_a_prompt_of_several_images_is_the_caption_of_none():
    data = DATA._replace(captions=[["a dog"], ["a cat"], *([["a dog"]] * 3), ["a fish"]])
    expected = [-1, 1, -1, -1, -1, 5]
    prompts, source = make_prompts(data, None, None, "all", "first", seed=3)
    assert prompts.own.tolist() == expected and len(source) == 6
    prompts, _ = make_prompts(data, None, 2, "all", "first", seed=3, names=["0.png", "5.png"])
    assert prompts.own.tolist() == [-1, 5]
    drawn, found = (make_prompts(of, None, 50, None, "first", seed=3)[0].own for of in (DATA, data))
    assert found.tolist() == [expected[row] for row in drawn]
    data = data._replace(groups=torch.tensor([0, 1, 0, 0, 0, 2]))  # which count as one
    prompts, _ = make_prompts(data, None, None, "all", "first", seed=3)
    assert prompts.own.tolist() == list(range(6))


@pytest.mark.parametrize("column", ["file_name", "Image"])
@pytest.mark.parametrize("name", ["p.json", "p.jsonl"])
def test_a_list_of_names_and_prompts_is_matched_by_name(tmp_path, name, column):
    rows = [{column: f"{letter}.png", "prompt": f"of {letter}"} for letter in "bca"]
    lines = map(json.dumps, rows)
    (tmp_path / name).write_text(json.dumps(rows) if name == "p.json" else "\n".join(lines))
    assert read_prompts(tmp_path / name, ["a.png", "b.png", "c.png"]) == ["of a", "of b", "of c"]
    assert read_prompts(tmp_path / name) == ["of b", "of c", "of a"]
    with pytest.raises(DataError, match=r"no caption for 1 of 1 images, first d\.png"):
        read_prompts(tmp_path / name, ["d.png"])


def test_where_names_and_order_differ_it_is_said_which_was_taken(tmp_path, capsys):
    """Training images in the order of a listing, samples in that of their numbers."""
    numbers = [0, 1, 10, 11, *range(2, 10)]
    paths = [f"{i}.png" for i in numbers]
    data = DATA._replace(captions=[[f"of {i}"] for i in numbers], paths=paths)
    names, (table, text) = [f"{i}.png" for i in range(12)], (tmp_path / "p.csv", tmp_path / "p.txt")
    table.write_text("file,text\n" + "".join(f"{i}.png,of {i}\n" for i in numbers))
    text.write_text("".join(f"of {i}\n" for i in range(12)))
    others = [f"{i}.png" for i in range(20, 32)]
    for prompts, given, is_said in (
        ("all", names, True), ("all", names[:3], False), ("all", others, False), ("all", paths, False),
        (table, names, True), (table, names[:3], False), (text, names, False),
    ):  # fmt: skip
        found, _ = make_prompts(data, None, len(given), prompts, "first", seed=3, names=given)
        said = capsys.readouterr().err
        text_of_it = f"warning: --prompts={prompts}: --samples have the names of training images"
        assert said.count("\n") == said.count(text_of_it) == is_said
        if given is not others:
            assert found.texts == [f"of {name[:-4]}" for name in given]


def test_images_that_are_there_have_the_prompts_of_their_names(tmp_path):
    """In a table in whatever order; and with `all`, where they have the names of training images."""
    path, names = tmp_path / "captions.json", ["10.png", "2.png", "1.png"]
    path.write_text(json.dumps({f"train/{i}.png": [f"caption {i % 6}"] for i in (1, 2, 3, 10)}))
    prompts, source = make_prompts(DATA, None, 3, path, "first", seed=3, names=names)
    assert prompts.texts == source == ["caption 4", "caption 2", "caption 1"]
    assert prompts.own.tolist() == [4, 2, 1]
    with pytest.raises(DataError, match=r"--prompts=.*no caption for 1 of 2 images, first 4\.png"):
        make_prompts(DATA, None, 2, path, "first", seed=3, names=["1.png", "4.png"])
    for names, own in (
        (["5.jpg", "0.jpg"], [5, 0]),
        (["a.png", "0.png"], [0, 1]),  # in turn
    ):
        prompts, _ = make_prompts(DATA, None, 2, "all", "first", seed=3, names=names)
        assert prompts.own.tolist() == own and prompts.texts == [f"caption {i}" for i in own]
    data = DATA._replace(paths=["a.png", "a.jpg", "b.png", "c.png", "d.png", "e.png"])
    prompts, _ = make_prompts(data, None, 2, "all", "first", seed=3, names=["c.png", "b.png"])
    assert prompts.own.tolist() == [0, 1], "two are called a"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_prompts_as_any_editor_writes_them(tmp_path, encoding, end):
    """What Unicode calls a line end may stand in a prompt."""
    for name, lines in (
        ("p.txt", ["a cat", "", "ein Bär\u0085\u2028!", ""]),
        ("p.json", ["[", '"a cat",', '"ein Bär\u0085\u2028!"', "]"]),
        ("p.csv", ["file_name;text", "1.png;a cat", "2.png;ein Bär\u0085\u2028!", "1.png;another of its captions"]),
    ):
        (tmp_path / name).write_bytes(end.join(lines).encode(encoding))
        assert read_prompts(tmp_path / name) == ["a cat", "ein Bär\u0085\u2028!"], name


@pytest.mark.parametrize("name", ["p.json", "p.jsonl", "p.txt", "p.csv"])
def test_prompts_that_cannot_be_read_are_not_to_be_removed(tmp_path, name):
    for content in (b'{"a": "\xff', "a cat\n".encode("utf-16-le"), b"", b"[" * 10**5 if name != "p.txt" else b"\n"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"--prompts=.*{name}: cannot be read \(") as error:
            read_prompts(tmp_path / name)
        assert "remove" not in str(error.value)


@pytest.mark.parametrize("kind", ["rand_numb_add", "rand_word_add", "rand_word_repeat"])
def test_additions_stand_between_the_words(kind):
    tokenizer = tiny_pipeline().tokenizer
    prompts, _ = make_prompts(DATA, tokenizer, 40, "all", "first", 3, kind, 2)
    added = []
    for i, (text, caption) in enumerate(zip(prompts.texts, prompts.captions, strict=True)):
        assert caption == f"caption {i % 6}"
        words = text.split(" ")
        for word in caption.split(" "):
            words.remove(word)
        added.append(tuple(words))
        if kind == "rand_word_repeat":
            assert len(words) == 2 and set(words) <= set(caption.split(" "))
        if kind == "rand_numb_add":
            assert len(words) == 2 and all(word.isdigit() for word in words)
    assert len(set(added)) > (3 if kind == "rand_word_repeat" else 30)

"""Captioned folders, captions of a step, duplication, and the batches of a shard."""

import collections
import json
import random
import resource

import numpy as np
import pytest
import torch
from absl.flags import FlagValues
from PIL import Image

from tests.text_files import CAPTIONS, NUMBER, SIDE, save_captions, save_images, tiny_pipeline
from text_to_image import build, data, flags
from text_to_image.data import (
    CaptionBatches,
    CaptionedImages,
    TextStates,
    captions_of_mode,
    check_length,
    duplicated,
    load_folder,
    match,
    random_tokens,
    read_captions,
)
from text_to_image.pipeline import encode_captions, encode_images
from text_to_image.tiny import make_tokenizer
from utils.errors import DataError, UsageError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_images(tmp_path_factory.mktemp("text") / "images")


@pytest.fixture(scope="module")
def captioned(folder):
    return load_folder(folder, save_captions(folder.parent / "captions.json", CAPTIONS), SIDE)


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    return TextStates(tiny_pipeline(), [texts[0] for texts in CAPTIONS.values()], tmp_path_factory.mktemp("cache"), "")


@pytest.fixture(scope="module")
def moments(captioned):
    return encode_images(tiny_pipeline().vae, captioned.images)


def test_folder(folder, captioned):
    assert captioned.paths == list(CAPTIONS) and captioned.captions == list(CAPTIONS.values())
    for image, name in zip(captioned.images, CAPTIONS, strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(Image.open(folder / name)))


def test_the_shorter_side_is_resized_and_the_centre_cut_out(tmp_path):
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 200  # the centre
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    Image.fromarray(pixels.transpose(1, 0, 2)).save(tmp_path / "high.png")
    images = load_folder(tmp_path, save_captions(tmp_path / "captions.json", {"wide.png": "a", "high.png": "b"}), 4)[0]
    assert images.shape == (2, 3, 4, 4) and images[..., 1:3, 1:3].eq(200).all()


def test_a_line_of_pixels_takes_no_memory(tmp_path):
    for size in ((20_000, 1), (1, 20_000)):
        Image.new("RGB", size, "white").save(tmp_path / "line.png")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert data.square(tmp_path / "line.png", 64).shape == (3, 64, 64)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "KB"
    pixels = np.zeros((9, 709, 3), np.uint8)
    pixels[:, 350:359] = 200  # the centre
    Image.fromarray(pixels).save(tmp_path / "line.png")
    assert (data.square(tmp_path / "line.png", 18)[:, :, 2:-2] == 200).all()


def test_all_bad_images_are_named_at_once(tmp_path):
    files = [save_images(tmp_path, [f"{i:02}.png"]) / f"{i:02}.png" for i in range(14)]
    for path in files[2:]:
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError) as error:
        data.load_images(files, SIDE, num_workers=2)
    named = [path.name for path in files if path.name in str(error.value)]
    assert named == [path.name for path in files[2:12]] and "; and 2 more: remove or replace them" in str(error.value)


def test_classes_are_sub_folders(tmp_path):
    save_images(tmp_path / "images", ["dog/1.png", "cat/2.png"])
    file = save_captions(tmp_path / "captions.json", {"1.png": ["one"], "2.png": ["two"]})
    found = load_folder(tmp_path / "images", file, 16)
    assert found.paths == ["cat/2.png", "dog/1.png"] and found.captions == [["two"], ["one"]]
    assert captions_of_mode(found, "classlevel", None) == [["An image of cat"], ["An image of dog"]]
    assert captions_of_mode(found, "nolevel", None) == [["An image"], ["An image"]]
    with pytest.raises(DataError, match="--caption_mode=classlevel: the images are in no sub-folders"):
        captions_of_mode(found._replace(paths=["2.png", "1.png"]), "classlevel", None)


def test_metadata_jsonl_in_the_folder(tmp_path):
    save_images(tmp_path, ["a.png", "b.png"])
    with pytest.raises(DataError, match="give the file of captions with --captions"):
        load_folder(tmp_path, None, 16)
    lines = [{"file_name": "b.png", "text": "bee"}, {"file_name": "a.png", "text": "ay"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert load_folder(tmp_path, None, 16).captions == [["ay"], ["bee"]]


def test_keys_are_paths_of_another_machine_or_file_names():
    published = {"/home/x/laion/train/images/1.jpg": ["one"], "/home/x/laion/train/other/1.jpg": ["two"]}
    assert match(published, ["images/1.jpg", "other/1.jpg"], "c") == [["one"], ["two"]]
    assert match({"/a/b/1.jpg": ["one"], "2.jpg": ["two"]}, ["x/2.jpg", "x/1.jpg"], "c") == [["two"], ["one"]]
    assert match({"1.jpg": ["file"], "x/1.jpg": ["path"]}, ["x/1.jpg"], "c") == [["path"]]
    assert match({"a\\b\\1.jpg": ["one"], "./a/b/2.jpg": ["two"]}, ["b/1.jpg", "b/2.jpg"], "c") == [["one"], ["two"]]
    # the same letter in two ways of writing it: one of most editors, one of a Mac's file names
    assert match({"caf\u00e9.png": ["one"]}, ["cafe\u0301.png"], "c") == [["one"]]
    assert match({"a/1.png": ["one"], "b/2.png": ["two"]}, ["1.png", "2.png"], "c") == [["one"], ["two"]], "flat now"
    assert match({"train/1.png": ["one"], "val/1.png": ["two"]}, ["1.png"], "c", "x/train") == [["one"]]


@pytest.mark.parametrize(
    ("captions", "paths", "message"),
    [
        ({"a/1.jpg": ["x"]}, ["a/1.jpg", "b/2.jpg", "b/3.jpg"], "no caption for 2 of 3 images, first b/2.jpg"),
        ({"a/1.jpg": ["x"], "b/1.jpg": ["y"]}, ["1.jpg"], "a/1.jpg and b/1.jpg could both be of 1.jpg"),
        ({"1.jpg": ["x"]}, ["a/1.jpg", "b/1.jpg"], "1.jpg could be of a/1.jpg and of b/1.jpg"),
        ({"1.jpg": ["x"], "./1.jpg": ["y"]}, ["1.jpg"], "./1.jpg and 1.jpg could both be of 1.jpg"),
        # of an image that is not there, in a folder beside that of the paths
        ({"dog/0.png": ["x"], "cat/1.png": ["y"]}, ["dog/0.png", "dog/1.png"], "no caption for 1 of 2 .* dog/1.png"),
        ({"/x/dog/0.png": ["x"], "/x/cat/1.png": ["y"]}, ["dog/0.png", "dog/1.png"], "no caption for 1 of 2 .*"),
        ({"cat/0.png": ["x"], "cat/1.png": ["y"]}, ["dog/0.png", "dog/1.png"], "no caption for 2 of 2 .*"),
        ({"train/0.png": ["x"], "val/1.png": ["y"]}, ["0.png", "1.png"], "no caption for 1 of 2 images, first 1.png"),
    ],
)
def test_captions_that_do_not_fit(captions, paths, message):
    with pytest.raises(DataError, match=f"^--captions=c.json: {message}$"):
        match(captions, paths, "c.json", "/somewhere/train")


@pytest.mark.parametrize("text", ["", "[]", '{"a.png": 3}', '{"a.png": []}', '{"a.png": [3]}', '{"a.png": "x"'])
def test_captions_that_cannot_be_read(tmp_path, text):
    (tmp_path / "captions.json").write_text(text)
    with pytest.raises(DataError, match=r"captions\.json: cannot be read"):
        data.read_captions(tmp_path / "captions.json")
    with pytest.raises(DataError, match=r"nothing\.json: cannot be read"):
        data.read_captions(tmp_path / "nothing.json")


LINES = [{"file_name": "a.png", "text": "one"}, {"file_name": "b.png", "text": "zwölf\u0085\u2028!"}]
LINES.append({"file_name": "a.png", "text": "two, three"})
TABLE = [("file_name", "text"), *(tuple(line.values()) for line in LINES)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_captions_as_any_editor_writes_them(tmp_path, encoding, end):
    """An image may have several lines; what Unicode calls a line end may stand in a caption."""
    quoted = [[f'"{cell}"' for cell in row] for row in TABLE]
    for name, lines in (
        ("m.jsonl", [json.dumps(line, ensure_ascii=False) for line in LINES]),
        ("m.JSONL", [json.dumps(line) for line in LINES] + ["", ""]),
        ("m.json", ["[", ",".join(json.dumps(line) for line in LINES), "]"]),
        ("c.json", ['{"a.png": "one",', f'"b.png": ["{LINES[1]["text"]}"],', '"a.png": ["two, three"]}']),
        ("m.csv", [",".join(row) for row in quoted]),
        ("m.tsv", ["\t".join(row) for row in TABLE]),
        ("semicolons.csv", ["; ".join(row) for row in TABLE]),
        ("excel.csv", ['"sep=;"', *("; ".join(row) for row in TABLE)]),
        ("m.ndjson", [json.dumps({"File_Name": a, "TEXT": b}) for a, b in TABLE[1:]]),
        ("other.csv", ["Image_Name| comment_number| comment", *("| ".join((a, "0", b)) for a, b in TABLE[1:])]),
    ):
        (tmp_path / name).write_bytes(end.join(lines).encode(encoding))
        found = read_captions(tmp_path / name)
        assert found == {"a.png": ["one", "two, three"], "b.png": ["zwölf\u0085\u2028!"]}, name
    lines = ["file_name\ttext", 'a.png\t"Good" dogs', 'b.png\t"']
    (tmp_path / "c.tsv").write_bytes(end.join(lines).encode(encoding))
    assert read_captions(tmp_path / "c.tsv") == {"a.png": ['"Good" dogs'], "b.png": ['"']}
    (tmp_path / "c.csv").write_bytes(f'text,file_name{end}"two{end}lines",a.png{end}'.encode(encoding))
    assert read_captions(tmp_path / "c.csv") == {"a.png": ["two\nlines"]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.json", '{"a.png": ["café"]}'.encode("latin-1"), "byte 15 is no utf-8: save it in UTF-8"),
        ("c.json", '{"a.png": ["x"]}'.encode("utf-16-le"), "it holds zero bytes: save it as text in UTF-8"),
        ("c.jsonl", b'{"file_name": "a.png", "text": "x", "text": "y"}', "a column of file_name, text, text is there"),
        ("c.jsonl", b'{"image": "a.png", "path": "b.png", "text": "y"}', "of the columns image, path, text, which is"),
        ("c.jsonl", b'{"file_name": "a.png", "label": 3}', "of the columns file_name, label, which is text"),
        ("c.jsonl", b'{"file_name": "a.png", "text": null}', "a.png has no list of texts"),
        ("c.jsonl", b'{"file_name": 3, "text": "x"}', "3 is no name of an image"),
        ("c.csv", b"file_name,text\n,x\n", "'' is no name of an image"),
        ("c.jsonl", b'"a"', ""),
        ("c.csv", b"file_name,text\na.png,a dog, brown\n", "line 2 has 3 columns and the first 2: put texts in quotes"),
        ("c.csv", b"file_name,text\n", "there are none in it"),
        ("c.csv", b"", "there are none in it"),
        ("c.parquet", b"PAR1\x00\x00", "it holds zero bytes"),
        ("c.json", b"[" * 100_000, ""),
    ],
)
def test_captions_that_are_ambiguous_or_of_another_form(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"--captions=.*{name}: cannot be read \(.*{message}"):
        read_captions(tmp_path / name)
    assert (tmp_path / name).exists()


def test_captions_that_are_empty_or_not_read_to_the_end(capsys):
    tokenizer = tiny_pipeline().tokenizer
    check_length(["a cat", "word " * 75], tokenizer, "captions")
    assert capsys.readouterr().err == ""
    check_length(["", " ", "a cat", "word " * 76, "word " * 2000], tokenizer, "captions")
    empty, long = capsys.readouterr().err.splitlines()
    assert empty == "warning: 2 of 5 captions are empty"
    assert long.startswith("warning: 2 of 5 captions have more than 77 tokens: the text encoder reads 77 and no more")


def test_random_tokens_of_a_tokenizer_that_pads_with_an_ordinary_token():
    """Stable Diffusion 2's pads with '!', number 0; the words that others draw do not change."""
    tokenizer = make_tokenizer()
    before = [random_tokens(tokenizer, 4, random.Random(i)) for i in range(20)]
    draw = random.Random(0)
    assert before[0] == tokenizer.decode([draw.randrange(49406) for _ in range(4)])
    tokenizer.pad_token = "!"
    assert tokenizer.pad_token_id == 0
    assert [random_tokens(tokenizer, 4, random.Random(i)) for i in range(20)] == before


def test_captions_of_token_numbers(captioned):
    tokenizer = tiny_pipeline().tokenizer
    ids = tokenizer("a photo of a cat").input_ids[1:-1]
    numbers = captioned._replace(captions=[[str(ids)]] * NUMBER)
    assert captions_of_mode(numbers, "random_tokens", tokenizer) == [["a photo of a cat"]] * NUMBER
    with pytest.raises(DataError, match="--caption_mode=random_tokens: needs captions such as"):
        captions_of_mode(captioned, "random_tokens", tokenizer)


def test_kept_text_states_are_those_that_are_computed(states, monkeypatch):
    monkeypatch.setattr(data, "encode_captions", lambda pipeline, texts: encode_captions(pipeline, texts) + 1)
    kept, new = "picture number 3", "something else"
    expected = encode_captions(tiny_pipeline(), [new, kept]).float()
    expected[0] += 1
    torch.testing.assert_close(states([new, kept]), expected, rtol=1e-2, atol=2e-3)


def test_what_is_cached_is_read_again_unless_it_is_damaged(tmp_path):
    array = torch.arange(6).half()
    assert torch.equal(data.cached(tmp_path, "a", "us", lambda: array), array)
    for owner in ("us", "others"):
        assert torch.equal(data.cached(tmp_path, "a", owner, lambda: 1 / 0), array)
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"damaged")
    assert torch.equal(data.cached(tmp_path, "a", "us", lambda: array + 1), array + 1)
    path.rename(tmp_path / "a.npy")  # as earlier versions called it
    assert torch.equal(data.cached(tmp_path, "a", "us", lambda: 1 / 0), array + 1)


def test_of_each_training_the_newest_cache_stays(tmp_path, captioned):
    """The images change, the captions change; another resolution and another pipeline keep theirs."""
    pipeline, other = tiny_pipeline(), captioned._replace(images=captioned.images[..., :8, :8])
    for name in ("text_of_mine.npy", "latents.npy"):
        (tmp_path / name).write_bytes(b"")

    def encode(given=captioned, vae="vae", text="text", mode="first", owner="data"):
        data.encode(given, pipeline, tmp_path, vae, text, mode, False, owner)
        names = {path.name for path in tmp_path.iterdir()}
        assert names >= {"text_of_mine.npy", "latents.npy"}
        return names

    first = encode()
    assert len(first) == 4 and encode() == first
    others = {"given": other}, {"vae": "2"}, {"text": "2"}, {"mode": "nolevel"}, {"owner": "2", "vae": "3"}
    for changes in others:
        assert encode(**changes) > first
    before = encode()
    changed = captioned._replace(images=captioned.images.flip(-1), captions=[["new"]] * NUMBER)
    after = encode(changed)
    assert len(after) == len(before) and before - after < first and len(before - after) == 2


def make(captioned, moments, states, index=None, **changes):
    settings = {"scaling_factor": 0.5, "often": duplicated(NUMBER, 0.25, 3), "batch_size": 4, "T": 1000, "seed": 3}
    index = torch.arange(NUMBER) if index is None else index
    return CaptionBatches(
        captioned.images, moments, captioned.captions, states, index, torch.device("cpu"), **{**settings, **changes}
    )


def test_an_epoch_has_every_image_once_with_its_latents_and_caption(captioned, moments, states):
    batches = make(captioned, moments, states, hflip=False)
    seen = [batches(step) for step in range(4)]
    assert sorted(i for batch in seen for i in batch.slots.tolist()) == list(range(NUMBER))
    for batch in seen:
        mean, deviation = moments[batch.slots, 0].float().unbind(1)
        noise = (batch.x_0 / 0.5 - mean) / deviation
        assert noise.std().item() == pytest.approx(1, abs=0.15) and abs(noise.mean()) < 0.15
        firsts = [captioned.captions[i][0] for i in batch.slots]
        assert torch.equal(batch.labels, states(firsts))
    again = make(captioned, moments, states, hflip=False)(2)
    assert all(torch.equal(a, b) for a, b in zip(again[:5], seen[2][:5], strict=True))


def test_half_of_the_latents_are_of_mirror_images(captioned, moments, states):
    moments = torch.stack([moments[:, :, 0], torch.zeros_like(moments[:, :, 1])], dim=2)  # no noise
    batches, mirrored = make(captioned, moments, states), 0
    for step in range(100):
        batch = batches(step)
        both = 0.5 * moments[batch.slots, :, 0].float()
        is_view = (batch.x_0[:, None] == both).all(dim=(2, 3, 4))
        assert is_view.any(dim=1).all()
        mirrored += int(is_view[:, 1].sum())
    assert 160 < mirrored < 240


@pytest.mark.parametrize(("mode", "share"), [("all", 2 / 3), ("allcaps", 2 / 3 * 0.5), ("first", 0)])
def test_captions_drawn_from_all(captioned, moments, states, mode, share):
    batches, draw = make(captioned, moments, states, caption_mode=mode, caption_prob=0.5), random.Random(0)
    drawn = [batches.caption(5, draw) for _ in range(1000)]
    assert set(drawn) <= set(captioned.captions[5])
    assert sum(caption != captioned.captions[5][0] for caption in drawn) / 1000 == pytest.approx(share, abs=0.05)


def test_changed_captions(captioned, moments, states):
    draw, first = random.Random(0), "picture number 5"
    for mode in ("randrepl", "randwordadd", "wordrepeat"):
        batches = make(captioned, moments, states, caption_mode=mode, caption_prob=0.2)
        drawn = [batches.caption(5, draw) for _ in range(500)]
        changed = [caption for caption in drawn if caption != first]
        assert len(changed) / 500 == pytest.approx(0.2, abs=0.06)
        if mode == "wordrepeat":
            assert all(len(caption.split()) == 5 and set(caption.split()) <= set(first.split()) for caption in changed)
        if mode == "randwordadd":
            left = [collections.Counter(first.split()) - collections.Counter(caption.split()) for caption in changed]
            assert not any(left) and len(set(changed)) > 0.9 * len(changed)
        if mode == "randrepl":
            assert len(set(changed)) > 0.9 * len(changed)


@pytest.mark.parametrize("duplication", data.DUPLICATIONS)
def test_duplication_within_shards(captioned, moments, states, duplication):
    often = duplicated(NUMBER, 0.25, 3)
    assert often.sum() == 4 and torch.equal(often, duplicated(NUMBER, 0.25, 3))
    assert not torch.equal(often, duplicated(NUMBER, 0.25, 4))
    chosen = often.nonzero().flatten()
    index = torch.cat([chosen[:2], (~often).nonzero().flatten()[:6]])  # a shard with 2 of them and 6 others
    batches = make(captioned, moments, states, index, duplication=duplication, dup_weight=5)
    counts = torch.bincount(torch.cat([batches.slots_of(step) for step in range(1000)]), minlength=NUMBER)
    assert counts.sum() == 500 * 8 and counts[index].sum() == counts.sum()
    share = counts[chosen].sum() / counts.sum()
    assert share.item() == pytest.approx(0.25 if duplication == "nodup" else 10 / 16, abs=0.03)
    draw = random.Random(0)
    for i, several in ((int(chosen[0]), duplication == "dup_image"), (int(index[-1]), False)):
        assert (len({batches.caption(i, draw) for _ in range(50)}) > 1) == several


def test_noise_on_text_states_and_mixtures_of_them(captioned, moments, states):
    plain = make(captioned, moments, states)(1)
    noisy = make(captioned, moments, states, text_noise=0.3)(1)
    assert all(torch.equal(plain[i], noisy[i]) for i in (0, 2, 3, 4))
    assert (noisy.labels - plain.labels).std().item() == pytest.approx(0.3, rel=0.05)
    mixed = make(captioned, moments, states, text_mixup=0.5)(1)
    pairs = plain.labels.flatten(1)
    for row in mixed.labels.flatten(1):  # every one lies on the line between two of them
        solved = torch.linalg.lstsq(pairs.T, row[:, None]).solution.flatten()
        assert solved.sum().item() == pytest.approx(1, abs=1e-2) and (solved.abs() > 0.01).sum() <= 2


def test_a_shard_smaller_than_a_batch(captioned, moments, states):
    with pytest.raises(UsageError, match="--batch_size=4 is larger than the 3 images of shard 0"):
        make(captioned, moments, states, torch.arange(3))


@pytest.mark.parametrize(
    ("split", "expected"),
    [("contiguous", [[0, 1, 2], [3, 4, 5]]), ("stratified", [[0, 1, 4], [2, 3, 5]])],
)
def test_sub_folders_are_the_classes_of_a_stratified_split(split, expected):
    values, classes = FlagValues(), ["dog", "cat", "cat", "dog", "elk", "elk"]
    flags.define(values)
    values(["program", "--client_num=2", f"--split={split}"])
    given = CaptionedImages(torch.zeros(6, 3, 2, 2), [["a"]] * 6, classes, list("abcdef"))
    assert [part.tolist() for part in build.slots(values, given)] == expected


def test_images_are_in_the_order_of_the_numbers_in_their_names(tmp_path):
    """Whatever else a system takes for a digit."""
    names = ["1²2.png", "2.png", "٣.png", "10.png", "a1.png"]
    save_images(tmp_path, names)
    assert [path.name for path in build.files_of(tmp_path)] == names

"""Captioned images in, and what of them belongs to a training step: latents, text states, t and eps."""

import ast
import csv
import hashlib
import io
import json
import os
import random
import re
import unicodedata
from collections import defaultdict, namedtuple
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from text_to_image.pipeline import encode_captions, encode_images, latent_moments
from training.batches import Batch, Batches, rand_augment, to_device
from utils import distributed
from utils.errors import DataError, one_line, warn
from utils.files import atomic_write
from utils.images import decoded, equal_images, fingerprint, list_images, read_image, united
from utils.name_lists import read_groups, read_kept
from utils.safe_files import check_memory, read_text
from utils.seeding import derive_seed, generator

CAPTION_MODES = (
    "first", "all", "nolevel", "classlevel", "random_tokens", "allcaps", "randrepl", "randwordadd", "wordrepeat",
)  # fmt: skip
DUPLICATIONS = ("nodup", "dup_both", "dup_image")
RAND_AUGS = ("none", "rand_numb_add", "rand_word_add", "rand_word_repeat")
LINES, TABLES = (".jsonl", ".ndjson"), (".csv", ".tsv")  # the suffixes of files with a caption a line
# columns of a table of captions; where there is no first one, one of the others, if that is clear
FILE_COLUMNS = ("file_name", "filename", "file", "file_path", "filepath", "path", "image", "image_name", "image_path")
TEXT_COLUMNS = ("text", "caption", "captions", "prompt", "comment", "description")
THIN = 64  # of the longer side to the shorter: such images are cut before they are resized

# images (N, 3, S, S) uint8; captions: N lists of texts, not empty; classes, paths in the folder: N texts
# each; subset: int64 (N,), ascending, which of the folder's images; groups: int64 (N,), of --groups
FIELDS = "images captions classes paths subset groups"
CaptionedImages = namedtuple("CaptionedImages", FIELDS, defaults=(None, None))


def load_folder(folder, captions, resolution, num_workers=0, keep_list=None, groups=None):
    """The images of a folder, or of its sub-folders, which are classes, `square`.

    keep_list: a file of the paths to take; groups: a table of groups of them; None for neither.

    Raises:
        DataError: files are missing or not what they should be.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"no directory {folder}: put the images there, or name another place with --data_root")
    if captions is None and not (folder / "metadata.jsonl").exists():
        raise DataError(f"{folder}: has no metadata.jsonl: give the file of captions with --captions")
    files = [Path(path) for group in list_images(folder, classes=True) for path in group]
    paths = [path.relative_to(folder).as_posix() for path in files]
    found = read_captions(captions or folder / "metadata.jsonl")
    captions = match(found, paths, captions or "metadata.jsonl", folder)
    if groups is not None:
        groups = read_groups(groups, paths)
    subset = torch.arange(len(paths))
    if keep_list is not None:
        subset = torch.from_numpy(read_kept(keep_list, paths)).nonzero().flatten()
        files, captions, paths = ([column[i] for i in subset] for column in (files, captions, paths))
        groups = None if groups is None else groups[subset]
    images, classes = load_images(files, resolution, num_workers), [path.parent.name for path in files]
    groups = None if groups is None else united(groups, equal_images(images))
    return CaptionedImages(images, captions, classes, paths, subset, groups)


def load_images(files, resolution, num_workers=0):
    """Image files as uint8 (N, 3, S, S), each as `square` makes it; a DataError names all bad ones."""
    check_memory(Path(files[0]).parent, len(files) * 3 * resolution**2)
    images = np.empty((len(files), 3, resolution, resolution), np.uint8)
    with closing(decoded(partial(square, side=resolution), files, num_workers, bad=[])) as decoding:
        for i, image in decoding:
            images[i] = image
    return torch.from_numpy(images)


def square(path, side):
    """An image file as uint8 (3, side, side): the shorter side resized to `side`, the centre cut out."""
    image = read_image(path)
    shorter, longer = sorted(image.size)
    if longer > THIN * shorter:  # resized as a whole, it could fill the memory
        left, top = ((length - min(length, THIN * shorter)) // 2 for length in image.size)
        image = image.crop((left, top, image.width - left, image.height - top))
    scale = side / min(image.size)
    width, height = (max(side, round(scale * length)) for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image.crop((left, top, left + side, top + side))).transpose(2, 0, 1)


def read_captions(path, flag="captions"):
    """{name of an image: its captions, in the order of the file}, not empty.

    The file is JSON of that form, a metadata.jsonl as diffusers reads it, or a table in a .csv or .tsv.
    An image may have several lines. flag: that names the file.

    Raises:
        DataError: missing, or of another form."""
    path, captions = Path(path), {}
    try:
        text, kind = read_text(path), path.suffix.lower()
        if kind in LINES:
            lines = [line for line in text.split("\n") if line.strip()]
            pairs = [file_and_text(json.loads(line, object_pairs_hook=list)) for line in lines]
        elif kind in TABLES:
            pairs = [file_and_text(row) for row in read_table(text)]
        else:
            pairs = json.loads(text, object_pairs_hook=list)  # a dict could not have a key twice
            if text.lstrip().startswith("["):
                pairs = [file_and_text(row) for row in pairs]
        for name, value in pairs:
            texts = [value] if isinstance(value, str) else value
            if not isinstance(name, str) or not parts_of(name):
                raise ValueError(f"{name!r} is no name of an image")
            if not texts or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{name} has no list of texts")
            captions.setdefault(name, []).extend(texts)
        if not captions:
            raise ValueError("there are none in it")
        return captions
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        form = '{"image.png": ["caption", ...]}, or lines of {"file_name": ..., "text": ...} in a .jsonl, .csv or .tsv'
        raise DataError(f"--{flag}={path}: cannot be read ({one_line(error)}): needs {form}") from error


def file_and_text(row):
    """The name of an image and its caption in a row of a table, [(column, value)], or a ValueError."""
    columns = [column.strip().lower() for column, _ in row]
    values = dict(zip(columns, (value for _, value in row), strict=True))
    if len(values) < len(columns):
        raise ValueError(f"a column of {', '.join(columns)} is there twice")
    found = []
    for names in (FILE_COLUMNS, TEXT_COLUMNS):
        known = names[:1] if names[0] in values else [name for name in names if name in values]
        if len(known) != 1:
            raise ValueError(f"of the columns {', '.join(columns)}, which is {names[0]}?")
        found.append(values[known[0]])
    return found


def read_table(text):
    """The rows, [(column, value)], of a table with a header, with commas, semicolons, tabs or bars.

    A first line such as sep=; says which, as for Excel. With tabs, quotes may be letters like others."""
    first = text.partition("\n")[0]
    mark = re.match(r'"?sep=([,;\t|])', first, re.IGNORECASE)
    delimiter = mark[1] if mark else max(",;\t|", key=first.count)
    table = partial(csv.reader, delimiter=delimiter, skipinitialspace=True, strict=True)
    rows = table(io.StringIO(text))
    if delimiter == "\t":
        try:
            list(table(io.StringIO(text)))
        except csv.Error:
            rows = table(io.StringIO(text), quoting=csv.QUOTE_NONE)
    if mark:
        next(rows)
    header = next(rows, [])
    for row in rows:
        if row and len(row) != len(header):
            what = f"line {rows.line_num} has {len(row)} columns and the first {len(header)}"
            raise ValueError(f"{what}: put texts in quotes")
        if row:
            yield list(zip(header, (value.strip() for value in row), strict=True))


def parts_of(path):
    """The parts of a path of any system, in composed letters: some systems write letters and accents."""
    parts = unicodedata.normalize("NFC", str(path)).replace("\\", "/").split("/")
    return [part for part in parts if part not in ("", ".")]


def match(captions, paths, name, folder="", flag="captions"):
    """The captions of every path: those of the key that has most of its last parts in common with it.

    A key in folders may have the file name alone in common, as a path of another machine has. It is of
    another image, and not taken, where other keys show that their folders are those of the paths, or
    where both are in folders and the key is relative.

    captions: {path of an image: its captions}. paths: of the images, in `folder`, whose own parts may be
    those of keys. name: of the file of captions, which `flag` names.

    Raises:
        DataError: a path has no captions, or it is not clear which are its."""
    whole, endings = defaultdict(set), defaultdict(set)  # a key's path, or the last parts of it -> keys
    for key in captions:
        parts = parts_of(key)
        whole[tuple(parts)].add(key)
        for start in range(len(parts)):
            endings[tuple(parts[start:])].add(key)
    in_folders = {key for parts, keys in whole.items() if len(parts) > 1 for key in keys}
    above, found, missing = parts_of(os.path.abspath(folder)), [], []  # noqa: PTH100 - of links, the names given
    for path in paths:
        parts = [*above, *parts_of(path)]
        start = next((start for start in range(len(parts)) if tuple(parts[start:]) in endings), len(parts))
        keys = whole.get(tuple(parts_of(path))) or endings.get(tuple(parts[start:]), set())
        found.append((path, keys, start == len(parts) - 1))
    are_known = any(keys & in_folders and not by_name for _, keys, by_name in found)
    path_of = {}
    for path, keys, by_name in found:
        is_relative = not any(key[:1] in "/\\" or key[1:2] == ":" for key in keys)
        if by_name and (are_known or (is_relative and "/" in path)):
            keys = keys - in_folders
        if len(keys) > 1:
            both = " and ".join(sorted(keys)[:2])
            raise DataError(f"--{flag}={name}: {both} could both be of {path}")
        for key in keys:
            if path_of.setdefault(key, path) != path:
                raise DataError(f"--{flag}={name}: {key} could be of {path_of[key]} and of {path}")
        missing += [] if keys else [path]
    if missing:
        what = f"no caption for {len(missing)} of {len(paths)} images, first {missing[0]}"
        raise DataError(f"--{flag}={name}: {what}")
    return [captions[key] for key in path_of]


def captions_of_mode(data, mode, tokenizer):
    """N lists of captions as `--caption_mode` has them before a step draws its own, or a DataError."""
    if mode == "nolevel":
        return [["An image"]] * len(data.captions)
    if mode == "classlevel":
        if not any("/" in path for path in data.paths):
            raise DataError("--caption_mode=classlevel: the images are in no sub-folders of --data_root, the classes")
        return [[f"An image of {name}"] for name in data.classes]
    if mode != "random_tokens":
        return data.captions
    try:
        return [[tokenizer.decode(ast.literal_eval(texts[0]))] for texts in data.captions]
    except Exception as error:  # of texts that are no Python, or not of numbers
        what = f"needs captions such as '[320, 1125]' ({one_line(error)})"
        raise DataError(f"--caption_mode=random_tokens: {what}") from error


def duplicated(number, weight_pc, seed):
    """(number,) bool: the share of the images that `--duplication` samples more often, by the seed."""
    order = torch.randperm(number, generator=generator("cpu", seed, "duplication"))
    return torch.zeros(number, dtype=torch.bool).index_fill(0, order[: int(weight_pc * number)], True)


def add_words(text, words, draw):
    """The text with every word put in at a place drawn by a `random.Random`."""
    parts = text.split(" ")
    for word in words:
        parts.insert(draw.randint(0, len(parts)), word)
    return " ".join(parts)


def random_tokens(tokenizer, number, draw):
    """The text of so many random tokens, those before the first special one."""
    special = {*tokenizer.all_special_ids} - {0, tokenizer.pad_token_id}  # some pad with '!', number 0
    return tokenizer.decode([draw.randrange(min(special)) for _ in range(number)])


def check_length(captions, tokenizer, what, limit=None):
    """Say how many of the captions are empty, and how many the text encoder does not read to the end.

    limit: the tokens that it reads; None: as many as the tokenizer says."""
    captions = list(captions)
    empty = sum(not text.strip() for text in captions)
    lengths = [len(ids) for ids in tokenizer(captions, verbose=False).input_ids]
    limit = limit or tokenizer.model_max_length
    long = [text for text, length in zip(captions, lengths, strict=True) if length > limit]
    if empty and distributed.is_main():
        warn(f"warning: {empty:,} of {len(captions):,} {what} are empty")
    if long and distributed.is_main():
        what = f"{len(long):,} of {len(captions):,} {what} have more than {limit} tokens"
        warn(f"warning: {what}: the text encoder reads {limit} and no more, such as of {long[0][:60]!r}")


def cached(directory, name, owner, make):
    """The array that make() gives, or gave in an earlier run, from a file in a directory: copy on write.

    name: of the content, whoever has made it. owner: any value: of the files made for the same one the
    newest stays; trainings with other data or networks, which may share the directory, keep theirs."""
    directory, tag = Path(directory), hashlib.sha256(repr(owner).encode()).hexdigest()[:16]
    for path in directory.glob(f"{name}*.npy"):
        with suppress(OSError, ValueError):  # gone, or damaged
            return torch.from_numpy(np.lib.format.open_memmap(path, mode="c"))
    array, path = make().cpu(), directory / f"{name}_{tag}.npy"
    try:
        with atomic_write(path) as file:
            np.save(file, array.numpy())
        for other in {*directory.glob(f"*_{tag}.npy")} - {path}:
            with suppress(OSError):  # gone, or of another user
                other.unlink()
    except DataError as error:
        warn(f"{error}; the next run computes it again")
    return array


def encode(data, pipeline, directory, vae_key, text_key, caption_mode, draws_captions, owner):
    """Latents, captions and text states of `CaptionedImages` for `CaptionBatches`, made once and cached.

    vae_key, text_key: hashes of the VAE, and of the tokenizer and text encoder. draws_captions: whether
    other captions of an image than the first are used. owner: as for `cached`, of this data."""
    name = f"latents_{vae_key[:16]}_{fingerprint(data.images)[:16]}"
    of_images = owner, vae_key, data.images.shape[-1]
    moments = cached(directory, name, of_images, lambda: encode_images(pipeline.vae, data.images))
    captions = captions_of_mode(data, caption_mode, pipeline.tokenizer)
    used = [text for texts in captions for text in (texts if draws_captions else texts[:1])]
    check_length(used, pipeline.tokenizer, "captions")
    if getattr(pipeline.text_encoder.config, "use_attention_mask", False):
        text_key += " masked"  # earlier versions did not mask
    firsts = [texts[0] for texts in captions]
    of_texts = owner, caption_mode
    return moments, captions, TextStates(pipeline, firsts, directory, text_key, of_texts)


class TextStates:
    """Hidden states of captions: of those given at the start kept, of others computed when asked for."""

    def __init__(self, pipeline, captions, directory, key, owner=None):
        self.pipeline = pipeline
        captions = list(dict.fromkeys(captions))
        self.rows = {caption: row for row, caption in enumerate(captions)}
        name = hashlib.sha256(repr((key, captions)).encode()).hexdigest()[:32]
        make = partial(encode_captions, pipeline, captions)
        self.kept = cached(directory, f"text_{name}", (owner, key), make)

    def __call__(self, captions):
        """(B, L, D) float32, on the text encoder's device."""
        device = self.pipeline.text_encoder.device
        kept = torch.tensor([self.rows.get(caption, -1) for caption in captions])
        states = to_device(self.kept[kept.clamp(min=0)], device).float()
        if others := [caption for caption in captions if caption not in self.rows]:
            states[(kept < 0).to(device)] = encode_captions(self.pipeline, others).float()
        return states


class CaptionBatches(Batches):
    """The batches of one shard of captioned images, by the shard's own step number.

    Args:
        images: (N, 3, H, W) uint8.
        moments: of `encode_images`, in host memory.
        captions, states: N lists of texts, of `captions_of_mode`, and `TextStates`.
        slots, device, batch_size, T, seed, shard, hflip, groups: as for `training.batches.ShardBatches`.
        scaling_factor: of the VAE's latents.
        caption_mode: one of CAPTION_MODES; `all` draws every caption from all of the image's. The last
            four change it with probability caption_prob: allcaps draws it from all, randrepl takes four
            random tokens, randwordadd adds two random words, wordrepeat adds two of its own words
            (Somepalli et al. 2023).
        text_noise: standard deviation of noise on the text states.
        text_mixup: a > 0 mixes the states with those of another sample, with weight 1 - lambda, lambda ~
            Beta(a, 1).
        duplication: dup_both draws the images that are `often`, (N,) bool of `duplicated`, dup_weight
            times as often, always with the first caption; dup_image with one drawn from all of theirs.
    """

    def __init__(
        self, images, moments, captions, states, slots, device, *, scaling_factor, often, batch_size, T,
        seed, shard=0, hflip=True, caption_mode="first", caption_prob=0.1, text_noise=0.0, text_mixup=0.0,
        duplication="nodup", dup_weight=5.0, groups=None,
    ):  # fmt: skip
        self.images, self.moments, self.captions, self.states = images, moments, captions, states
        self.scaling_factor, self.often, self.hflip = scaling_factor, often, hflip
        self.caption_mode, self.caption_prob = caption_mode, caption_prob
        self.text_noise, self.text_mixup = text_noise, text_mixup
        self.duplication, self.dup_weight = duplication, dup_weight
        super().__init__(slots, device, batch_size, T, seed, shard, groups)

    def draw_order(self, stream):
        """As in `Batches`: each image once, or with replacement if some are often."""
        if self.duplication == "nodup":
            return super().draw_order(stream)
        weights = torch.where(self.often[self.slots], self.dup_weight, 1.0)
        return torch.multinomial(weights, len(self.slots), replacement=True, generator=stream)

    def caption(self, i, draw):
        """A caption of image number i, drawn by a `random.Random`."""
        texts, mode, tokenizer = self.captions[i], self.caption_mode, self.states.pipeline.tokenizer
        if mode == "all" or (self.duplication == "dup_image" and self.often[i]):
            return draw.choice(texts)
        if draw.random() >= self.caption_prob:
            return texts[0]
        if mode == "allcaps":
            return draw.choice(texts)
        if mode == "randrepl":
            return random_tokens(tokenizer, 4, draw)
        if mode == "randwordadd":
            return add_words(texts[0], [random_tokens(tokenizer, 1, draw) for _ in range(2)], draw)
        if mode == "wordrepeat":
            return add_words(texts[0], draw.choices(texts[0].split(" "), k=2), draw)
        return texts[0]

    def __call__(self, step):
        """The `Batch` of a step: x_0 scaled latents (B, C, h, w), `labels` text states (B, L, D)."""
        slots = self.slots_of(step)
        draw = random.Random(derive_seed(self.seed, "captions", self.shard, step))
        text = self.states([self.caption(i, draw) for i in slots.tolist()]).to(self.device)
        moments = to_device(self.moments[slots], self.device).float()

        B, device = self.batch_size, self.device
        stream = generator(device, self.seed, "batch", self.shard, step)
        t = torch.randint(self.T, (B,), generator=stream, device=device)
        latent_noise, eps = torch.randn((2, B, *moments.shape[3:]), generator=stream, device=device)
        mirrored = torch.rand(B, generator=stream, device=device) < (0.5 if self.hflip else 0.0)
        mean, deviation = moments[torch.arange(B, device=device), mirrored.long()].unbind(1)
        x_0 = self.scaling_factor * (mean + deviation * latent_noise)
        if self.text_noise:
            text = text + self.text_noise * torch.randn(text.shape, generator=stream, device=device)
        if self.text_mixup:
            weight = draw.betavariate(self.text_mixup, 1)
            other = torch.randperm(B, generator=stream, device=device)
            text = weight * text + (1 - weight) * text[other]
        return Batch(x_0, text, t, eps, to_device(slots, device), mirrored)

    def augmented(self, slots, magnitude):
        augment = rand_augment(magnitude)
        images = torch.stack([augment(image) for image in self.images[slots]])
        mean, deviation = latent_moments(self.states.pipeline.vae, images).to(self.device).unbind(1)
        x_0 = self.scaling_factor * (mean + deviation * torch.randn_like(mean))
        text = self.states([self.captions[i][0] for i in slots.tolist()]).to(self.device)
        t = torch.randint(self.T, (len(slots),), device=self.device)
        is_mirrored = torch.zeros_like(t, dtype=torch.bool)
        return Batch(x_0, text, t, torch.randn_like(x_0), to_device(slots, self.device), is_mirrored)

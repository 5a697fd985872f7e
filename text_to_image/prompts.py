"""What a text-conditioned generator is asked for, and whose captions that is."""

import json
import random
from collections import Counter, namedtuple
from pathlib import Path

import torch

from score.record import say
from text_to_image.data import (
    FILE_COLUMNS,
    LINES,
    TABLES,
    CaptionedImages,
    add_words,
    captions_of_mode,
    match,
    random_tokens,
    read_captions,
)
from utils.errors import DataError, one_line
from utils.images import equal_images, firsts
from utils.safe_files import read_text
from utils.seeding import derive_seed

# texts: for the pipeline; captions: without additions; own: (N,) int64, the caption's only image, or -1
Prompts = namedtuple("Prompts", "texts captions own")


def distinct(data):
    """The `CaptionedImages` with repeated images there once, with all of their captions."""
    group = equal_images(data.images)
    rows = firsts(group).nonzero().flatten().tolist()
    captions = [[] for _ in range(int(group.max()) + 1)]
    for number, texts in zip(group.tolist(), data.captions, strict=True):
        captions[number] += texts
    classes, paths = ([column[i] for i in rows] for column in (data.classes, data.paths))
    subset, groups = (None if column is None else column[rows] for column in (data.subset, data.groups))
    return CaptionedImages(data.images[rows], captions, classes, paths, subset, groups)


def not_in(training, heldout):
    """The held-out images (L, 3, H, W), each once, that equal no training image, or None; both uint8."""
    is_new = firsts(equal_images(torch.cat([training, heldout])))[len(training) :]
    return heldout[is_new] if is_new.any() else None


def read_prompts(path, names=None):
    """Texts in a file, a line each, JSON, or the first ones of a file of captions.

    names: of the images whose captions are wanted; None: those of all that the file names, in turn.

    Raises:
        DataError: it cannot be read, or it is not clear which captions are of the names."""
    path, kind = Path(path), Path(path).suffix.lower()
    try:
        content = json.loads(read_text(path)) if kind == ".json" else None
        if kind in (*LINES, *TABLES) or isinstance(content, dict) or names_files(content):
            captions = read_captions(path, "prompts")
            found = match(captions, names, path, flag="prompts") if names else captions.values()
            lines = [texts[0] for texts in found]
        elif kind == ".json":
            rows = content if isinstance(content, list) else ()
            lines = [line["prompt"] if isinstance(line, dict) else line for line in rows]
        else:
            lines = [line for line in read_text(path).split("\n") if line.strip()]
        if not lines or not all(isinstance(line, str) for line in lines):
            raise ValueError("no list of texts")
        return lines
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        what = f"cannot be read ({one_line(error)}): give random, all, or a file with a prompt a line"
        raise DataError(f"--prompts={path}: {what}") from error


def names_files(content):
    """Whether a JSON value is a list of objects that name files; prompts.json has numbers of images."""
    rows = [row for row in content if isinstance(row, dict)] if isinstance(content, list) else ()
    named = (column for row in rows for column, value in row.items() if isinstance(value, str))
    return any(column.strip().lower() in FILE_COLUMNS for column in named)


def owners(texts, captions):
    """The number of the image whose caption each text is, -1: of none or several; captions: of all."""
    images = {}
    for i, of_image in enumerate(captions):
        for text in of_image:
            images.setdefault(text, set()).add(i)
    return [min(found) if len(found := images.get(text, ())) == 1 else -1 for text in texts]


def rows_of(names, paths):
    """The numbers of the paths that are these names but for suffixes; None if not each is just one."""
    rows = {Path(path).with_suffix(""): row for row, path in enumerate(paths)}
    found = [rows.get(Path(name).with_suffix("")) for name in names]
    return None if None in found or len(rows) < len(paths) else found


def make_prompts(
    data, tokenizer, number, prompts, caption_mode, seed, rand_augs="none", rand_aug_repeats=4,
    names=None,
):  # fmt: skip
    """The `Prompts` of images, and the texts they are taken from; no prompt depends on the number.

    Args:
        data: `CaptionedImages`, distinct ones.
        tokenizer: of the pipeline; None if neither caption_mode nor rand_augs needs one.
        number: of images; None: one of each text.
        prompts: None or random: first captions, drawn with replacement; all: in turn; or a file.
        rand_augs, rand_aug_repeats: what is put into every prompt at random places, and how many:
            numbers, words, or words of its own (Somepalli et al. 2023).
        names: of images that are files already: a prompt is that of the name in a file that names
            images, and with `all` where all have the names of training images.

    Raises:
        DataError: a file that cannot be read, or that has not one prompt for each of the images."""
    source = [texts[0] for texts in captions_of_mode(data, caption_mode, tokenizer)]
    is_random = prompts in (None, "random")
    groups = range(len(source)) if data.groups is None else data.groups.tolist()
    uses = Counter(text for text, _ in set(zip(source, groups, strict=True)))
    own = [row if uses[text] == 1 else -1 for row, text in enumerate(source)]
    in_turn, named = source, rows_of(names, data.paths) if names else None
    if not is_random and prompts != "all":
        source = read_prompts(prompts, names)
        in_turn = read_prompts(prompts) if named else source
        own = owners(source, data.captions)
    elif named:
        source, own = ([column[row] for row in named] for column in (source, own))
    if named and len(in_turn) == len(source) and in_turn != source:
        what = "--samples have the names of training images, and the prompts of these, not in turn"
        say(f"--prompts={prompts}: {what}: for that, name a .txt with a prompt a line")
    number = number or len(source)
    rows = (derive_seed(seed, "prompt", i) if is_random else i for i in range(number))
    rows = [row % len(source) for row in rows]
    chosen = [source[row] for row in rows]
    streams = (random.Random(derive_seed(seed, "rand_augs", i)) for i in range(number))
    pairs = zip(chosen, streams, strict=True)
    texts = [augmented(*pair, tokenizer, rand_augs, rand_aug_repeats) for pair in pairs]
    return Prompts(texts, chosen, torch.tensor([own[row] for row in rows])), source


def augmented(text, draw, tokenizer, rand_augs, repeats):
    """A prompt with its additions, drawn by a `random.Random`."""
    if rand_augs == "none":
        return text
    if rand_augs == "rand_numb_add":
        words = [str(draw.randrange(100_000)) for _ in range(repeats)]
    elif rand_augs == "rand_word_add":
        words = [random_tokens(tokenizer, 1, draw) for _ in range(repeats)]
    else:
        words = draw.choices(text.split(" "), k=repeats)
    return add_words(text, words, draw)

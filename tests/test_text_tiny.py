"""text_to_image/tiny.py: the emoji, and the pipeline that is made of them."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.commands import run_module
from tests.text_files import tiny_pipeline
from text_to_image import tiny


@pytest.fixture(scope="module")
def data():
    return tiny.read_emoji(16)


def test_emoji_are_distinct_and_coloured(data):
    number = len(data.images)
    assert 900 < number == len(data.captions) == len(set(data.paths))
    assert len(data.images.flatten(1).unique(dim=0)) == number
    assert (data.images.amax(1) - data.images.amin(1)).flatten(1).amax(1).min() > 40
    cherries = data.paths.index("cherries")
    assert data.captions[cherries][:2] == ["cherries", "an icon of cherries"]
    red, green = data.images[cherries, :2].float().mean(dim=(1, 2))
    assert red > green


def test_images_are_saved_with_their_captions(data, tmp_path):
    tiny.save_images(data, [3, 7], tmp_path / "train")
    captions = json.loads((tmp_path / "train.json").read_text())
    assert list(captions.values()) == [data.captions[3], data.captions[7]]
    for name, i in zip(captions, [3, 7], strict=True):
        saved = np.asarray(Image.open(tmp_path / "train" / name)).transpose(2, 0, 1)
        assert (saved == data.images[i].numpy()).all()


def test_nothing_of_others_is_overwritten(tmp_path):
    """An interrupted call goes on, a finished one does not."""
    (tmp_path / "made.log").touch()
    mark = tiny.begin(tmp_path)
    (tmp_path / "train").mkdir()
    assert tiny.begin(tmp_path) == mark
    mark.unlink()
    line = run_module("text_to_image.tiny", tmp_path, cwd=tmp_path, code=2).stderr.splitlines()[-1]
    assert f"{tmp_path}/train: is there, and would be overwritten: name another directory" in line
    assert not any((tmp_path / "train").iterdir())


def test_scaled_latents_have_deviation_one():
    """Also where the VAE is not trained."""
    images = torch.randint(256, (32, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    vae = copy.deepcopy(tiny_pipeline().vae)
    before = vae.config.scaling_factor
    tiny.train_vae(vae, images, 0)
    latents = vae.encode(images / 127.5 - 1).latent_dist.mean
    assert abs(vae.config.scaling_factor * latents.std().item() - 1) < 1e-2 < abs(vae.config.scaling_factor - before)

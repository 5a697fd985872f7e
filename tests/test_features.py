"""Feature spaces against torchvision, transformers and numpy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms
from torchvision.models import resnet50

from score import features
from score.features import COPIES, FRECHET, feature_space, load_sscd, pooled, preprocessed
from score.similarity import clip_scores
from tests.inception_weights import write_weights
from utils.errors import DataError, UsageError

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randint(0, 256, (5, 3, 40, 40), dtype=torch.uint8, generator=GENERATOR)


@pytest.fixture(scope="module")
def sscd(tmp_path_factory):
    """A file of random weights in the published form, and the same network made of torchvision's pieces."""
    torch.manual_seed(0)
    network = resnet50(num_classes=512).eval()
    path = tmp_path_factory.mktemp("sscd") / "sscd_disc_mixup.torchvision.pt"
    torch.save({f"backbone.{name}": value for name, value in network.state_dict().items()}, path)
    return path, network


def test_sscd_is_a_resnet_with_generalised_mean_pooling(sscd):
    path, network = sscd
    x = torch.randn(2, 3, 64, 64, generator=GENERATOR)
    body = torch.nn.Sequential(*list(network.children())[:-2])
    maps = body(x).clamp(min=1e-6).double()
    pooled = (maps**3).flatten(2).mean(dim=2) ** (1 / 3)
    expected = F.linear(pooled, network.fc.weight.double(), network.fc.bias.double())
    torch.testing.assert_close(load_sscd(path)(x).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("how", "sides", "mean"), [("published", (256, 224), 0.5), ("recommended", (288, 288), None)])
@pytest.mark.parametrize("shape", [(40, 40), (300, 400)])
def test_preprocessing_is_that_of_torchvision(how, sides, mean, shape):
    mean, std = (mean, mean) if mean else features.IMAGENET
    steps = [transforms.Resize(sides[0]), transforms.CenterCrop(sides[1]), transforms.ToTensor()]
    normalize = transforms.Normalize([mean] * 3 if mean == 0.5 else mean, [std] * 3 if mean == 0.5 else std)
    # smooth images: PIL rounds to levels between the two directions
    x = F.interpolate(torch.rand(1, 3, 5, 5, generator=GENERATOR), shape, mode="bicubic").clamp(0, 1)
    image = (255 * x).round().to(torch.uint8)
    reference = transforms.Compose([*steps, normalize])(Image.fromarray(image[0].permute(1, 2, 0).numpy()))
    ours = preprocessed(image, *features.PREPROCESS[how])[0]
    assert ours.shape == reference.shape == (3, sides[1], sides[1])
    assert (ours - reference).abs().max() < 0.03


def test_files_that_are_not_sscd(tmp_path, sscd):
    with pytest.raises(DataError, match=r"nothing\.pt: cannot be read as SSCD's weights"):
        load_sscd(tmp_path / "nothing.pt")
    torch.save({"backbone.fc.weight": torch.zeros(512, 2048)}, tmp_path / "part.pt")
    with pytest.raises(DataError, match=r"part\.pt: cannot be read as SSCD's weights"):
        load_sscd(tmp_path / "part.pt")
    path, x = str(tmp_path / "script.pt"), torch.randn(1, 3, 32, 32)
    torch.jit.trace(load_sscd(sscd[0]), x).save(path)
    with pytest.raises(UsageError, match="is TorchScript, which runs code"):
        load_sscd(path)
    torch.testing.assert_close(load_sscd(path, allow_torchscript=True)(x), load_sscd(sscd[0])(x))


def test_sscd_in_half_precision(sscd, tmp_path):
    weights = {name: value.half() for name, value in torch.load(sscd[0], weights_only=True).items()}
    torch.save(weights, tmp_path / "half.pt")
    torch.jit.trace(load_sscd(sscd[0]), torch.randn(1, 3, 32, 32)).half().save(str(tmp_path / "script.pt"))
    x = torch.randn(1, 3, 32, 32)
    expected = load_sscd(sscd[0])(x)
    for name in ("half.pt", "script.pt"):
        found = load_sscd(str(tmp_path / name), allow_torchscript=True)(x)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    from text_to_image.tiny import make_tokenizer

    torch.manual_seed(0)
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**text, "eos_token_id": 49407, "bos_token_id": 49406},
        vision_config={**text, "image_size": 224, "patch_size": 32},
        projection_dim=16,
    )
    folder = tmp_path_factory.mktemp("clip")
    transformers.CLIPModel(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("side", "dtype"), [(336, torch.float32), (48, torch.float16)])
def test_clip_of_another_size_or_precision(clip, tmp_path, side, dtype):
    """Images are brought to the model's own size; what it was saved in does not matter."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPConfig.from_pretrained(clip)
    config.vision_config.image_size, config.text_config.max_position_embeddings = side, 20
    model = transformers.CLIPModel(config).to(dtype).eval()
    model.save_pretrained(tmp_path)
    transformers.CLIPTokenizer.from_pretrained(clip).save_pretrained(tmp_path)
    loaded = features.load_clip(tmp_path)
    assert {value.dtype for value in loaded[0].parameters()} == {torch.float32}
    assert clip_scores(loaded, IMAGES[:2], ["a cat", "x " * 100]).isfinite().all()
    mean, std = (torch.tensor(values)[:, None, None] for values in features.CLIP_NORMALIZE)
    x = F.interpolate(IMAGES / 255, (side, side), mode="bilinear", antialias=True).clamp(0, 1)
    with torch.no_grad():
        expected = model.float().get_image_features(pixel_values=(x - mean) / std).pooler_output
    ours = feature_space("clip", "cpu", clip=tmp_path).features(IMAGES)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_weights_of_another_model_are_not_taken_for_clip(clip, tmp_path):
    """transformers would draw at random what the file lacks."""
    transformers = pytest.importorskip("transformers")
    transformers.CLIPModel.from_pretrained(clip).text_model.save_pretrained(tmp_path)
    for path in clip.iterdir():
        if path.suffix == ".json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(DataError, match=r"--clip=.*: cannot be read as CLIP \(weights of another model"):
        features.load_clip(tmp_path)


def test_every_space_makes_what_it_says(sscd, clip, tmp_path):
    files = {"sscd": sscd[0], "inception": write_weights(tmp_path / "inception.pth"), "clip": clip}
    for name in {*COPIES, *FRECHET.values()}:
        space = feature_space(name, "cpu", **({name: files[name]} if name in files else {}))
        with torch.no_grad():
            rows = space.features(IMAGES)
        assert len(rows) == 5 and rows.dtype == torch.float32
        assert space.threshold == (0.5 if name == "sscd" else None)
        if name in FRECHET.values():
            assert FRECHET[space.name] == name and rows.shape[1] == space.dimension and space.distance
    correlated = F.normalize(feature_space("pixels", "cpu").features(IMAGES))
    expected = np.corrcoef(IMAGES.flatten(1).numpy())
    np.testing.assert_allclose((correlated @ correlated.T).numpy(), expected, atol=1e-5)
    assert torch.equal(feature_space("pooled pixels", "cpu").features(IMAGES), pooled(IMAGES))

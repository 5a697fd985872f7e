"""Embeddings, the search and the statistics of copies in feature space, against torchvision, numpy and brute force."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms
from torchvision.models import resnet50

from score import similarity
from score.similarity import (
    FEATURES,
    background,
    copy_threshold,
    detection,
    embed,
    load_sscd,
    make_embedding,
    measures,
    most_similar,
    preprocess,
    statistics,
)
from tests.inception_weights import write_weights
from utils.errors import DataError, UsageError

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randint(0, 256, (5, 3, 40, 40), dtype=torch.uint8, generator=GENERATOR)


def features(number, dimensions=6):
    return F.normalize(torch.randn(number, dimensions, generator=GENERATOR))


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
    mean, std = (mean, mean) if mean else similarity.IMAGENET
    steps = [transforms.Resize(sides[0]), transforms.CenterCrop(sides[1]), transforms.ToTensor()]
    normalize = transforms.Normalize([mean] * 3 if mean == 0.5 else mean, [std] * 3 if mean == 0.5 else std)
    # smooth images: PIL rounds to levels between the two directions
    x = F.interpolate(torch.rand(1, 3, 5, 5, generator=GENERATOR), shape, mode="bicubic").clamp(0, 1)
    image = (255 * x).round().to(torch.uint8)
    reference = transforms.Compose([*steps, normalize])(Image.fromarray(image[0].permute(1, 2, 0).numpy()))
    ours = preprocess(image, *similarity.PREPROCESS[how])[0]
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


def test_embeddings_have_length_one(sscd, tmp_path):
    for kind, settings in (
        ("sscd", {"sscd": sscd[0]}),
        ("inception", {"inception": write_weights(tmp_path / "inception.pth")}),
        ("pixels", {}),
    ):
        rows = embed(make_embedding(kind, "cpu", **settings), IMAGES, batch_size=2)
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(5))
    pixels = IMAGES.flatten(1).numpy()
    np.testing.assert_allclose((rows @ rows.T).numpy(), np.corrcoef(pixels), atol=1e-5)


def test_search_against_brute_force():
    queries, keys = features(23), features(57)
    products = queries.double().numpy() @ keys.double().numpy().T
    for batches in ((1024, 8192), (5, 7), (23, 57)):
        found, index = most_similar(queries, keys, 4, *batches)
        assert np.array_equal(index.numpy(), np.argsort(-products, axis=1)[:, :4])
        np.testing.assert_allclose(found.numpy(), -np.sort(-products, axis=1)[:, :4], atol=1e-6)
    assert most_similar(queries, keys[:3], 50, 5, 2)[0].shape == (23, 3)


def test_statistics_against_numpy():
    values = np.random.default_rng(0).uniform(size=200)
    found = statistics(torch.from_numpy(values), "sim")
    assert found.keys() == {"sim_mean", "sim_std", "sim_75pc", "sim_90pc", "sim_95pc", "sim_gt_05pc"}
    assert found["sim_mean"] == pytest.approx(values.mean()) and found["sim_std"] == pytest.approx(values.std())
    for q in (75, 90, 95):
        assert found[f"sim_{q}pc"] == pytest.approx(np.quantile(values, q / 100))
    assert found["sim_gt_05pc"] == pytest.approx((values > 0.5).mean())
    del found["sim_gt_05pc"]
    assert statistics(torch.from_numpy(values), "sim", copy_threshold("pixels")) == found
    assert [copy_threshold(name) for name in FEATURES if name != "pixels"] == [0.5] * 3


def test_measures_against_distances_of_features():
    training, own = features(80), torch.arange(30)
    queries = F.normalize(training[:30] + 0.2 * torch.randn(30, 6, generator=GENERATOR))
    queries[3] = training[3]
    numbers, (found, index) = measures(queries, training, own)
    distances = np.linalg.norm(queries.double().numpy()[:, None] - training.double().numpy()[None], axis=2)
    nearest = np.sort(distances, axis=1)
    assert numbers["f_mem"] == pytest.approx((nearest[:, 0] < nearest[:, 1] / 3).mean())
    ratio = nearest[:, 0] ** 2 / (nearest[:, :50] ** 2).mean(axis=1)
    assert numbers["mq_fraction"]["15"] == pytest.approx((ratio < 0.15).mean())
    assert numbers["own_image"] == pytest.approx((distances.argmin(axis=1) == np.arange(30)).mean())
    assert numbers["sim_mean"] == pytest.approx((1 - nearest[:, 0] ** 2 / 2).mean(), abs=1e-5)
    assert found.shape == index.shape == (30, 50)
    ours, _ = measures(queries, training, torch.where(own < 20, own, -1))
    assert ours["own_image"] == pytest.approx((distances.argmin(axis=1) == np.arange(30))[:20].mean())
    assert "own_image" not in measures(queries, training)[0]
    counts, _ = np.histogram(found[:, 0].clip(0, 1).numpy(), bins=similarity.BINS, range=(0, 1))
    np.testing.assert_allclose(numbers["sim_histogram"], counts / 30, atol=1e-6)


def test_detection_counts_pairs_in_the_right_order():
    scores, copies = torch.rand(40, generator=GENERATOR), torch.rand(40, generator=GENERATOR) < 0.3
    pairs = scores[copies].numpy()[:, None] > scores[~copies].numpy()
    found = detection(scores, copies)
    assert found["auc"] == pytest.approx(pairs.mean()) and found["copies"] == copies.sum()
    assert found["mean_of_copies"] == pytest.approx(scores[copies].mean().item())
    none = detection(scores, torch.zeros(40, dtype=torch.bool))
    assert none["auc"] is None is none["mean_of_copies"] and none["copies"] == 0


def test_background_leaves_out_the_image_itself():
    training = features(40)
    products = training.double().numpy() @ training.double().numpy().T
    np.fill_diagonal(products, -2)
    assert background(training)["bg_mean"] == pytest.approx(products.max(axis=1).mean(), abs=1e-6)


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


def test_clip_score_is_that_of_transformers(clip):
    transformers = pytest.importorskip("transformers")
    model = transformers.CLIPModel.from_pretrained(clip)
    images = IMAGES.repeat_interleave(6, dim=-1).repeat_interleave(6, dim=-2)[..., 8:-8, 8:-8]  # 224, so no resizing
    captions = ["a cat", "a dog", "an icon of yo-yo", "x " * 100, ""]
    loaded = similarity.load_clip(clip)
    ours = similarity.clip_scores(loaded, images, captions, batch_size=2)
    mean, std = (torch.tensor(values)[:, None, None] for values in similarity.CLIP_NORMALIZE)
    for image, caption, score in zip(images, captions, ours, strict=True):
        tokens = loaded[1]([caption], truncation=True, max_length=77, return_tensors="pt")
        output = model(**tokens, pixel_values=((image / 255 - mean) / std)[None])
        expected = output.logits_per_image / model.logit_scale.exp()
        assert score.item() == pytest.approx(100 * expected.item(), abs=1e-3)
    with pytest.raises(DataError, match="--clip=nothing: cannot be read as CLIP"):
        similarity.load_clip("nothing")


@pytest.mark.parametrize(("side", "dtype"), [(336, torch.float32), (48, torch.float16)])
def test_clip_of_another_size_or_precision(clip, tmp_path, side, dtype):
    """Images are brought to the model's own size; what it was saved in does not matter."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPConfig.from_pretrained(clip)
    config.vision_config.image_size, config.text_config.max_position_embeddings = side, 20
    model = transformers.CLIPModel(config).to(dtype).eval()
    model.save_pretrained(tmp_path)
    transformers.CLIPTokenizer.from_pretrained(clip).save_pretrained(tmp_path)
    loaded = similarity.load_clip(tmp_path)
    assert {value.dtype for value in loaded[0].parameters()} == {torch.float32}
    assert similarity.clip_scores(loaded, IMAGES[:2], ["a cat", "x " * 100]).isfinite().all()
    mean, std = (torch.tensor(values)[:, None, None] for values in similarity.CLIP_NORMALIZE)
    x = F.interpolate(IMAGES / 255, (side, side), mode="bilinear", antialias=True).clamp(0, 1)
    with torch.no_grad():
        expected = model.float().get_image_features(pixel_values=(x - mean) / std).pooler_output
    ours = make_embedding("clip", "cpu", clip=tmp_path)(IMAGES)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_weights_of_another_model_are_not_taken_for_clip(clip, tmp_path):
    """transformers would draw at random what the file lacks."""
    transformers = pytest.importorskip("transformers")
    transformers.CLIPModel.from_pretrained(clip).text_model.save_pretrained(tmp_path)
    for path in clip.iterdir():
        if path.suffix == ".json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(DataError, match=r"--clip=.*: cannot be read as CLIP \(weights of another model"):
        similarity.load_clip(tmp_path)

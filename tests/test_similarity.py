"""The search and the statistics of copies in feature space, against numpy and brute force."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from score import similarity
from score.features import CLIP_NORMALIZE, feature_space, load_clip
from score.similarity import detection, embed, evaluate_similarity, measure_similarity, most_similar, statistics
from tests.test_features import clip as clip
from utils.errors import DataError

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randint(0, 256, (5, 3, 40, 40), dtype=torch.uint8, generator=GENERATOR)


def features(number, dimensions=6):
    return F.normalize(torch.randn(number, dimensions, generator=GENERATOR))


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
    found = statistics(torch.from_numpy(values), "sim", 0.5)
    assert found.keys() == {"sim_mean", "sim_std", "sim_75pc", "sim_90pc", "sim_95pc", "sim_gt_05pc"}
    assert found["sim_mean"] == pytest.approx(values.mean()) and found["sim_std"] == pytest.approx(values.std())
    for q in (75, 90, 95):
        assert found[f"sim_{q}pc"] == pytest.approx(np.quantile(values, q / 100))
    assert found["sim_gt_05pc"] == pytest.approx((values > 0.5).mean())
    del found["sim_gt_05pc"]
    assert statistics(torch.from_numpy(values), "sim") == found


def test_numbers_against_distances_of_features():
    training, own = features(80), torch.arange(30)
    queries = F.normalize(training[:30] + 0.2 * torch.randn(30, 6, generator=GENERATOR))
    queries[3] = training[3]
    numbers, (found, index) = measure_similarity(queries, training, prompt_images=own)
    distances = np.linalg.norm(queries.double().numpy()[:, None] - training.double().numpy()[None], axis=2)
    nearest = np.sort(distances, axis=1)
    assert numbers["f_mem"] == pytest.approx((nearest[:, 0] < nearest[:, 1] / 3).mean())
    ratio = nearest[:, 0] ** 2 / (nearest[:, :50] ** 2).mean(axis=1)
    assert numbers["mq_fraction"]["15"] == pytest.approx((ratio < 0.15).mean())
    assert numbers["own_image"] == pytest.approx((distances.argmin(axis=1) == np.arange(30)).mean())
    assert numbers["sim_mean"] == pytest.approx((1 - nearest[:, 0] ** 2 / 2).mean(), abs=1e-5)
    assert found.shape == index.shape == (30, 50)
    ours, _ = measure_similarity(queries, training, prompt_images=torch.where(own < 20, own, -1))
    assert ours["own_image"] == pytest.approx((distances.argmin(axis=1) == np.arange(30))[:20].mean())
    assert "own_image" not in measure_similarity(queries, training)[0]
    counts, _ = np.histogram(found[:, 0].clip(0, 1).numpy(), bins=similarity.BINS, range=(0, 1))
    np.testing.assert_allclose(numbers["sim_histogram"], counts / 30, atol=1e-6)


def test_groups_against_distances_of_features():
    """Of 60 keys 45 in groups of three that are alike; each query is near one of them."""
    groups = torch.cat([torch.arange(15).repeat_interleave(3), torch.arange(15, 30)])
    keys = F.normalize(features(30)[groups] + 0.01 * torch.randn(60, 6, generator=GENERATOR))
    queries = F.normalize(keys + 0.01 * torch.randn(60, 6, generator=GENERATOR))
    numbers, (found, _) = measure_similarity(queries, keys, groups=groups)
    d = ((queries.double()[:, None] - keys.double()) ** 2).sum(-1)
    rows = []
    for row in d:
        first = int(row.argmin())
        rest = row[groups != groups[first]].sort().values
        rows.append(torch.cat([row[first : first + 1], rest])[:50])
    assert [row.isnan().sum() for row in found] == [50 - min(50, len(row)) for row in rows]
    ratio = torch.stack([row[0] / row.mean() for row in rows])
    assert numbers["mq_fraction"]["15"] == pytest.approx((ratio < 0.15).double().mean())
    assert numbers["f_mem"] == np.mean([9 * row[0].item() < row[1].item() for row in rows]) > 0.8
    assert measure_similarity(queries, keys)[0]["f_mem"] < 0.5
    alone = measure_similarity(queries, keys, groups=torch.arange(60))[0]
    assert alone == measure_similarity(queries, keys)[0]

    space = feature_space("pixels", "cpu")
    training = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8, generator=GENERATOR)
    training[1::3] = training[::3] ^ 1
    for groups in (torch.arange(12) // 3, torch.zeros(12, dtype=torch.int64)):
        numbers = evaluate_similarity(space, training[:2], training, groups=groups)[0]
        products = np.corrcoef(training.flatten(1).numpy())
        products[groups[:, None] == groups] = -2
        largest = products.max(axis=1)
        largest[largest == -2] = 1  # of one group there is no other
        assert numbers["bg_mean"] == pytest.approx(largest.mean(), abs=1e-6)


def test_detection_counts_pairs_in_the_right_order():
    scores, copies = torch.rand(40, generator=GENERATOR), torch.rand(40, generator=GENERATOR) < 0.3
    pairs = scores[copies].numpy()[:, None] > scores[~copies].numpy()
    found = detection(scores, copies)
    assert found["auc"] == pytest.approx(pairs.mean()) and found["copies"] == copies.sum()
    assert found["mean_of_copies"] == pytest.approx(scores[copies].mean().item())
    none = detection(scores, torch.zeros(40, dtype=torch.bool))
    assert none["auc"] is None is none["mean_of_copies"] and none["copies"] == 0


def test_clip_score_is_that_of_transformers(clip):
    transformers = pytest.importorskip("transformers")
    model = transformers.CLIPModel.from_pretrained(clip)
    images = IMAGES.repeat_interleave(6, dim=-1).repeat_interleave(6, dim=-2)[..., 8:-8, 8:-8]  # 224, so no resizing
    captions = ["a cat", "a dog", "an icon of yo-yo", "x " * 100, ""]
    loaded = load_clip(clip)
    ours = similarity.clip_scores(loaded, images, captions, batch_size=2)
    mean, std = (torch.tensor(values)[:, None, None] for values in CLIP_NORMALIZE)
    for image, caption, score in zip(images, captions, ours, strict=True):
        tokens = loaded[1]([caption], truncation=True, max_length=77, return_tensors="pt")
        output = model(**tokens, pixel_values=((image / 255 - mean) / std)[None])
        expected = output.logits_per_image / model.logit_scale.exp()
        assert score.item() == pytest.approx(100 * expected.item(), abs=1e-3)
    with pytest.raises(DataError, match="--clip=nothing: cannot be read as CLIP"):
        load_clip("nothing")


def test_embeddings_have_length_one_whatever_the_batch():
    space = feature_space("pixels", "cpu", batch_size=2)
    rows = embed(space, IMAGES)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(5))
    assert torch.equal(rows, F.normalize(space.features(IMAGES)))


def test_an_evaluation_has_floors_of_its_shape_and_the_training_images_among_each_other():
    training, images, others = torch.randint(0, 256, (3, 40, 3, 8, 8), dtype=torch.uint8, generator=GENERATOR)
    space, prompts = feature_space("pixels", "cpu"), torch.arange(40)
    floors = {"holdout": (others, None), "base": (others[:30], prompts[:30])}
    numbers, found, (cosine, index) = evaluate_similarity(space, images, training, None, floors)
    products = np.corrcoef(training.flatten(1).numpy())
    np.fill_diagonal(products, -2)
    assert numbers["bg_mean"] == pytest.approx(products.max(axis=1).mean(), abs=1e-6)
    assert cosine.shape == index.shape == (40, 40)
    for name, (of_floor, own) in floors.items():
        alone, _ = measure_similarity(embed(space, of_floor), embed(space, training), None, own)
        assert found[name] == {"features": "pixels", "preprocess": None, **alone}
        assert found[name].keys() - {"own_image"} == {key for key in numbers if not key.startswith("bg_")}

"""The UNet's names and shapes against a list derived from the paper's architecture, and how it loads weights."""

import math

import numpy as np
import pytest
import torch

from model import UNet, sinusoidal_table
from tests.networks import visible

T, CH, CH_MULT, ATTN, BLOCKS = 20, 32, [1, 2, 2], [1], 2


def layer(name, *weight_shape):
    return {f"{name}.weight": weight_shape, f"{name}.bias": weight_shape[:1]}


def embedding(name, rows):
    perceptron = {**layer(f"{name}.1", 4 * CH, CH), **layer(f"{name}.3", 4 * CH, 4 * CH)}
    return {f"{name}.0.weight": (rows, CH), **perceptron}


def res_block(name, in_ch, out_ch, attn):
    keys = {
        **{f"{name}.block1.0.{kind}": (in_ch,) for kind in ("weight", "bias")},
        **layer(f"{name}.block1.2", out_ch, in_ch, 3, 3),
        **layer(f"{name}.temb_proj.1", out_ch, 4 * CH),
        **layer(f"{name}.cemb_proj.1", out_ch, 4 * CH),
        **{f"{name}.block2.0.{kind}": (out_ch,) for kind in ("weight", "bias")},
        **layer(f"{name}.block2.3", out_ch, out_ch, 3, 3),
    }
    if in_ch != out_ch:
        keys |= layer(f"{name}.shortcut", out_ch, in_ch, 1, 1)
    if attn:
        keys |= {f"{name}.attn.group_norm.{kind}": (out_ch,) for kind in ("weight", "bias")}
        for projection in ("proj_q", "proj_k", "proj_v", "proj"):
            keys |= layer(f"{name}.attn.{projection}", out_ch, out_ch, 1, 1)
    return keys


def reference_shapes(num_labels):
    """Written out by hand for T = 20, ch = 32, ch_mult = 1 2 2, attn = 1, two blocks per level."""
    keys = embedding("time_embedding.timembedding", T)
    if num_labels:
        keys |= embedding("cond_embedding.timembedding", num_labels + 1)
    keys |= layer("head", 32, 3, 3, 3)
    keys |= res_block("downblocks.0", 32, 32, False) | res_block("downblocks.1", 32, 32, False)
    keys |= layer("downblocks.2.main", 32, 32, 3, 3)
    keys |= res_block("downblocks.3", 32, 64, True) | res_block("downblocks.4", 64, 64, True)
    keys |= layer("downblocks.5.main", 64, 64, 3, 3)
    keys |= res_block("downblocks.6", 64, 64, False) | res_block("downblocks.7", 64, 64, False)
    keys |= res_block("middleblocks.0", 64, 64, True) | res_block("middleblocks.1", 64, 64, False)
    # skips, last in first out: 64 64 64 | 64 64 32 | 32 32 32
    for i, in_ch in enumerate((128, 128, 128)):
        keys |= res_block(f"upblocks.{i}", in_ch, 64, False)
    keys |= layer("upblocks.3.main", 64, 64, 3, 3)
    for i, in_ch in enumerate((128, 128, 96)):
        keys |= res_block(f"upblocks.{4 + i}", in_ch, 64, True)
    keys |= layer("upblocks.7.main", 64, 64, 3, 3)
    for i, in_ch in enumerate((96, 64, 64)):
        keys |= res_block(f"upblocks.{8 + i}", in_ch, 32, False)
    return keys | {"tail.0.weight": (32,), "tail.0.bias": (32,)} | layer("tail.2", 3, 32, 3, 3)


def make(num_labels=None, dropout=0.1):
    torch.manual_seed(0)
    return UNet(T, CH, CH_MULT, ATTN, BLOCKS, dropout, num_labels)


@pytest.mark.parametrize("num_labels", [None, 5])
def test_keys_and_shapes_are_the_published_ones(num_labels):
    shapes = {key: tuple(value.shape) for key, value in make(num_labels).state_dict().items()}
    assert shapes == reference_shapes(num_labels)


def test_parameters_come_in_published_order():
    names = [name for name, _ in make().named_parameters()]
    assert names[0] == "time_embedding.timembedding.0.weight"
    firsts = list(dict.fromkeys(name.split(".")[0] for name in names))
    assert firsts == ["time_embedding", "head", "downblocks", "middleblocks", "upblocks", "tail"]
    block = list(dict.fromkeys(name.split(".")[2] for name in names if name.startswith("downblocks.3.")))
    assert block == ["block1", "temb_proj", "cemb_proj", "block2", "shortcut", "attn"]


def test_time_table_is_frozen_and_right():
    parameters = dict(make().named_parameters())
    assert not parameters["time_embedding.timembedding.0.weight"].requires_grad
    table = sinusoidal_table(T, CH).numpy()
    for t, i in ((0, 0), (3, 0), (7, 5), (19, 15)):
        angle = t * 10000 ** (-2 * i / CH)
        np.testing.assert_allclose(table[t, 2 * i : 2 * i + 2], [math.sin(angle), math.cos(angle)], atol=1e-6)


def test_initial_weights():
    net = make(num_labels=5)
    weight = net.downblocks[3].block1[2].weight
    bound = math.sqrt(6 / (9 * 32 + 9 * 64))
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    for small in (net.tail[2], net.middleblocks[0].block2[3]):
        assert 0 < small.weight.abs().max() < 1e-5
    assert all(not value.any() for name, value in net.named_parameters() if "block" in name and name.endswith("2.bias"))
    assert not net.cond_embedding.timembedding[0].weight[0].any()


def test_block_by_hand():
    """One attention block in numpy: group norm, softmax(q k^T / sqrt(C)) v, projection, residual."""
    block = make().middleblocks[0].attn.double()
    x = torch.randn(2, 64, 3, 3, dtype=torch.float64)
    groups = x.numpy().reshape(2, 32, -1)
    h = (groups - groups.mean(-1, keepdims=True)) / np.sqrt(groups.var(-1, keepdims=True) + 1e-5)
    h = h.reshape(2, 64, 9).transpose(0, 2, 1)
    weights = {name: value.detach().numpy() for name, value in block.state_dict().items()}
    q, k, v = (h @ weights[f"proj_{name}.weight"][:, :, 0, 0].T for name in "qkv")
    logits = q @ k.transpose(0, 2, 1) / np.sqrt(64)
    attention = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    out = (attention @ v) @ weights["proj.weight"][:, :, 0, 0].T
    expected = x.numpy() + out.transpose(0, 2, 1).reshape(2, 64, 3, 3)
    np.testing.assert_allclose(block(x).detach().numpy(), expected, atol=1e-10)


def test_up_sampling_by_hand():
    """Every pixel twice in each direction, then a 3x3 correlation over zero padding."""
    layer = make().upblocks[3].double()
    x = torch.randn(1, 64, 2, 3, dtype=torch.float64)
    large = np.pad(x.numpy().repeat(2, axis=2).repeat(2, axis=3), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(large, (3, 3), axis=(2, 3))
    weight, bias = layer.main.weight.detach().numpy(), layer.main.bias.detach().numpy()
    expected = np.einsum("bihwyx,oiyx->bohw", windows, weight) + bias[:, None, None]
    np.testing.assert_allclose(layer(x, None, None).detach().numpy(), expected, atol=1e-10)


def test_loads_pytorch_ddpm_weights_without_cemb_proj():
    source, target = make(), UNet(T, CH, CH_MULT, ATTN, BLOCKS, 0.1)
    published = {key: value for key, value in source.state_dict().items() if ".cemb_proj." not in key}
    target.load_state_dict(published)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 9])
    source.eval(), target.eval()
    assert torch.equal(source(x, t), target(x, t))


@pytest.mark.parametrize("key", ["tail.2.bias", "downblocks.0.cemb_proj.1.weight"])
def test_a_missing_key_is_named(key):
    weights = make().state_dict()
    del weights[key]
    with pytest.raises(RuntimeError, match=key.replace(".", r"\.")):
        make().load_state_dict(weights)


def test_extra_and_misshaped_keys_are_named():
    with pytest.raises(RuntimeError, match="surplus"):
        make().load_state_dict({**make().state_dict(), "surplus": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"head\.bias"):
        make().load_state_dict({**make().state_dict(), "head.bias": torch.zeros(7)})
    without = {key: value for key, value in make(5).state_dict().items() if ".cemb_proj." not in key}
    with pytest.raises(RuntimeError, match="cemb_proj"):
        make(5).load_state_dict(without)


def test_labels_look_up_row_label_plus_one():
    net = visible(make(num_labels=5))
    with torch.no_grad():
        net.cond_embedding.timembedding[3].bias.fill_(0.5)
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([4])
    table = net.cond_embedding.timembedding[0].weight
    outputs = {label: net(x, t, torch.tensor([label])) for label in (-1, 0, 4)}
    with torch.no_grad():
        table[5] = table[1]
        assert torch.equal(net(x, t, torch.tensor([4])), outputs[0])
        table[1] = 0
        assert torch.equal(net(x, t, torch.tensor([0])), outputs[-1])
    assert not torch.allclose(outputs[0], outputs[4])
    assert not torch.allclose(net(x, t), outputs[-1]), "no labels leaves the conditional term out altogether"


def test_bad_arguments():
    with pytest.raises(ValueError, match="level"):
        UNet(T, CH, [1, 2], [2], 1, 0.1)
    with pytest.raises(ValueError, match="num_channels"):
        UNet(T, 40, [1, 2], [1], 1, 0.1)

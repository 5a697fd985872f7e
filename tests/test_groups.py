"""GroupNorm's groups: no block is blind to t or to the class, and the number of groups goes with the weights."""

import pytest
import torch

from model import ResBlock, UNet
from tests.commands import ROOT, eval_flags, run, values_of
from tests.networks import TINY_FLAGS, visible
from training import build
from training.flags import norm_groups
from utils.errors import UsageError

CONFIGS = sorted(path.stem for path in (ROOT / "config").glob("*.txt"))
TINY = [*TINY_FLAGS, "--num_images=4", "--fid_features=pixels"]


def outputs_of_blocks(net, inputs, temb, cemb):
    """What every block makes of the same images with other embeddings: {name: (B, C, H, W)}."""
    blocks = {name: block for name, block in net.named_modules() if isinstance(block, ResBlock)}
    return {name: block(inputs[name], temb, cemb) for name, block in blocks.items()}


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_every_block_sees_t_and_the_class(name):
    values = values_of("test", f"--flagfile={ROOT}/config/{name}.txt")
    torch.manual_seed(0)
    net, num_labels = visible(build.unet(values)), values.num_labels
    inputs = {}
    for block_name, block in net.named_modules():
        if isinstance(block, ResBlock):
            block.register_forward_pre_hook(lambda _, args, key=block_name: inputs.__setitem__(key, args[0]))
    labels = torch.tensor([3]) if num_labels else None
    side = max(16, 2 ** (len(values.ch_mult) - 1))
    net(torch.randn(1, 3, side, side), torch.tensor([900]), labels)

    def outputs(t, label):
        cemb = net.cond_embedding(torch.tensor([label + 1])) if num_labels else None
        return outputs_of_blocks(net, inputs, net.time_embedding(torch.tensor([t])), cemb)

    early, late = outputs(10, 3), outputs(900, 3)
    others = [(early, late), *([(early, outputs(10, 5))] if num_labels else [])]
    for before, after in others:
        change = {key: ((after[key] - before[key]).norm() / before[key].norm()).item() for key in before}
        assert len(change) >= 8
        assert min(change.values()) > 0.01, change


@pytest.mark.parametrize(("ch", "groups"), [(128, 32), (256, 32), (64, 16), (32, 8), (4, 1)])
def test_default_number(ch, groups):
    """The published network from 128 channels on, at least four channels a group below."""
    assert norm_groups(values_of("test", f"--ch={ch}")) == groups


def test_the_number_goes_with_the_weights(tmp_path):
    """Recorded by both scripts, taken by evaluation and --check_dir."""
    run("main.py", "--train", *TINY, "--norm_groups=4", "--total_steps=2", "--logdir=main", cwd=tmp_path)
    once = ["--client_num=2", "--local_epoch=1", "--total_round=1", "--check_dir=main/ckpt2.pt"]
    run("main_fed.py", "--train", *TINY, *once, "--logdir=fed", cwd=tmp_path)
    paths = {"main": tmp_path / "main/ckpt2.pt", "fed": tmp_path / "fed/global_ckpt_round1.pt"}
    for path in paths.values():
        assert torch.load(path, weights_only=True)["norm_groups"] == 4
    state = torch.load(paths["main"], weights_only=True)
    net = UNet(T=20, ch=32, ch_mult=[2], attn=[0], num_res_blocks=1, dropout=0.1, groups=4)
    net.load_state_dict(state["net_model"])

    run("all_in.py", *TINY, "--stages=generate", "--unet_dir=main", *eval_flags(tmp_path), cwd=tmp_path)
    result = run("main.py", "--eval", *TINY, "--logdir=main", "--norm_groups=8", cwd=tmp_path, code=2)
    assert result.stderr == "main.py: error: --norm_groups=8: main/ckpt2.pt was trained with 4, leave the flag out\n"


def test_a_checkpoint_that_records_no_number_is_published():
    published = {"net_model": {}}
    assert norm_groups(values_of("test", "--ch=32"), published, "a.pt") == 32
    assert norm_groups(values_of("test", "--ch=32"), {**published, "norm_groups": 8}, "a.pt") == 8
    for given, message in (
        (["--ch=32", "--norm_groups=8"], "--norm_groups=8: a.pt was trained with 32, leave the flag out"),
        (["--ch=16"], "--ch=16: must be a multiple of the 32 groups of a GroupNorm of a.pt"),
    ):
        with pytest.raises(UsageError, match=message):
            norm_groups(values_of("test", *given), published, "a.pt")

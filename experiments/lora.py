"""LoRA or the whole UNet, on captioned emoji: what is trained, and what is measured of its images.

Images and pipeline are made as by com/demo_text.sh. docs/TEXT_TO_IMAGE.md says what is expected.
"""

import functools
import itertools

import torch

from experiments import runs
from experiments.images import fpd
from score.features import feature_space
from score.similarity import embed, measure_similarity
from text_to_image.data import load_folder, load_images
from text_to_image.lora import load_lora
from text_to_image.pipeline import as_scheduler, find_unet, generate_numbered, load_pipeline
from training.logger import read_metrics
from utils.errors import UsageError
from utils.files import read_json, write_json
from utils.images import to_uint8

K = 4
STEPS = 960  # over all shards
ROUNDS, POINTS = 24, 6  # of a training, and its checkpoints
IMAGES = 64  # one of each caption

DATA = {"made by": "text_to_image.tiny", "vae_steps": 500, "unet_steps": 2000}
SIDE = 32
TRAINING = {
    "resolution": SIDE, "hflip": False, "duplication": "dup_both", "weight_pc": 0.125, "dup_weight": 4,
    "batch_size": 16, "ema_decay": 0.99, "bank_bins": 50, "sample_step": 0, "log_step": STEPS,
    "device": "cpu",
}  # fmt: skip
SAMPLER = {"steps": 10, "guidance": 2.0, "resolution": SIDE, "text_noise": 0.0, "dtype": torch.float32}
SCHEDULER = "DPMSolverMultistepScheduler"

PLAIN = {"client_num": 1, "anti_grad": "off", "warmup": 100}
IET_AGC = {"client_num": K, "warmup": 25}

# {rank: --lr}; rank 0 is the whole UNet. As experiments/lora_rates.py chooses them
RATES = {0: 3e-4, 2: 1e-3, 8: 3e-3, 32: 1e-2}
# All layers of the blocks. This UNet has attention at its coarsest level only, where a LoRA learns little
TARGETS = "to_k,to_q,to_v,to_out.0,ff.net.0.proj,ff.net.2,proj_in,proj_out,conv1,conv2,conv_shortcut"


def of_rank(rank, lr):
    """The flags of the whole UNet (0), or of a LoRA, of which B alone trains as shards need it."""
    of_lora = {"lora_rank": rank, "lora_targets": TARGETS, "lora_freeze_a": True}
    return {"lr": lr} | (of_lora if rank else {})


ARMS = {"default": PLAIN | of_rank(0, RATES[0]), "IET-AGC": IET_AGC | of_rank(0, RATES[0])}
for rank in (2, 8, 32):
    ARMS[f"LoRA {rank}"] = PLAIN | of_rank(rank, RATES[rank])
    ARMS[f"LoRA {rank} IET-AGC"] = IET_AGC | of_rank(rank, RATES[rank])
SEEDS = dict.fromkeys(ARMS, range(1, 4))

# a checkpoint copies if this measure is above this number
COPIES = "own_image above", 0.10


def make(out, scale):
    """Make the pipeline and the emoji below `out`, if they are not there; returns their directory."""
    made = out / "runs/emoji"
    done = made / "made.json"
    steps = {name: round(scale * DATA[name]) for name in ("vae_steps", "unet_steps")}
    if not done.exists():
        made.mkdir(parents=True, exist_ok=True)
        flags = [str(made), *(f"--{name}={number}" for name, number in steps.items())]
        runs.call("-m text_to_image.tiny", flags, made / "tiny.log")
        write_json(done, steps)
    if read_json(done) != steps:
        raise UsageError(f"{made}: was made with another --scale: choose another --out")
    return made


def plan(experiment, spec, out, scale=1.0):
    """All `runs.Run`s of this module or experiments/lora_rates.py, seed by seed; as `runs.plan`."""
    seeds = sorted({seed for of_arm in spec.SEEDS.values() for seed in of_arm})
    return [
        make_run(experiment, spec, arm, seed, out, scale)
        for seed, arm in itertools.product(seeds, spec.ARMS)
        if seed in spec.SEEDS[arm]
    ]


def make_run(experiment, spec, arm, seed, out, scale):
    """The `runs.Run` of an arm with a seed; the other arguments as for `plan`."""
    made, directory = out / "runs/emoji", out / "runs" / experiment / arm / f"seed{seed}"
    own = spec.ARMS[arm]
    steps = max(1, round(scale * STEPS / (ROUNDS * own["client_num"])))
    values = {
        "train": True, "pretrained": made / "pipeline", "data_root": made / "train",
        "captions": made / "train.json", **TRAINING, **own, "local_steps": steps,
        "total_round": spec.ROUNDS, "save_round": spec.ROUNDS // spec.POINTS, "seed": seed,
        "logdir": directory / "log",
    }  # fmt: skip
    flags = [f"--{name}={value}" for name, value in values.items()]
    images = max(8, round(scale * IMAGES))
    per_round = steps * own["client_num"]
    return runs.Run(experiment, arm, seed, directory, flags, made, None, spec.ROUNDS, per_round, images)


def work(run):
    """As `runs.work`: train one run, and measure the pipeline it starts from and its checkpoints."""
    log = run.directory / "log"
    run.directory.mkdir(parents=True, exist_ok=True)
    runs.call("-m text_to_image.main_fed", run.flags, run.directory / "train.log")
    points = [({"steps": 0}, functools.partial(measure, run, None))]
    folders = log.glob("checkpoint_round*")
    for r in sorted(int(folder.name.removeprefix("checkpoint_round")) for folder in folders):
        unet = find_unet(log / f"checkpoint_round{r}")
        about = {"steps": r * run.steps_per_round, "loss": round_loss(log, r)}
        points.append((about, functools.partial(measure, run, unet)))
    runs.measure_all(run, read_json(log / "train.json")["seconds"], points)


def round_loss(log, r):
    """The mean loss of the steps of a round, of which there is a line for every shard."""
    losses = [line["loss"] for line in read_metrics(log) if line.get("round") == r]
    return sum(losses) / len(losses)


def measure(run, unet):
    """The numbers of images by the pipeline with a UNet or LoRA, of `find_unet`, or with its own (None).

    What is "above" is less what held-out images reach in their place."""
    numbers, real = numbers_of(generate(run.data, unet, run.images, run.seed), run.data), floor(run.data)
    return numbers | {f"{name} above": numbers[name] - value for name, value in real.items()}


@functools.cache
def floor(made):
    """What held-out images reach in place of generated ones, with the captions given to them in turn."""
    numbers = numbers_of(real_images(made)[1], made)
    return {name: numbers[name] for name in ("own_image", "f_mem", "similarity")}


@functools.cache
def real_images(made):
    """The `CaptionedImages` of the training, and held-out images (N, 3, S, S) uint8."""
    data = load_folder(made / "train", made / "train.json", SIDE)
    return data, load_images(sorted((made / "heldout").glob("*.png")), SIDE)


def numbers_of(images, made):
    """Similarities by the correlation of pixels, and fpd to held-out images, of uint8 (N, 3, S, S).

    Image i is taken for one of caption i, as `generate` makes them."""
    data, heldout = real_images(made)
    space, own = feature_space("pixels", "cpu"), torch.arange(len(images)) % len(data.images)
    features = embed(space, images), embed(space, data.images)
    numbers, _ = measure_similarity(*features, space.threshold, own)
    return {
        "own_image": numbers["own_image"], "f_mem": numbers["f_mem"], "similarity": numbers["sim_mean"],
        "fpd": fpd(images, heldout), "images": len(images),
    }  # fmt: skip


@functools.cache  # those of the pipeline itself are the same for all arms
def generate(made, unet, number, seed):
    """So many images, uint8, of the first captions in turn; unet: as for `measure`."""
    own = made / "pipeline/unet"
    is_lora = unet is not None and unet.is_file()
    pipeline = load_pipeline(made / "pipeline", own if unet is None or is_lora else unet)
    if is_lora:
        load_lora(pipeline, unet, scale=1.0)
    pipeline.scheduler = as_scheduler(SCHEDULER, pipeline.scheduler, "the experiment")
    texts = [captions[0] for captions in real_images(made)[0].captions]
    texts = list(itertools.islice(itertools.cycle(texts), number))
    return to_uint8(2 * generate_numbered(pipeline, texts, range(number), seed=seed, **SAMPLER) - 1)

"""Random kills, damaged checkpoints and full disks against small runs, each of which must end as if nothing happened:

python -m tests.faults [--minutes 11] [--seed 8]

Its parts are those of tests/test_resume.py, tests/test_disk_full.py and tests/test_distributed.py.
"""

import contextlib
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.commands import ROOT, environment, forking_python
from tests.text_files import CAPTIONS, save_captions, save_images, saved_pipeline
from training.logger import read_metrics
from training.resume import shard_files
from training.weights import ROUNDS, STEPS, numbered
from utils import startup
from utils.bar import progress_bar

LOG_STEP = 7
COMMON = [
    "--train", "--dataset=digits", "--img_size=8", "--num_train=48", "--ch=32", "--ch_mult=1", "--attn=0", "--T=20",
    "--num_res_blocks=1", "--sample_steps=2", "--sample_size=2", "--batch_size=8", "--lr=1e-3", "--warmup=20",
    "--sample_step=50", f"--log_step={LOG_STEP}", "--ema_decay=0.9", "--device=cpu",
]  # fmt: skip
SCRIPTS = {
    "main.py": [*COMMON, "--total_steps=300", "--save_step=6"],
    "main_fed.py": [
        *COMMON, "--client_num=3", "--local_epoch=10", "--total_round=5", "--save_step=3", "--mem_ratio=1.0",
    ],
    "text_to_image.main_fed": [
        "--train", "--pretrained=pipeline", "--data_root=images", "--captions=captions.json", "--resolution=16",
        "--batch_size=4", "--lr=1e-3", "--warmup=2", "--sample_step=0", f"--log_step={LOG_STEP}", "--client_num=3",
        "--local_steps=20", "--total_round=5", "--save_step=3", "--save_round=1", "--mem_ratio=1.0", "--device=cpu",
    ],
}  # fmt: skip
KILLS = ("kill", "kill during a save", "SIGTERM")
DAMAGES = ("truncated", "bit flipped", "emptied")
FULL_DISK = "full disk"


def start(script, logdir, inputs, *flags):
    """The script, with further flags, as a process in the directory of its inputs; its output goes beside logdir."""
    program = [str(ROOT / script)] if script.endswith(".py") else ["-m", script]
    command = [forking_python(), *program, *SCRIPTS[script], *flags, f"--logdir={logdir}"]
    env = environment(PYTHONPATH=str(ROOT))
    with Path(f"{logdir}.out").open("w") as out, Path(f"{logdir}.err").open("w") as err:
        return subprocess.Popen(command, cwd=inputs, stdout=out, stderr=err, env=env)


def make_inputs(directory):
    """A small pipeline, images and captions, for the text-conditioned half."""
    saved_pipeline(directory)
    save_images(directory / "images")
    save_captions(directory / "captions.json", CAPTIONS)


def checkpoints(logdir):
    """The files that a run can continue from, the newest first."""
    files = [path for pattern in ("ckpt*.pt", "state/*.pt") for path in logdir.glob(pattern)]
    return sorted(files, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def wait_for(process, condition, seconds=60):
    """Whether a condition has come true before the process ended."""
    limit = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < limit:
        with contextlib.suppress(FileNotFoundError):  # a checkpoint replaced while it was looked at
            if condition():
                return True
        time.sleep(0.0005)
    return False


def wait_for_a_save(process, logdir):
    known = set(checkpoints(logdir))
    return wait_for(process, lambda: set(checkpoints(logdir)) - known)


def interrupt(process, fault, logdir, chance):
    """End a run at a random instant of its training; returns whether that came before the run's own end."""
    if not wait_for_a_save(process, logdir):
        return False
    time.sleep(chance.uniform(0, 1.5))
    if fault == "kill during a save":
        wait_for(process, lambda: list(logdir.glob("**/.*.tmp")))
    process.send_signal(signal.SIGTERM if fault == "SIGTERM" else signal.SIGKILL)
    return process.wait() == (143 if fault == "SIGTERM" else -signal.SIGKILL)


def damage(path, kind, chance):
    """Truncate a checkpoint, flip one bit of its largest tensor, or empty it."""
    data = bytearray(path.read_bytes())
    if kind == "bit flipped":
        with zipfile.ZipFile(path) as archive:
            record = max(archive.infolist(), key=lambda member: member.file_size)
        lengths = struct.unpack("<HH", data[record.header_offset + 26 : record.header_offset + 30])
        first = record.header_offset + 30 + sum(lengths)  # behind the record's header, its name and its padding
        data[chance.randrange(first, first + record.file_size)] ^= 1 << chance.randrange(8)
    else:
        del data[chance.randrange(1, len(data)) if kind == "truncated" else 0 :]
    path.write_bytes(data)


@contextlib.contextmanager
def small_disk(megabytes):
    """A directory on a file system of its own (tmpfs), or None where this process may not mount one."""
    with tempfile.TemporaryDirectory() as directory:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", directory]
        mounted = sys.platform == "linux" and subprocess.run(mount, capture_output=True, check=False).returncode == 0
        try:
            yield Path(directory) if mounted else None
        finally:
            if mounted:
                subprocess.run(["umount", directory], check=True)


def fill(disk, leave):
    """Fill a file system but for so many bytes; returns the file that takes the room."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    os.truncate(filler, max(0, filler.stat().st_size - leave))
    return filler


def final_state(script, logdir):
    """Everything that two runs must agree on: checkpoint files, and the steps that were logged."""
    if script == "main.py":
        paths = [*numbered(logdir, STEPS).values()][:1]
    else:
        newest = (next(iter(shard_files(logdir, k).values())) for k in range(3))
        paths = [*numbered(logdir, ROUNDS).values(), *newest]
    states = {path.name: torch.load(path, weights_only=True) for path in paths}
    for state in states.values():
        state.pop("seconds")
    for path in logdir.glob("checkpoint_round*/unet/*.safetensors"):
        states[path.parent.parent.name] = load_file(path)
    return {**states, "logged": [line["step"] for line in read_metrics(logdir) if line["step"] % LOG_STEP == 0]}


def differences(a, b, name=""):
    """The places where two nested structures of dicts, lists, tensors and numbers differ, as a list of names."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [name]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict) and isinstance(b, dict):
        missing = [f"{name}.{key}" for key in a.keys() ^ b.keys()]
        return missing + [
            found for key in a.keys() & b.keys() for found in differences(a[key], b[key], f"{name}.{key}")
        ]
    return [] if a == b else [name]


def attack(script, logdir, inputs, disk, chance, counts):
    """Start a run five times, each hit by a random fault, then let it finish; whether it did.

    inputs: of `start`; disk: the small file system that the log directory is on, or None.
    """
    for _ in range(5):
        fault = chance.choice([*KILLS, *DAMAGES, *([FULL_DISK] if disk else [])])
        process = start(script, logdir, inputs)
        if fault == FULL_DISK:
            if not wait_for_a_save(process, logdir):
                continue
            filler = fill(disk, leave=chance.randrange(1 << 16))
            code, errors = process.wait(), Path(f"{logdir}.err").read_text()
            filler.unlink()
            if not (code == 1 and "cannot be written" in errors):
                counts["full disks without a clear line"] += 1
                print(f"\n{script}: {errors[-2000:]}", file=sys.stderr)
        elif not interrupt(process, fault if fault in KILLS else "kill", logdir, chance):
            continue
        elif fault in DAMAGES:
            damage(checkpoints(logdir)[0], fault, chance)
        counts[fault] += 1
    return start(script, logdir, inputs).wait() == 0


def main():
    parser = startup.Parser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--minutes", type=float, default=11, help="how long to go on")
    parser.add_argument("--seed", type=int, default=8, help="of the faults and their instants")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    bad = ("full disks without a clear line", "runs that did not continue", "runs that differ")
    counts = dict.fromkeys([*KILLS, *DAMAGES, FULL_DISK, *(f"runs of {script}" for script in SCRIPTS), *bad], 0)
    with small_disk(1024) as disk, tempfile.TemporaryDirectory() as directory, progress_bar(unit="run") as bar:
        expected, inputs = {}, Path(directory)
        make_inputs(inputs)
        for script in SCRIPTS:
            start(script, inputs / script, inputs).wait()
            expected[script] = final_state(script, inputs / script)
        limit = time.monotonic() + 60 * options.minutes
        while time.monotonic() < limit:
            script = chance.choice(list(SCRIPTS))
            counts[f"runs of {script}"] += 1
            with tempfile.TemporaryDirectory(dir=disk) as place:
                logdir = Path(place) / "log"
                if not attack(script, logdir, inputs, disk, chance, counts):
                    counts["runs that did not continue"] += 1
                elif found := differences(expected[script], final_state(script, logdir)):
                    counts["runs that differ"] += 1
                    print(f"\n{script} differs in {found[:5]}", file=sys.stderr)
            bar.update()
    for name, count in counts.items():
        print(f"| {name} | {count} |")
    return int(any(counts[name] for name in bad))


if __name__ == "__main__":
    startup.run(main)

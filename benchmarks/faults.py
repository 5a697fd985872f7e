"""Random kills, damaged checkpoints and full disks against small runs, each of which must end as if nothing happened:

python -m benchmarks.faults --minutes 30 [--json FILE]
"""

if __name__ == "__main__":  # before the imports that take seconds
    from utils import startup

    startup.prepare()

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

from training.logger import read_metrics
from utils import distributed, startup
from utils.files import write_json

ROOT = Path(__file__).parent.parent
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
}  # fmt: skip
KILLS = ("kill", "kill during a save", "SIGTERM")
DAMAGES = ("truncated", "bit flipped", "emptied")
FULL_DISK = "full disk"


def start(script, logdir):
    """The script as a process of its own, with one thread; its output goes to files beside the log directory."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with Path(f"{logdir}.out").open("w") as out, Path(f"{logdir}.err").open("w") as err:
        command = [sys.executable, str(ROOT / script), *SCRIPTS[script], f"--logdir={logdir}"]
        return subprocess.Popen(command, stdout=out, stderr=err, env=environment)


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


def interrupt(process, fault, logdir, chance):
    """End a run by a fault at a random instant of its training; returns whether it came before the run's own end."""
    known = {path.name for path in checkpoints(logdir)}
    if not wait_for(process, lambda: {path.name for path in checkpoints(logdir)} - known):
        return False
    time.sleep(chance.uniform(0, 1.5))
    if fault == "kill during a save":
        wait_for(process, lambda: list(logdir.glob(".*.tmp")) + list(logdir.glob("state/.*.tmp")))
    number = signal.SIGTERM if fault == "SIGTERM" else signal.SIGKILL
    if process.poll() is not None:
        return False
    process.send_signal(number)
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


def interrupt_by_full_disk(process, disk, logdir, chance):
    """Take the room away while a run trains; returns its exit code, or None if it had ended before."""
    known = {path.name for path in checkpoints(logdir)}
    if not wait_for(process, lambda: {path.name for path in checkpoints(logdir)} - known):
        return None
    filler = fill(disk, leave=chance.randrange(1 << 16))
    code = process.wait()
    filler.unlink()
    return code


def final_state(script, logdir):
    """Everything that two runs must agree on: checkpoint files, and the steps that were logged."""
    paths = [logdir / "ckpt300.pt"] if script == "main.py" else sorted(logdir.glob("global_ckpt_round*.pt"))
    paths += [logdir / "state" / f"shard{k}_step100.pt" for k in range(3)] if script == "main_fed.py" else []
    states = {path.name: torch.load(path, weights_only=True) for path in paths}
    for state in states.values():
        state.pop("seconds")
    return {**states, "logged": [line["step"] for line in read_metrics(logdir) if line["step"] % LOG_STEP == 0]}


def differences(a, b, name=""):
    """The places where two nested structures of dicts, lists, tensors and numbers differ, as a list of names."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [name]
    if isinstance(a, dict) and isinstance(b, dict):
        missing = [f"{name}.{key}" for key in a.keys() ^ b.keys()]
        return missing + [
            found for key in a.keys() & b.keys() for found in differences(a[key], b[key], f"{name}.{key}")
        ]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [found for i, (x, y) in enumerate(zip(a, b, strict=True)) for found in differences(x, y, f"{name}[{i}]")]
    return [] if a == b else [name]


def attack(script, disk, counts, chance, faults):
    """One run in a fresh directory, hit by a random fault at every start until it gets through; returns its end."""
    with tempfile.TemporaryDirectory(dir=disk) as directory:
        logdir = Path(directory) / "log"
        for _ in range(faults):
            fault = chance.choice([*KILLS, *DAMAGES, *([FULL_DISK] if disk else [])])
            process = start(script, logdir)
            if fault == FULL_DISK:
                code = interrupt_by_full_disk(process, disk, logdir, chance)
                survived = code is None or (code == 1 and "cannot be written" in Path(f"{logdir}.err").read_text())
                happened = code is not None
            else:
                happened = interrupt(process, fault if fault in KILLS else "kill", logdir, chance)
                survived = True
                if happened and fault in DAMAGES:
                    damage(checkpoints(logdir)[0], fault, chance)
            process.wait()
            if not happened:
                continue
            counts[fault] += 1
            if not survived:
                counts["unclear endings"] += 1
                print(f"\n{script}, {fault}: {Path(f'{logdir}.err').read_text()[-2000:]}", file=sys.stderr)
        process = start(script, logdir)
        if process.wait() != 0:
            counts["runs that did not continue"] += 1
            return None
        return final_state(script, logdir)


def main(arguments=None):
    parser = startup.Parser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30, help="how long to go on")
    parser.add_argument("--seed", type=int, default=0, help="of the faults and their instants")
    parser.add_argument("--json", type=os.path.expanduser, help="also write the counts to this file")
    options = parser.parse_args(arguments)
    chance = random.Random(options.seed)
    endings = ("unclear endings", "runs", "runs that did not continue", "runs that differ")
    counts = dict.fromkeys([*KILLS, *DAMAGES, FULL_DISK, *endings], 0)
    limit = time.monotonic() + 60 * options.minutes
    with small_disk(256) as disk, tempfile.TemporaryDirectory() as directory, distributed.bar(unit="run") as bar:
        expected = {}
        for script in SCRIPTS:
            logdir = Path(directory) / script
            if start(script, logdir).wait() != 0:
                raise SystemExit(Path(f"{logdir}.err").read_text())
            expected[script] = final_state(script, logdir)
        while time.monotonic() < limit:
            script = chance.choice(list(SCRIPTS))
            state = attack(script, disk, counts, chance, faults=5)
            counts["runs"] += 1
            if state is not None and (found := differences(expected[script], state)):
                counts["runs that differ"] += 1
                print(f"\n{script} differs in {found[:5]}", file=sys.stderr)
            bar.update()
            bar.set_postfix({name: count for name, count in counts.items() if count})
    for name, count in counts.items():
        print(f"| {name} | {count} |")
    if options.json:
        write_json(options.json, {"minutes": options.minutes, "seed": options.seed, "disk": bool(disk), **counts})
    return int(any(counts[name] for name in ("unclear endings", "runs that did not continue", "runs that differ")))


if __name__ == "__main__":
    startup.run(main)

"""The speed of everything against an honest baseline, as one table.

python -m benchmarks [--only step,evaluation,scaling] [--json FILE]
python -m benchmarks --only gpu,gpu_search,gpu_memory,gpu_compiled [--json FILE]
"""

import os
import pkgutil

from utils import startup
from utils.bar import progress_bar
from utils.errors import DataError, UsageError
from utils.files import write_json
from utils.machine import machine

PARTS = {"step": "baselines", "evaluation": "baselines", "scaling": "scaling"}
PARTS |= dict.fromkeys(("gpu", "gpu_search", "gpu_memory", "gpu_compiled"), "gpu")


def main(arguments=None):
    """Print the table."""
    parser = startup.Parser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", default="step,evaluation,scaling", help=f"some of {','.join(PARTS)}")
    parser.add_argument("--json", type=os.path.expanduser, help="also write the numbers to this file")
    parser.add_argument("--scale", type=float, default=1.0, help="below 1: a smaller trial, whose targets mean little")
    options = parser.parse_args(arguments)
    parts = options.only.split(",")
    if not set(parts) <= PARTS.keys():
        raise UsageError(f"--only={options.only}: choose some of {','.join(PARTS)}")
    rows = []
    try:
        for part in progress_bar(parts, desc="benchmarks"):
            rows += pkgutil.resolve_name(f"benchmarks.{PARTS[part]}:{part}")(options.scale)
            if options.json:  # what is measured stays if a later part is cut off
                write_json(options.json, {"machine": machine(), "rows": rows})
    except ModuleNotFoundError as error:
        raise DataError(f"{error.name} is not installed: pip install -r requirements-dev.txt") from error
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    print("\n| what | ours | baseline | ratio | target | |\n|---|---|---|---|---|---|")
    for row in rows:
        numbers = ["" if row[name] is None else f"{row[name]:.4g}" for name in ("ours", "baseline", "ratio")]
        verdict = row["target"] and ("met" if row["ok"] else "**missed**")
        print(f"| {row['what']} | {' | '.join(numbers)} | {row['target']} | {verdict} |")


if __name__ == "__main__":
    startup.run(main)

#!/usr/bin/env bash
# Sourced by the other scripts: leaves in PYTHON an interpreter with everything in requirements.txt.
# That is the python of the active environment if it has it all, else .venv, which is made if it is missing or outdated.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

satisfies_requirements() {
    "$1" - <<'PYTHON' 2>/dev/null
import sys
from importlib.metadata import version
from pathlib import Path

for line in Path("requirements.txt").read_text().splitlines():
    name, _, wanted = line.partition("==")
    if wanted and version(name).split("+")[0] != wanted:
        sys.exit(1)
PYTHON
}

if [[ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]] && satisfies_requirements python; then
    PYTHON=python
else
    PYTHON=.venv/bin/python
    if ! satisfies_requirements "$PYTHON"; then
        if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            echo "com/setup.sh: python3 must be Python 3.11 or newer; conda env create -f env.yml makes one" >&2
            exit 1
        fi
        echo "com/setup.sh: installing requirements.txt into .venv (5.6 GB, some minutes)"
        python3 -m venv .venv
        "$PYTHON" -m pip install --quiet --requirement requirements.txt
    fi
fi
export PYTHON

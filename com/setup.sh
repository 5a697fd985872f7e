#!/usr/bin/env bash
# Sourced by the other scripts: leaves in PYTHON an interpreter with everything in the file REQUIREMENTS (requirements.txt).
# That is the python of the active environment if its versions are within the ranges, else .venv, which is made of the
# versions in constraints.txt, or completed, where it lacks something.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

REQUIREMENTS="${REQUIREMENTS:-requirements.txt}"

# lacking PYTHON: what this interpreter lacks of the requirements first, nothing if it has them all
lacking() {
    "$1" - requirements.txt "$REQUIREMENTS" 2>/dev/null <<'PYTHON' || echo "Python 3.11 or newer with packaging"
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

assert sys.version_info >= (3, 11)
for line in "\n".join(Path(file).read_text() for file in sys.argv[1:]).splitlines():
    text = line.partition("#")[0].strip()
    if text and not text.startswith("-"):
        needed = Requirement(text)
        try:
            found = version(needed.name)
        except PackageNotFoundError:
            found = None
        if found is None or not needed.specifier.contains(found, prereleases=True):
            sys.exit(print(f"{text} (it has {found or 'none'})"))
PYTHON
}

PYTHON=.venv/bin/python
if [[ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]]; then
    lacks="$(lacking python)"
    if [[ -z "$lacks" ]]; then
        PYTHON=python
    else
        echo "com/setup.sh: the active environment lacks $lacks of $REQUIREMENTS: .venv is used instead" >&2
    fi
fi
if [[ "$PYTHON" != python && -n "$(lacking "$PYTHON")" ]]; then
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "com/setup.sh: python3 must be Python 3.11 or newer; conda env create -f env.yml makes one" >&2
        exit 1
    fi
    echo "com/setup.sh: installing $REQUIREMENTS into .venv (5.6 GB in all, some minutes)"
    python3 -m venv .venv
    "$PYTHON" -m pip install --quiet --constraint constraints.txt --requirement "$REQUIREMENTS"
fi
export PYTHON

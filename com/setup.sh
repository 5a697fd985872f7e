#!/usr/bin/env bash
# Sourced by the other scripts: leaves in PYTHON an interpreter with everything in the file REQUIREMENTS (requirements.txt),
# and in ROOT the directory of this project, whose modules PYTHON finds from anywhere. Relative paths are the caller's.
# PYTHON is the python of the active environment if its versions are within the ranges, else .venv, which is made of the
# versions in constraints.txt, or completed, where it lacks something.
set -euo pipefail
ROOT="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null && pwd)"
REQUIREMENTS="${REQUIREMENTS:-requirements.txt}"

# a standard stream that is closed: the next file that is opened would take its place
[[ -e /dev/fd/0 ]] || exec </dev/null
[[ -e /dev/fd/1 ]] || exec >/dev/null
[[ -e /dev/fd/2 ]] || exec 2>/dev/null

# lacking PYTHON: what this interpreter lacks of the requirements first, nothing if it has them all
lacking() {
    "$1" -P - "$ROOT/requirements.txt" "$ROOT/$REQUIREMENTS" 2>/dev/null <<'PYTHON' || echo "Python 3.11 or newer with packaging"
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

# expand NAME...: replace ~ and ~user at the start of these variables, as the shell does where nothing is quoted
expand() {
    local name user home
    for name; do
        user="${!name%%/*}"
        if [[ "$user" =~ ^~[A-Za-z0-9._-]*$ ]]; then
            eval "home=$user"
            printf -v "$name" %s "$home${!name#"$user"}"
        fi
    done
}

PYTHON="$ROOT/.venv/bin/python"
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
    python3 -m venv "$ROOT/.venv"
    "$PYTHON" -m pip install --quiet --constraint "$ROOT/constraints.txt" --requirement "$ROOT/$REQUIREMENTS"
fi
# freed memory stays with the process, for the next step to use: a fifth of the time of a CPU step
export MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=2147483647
export PYTHON PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

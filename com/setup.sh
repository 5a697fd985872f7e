#!/usr/bin/env bash
# Sourced by the other scripts: leaves in PYTHON an interpreter with everything in requirements.txt, and in ROOT the
# directory of this project, whose modules PYTHON finds from anywhere. Relative paths are those of the caller.
# PYTHON is the python of the active environment if it has it all, else .venv, which is made if it is missing or outdated.
set -euo pipefail
ROOT="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null && pwd)"

# a standard stream that is closed: the next file that is opened would take its place
[[ -e /dev/fd/0 ]] || exec </dev/null
[[ -e /dev/fd/1 ]] || exec >/dev/null
[[ -e /dev/fd/2 ]] || exec 2>/dev/null

satisfies_requirements() {
    "$1" -P - "$ROOT/requirements.txt" <<'PYTHON' 2>/dev/null
import sys
from importlib.metadata import version
from pathlib import Path

for line in Path(sys.argv[1]).read_text().splitlines():
    name, _, wanted = line.partition("==")
    if wanted and version(name).split("+")[0] != wanted:
        sys.exit(1)
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

if [[ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]] && satisfies_requirements python; then
    PYTHON=python
else
    PYTHON="$ROOT/.venv/bin/python"
    if ! satisfies_requirements "$PYTHON"; then
        if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            echo "com/setup.sh: python3 must be Python 3.11 or newer; conda env create -f env.yml makes one" >&2
            exit 1
        fi
        echo "com/setup.sh: installing requirements.txt into .venv (5.6 GB, some minutes)"
        python3 -m venv "$ROOT/.venv"
        "$PYTHON" -m pip install --quiet --requirement "$ROOT/requirements.txt"
    fi
fi
export PYTHON PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

#!/usr/bin/env bash
# Quality against memorisation along the trainings of all four arms: results/frontier.json, frontier.png and a table.
# Flags: see python -m experiments.frontier --help. Killed and run again, it does only what is missing.
set -euo pipefail
REQUIREMENTS=requirements-dev.txt
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

"$PYTHON" -P -m experiments.frontier "$@"

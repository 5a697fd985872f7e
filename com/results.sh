#!/usr/bin/env bash
# All numbers of docs/RESULTS.md: results/cifar10.json, or that of --experiment=digits or altered, its figure and the
# tables. Killed and run again, it does only what is missing. Flags: see python -m experiments --help.
set -euo pipefail
REQUIREMENTS=requirements-dev.txt
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

"$PYTHON" -P -m experiments "$@"
if [[ . -ef "$ROOT" ]]; then # the document is of the results that are kept here
    "$PYTHON" -P -m experiments.tables
fi

#!/usr/bin/env bash
# All numbers of docs/RESULTS.md: results/cifar10.json, or that of --experiment=digits or altered, its figure and the
# tables; those of docs/TEXT_TO_IMAGE.md are of --experiment=lora. Killed and run again, it does only what is missing.
# Flags: see python -m experiments --help.
set -euo pipefail
REQUIREMENTS=requirements-dev.txt
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

"$PYTHON" -P -m experiments "$@"
if [[ . -ef "$ROOT" ]]; then # the documents are of the results that are kept here
    "$PYTHON" -P -m experiments.tables
fi

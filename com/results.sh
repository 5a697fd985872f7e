#!/usr/bin/env bash
# All numbers of docs/RESULTS.md: tuning, the frontier of all data sets, the tables. Killed and run again, it does only
# what is missing. Further flags (--minutes, --images, ...) go to both experiments.
set -euo pipefail
REQUIREMENTS=requirements-dev.txt
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

"$PYTHON" -P -m experiments.tuning "$@"
"$PYTHON" -P -m experiments.frontier "$@"
if [[ . -ef "$ROOT" ]]; then # the document is of the results that are kept here
    "$PYTHON" -P -m experiments.tables
fi

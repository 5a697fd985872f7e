#!/usr/bin/env bash
# All numbers of docs/RESULTS.md: tuning, the frontier of all data sets, the tables. Killed and run again, it does only
# what is missing. Further flags (--minutes, --images, ...) go to both experiments.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

"$PYTHON" -m experiments.tuning "$@"
"$PYTHON" -m experiments.frontier "$@"
"$PYTHON" -m experiments.tables

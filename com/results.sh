#!/usr/bin/env bash
# Everything that docs/RESULTS.md says: tuning, the frontier of all data sets, the document. Killed and run again, it does
# only what is missing. Further flags (--minutes, --images, ...) go to both experiments.
set -euo pipefail
REQUIREMENTS=requirements-dev.txt
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

"$PYTHON" -m experiments.tuning "$@"
"$PYTHON" -m experiments.frontier "$@"
"$PYTHON" -m experiments.document

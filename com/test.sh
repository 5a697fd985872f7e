#!/usr/bin/env bash
# The project's checks: ruff, shellcheck, pytest. Further arguments go to pytest.
set -euo pipefail
REQUIREMENTS=requirements-dev.txt
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
cd -- "$ROOT"

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
scripts="$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')"
"$scripts/shellcheck" --external-sources --source-path=SCRIPTDIR com/*.sh com/*.sbatch .ci/run
# one test process per core, each with one thread: the networks of the tests are too small for more; neighbouring tests
# share what they have prepared, so they stay in one process
OMP_NUM_THREADS=1 "$PYTHON" -m pytest -n "$(nproc)" --dist=worksteal "$@"

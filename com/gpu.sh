#!/usr/bin/env bash
# What a GPU changes: its tests against the CPU, then the rates of the CIFAR-10 experiment as a table and as
# results/gpu.json, which is written part by part, each some minutes on one GPU. Further arguments go to
# python -m benchmarks, such as --only gpu_search.
set -euo pipefail
REQUIREMENTS=requirements-dev.txt
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

if ! "$PYTHON" -P -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "com/gpu.sh: no GPU on this machine: nothing was tested or measured" >&2
    exit 1
fi
(cd -- "$ROOT" && "$PYTHON" -m pytest tests/test_cuda.py)
"$PYTHON" -P -m benchmarks --only gpu,gpu_search,gpu_memory,gpu_compiled --json results/gpu.json "$@"

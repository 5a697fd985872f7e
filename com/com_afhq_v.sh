#!/usr/bin/env bash
# IET-AGC on the dogs of AFHQ, then the evaluation of its averages. Settings: see common.sh.
# Further flags go to training and evaluation. Run again, it skips what is finished.
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

iet_agc AFHQ_DOG "$@"

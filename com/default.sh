#!/usr/bin/env bash
# Default training, then the evaluation of its checkpoints. Settings: see common.sh; CONFIG: a file of config/.
# Further flags go to training and evaluation. Run again, it skips what is finished.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

LOG_DIR="${LOG_DIR:-./logs/default}"
CONFIG="${CONFIG:-$ROOT/config/CIFAR10.txt}"
expand LOG_DIR CONFIG
flags=(--flagfile="$CONFIG" --data_root="$DATA_ROOT" --logdir="$LOG_DIR" --save_step=20000 "$@")
once "$LOG_DIR/trained" "${LAUNCH[@]}" "$ROOT/main.py" --train "${flags[@]}"
evaluate "${CHECKPOINTS:-ckpt100k.pt ckpt200k.pt ckpt300k.pt ckpt400k.pt}" --unet_dir "$ROOT/all_in.py" "${flags[@]}" \
    --use_ema=False

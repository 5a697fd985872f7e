#!/usr/bin/env bash
# Sourced by the experiments: paths, and how a log directory is evaluated.
# DATA_ROOT: data sets (./data). LOG_DIR: logs and results (./logs/<experiment>).
# PROCESSES: how many train and evaluate together, one per GPU of this machine (1).
# SEEDS: one evaluation of every checkpoint per seed. CHECKPOINTS: file names in LOG_DIR to evaluate.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

DATA_ROOT="${DATA_ROOT:-./data}"
SEEDS="${SEEDS:-1 2 3}"
PROCESSES="${PROCESSES:-1}"
expand DATA_ROOT
export PYTHONSAFEPATH=1 # nothing is imported from the caller's directory, by torchrun's processes neither

LAUNCH=("$PYTHON")
if ((PROCESSES > 1)); then
    LAUNCH=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$PROCESSES")
fi

# once MARKER COMMAND...: run the command unless MARKER says that the same command has finished before
once() {
    local marker="$1"
    shift
    if [[ -f "$marker" && "$(<"$marker")" == "$*" ]]; then
        echo "done before: $marker"
        return
    fi
    "$@"
    mkdir -p -- "${marker%/*}"
    printf '%s\n' "$*" >"$marker"
}

# evaluate CHECKPOINTS WEIGHTS COMMAND...: every checkpoint, as the flag WEIGHTS of the command, with every seed, then a
# table of mean and spread
evaluate() {
    local checkpoints="$1" weights="$2" checkpoint seed out
    local results=()
    shift 2
    for checkpoint in $checkpoints; do
        for seed in $SEEDS; do
            out="$LOG_DIR/eval/${checkpoint%.pt}/seed$seed"
            once "$out/done" "${LAUNCH[@]}" "$@" --seed="$seed" "$weights=$LOG_DIR/$checkpoint" \
                --generate_dir="$out/generate" --similar_dir="$out/similar" --grid_dir="$out/grid"
            results+=("${checkpoint%.pt}=$out/grid/result.json")
        done
    done
    "$PYTHON" -m score.compare --json="$LOG_DIR/eval/table.json" "${results[@]}"
}

# iet_agc CONFIG FLAGS...: IET-AGC with the settings of config/CONFIG.txt, then the evaluation of its averages
iet_agc() {
    LOG_DIR="${LOG_DIR:-./logs/iet_agc_${1,,}}"
    expand LOG_DIR
    local flags=(--flagfile="$ROOT/config/$1.txt" --data_root="$DATA_ROOT" --logdir="$LOG_DIR" "${@:2}")
    once "$LOG_DIR/trained" "${LAUNCH[@]}" "$ROOT/main_fed.py" --train "${flags[@]}"
    evaluate "${CHECKPOINTS:-global_ckpt_round5.pt global_ckpt_round10.pt}" --unet_dir "$ROOT/all_in.py" "${flags[@]}" \
        -Fed=True --use_ema=False
}

#!/usr/bin/env bash
# Default training and IET-AGC on 64 handwritten digits with the same number of steps, images from both, and one table.
# Run again, it skips what is finished. Further flags go to training and evaluation.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

out="${LOG_DIR:-results/demo}"
expand out
flags=(--flagfile="$ROOT/config/DIGITS.txt" --num_train=64 --sample_step=1000 --fid_reference=heldout "$@")

steps="${DEMO_STEPS:-6000}" rounds="${DEMO_ROUNDS:-20}"

# 64 images in batches of 16 are 4 steps an epoch, in one piece or as 4 shards of 16
once "$out/default/trained" "$PYTHON" "$ROOT/main.py" --train "${flags[@]}" --logdir="$out/default" \
    --total_steps="$steps" --warmup=100 --save_step=1000
once "$out/iet_agc/trained" "$PYTHON" "$ROOT/main_fed.py" --train "${flags[@]}" --logdir="$out/iet_agc" \
    --client_num=4 --local_epoch="$((steps / 4 / rounds))" --total_round="$rounds" --warmup=25

results=()
for method in default iet_agc; do
    eval="$out/$method/eval"
    once "$eval/done" "$PYTHON" "$ROOT/all_in.py" "${flags[@]}" --unet_dir="$out/$method" --batch_size=512 --save_png \
        --generate_dir="$eval/generate" --similar_dir="$eval/similar" --grid_dir="$eval/grid"
    results+=("$method=$eval/grid/result.json")
done

echo
"$PYTHON" -P -m score.compare --json="$out/table.json" --html="$out/compare.html" --picture="$out/memorised.png" "${results[@]}"
echo
echo "Lower MQ and f_mem: less memorised. Lower fpd (to held-out digits): better images."
echo "Pages: $out/compare.html, $out/*/eval/grid/report.html"
echo "Pictures: $out/memorised.png, $out/*/eval/grid/grid_image*.png, $out/*/sample/*.png"

#!/usr/bin/env bash
# Default training and IET-AGC on 64 handwritten digits with the same number of steps, images from both, and one table.
# In it default training stands a second time, stopped at its first checkpoint with images as good as IET-AGC's.
# Run again, it skips what is finished. Further flags go to training and evaluation.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

out="${LOG_DIR:-results/demo}"
expand out
flags=(--flagfile="$ROOT/config/DIGITS.txt" --num_train=64 --sample_step=1000 --fid_reference=heldout "$@")

steps="${DEMO_STEPS:-6000}" rounds="${DEMO_ROUNDS:-20}" save_step="${DEMO_SAVE_STEP:-1000}"

# 64 images in batches of 16 are 4 steps an epoch, in one piece or as 4 shards of 16
once "$out/default/trained" "$PYTHON" "$ROOT/main.py" --train "${flags[@]}" --logdir="$out/default" \
    --total_steps="$steps" --warmup=100 --save_step="$save_step"
once "$out/iet_agc/trained" "$PYTHON" "$ROOT/main_fed.py" --train "${flags[@]}" --logdir="$out/iet_agc" \
    --client_num=4 --local_epoch="$((steps / 4 / rounds))" --total_round="$rounds" --warmup=25

# measure CHECKPOINT DIRECTORY: generate images and measure them; of a log directory those of its newest checkpoint
measure() {
    once "$2/done" "$PYTHON" "$ROOT/all_in.py" "${flags[@]}" --unet_dir="$1" --batch_size=512 --save_png \
        --generate_dir="$2/generate" --similar_dir="$2/similar" --grid_dir="$2/grid"
}

# is_as_good DIRECTORY OTHER: True if its images are at least as near to held-out digits as the other's, else False
is_as_good() {
    "$PYTHON" -P -c 'import json, sys
results = [json.load(open(f"{directory}/grid/result.json")) for directory in sys.argv[1:]]
distance, other = (result.get("fpd", result.get("fid")) for result in results)
print(distance <= other)' "$@"
}

measure "$out/default" "$out/default/eval"
measure "$out/iet_agc" "$out/iet_agc/eval"
results=("default=$out/default/eval/grid")
for ((step = save_step; step < steps; step += save_step)); do
    name="ckpt$step"
    name="${name/%000/k}" # as main.py calls it
    stopped="$out/default/eval_$name"
    measure "$out/default/$name.pt" "$stopped"
    found="$(is_as_good "$stopped" "$out/iet_agc/eval")"
    if [[ "$found" == True ]]; then
        results+=("default, $step steps=$stopped/grid")
        break
    fi
done
results+=("iet_agc=$out/iet_agc/eval/grid")

echo
"$PYTHON" -P -m score.compare --json="$out/table.json" --html="$out/compare.html" --picture="$out/memorised.png" "${results[@]}"
echo
echo "Lower MQ and f_mem: less memorised. Lower fpd (to held-out digits): better images."
echo "Pages: $out/compare.html, $out/*/eval*/grid/report.html"
echo "Pictures: $out/memorised.png, $out/*/eval*/grid/grid_image*.png, $out/*/sample/*.png"

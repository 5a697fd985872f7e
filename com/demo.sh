#!/usr/bin/env bash
# Default training and IET-AGC on 64 handwritten digits with the same number of steps, images from both, and one table.
# In it default training stands twice: at its end, and at the earlier checkpoint whose images are about as good as
# those of IET-AGC. Run again, it skips what is finished. Further flags go to training and evaluation.
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

# measure CHECKPOINT DIRECTORY: generate images and measure them; of a log directory its newest checkpoint
measure() {
    once "$2/done" "$PYTHON" "$ROOT/all_in.py" "${flags[@]}" --unet_dir="$1" --batch_size=512 --save_png \
        --generate_dir="$2/generate" --similar_dir="$2/similar" --grid_dir="$2/grid"
}

measure "$out/default" "$out/default/eval"
measure "$out/iet_agc" "$out/iet_agc/eval"
earlier=()
for ((step = save_step; step < steps; step += save_step)); do
    name="ckpt$step"
    name="${name/%000/k}"
    measure "$out/default/$name.pt" "$out/default/eval_$name"
    earlier+=("$name")
done

# the checkpoint whose distance to held-out images (fpd, or FID) is nearest to that of IET-AGC
nearest="$("$PYTHON" -P - "$out" "${earlier[@]}" <<'PYTHON'
import json
import sys
from pathlib import Path


def quality(evaluation):
    result = json.loads((Path(sys.argv[1]) / evaluation / "grid/result.json").read_text())
    return result["fpd"] if "fpd" in result else result["fid"]


aim = quality("iet_agc/eval")
print(min(sys.argv[2:], key=lambda name: abs(quality(f"default/eval_{name}") - aim)))
PYTHON
)"
results=("default=$out/default/eval/grid/result.json" "default, $nearest=$out/default/eval_$nearest/grid/result.json"
    "iet_agc=$out/iet_agc/eval/grid/result.json")

echo
"$PYTHON" -P -m score.compare --json="$out/table.json" --html="$out/compare.html" --picture="$out/memorised.png" "${results[@]}"
echo
echo "Lower MQ and f_mem: less memorised. Lower fpd (to held-out digits): better images."
echo "Pages: $out/compare.html, $out/*/eval*/grid/report.html"
echo "Pictures: $out/memorised.png, $out/*/eval*/grid/grid_image*.png, $out/*/sample/*.png"

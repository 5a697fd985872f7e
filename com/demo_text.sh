#!/usr/bin/env bash
# Default fine-tuning and IET-AGC of a small text-to-image pipeline on 64 captioned emoji with the same number of steps,
# images from both, and one table. At most 15 minutes on two CPU cores, without a network after set-up.
# Run again, it skips what is finished. Further flags go to training and evaluation.
set -euo pipefail
REQUIREMENTS=requirements-text.txt
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

out="${LOG_DIR:-results/demo_text}"
expand out
steps="${DEMO_STEPS:-2000}" rounds="${DEMO_ROUNDS:-20}"

# the VAE and a UNet, trained on other emoji
once "$out/made" "$PYTHON" -m text_to_image.tiny "$out" --vae_steps="$((steps / 4))" --unet_steps="$steps"

# one image in eight is repeated: it is drawn four times as often
flags=(--pretrained="$out/pipeline" --data_root="$out/train" --captions="$out/train.json" --resolution=32 --nohflip
    --duplication=dup_both --weight_pc=0.125 --dup_weight=4 --batch_size=16 --lr=1e-3 --ema_decay=0.99 --bank_bins=50
    --guidance=2 --sample_step=0 "$@")
common=(--total_round="$rounds" --save_round="$((rounds / 4))")
once "$out/default/trained" "$PYTHON" -m text_to_image.main_fed --train "${flags[@]}" "${common[@]}" \
    --logdir="$out/default" --client_num=1 --anti_grad=off --local_steps="$((steps / rounds))" --warmup=100
once "$out/iet_agc/trained" "$PYTHON" -m text_to_image.main_fed --train "${flags[@]}" "${common[@]}" \
    --logdir="$out/iet_agc" --client_num=4 --local_steps="$((steps / rounds / 4))" --warmup=25

results=() pictures=()
for round in "$((rounds / 4))" "$rounds"; do
    for method in default iet_agc; do
        eval="$out/$method/eval_round$round"
        once "$eval/done" "$PYTHON" -m text_to_image.all_in "${flags[@]}" --unet="$out/$method/checkpoint_round$round" \
            --prompts=all --features=pixels --heldout="$out/heldout" --batch_size=64 --base_dir="$out/base" \
            --generate_dir="$eval/generate" --similar_dir="$eval/similar" --grid_dir="$eval/grid"
        results+=("$method, round $round=$eval/grid/result.json")
        pictures+=("$method, round $round=$eval/generate/generate.npy")
    done
done

echo
"$PYTHON" -m score.compare --floors --json="$out/table.json" "${results[@]}"
"$PYTHON" -m score.grids "$out/demo_text.png" "training (OpenMoji, CC BY-SA 4.0)=$out/train" "${pictures[@]}"
echo
echo "Lower own image and f_mem, lower similarity: less memorised. Lower fpd to held-out: better images."
echo "Pages: $out/*/eval_round*/grid/report.html. Pictures: $out/demo_text.png, $out/*/eval_round*/grid/grid_image*.png"

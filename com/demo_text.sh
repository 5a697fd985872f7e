#!/usr/bin/env bash
# Default fine-tuning and IET-AGC of a small text-to-image pipeline on 64 captioned emoji with the same number of steps,
# of its whole UNet and of a LoRA, images from all, and one table. At most 15 minutes on two CPU cores, without a
# network after set-up.
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
default=(--client_num=1 --anti_grad=off --local_steps="$((steps / rounds))" --warmup=100)
iet_agc=(--client_num=4 --local_steps="$((steps / rounds / 4))" --warmup=25)
lora=(--lora_rank=8 --lora_freeze_a --lr=3e-3)

# train NAME FLAG...
train() {
    once "$out/$1/trained" "$PYTHON" -m text_to_image.main_fed --train "${flags[@]}" --logdir="$out/$1" \
        --total_round="$rounds" --save_round="$((rounds / 4))" "${@:2}"
}
train default "${default[@]}"
train iet_agc "${iet_agc[@]}"
train lora_default "${default[@]}" "${lora[@]}"
train lora_iet_agc "${iet_agc[@]}" "${lora[@]}"

results=() pictures=()
# measure NAME ROUND
measure() {
    local eval="$out/$1/eval_round$2"
    once "$eval/done" "$PYTHON" -m text_to_image.all_in "${flags[@]}" --unet="$out/$1/checkpoint_round$2" \
        --prompts=all --features=pixels --heldout="$out/heldout" --batch_size=64 --base_dir="$out/base" \
        --generate_dir="$eval/generate" --similar_dir="$eval/similar" --grid_dir="$eval/grid"
    results+=("$1, round $2=$eval/grid/result.json")
    pictures+=("$1, round $2=$eval/generate/generate.npy")
}
for round in "$((rounds / 4))" "$rounds"; do
    measure default "$round"
    measure iet_agc "$round"
done
measure lora_default "$rounds"
measure lora_iet_agc "$rounds"

echo
"$PYTHON" -m score.compare --floors --json="$out/table.json" "${results[@]}"
"$PYTHON" -m score.grids "$out/demo_text.png" "training (OpenMoji, CC BY-SA 4.0)=$out/train" "${pictures[@]}"
echo
echo "Lower own image and f_mem, lower similarity: less memorised. Lower fpd to held-out: better images."
echo "Pages: $out/*/eval_round*/grid/report.html. Pictures: $out/demo_text.png, $out/*/eval_round*/grid/grid_image*.png"

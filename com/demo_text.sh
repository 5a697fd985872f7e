#!/usr/bin/env bash
# Default fine-tuning and IET-AGC of a small text-to-image pipeline on 64 captioned emoji with the same number of steps,
# of its whole UNet and of a LoRA, images from all, and one table. At most 15 minutes on two CPU cores, without a
# network after set-up. DEMO_STEPS=2000 shows more, and takes longer.
# Run again, it skips what is finished. Further flags go to training and evaluation.
set -euo pipefail
REQUIREMENTS=requirements-text.txt
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

out="${LOG_DIR:-results/demo_text}"
expand out
steps="${DEMO_STEPS:-600}" rounds="${DEMO_ROUNDS:-10}"

# the VAE and a UNet, trained on other emoji
once "$out/made" "$PYTHON" -m text_to_image.tiny "$out" --vae_steps="$((steps / 3))" --unet_steps="$((steps / 2))"

# one image in eight is repeated: it is drawn four times as often
flags=(--pretrained="$out/pipeline" --data_root="$out/train" --captions="$out/train.json" --resolution=32 --nohflip
    --duplication=dup_both --weight_pc=0.125 --dup_weight=4 --batch_size=16 --lr=1e-3 --ema_decay=0.99 --bank_bins=50
    --guidance=2 --scheduler=dpm --sample_steps=10 --sample_step=0 "$@")
default=(--client_num=1 --anti_grad=off --local_steps="$((steps / rounds))" --warmup=50)
iet_agc=(--client_num=4 --local_steps="$((steps / rounds / 4))" --warmup=12)
# of all layers of the blocks: of the attention, which this UNet has at its coarsest level only, a LoRA learns little
blocks=to_k,to_q,to_v,to_out.0,ff.net.0.proj,ff.net.2,proj_in,proj_out,conv1,conv2,conv_shortcut
lora=(--lora_rank=8 --lora_freeze_a --lora_targets="$blocks" --lr=3e-3)

# train NAME FLAG...
train() {
    once "$out/$1/trained" "$PYTHON" -m text_to_image.main_fed --train "${flags[@]}" --logdir="$out/$1" \
        --total_round="$rounds" --save_round="$(((rounds + 1) / 2))" "${@:2}"
}

# both NAME FLAG...: default training and IET-AGC side by side, each on one core; the names are NAMEdefault, NAMEiet_agc
both() {
    echo "IET-AGC trains at the same time: $out/$1iet_agc.log"
    OMP_NUM_THREADS=1 train "$1iet_agc" "${iet_agc[@]}" "${@:2}" >"$out/$1iet_agc.log" 2>&1 &
    OMP_NUM_THREADS=1 train "$1default" "${default[@]}" "${@:2}"
    wait "$!" || {
        tail -n 1 "$out/$1iet_agc.log" >&2
        exit 1
    }
}
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
both ""
both lora_ "${lora[@]}"

results=() pictures=()
# measure NAME ROUND
measure() {
    local eval="$out/$1/eval_round$2"
    once "$eval/done" "$PYTHON" -m text_to_image.all_in "${flags[@]}" --unet="$out/$1/checkpoint_round$2" \
        --prompts=all --features=pixels --heldout="$out/heldout" --batch_size=64 \
        --base_dir="$out/base" --generate_dir="$eval/generate" --similar_dir="$eval/similar" --grid_dir="$eval/grid"
    results+=("$1, round $2=$eval/grid/result.json")
    pictures+=("$1, round $2=$eval/generate/generate.npy")
}
measure default "$((rounds / 2))"
for name in default iet_agc lora_default lora_iet_agc; do
    measure "$name" "$rounds"
done

echo
"$PYTHON" -m score.compare --floors --json="$out/table.json" "${results[@]}"
"$PYTHON" -m score.grids "$out/demo_text.png" "training (OpenMoji, CC BY-SA 4.0)=$out/train" "${pictures[@]}"
echo
echo "Lower own image and f_mem, lower similarity: less memorised. Lower fpd to held-out: better images."
echo "Pages: $out/*/eval_round*/grid/report.html. Pictures: $out/demo_text.png, $out/*/eval_round*/grid/grid_image*.png"

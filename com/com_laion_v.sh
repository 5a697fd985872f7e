#!/usr/bin/env bash
# IET-AGC on LAION-10k from Stable Diffusion 2.1, then the evaluation of its averages. Settings: see common.sh, and
# PRETRAINED: the pipeline's folder (./stable-diffusion-2-1). CAPTIONS: a file (DATA_ROOT/laion_10k/captions.json).
# SSCD, CLIP: weights for similarity and CLIP score (./sscd_disc_mixup.torchvision.pt, ./clip-vit-base-patch16), may be
# empty. CHECKPOINTS: directories in LOG_DIR to evaluate (checkpoint_round25). SEEDS: of the images (1).
# Further flags go to training and evaluation. Run again, it skips what is finished.
set -euo pipefail
REQUIREMENTS=requirements-text.txt
SEEDS="${SEEDS:-1}"
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

LOG_DIR="${LOG_DIR:-./logs/laion}"
PRETRAINED="${PRETRAINED:-./stable-diffusion-2-1}"
CAPTIONS="${CAPTIONS:-$DATA_ROOT/laion_10k/captions.json}"
SSCD="${SSCD-./sscd_disc_mixup.torchvision.pt}"
CLIP="${CLIP-./clip-vit-base-patch16}"
expand LOG_DIR PRETRAINED CAPTIONS SSCD CLIP

flags=(--pretrained="$PRETRAINED" --data_root="$DATA_ROOT/laion_10k/train" --captions="$CAPTIONS" --resolution=256)
training=(--client_num=4 --split=contiguous --local_steps=2000 --total_round=25 --batch_size=8 --lr=2.5e-6 --warmup=5000
    --mem_ratio=1.25 --save_round=5)
once "$LOG_DIR/trained" "${LAUNCH[@]}" -m text_to_image.main_fed --train "${flags[@]}" "${training[@]}" \
    --logdir="$LOG_DIR" "$@"
measures=(--num_images=4000 ${SSCD:+--sscd="$SSCD"} ${CLIP:+--clip="$CLIP"})
evaluate "${CHECKPOINTS:-checkpoint_round25}" --unet -m text_to_image.all_in "${flags[@]}" "${measures[@]}" "$@"

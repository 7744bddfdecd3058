#!/usr/bin/env bash
# Stage 2 at full size, from the cold start's last checkpoint. Any flag can be overridden. --max-train-steps counts over
# both stages: 2 000 updates with the reward from a cold start of 10 000 end at 12 000.
# RESUME_CKPT=runs/sitxl/cold_start/checkpoints/torch_units/step-10000.pt bash scripts/dmdr_sitxl_refl.sh --max-train-steps 12000
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

launch train_cc.dmdr_refl \
    --teacher "${TEACHER:-sit_weights/SiT-XL-2}" \
    --resume-ckpt "${RESUME_CKPT:-runs/sitxl/cold_start/checkpoints/torch_units/step-20000.pt}" \
    --output-dir "${OUTPUT_DIR:-runs/sitxl/dmdr}" \
    --auto-resume \
    --vae "${VAE:-stabilityai/sd-vae-ft-ema}" \
    --seed 30 \
    --mixed-precision auto \
    --encoder-type dinov2 \
    --dinov2-backbone "${DINOV2_BACKBONE:-https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth}" \
    --dinov2-head "${DINOV2_HEAD:-https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_linear4_head.pth}" \
    --reward-weight 0.05 \
    --reward-micro-batch 8 \
    --max-train-steps 22000 \
    --batch-size 24 \
    --gradient-accumulation-steps 1 \
    --num-steps 1 \
    --timestep-shift 1.0 \
    --ratio-update 5 \
    --lora-rank 32 \
    --lora-init-spread 1.0 \
    --lora-scale-fake 2.0 \
    --lora-scale-real 0.75 \
    --dynamic-steps 0 \
    --real-guidance-scale 1.0 \
    --real-guidance-interval 0.0 1.0 \
    --learning-rate-generator 1e-5 \
    --learning-rate-estimator 1e-5 \
    --weight-decay-generator 0.01 \
    --weight-decay-estimator 0.0 \
    --max-grad-norm 1.0 \
    --ema-decay 0 \
    --checkpoint-steps 500 \
    --sample-steps 50 \
    --num-previews 16 \
    --teacher-preview-steps 50 \
    "$@"

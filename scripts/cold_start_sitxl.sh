#!/usr/bin/env bash
# Stage 1 at full size: SiT-XL/2, ImageNet 256. Any flag can be overridden: bash scripts/cold_start_sitxl.sh --batch-size 32
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

launch train_cc.cold_start \
    --teacher "${TEACHER:-sit_weights/SiT-XL-2}" \
    --output-dir "${OUTPUT_DIR:-runs/sitxl/cold_start}" \
    --auto-resume \
    --vae "${VAE:-stabilityai/sd-vae-ft-ema}" \
    --seed 30 \
    --mixed-precision auto \
    --max-train-steps 20000 \
    --batch-size 64 \
    --gradient-accumulation-steps 1 \
    --num-steps 1 \
    --timestep-shift 1.0 \
    --ratio-update 5 \
    --lora-rank 32 \
    --lora-init-spread 1.0 \
    --lora-scale-fake 2.0 \
    --lora-scale-real 0.75 \
    --dynamic-steps 10000 \
    --renoise-alpha 4.0 \
    --renoise-beta 1.5 \
    --real-guidance-scale 1.0 \
    --real-guidance-interval 0.0 1.0 \
    --learning-rate-generator 2e-5 \
    --learning-rate-estimator 2e-5 \
    --weight-decay-generator 0.01 \
    --weight-decay-estimator 0.0 \
    --max-grad-norm 1.0 \
    --ema-decay 0 \
    --checkpoint-steps 5000 \
    --sample-steps 1000 \
    --num-previews 16 \
    --teacher-preview-steps 50 \
    "$@"

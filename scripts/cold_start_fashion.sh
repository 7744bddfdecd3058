#!/usr/bin/env bash
# Stage 1 of the Fashion-MNIST recipe, on any machine. Any flag can be overridden: bash scripts/cold_start_fashion.sh --num-steps 2
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
one_process_unless_asked # on 8 GPUs the recipe would be another one: 8 times the batch
FASHION="${FASHION:-runs/fashion}"
# Scores the previews where there is one; it never trains anything here.
HOLDOUT_CLASSIFIER="${HOLDOUT_CLASSIFIER:-$FASHION/classifier_evaluation}"
if [ -d "$HOLDOUT_CLASSIFIER" ]; then
    set -- --holdout-classifier "$HOLDOUT_CLASSIFIER" "$@"
fi

launch train_cc.cold_start \
    --teacher "${TEACHER:-$FASHION/teacher}" \
    --output-dir "${OUTPUT_DIR:-$FASHION/cold_start}" \
    --auto-resume \
    --vae "${VAE:-$FASHION/vae}" \
    --seed "${SEED:-30}" \
    --mixed-precision no \
    --no-compile \
    --max-train-steps 300 \
    --batch-size 64 \
    --gradient-accumulation-steps 1 \
    --num-steps 1 \
    --timestep-shift 1.0 \
    --ratio-update 5 \
    --lora-rank 32 \
    --lora-init-spread 0.072 \
    --lora-scale-fake 2.0 \
    --lora-scale-real 0.75 \
    --dynamic-steps 150 \
    --renoise-alpha 4.0 \
    --renoise-beta 1.5 \
    --real-guidance-scale 1.0 \
    --real-guidance-interval 0.0 1.0 \
    --learning-rate-generator 2e-4 \
    --learning-rate-estimator 1e-3 \
    --weight-decay-generator 0.01 \
    --weight-decay-estimator 0.01 \
    --max-grad-norm 1.0 \
    --ema-decay 0.98 \
    --checkpoint-steps 100 \
    --sample-steps 50 \
    --num-previews 20 \
    --teacher-preview-steps 20 \
    "$@"

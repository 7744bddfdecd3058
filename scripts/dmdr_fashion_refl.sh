#!/usr/bin/env bash
# Stage 2 of the Fashion-MNIST recipe, from the cold start's last checkpoint. Any flag can be overridden; without the reward,
# the control: OUTPUT_DIR=runs/fashion/control bash scripts/dmdr_fashion_refl.sh --encoder-type none
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
one_process_unless_asked # on 8 GPUs the recipe would be another one: 8 times the batch
FASHION="${FASHION:-runs/fashion}"

launch train_cc.dmdr_refl \
    --teacher "${TEACHER:-$FASHION/teacher}" \
    --resume-ckpt "${RESUME_CKPT:-$FASHION/cold_start/checkpoints/torch_units/step-300.pt}" \
    --output-dir "${OUTPUT_DIR:-$FASHION/dmdr}" \
    --auto-resume \
    --vae "${VAE:-$FASHION/vae}" \
    --seed "${SEED:-30}" \
    --mixed-precision no \
    --no-compile \
    --encoder-type classifier \
    --reward-classifier "${REWARD_CLASSIFIER:-$FASHION/classifier_reward}" \
    --reward-weight 0.05 \
    --reward-micro-batch 32 \
    --frechet-window 6400 \
    --holdout-classifier "${HOLDOUT_CLASSIFIER:-$FASHION/classifier_evaluation}" \
    --max-train-steps 400 \
    --batch-size 64 \
    --gradient-accumulation-steps 1 \
    --num-steps 1 \
    --timestep-shift 1.0 \
    --ratio-update 5 \
    --lora-rank 32 \
    --lora-init-spread 0.072 \
    --lora-scale-fake 2.0 \
    --lora-scale-real 0.75 \
    --dynamic-steps 0 \
    --real-guidance-scale 1.0 \
    --real-guidance-interval 0.0 1.0 \
    --learning-rate-generator 1e-4 \
    --learning-rate-estimator 1e-3 \
    --weight-decay-generator 0.01 \
    --weight-decay-estimator 0.01 \
    --max-grad-norm 1.0 \
    --ema-decay 0.98 \
    --checkpoint-steps 50 \
    --sample-steps 25 \
    --num-previews 20 \
    --teacher-preview-steps 20 \
    "$@"

#!/usr/bin/env bash
# Stage 2 of the digits recipe, from the cold start's last checkpoint. Any flag can be overridden; without the reward,
# the control: OUTPUT_DIR=runs/digits/control bash scripts/dmdr_digits_refl.sh --encoder-type none
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
one_process_unless_asked # on 8 GPUs the recipe would be another one: 8 times the batch
DIGITS="${DIGITS:-runs/digits}"

launch train_cc.dmdr_refl \
    --teacher "${TEACHER:-$DIGITS/teacher}" \
    --resume-ckpt "${RESUME_CKPT:-$DIGITS/cold_start/checkpoints/torch_units/step-400.pt}" \
    --output-dir "${OUTPUT_DIR:-$DIGITS/dmdr}" \
    --auto-resume \
    --vae none \
    --seed "${SEED:-30}" \
    --mixed-precision no \
    --no-compile \
    --encoder-type classifier \
    --reward-classifier "${REWARD_CLASSIFIER:-$DIGITS/classifier_reward}" \
    --reward-weight 0.5 \
    --reward-micro-batch 0 \
    --frechet-window 6400 \
    --holdout-classifier "${HOLDOUT_CLASSIFIER:-$DIGITS/classifier_evaluation}" \
    --max-train-steps 500 \
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
    --teacher-preview-steps 32 \
    "$@"

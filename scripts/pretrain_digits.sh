#!/usr/bin/env bash
# Stage 0 of the digits recipe: the multi-step teacher and two classifiers of different architecture, one to reward and
# one to evaluate. What is there already is kept.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
DIGITS="${DIGITS:-runs/digits}"
SEED="${SEED:-30}"

[ -f "$DIGITS/reference.npz" ] || python -m train_cc.pretrain.data --dataset digits --output "$DIGITS/reference.npz"
[ -f "$DIGITS/teacher/config.json" ] || python -m train_cc.pretrain.teacher \
    --dataset digits \
    --output-dir "$DIGITS/teacher" \
    --hidden-size 64 \
    --depth 4 \
    --num-heads 2 \
    --patch-size 2 \
    --max-train-steps 2000 \
    --batch-size 128 \
    --learning-rate 2e-3 \
    --label-dropout 0.1 \
    --ema-decay 0.999 \
    --seed "$SEED"
[ -f "$DIGITS/classifier_reward/config.json" ] || python -m train_cc.pretrain.classifier \
    --dataset digits \
    --output-dir "$DIGITS/classifier_reward" \
    --architecture test_efficientnet \
    --image-size 32 \
    --noise-augmentation 0.2 \
    --max-train-steps 400 \
    --batch-size 128 \
    --learning-rate 2e-3 \
    --seed "$SEED"
[ -f "$DIGITS/classifier_evaluation/config.json" ] || python -m train_cc.pretrain.classifier \
    --dataset digits \
    --output-dir "$DIGITS/classifier_evaluation" \
    --architecture test_resnet \
    --image-size 32 \
    --noise-augmentation 0.1 \
    --max-train-steps 400 \
    --batch-size 128 \
    --learning-rate 2e-3 \
    --seed 30

#!/usr/bin/env bash
# Stage 0 of the digits recipe: the multi-step teacher and two classifiers of different architecture, one to reward and
# one to evaluate. What is finished is kept, what was interrupted continues. Both side by side, or one alone:
# bash scripts/pretrain_digits.sh [teacher|classifiers]
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
source scripts/parts.sh
DIGITS="${DIGITS:-runs/digits}"
SEED="${SEED:-30}"
PARTS=2 LOGS="$DIGITS/logs"

teacher() {
    [ -f "$DIGITS/reference.npz" ] || run python -m train_cc.pretrain.data --dataset digits --output "$DIGITS/reference.npz"
    finished "$DIGITS/teacher" || run python -m train_cc.pretrain.teacher \
        --dataset digits \
        --output-dir "$DIGITS/teacher" \
        --hidden-size 64 \
        --depth 4 \
        --num-heads 2 \
        --patch-size 2 \
        --max-train-steps 2000 \
        --batch-size 128 \
        --checkpoint-steps 250 \
        --learning-rate 2e-3 \
        --label-dropout 0.1 \
        --ema-decay 0.999 \
        --seed "$SEED"
    need "$DIGITS/teacher"
}

classifiers() {
    finished "$DIGITS/classifier_reward" || run python -m train_cc.pretrain.classifier \
        --dataset digits \
        --output-dir "$DIGITS/classifier_reward" \
        --purpose reward \
        --architecture test_efficientnet \
        --image-size 32 \
        --noise-augmentation 0.2 \
        --max-train-steps 400 \
        --checkpoint-steps 100 \
        --batch-size 128 \
        --learning-rate 2e-3 \
        --seed "$SEED"
    need "$DIGITS/classifier_reward"
    finished "$DIGITS/classifier_evaluation" || run python -m train_cc.pretrain.classifier \
        --dataset digits \
        --output-dir "$DIGITS/classifier_evaluation" \
        --purpose evaluation \
        --architecture test_resnet \
        --image-size 32 \
        --noise-augmentation 0.1 \
        --max-train-steps 400 \
        --checkpoint-steps 100 \
        --batch-size 128 \
        --learning-rate 2e-3 \
        --seed 30
    need "$DIGITS/classifier_evaluation"
}

case "$*" in
    teacher | classifiers) "$1" ;;
    "")
        part "teacher" "about 2 min" teacher
        part "classifiers" "about 1 min" classifiers
        run_parts
        ;;
    *) echo "error: $* is given; allowed: teacher, classifiers, or nothing for both" >&2; exit 2;;
esac

#!/usr/bin/env bash
# Stage 0 of the Fashion-MNIST recipe: a VAE, a teacher of its latents, and classifiers of different architecture, one to
# reward and two to evaluate. What is finished is kept, what was interrupted continues. The data: DATA_DIR=FOLDER with the
# four idx files of Fashion-MNIST, else torchvision downloads them. All parts in turn, or some of them:
# bash scripts/pretrain_fashion.sh [vae|reward|decoder|teacher|evaluation|evaluation_vit]...
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
source scripts/parts.sh
FASHION="${FASHION:-runs/fashion}"
SEED="${SEED:-30}"
data=(--dataset fashion-mnist ${DATA_DIR:+--data-dir "$DATA_DIR"})

vae() { # as it is before its decoder is trained further: a teacher needs no more of it
    finished "$FASHION/vae_first" || run python -m train_cc.pretrain.vae "${data[@]}" \
        --output-dir "$FASHION/vae_first" \
        --channels 16 32 64 \
        --layers 1 \
        --groups 8 \
        --max-train-steps 3000 \
        --batch-size 16 \
        --checkpoint-steps 500 \
        --learning-rate 2e-3 \
        --kl-weight 5e-5 \
        --ema-decay 0.995 \
        --seed "$SEED"
    need "$FASHION/vae_first"
}

decoder() {
    finished "$FASHION/vae" || run python -m train_cc.pretrain.vae "${data[@]}" \
        --output-dir "$FASHION/vae" \
        --decoder-of "$FASHION/vae_first" \
        --classifier "$FASHION/classifier_reward" \
        --feature-weight 0.1 \
        --max-train-steps 2000 \
        --batch-size 16 \
        --checkpoint-steps 500 \
        --learning-rate 1e-3 \
        --ema-decay 0.997 \
        --seed "$SEED"
    need "$FASHION/vae"
    [ -f "$FASHION/real_through_vae.npz" ] || run python -m train_cc.pretrain.data "${data[@]}" \
        --split train \
        --num-images 10000 \
        --vae "$FASHION/vae" \
        --output "$FASHION/real_through_vae.npz"
}

teacher() {
    finished "$FASHION/teacher" || run python -m train_cc.pretrain.teacher "${data[@]}" \
        --output-dir "$FASHION/teacher" \
        --vae "$FASHION/vae_first" \
        --hidden-size 128 \
        --depth 6 \
        --num-heads 4 \
        --patch-size 2 \
        --max-train-steps 7000 \
        --batch-size 128 \
        --checkpoint-steps 250 \
        --learning-rate 2e-3 \
        --warmup-steps 100 \
        --label-dropout 0.1 \
        --ema-decay 0.999 \
        --seed "$SEED"
    need "$FASHION/teacher"
}

reward() {
    finished "$FASHION/classifier_reward" || run python -m train_cc.pretrain.classifier "${data[@]}" \
        --output-dir "$FASHION/classifier_reward" \
        --purpose reward \
        --architecture test_efficientnet \
        --image-size 32 \
        --noise-augmentation 0.2 \
        --max-train-steps 1500 \
        --checkpoint-steps 250 \
        --batch-size 64 \
        --learning-rate 2e-3 \
        --seed "$SEED"
    need "$FASHION/classifier_reward"
}

evaluation() { # the judges are the same for all seeds
    [ -f "$FASHION/reference.npz" ] || run python -m train_cc.pretrain.data "${data[@]}" \
        --split test \
        --output "$FASHION/reference.npz"
    [ -f "$FASHION/real_training.npz" ] || run python -m train_cc.pretrain.data "${data[@]}" \
        --split train \
        --num-images 10000 \
        --output "$FASHION/real_training.npz"
    finished "$FASHION/classifier_evaluation" || run python -m train_cc.pretrain.classifier "${data[@]}" \
        --output-dir "$FASHION/classifier_evaluation" \
        --purpose evaluation \
        --architecture test_resnet \
        --image-size 32 \
        --noise-augmentation 0.1 \
        --max-train-steps 3000 \
        --checkpoint-steps 250 \
        --batch-size 128 \
        --learning-rate 2e-3 \
        --seed 30
    need "$FASHION/classifier_evaluation"
}

evaluation_vit() {
    finished "$FASHION/classifier_evaluation_vit" || run python -m train_cc.pretrain.classifier "${data[@]}" \
        --output-dir "$FASHION/classifier_evaluation_vit" \
        --purpose evaluation \
        --architecture test_vit \
        --image-size 32 \
        --noise-augmentation 0.1 \
        --max-train-steps 3000 \
        --checkpoint-steps 250 \
        --batch-size 128 \
        --learning-rate 1e-3 \
        --seed 30
    need "$FASHION/classifier_evaluation_vit"
}

[ -n "$*" ] || set -- vae reward decoder teacher evaluation evaluation_vit
for part in "$@"; do
    case "$part" in
        vae | reward | decoder | teacher | evaluation | evaluation_vit) "$part" ;;
        *)
            echo "error: $part is no part; there are vae, reward, decoder, teacher, evaluation, evaluation_vit" >&2
            exit 2
            ;;
    esac
done

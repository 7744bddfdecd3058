#!/usr/bin/env bash
# Stage 0 of the Fashion-MNIST recipe: a VAE, a teacher of its latents, and classifiers of different architecture, one to
# reward and two to evaluate. What is finished is kept, what was interrupted continues. The data: DATA_DIR=FOLDER with the
# four idx files, else torchvision downloads them. PART by PART: bash scripts/pretrain_fashion.sh vae
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
FASHION="${FASHION:-runs/fashion}"
SEED="${SEED:-30}"
data=(--dataset fashion-mnist ${DATA_DIR:+--data-dir "$DATA_DIR"})

finished() { # FOLDER: the network is there, and its record, where there is one, says that it is the finished one
    ls "$1/config.json" "$1"/*.safetensors >/dev/null 2>&1 &&
        { [ ! -f "$1/args.json" ] || grep -q '"finished"' "$1/args.json"; }
}

train() { # FOLDER COMMAND...: unless it is there; a command that was asked to stop ends well, but has not finished
    finished "$1" || run python -m "${@:2}" "${data[@]}" --output-dir "$1"
    finished "$1" || { echo "$1 is not finished; the same command continues" >&2; exit 1; }
}

images() { # FILE FLAGS...
    [ -f "$1" ] || run python -m train_cc.pretrain.data "${data[@]}" --output "$1" "${@:2}"
}

vae() { # as it is before its decoder is trained further: the teacher needs no more of it
    train "$FASHION/vae_first" train_cc.pretrain.vae \
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
}

decoder() {
    train "$FASHION/vae" train_cc.pretrain.vae \
        --decoder-of "$FASHION/vae_first" \
        --classifier "$FASHION/classifier_reward" \
        --feature-weight 0.1 \
        --max-train-steps 2000 \
        --batch-size 16 \
        --checkpoint-steps 500 \
        --learning-rate 1e-3 \
        --ema-decay 0.997 \
        --seed "$SEED"
    images "$FASHION/real_through_vae.npz" --split test --vae "$FASHION/vae"
}

teacher() {
    train "$FASHION/teacher" train_cc.pretrain.teacher \
        --vae "$FASHION/vae_first" \
        --hidden-size 128 \
        --depth 6 \
        --num-heads 4 \
        --patch-size 2 \
        --max-train-steps 4500 \
        --batch-size 128 \
        --checkpoint-steps 250 \
        --learning-rate 2e-3 \
        --warmup-steps 100 \
        --label-dropout 0.1 \
        --ema-decay 0.999 \
        --seed "$SEED"
}

classifier() { # NAME PURPOSE ARCHITECTURE STEPS BATCH LEARNING-RATE NOISE SEED
    train "$FASHION/$1" train_cc.pretrain.classifier \
        --purpose "$2" \
        --architecture "$3" \
        --image-size 32 \
        --max-train-steps "$4" \
        --batch-size "$5" \
        --learning-rate "$6" \
        --noise-augmentation "$7" \
        --checkpoint-steps 250 \
        --seed "$8"
}
reward() { classifier classifier_reward reward test_efficientnet 1500 64 2e-3 0.2 "$SEED"; }
evaluation() { # the judges are the same for all seeds
    images "$FASHION/reference.npz" --split test
    images "$FASHION/real_training.npz" --split train --num-images 10000
    classifier classifier_evaluation evaluation test_resnet 3000 128 2e-3 0.1 30
}
evaluation_vit() { classifier classifier_evaluation_vit evaluation test_vit 3000 128 1e-3 0.1 30; }

for part in "${@:-all}"; do
    case "$part" in
        vae | teacher | reward | decoder | evaluation | evaluation_vit) "$part" ;;
        all) for each in vae reward decoder teacher evaluation evaluation_vit; do "$each"; done ;;
        *) echo "error: $part is no part of stage 0; there are vae, reward, decoder, teacher, evaluation, evaluation_vit" >&2; exit 2 ;;
    esac
done

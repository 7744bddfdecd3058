#!/usr/bin/env bash
# The whole job on Fashion-MNIST in latents: VAE, teacher, classifiers, cold starts of one and two steps, DMDR, evaluation.
# Ends with the table of results and the paths of the pictures. Finished parts are kept, an interrupted one continues.
# The data: DATA_DIR=FOLDER with the four idx files of Fashion-MNIST, else torchvision downloads them.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
source scripts/parts.sh
export FASHION="${FASHION:-runs/fashion}" SEED="${SEED:-30}"
PARTS=14 LOGS="$FASHION/logs"
NUM_IMAGES="${NUM_IMAGES:-10000}" # of a row
began=$SECONDS

training() { # FOLDER COMMAND...: a run that was asked to stop ends well, but is not finished
    OUTPUT_DIR="$FASHION/$1" run "${@:2}"
    [ -f "$FASHION/$1/generator/config.json" ] || { echo "$1 is not finished; the same command continues" >&2; exit 1; }
}

generate() { # , FLAGS , FLAGS ...: sample sets of one process
    run python -m scripts.in_turn evaluation.generate --num-images "$NUM_IMAGES" --seed 0 --vae "$FASHION/vae" "$@"
}
samples_of_the_teacher() {
    generate --generator "$FASHION/teacher" \
        , --output "$FASHION/samples/teacher.npz" --sampler euler --num-steps 20 \
        , --output "$FASHION/samples/teacher_one_step.npz"
}
samples() {
    local name sets=()
    for name in "$@"; do
        sets+=(, --output "$FASHION/samples/$name.npz" --generator "$FASHION/$name/generator")
    done
    generate "${sets[@]}"
}

part "VAE" "about 12 min" bash scripts/pretrain_fashion.sh vae
part "classifiers, to reward and to evaluate" "about 9 min" bash scripts/pretrain_fashion.sh reward evaluation
run_parts
part "teacher" "about 35 min" bash scripts/pretrain_fashion.sh teacher
part "decoder of the VAE" "about 8 min" bash scripts/pretrain_fashion.sh decoder
part "second classifier to evaluate" "about 3 min" bash scripts/pretrain_fashion.sh evaluation_vit
run_parts
part "cold start" "about 8 min" training cold_start bash scripts/cold_start_fashion.sh
part "cold start of two steps" "about 8 min" training two_steps bash scripts/cold_start_fashion.sh --num-steps 2
run_parts
part "control: 100 more updates without reward" "about 3 min" \
    training control bash scripts/dmdr_fashion_refl.sh --encoder-type none
part "DMDR" "about 3 min" training dmdr bash scripts/dmdr_fashion_refl.sh
part "DMDR with a strong reward" "about 3 min" training dmdr_strong bash scripts/dmdr_fashion_refl.sh --reward-weight 0.2
part "samples of the teacher" "about 4 min" samples_of_the_teacher
run_parts
part "samples of one and two steps" "about 2 min" samples cold_start two_steps
part "samples after more updates" "about 2 min" samples control dmdr dmdr_strong
run_parts

echo "[$PARTS/$PARTS] figures and report, about 3 min"
run python -m evaluation.evaluate \
    "$FASHION"/real_training.npz "$FASHION"/real_through_vae.npz \
    "$FASHION"/samples/{teacher,teacher_one_step,cold_start,two_steps,control,dmdr,dmdr_strong}.npz \
    "$FASHION/reference.npz" \
    --names "real training images" "the same through the VAE" "teacher, 20 Euler steps" \
    "teacher used in one step" "cold start, 1 step" "cold start, 2 steps" "control: 100 more updates" \
    "DMDR: 100 more updates, reward 0.05" "DMDR: 100 more updates, reward 0.2" \
    --space "classifier:$FASHION/classifier_evaluation" "classifier:$FASHION/classifier_evaluation_vit" \
    --overwrite \
    --output "$FASHION/results.json" \
    --picture "$FASHION/results.png" \
    --picture-columns 10
run python -m evaluation.report "$FASHION"/{cold_start,control,dmdr} --output "$FASHION/report.html" --overwrite
echo "did it work, and how: open $FASHION/report.html in a browser"
echo "Fashion-MNIST with seed $SEED: $((SECONDS - began)) s"

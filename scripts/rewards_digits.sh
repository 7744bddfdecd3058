#!/usr/bin/env bash
# Rewards on digits, each against the control of as many updates, over seeds and in two feature spaces that no reward and
# no training saw. Finished parts are kept: SEEDS="30 31 32" bash scripts/rewards_digits.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
one_process_unless_asked
export DIGITS="${DIGITS:-runs/digits}"
OUTPUT_DIR="${OUTPUT_DIR:-$DIGITS/rewards}"
began=$SECONDS

run bash scripts/pretrain_digits.sh
SECOND="$DIGITS/classifier_evaluation_vit"
[ -f "$SECOND/model.safetensors" ] || run python -m train_cc.pretrain.classifier \
    --dataset digits \
    --output-dir "$SECOND" \
    --purpose evaluation \
    --architecture test_vit \
    --image-size 32 \
    --noise-augmentation 0.1 \
    --learning-rate 1e-3
[ -f "$DIGITS/statistics.npz" ] || run python -m evaluation.statistics \
    --images digits \
    --space "classifier:$DIGITS/classifier_reward" \
    --output "$DIGITS/statistics.npz"

off=(--real-guidance-scale 1)
early=(--real-guidance-scale 1.5 --real-guidance-interval 0.0 0.4)
none=(--encoder-type none)
frechet=(--reward frechet 1 "$DIGITS/statistics.npz")
bright=(--tilt 1 python scripts/rewards/bright_pixels.py:bright_pixels)
rows=() samples=()

row() { # SEED GUIDANCE NAME FLAG...: 100 updates from the guidance's cold start, and 10 000 samples of what they make
    local seed="$1" guidance="$2" name="$3"
    local run="$OUTPUT_DIR/seed-$seed/${name// /_}" cold="$OUTPUT_DIR/seed-$seed/cold_start_$guidance"
    OUTPUT_DIR="$run" RESUME_CKPT="$cold/checkpoints/torch_units/step-400.pt" SEED="$seed" \
        run bash scripts/dmdr_digits_refl.sh --sample-steps 1000 --keep-checkpoints 1 "${@:4}"
    run python -m evaluation.generate --generator "$run/generator" --output "$run/samples.npz" \
        --num-images 10000 --seed "$seed"
    rows+=("$name, seed $seed") samples+=("$run/samples.npz")
}

for seed in ${SEEDS:-30 31 32}; do
    for guidance in off early; do
        declare -n flags="$guidance"
        OUTPUT_DIR="$OUTPUT_DIR/seed-$seed/cold_start_$guidance" SEED="$seed" \
            run bash scripts/cold_start_digits.sh --sample-steps 1000 --keep-checkpoints 1 "${flags[@]}"
    done
    row "$seed" off "control" "${off[@]}" "${none[@]}"
    row "$seed" off "ReFL 0.05" "${off[@]}" --reward-weight 0.05
    row "$seed" off "Frechet" "${off[@]}" "${none[@]}" "${frechet[@]}"
    row "$seed" off "tilt" "${off[@]}" "${none[@]}" "${bright[@]}"
    row "$seed" early "early guidance" "${early[@]}" "${none[@]}"
    row "$seed" early "early guidance + Frechet + ReFL 0.05" "${early[@]}" --reward-weight 0.05 "${frechet[@]}"
done
for space in classifier_evaluation classifier_evaluation_vit; do
    run python -m evaluation.evaluate "${samples[@]}" "$DIGITS/reference.npz" --names "${rows[@]}" --over-seeds \
        --classifier "$DIGITS/$space" --output "$OUTPUT_DIR/$space.json"
done
echo "rewards: $((SECONDS - began)) s"

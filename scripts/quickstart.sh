#!/usr/bin/env bash
# The whole job on real digits, on any machine: teacher, classifiers, cold start, evaluation. Ends with the table of
# results and the paths of the pictures. Finished parts are kept, an interrupted one continues.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
export DIGITS="${DIGITS:-runs/digits}" SEED="${SEED:-30}"
began=$SECONDS

bash scripts/pretrain_digits.sh
bash scripts/cold_start_digits.sh

generate() { # FILE FOLDER FLAGS...
    python -m evaluation.generate --output "$DIGITS/samples/$1.npz" --generator "$2" --num-images 1800 --seed 0 "${@:3}"
}
generate teacher "$DIGITS/teacher" --sampler euler --num-steps 32
generate teacher_one_step "$DIGITS/teacher"
generate cold_start "$DIGITS/cold_start/generator"

python -m evaluation.evaluate \
    "$DIGITS"/samples/{teacher,teacher_one_step,cold_start}.npz "$DIGITS/reference.npz" \
    --names "teacher, 32 Euler steps" "teacher used in one step" "cold start, 1 step" \
    --classifier "$DIGITS/classifier_evaluation" \
    --output "$DIGITS/results.json" \
    --picture "$DIGITS/results.png"
echo "a preview while training: $DIGITS/cold_start/samples/step-400/grid.png"
echo "quickstart with seed $SEED: $((SECONDS - began)) s"

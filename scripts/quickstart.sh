#!/usr/bin/env bash
# The whole job on real digits, on any machine: teacher, classifiers, cold start, DMDR, evaluation. Ends with the table of
# results and the paths of the pictures. Finished parts are kept, an interrupted one continues.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
export DIGITS="${DIGITS:-runs/digits}" SEED="${SEED:-30}"
began=$SECONDS

finished() { # a run that was asked to stop ends well, but is not finished
    [ -f "$DIGITS/$1/generator/config.json" ] || { echo "$1 is not finished; the same command continues"; exit 1; }
}
run bash scripts/pretrain_digits.sh
run bash scripts/cold_start_digits.sh
finished cold_start
run bash scripts/dmdr_digits_refl.sh
finished dmdr
OUTPUT_DIR="$DIGITS/control" run bash scripts/dmdr_digits_refl.sh --encoder-type none
finished control

generate() { # FILE FOLDER FLAGS...
    run python -m evaluation.generate --output "$DIGITS/samples/$1.npz" --generator "$2" --num-images 1800 --seed 0 --overwrite "${@:3}"
}
generate teacher "$DIGITS/teacher" --sampler euler --num-steps 32
generate teacher_one_step "$DIGITS/teacher"
generate cold_start "$DIGITS/cold_start/generator"
generate control "$DIGITS/control/generator"
generate dmdr "$DIGITS/dmdr/generator"

run python -m evaluation.evaluate \
    "$DIGITS"/samples/{teacher,teacher_one_step,cold_start,control,dmdr}.npz "$DIGITS/reference.npz" \
    --names "teacher, 32 Euler steps" "teacher used in one step" "cold start, 1 step" \
    "control: 100 more updates" "DMDR: 100 more updates with reward" \
    --classifier "$DIGITS/classifier_evaluation" \
    --output "$DIGITS/results.json" \
    --picture "$DIGITS/results.png" \
    --picture-columns 10
run python -m evaluation.report "$DIGITS"/{cold_start,control,dmdr} --output "$DIGITS/report.html"
echo "did it work, and how: open $DIGITS/report.html in a browser"
echo "quickstart with seed $SEED: $((SECONDS - began)) s"

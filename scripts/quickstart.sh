#!/usr/bin/env bash
# The whole job on real digits, on any machine: teacher, classifiers, cold start, DMDR, evaluation. Ends with the table of
# results and the paths of the pictures. Finished parts are kept, an interrupted one continues.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
source scripts/parts.sh
export DIGITS="${DIGITS:-runs/digits}" SEED="${SEED:-30}"
PARTS=8 LOGS="$DIGITS/logs"
began=$SECONDS

training() { # FOLDER COMMAND...: a run that was asked to stop ends well, but is not finished
    run "${@:2}"
    [ -f "$DIGITS/$1/generator/config.json" ] || { echo "$1 is not finished; the same command continues" >&2; exit 1; }
}
control() { OUTPUT_DIR="$DIGITS/control" training control bash scripts/dmdr_digits_refl.sh --encoder-type none; }

samples_of_the_teacher() {
    run python -m scripts.in_turn evaluation.generate --num-images 1800 --seed 0 --overwrite --generator "$DIGITS/teacher" \
        , --output "$DIGITS/samples/teacher.npz" --sampler euler --num-steps 32 \
        , --output "$DIGITS/samples/teacher_one_step.npz"
}
samples() {
    run python -m scripts.in_turn evaluation.generate --num-images 1800 --seed 0 --overwrite \
        , --output "$DIGITS/samples/cold_start.npz" --generator "$DIGITS/cold_start/generator" \
        , --output "$DIGITS/samples/control.npz" --generator "$DIGITS/control/generator" \
        , --output "$DIGITS/samples/dmdr.npz" --generator "$DIGITS/dmdr/generator"
}

part "teacher" "about 2 min" bash scripts/pretrain_digits.sh teacher
part "classifiers" "about 1 min" bash scripts/pretrain_digits.sh classifiers
run_parts
part "cold start" "about 1 min" training cold_start bash scripts/cold_start_digits.sh
run_parts
part "DMDR" "about half a minute" training dmdr bash scripts/dmdr_digits_refl.sh
part "control: as many updates without reward" "about half a minute" control
part "samples of the teacher" "some seconds" samples_of_the_teacher
run_parts
part "samples of the generators" "some seconds" samples
run_parts

echo "[8/8] figures and report, some seconds"
run python -m evaluation.evaluate \
    "$DIGITS"/samples/{teacher,teacher_one_step,cold_start,control,dmdr}.npz "$DIGITS/reference.npz" \
    --names "teacher, 32 Euler steps" "teacher used in one step" "cold start, 1 step" \
    "control: 100 more updates" "DMDR: 100 more updates with reward" \
    --classifier "$DIGITS/classifier_evaluation" \
    --overwrite \
    --output "$DIGITS/results.json" \
    --picture "$DIGITS/results.png" \
    --picture-columns 10
run python -m evaluation.report "$DIGITS"/{cold_start,control,dmdr} --output "$DIGITS/report.html" --overwrite
echo "did it work, and how: open $DIGITS/report.html in a browser"
echo "quickstart with seed $SEED: $((SECONDS - began)) s"

#!/usr/bin/env bash
# One row of the digits table: bash scripts/evaluate_digits.sh GENERATOR_FOLDER OUTPUT_FOLDER [flags of evaluation.generate]
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
DIGITS="${DIGITS:-runs/digits}"
two_folders "$@"
GENERATOR="$1" OUTPUT="$2"

run python -m evaluation.generate --generator "$GENERATOR" --output "$OUTPUT/samples.npz" --overwrite --num-images 1800 "${@:3}"
run python -m evaluation.evaluate "$OUTPUT/samples.npz" "$DIGITS/reference.npz" \
    --classifier "$DIGITS/classifier_evaluation" \
    --output "$OUTPUT/figures.json" --overwrite

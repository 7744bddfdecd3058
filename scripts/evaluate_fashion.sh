#!/usr/bin/env bash
# One row of the Fashion-MNIST table: bash scripts/evaluate_fashion.sh GENERATOR_FOLDER OUTPUT_FOLDER [flags of evaluation.generate]
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
FASHION="${FASHION:-runs/fashion}"
two_folders "$@"
GENERATOR="$1" OUTPUT="$2"

run python -m evaluation.generate --generator "$GENERATOR" --output "$OUTPUT/samples.npz" --overwrite --num-images 10000 \
    --vae "${VAE:-$FASHION/vae}" "${@:3}"
run python -m evaluation.evaluate "$OUTPUT/samples.npz" "$FASHION/reference.npz" \
    --space "classifier:$FASHION/classifier_evaluation" "classifier:$FASHION/classifier_evaluation_vit" \
    --output "$OUTPUT/figures.json" --overwrite

#!/usr/bin/env bash
# One row of the ImageNet 256 table by ADM's protocol: 50 000 images, FID, recall, IS, precision in Inception features.
# REFERENCE=VIRTUAL_imagenet256_labeled.npz bash scripts/evaluate_sitxl.sh GENERATOR_FOLDER OUTPUT_FOLDER [flags of evaluation.generate]
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
GENERATOR="${1:?the generator folder is missing}" OUTPUT="${2:?the output folder is missing}"
REFERENCE="${REFERENCE:-VIRTUAL_imagenet256_labeled.npz}"

# INCEPTION: torch-fidelity's weights file, where it cannot be downloaded
evaluate() {
    run python -m evaluation.evaluate "$OUTPUT/samples.npz" "$REFERENCE" --inception ${INCEPTION:+"$INCEPTION"} \
        --output "$OUTPUT/figures.json" "$@"
}
evaluate --check # a wrong reference shows before 50 000 images are sampled

run launch evaluation.generate \
    --generator "$GENERATOR" \
    --output "$OUTPUT/samples.npz" \
    --overwrite \
    --vae "${VAE:-stabilityai/sd-vae-ft-ema}" \
    --num-images 50000 \
    --batch-size 64 \
    --dtype bf16 \
    "${@:3}"
evaluate

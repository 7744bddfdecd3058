#!/usr/bin/env bash
# One row of the ImageNet 256 table: 50 000 images by ADM's protocol in Inception features, and the same figures in two more
# spaces, with the row that real images have: one half of ADM's 10 000 against the other.
# REFERENCE=VIRTUAL_imagenet256_labeled.npz bash scripts/evaluate_sitxl.sh GENERATOR_FOLDER OUTPUT_FOLDER [flags of evaluation.generate]
# OUTPUT_FOLDER/samples.npz (10 GB) is kept: the same command after a failed evaluation does not sample again. Samples of
# another generator there are refused without --overwrite. Sampling is in fp16 as training is; on a CPU add --dtype fp32.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
two_folders "$@"
GENERATOR="$1" OUTPUT="$2"
REFERENCE="${REFERENCE:-VIRTUAL_imagenet256_labeled.npz}"

# INCEPTION: torch-fidelity's weights file, where it cannot be downloaded. SPACES: the judges, any of evaluation.evaluate.
evaluate() {
    # shellcheck disable=SC2086
    run python -m evaluation.evaluate "$OUTPUT/samples.npz" "$REFERENCE" \
        --space ${SPACES:-inception dinov2 timm:${TIMM_ENCODER:-convnext_base.fb_in22k_ft_in1k}} \
        --dinov2-backbone "${DINOV2_BACKBONE:-https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth}" \
        ${INCEPTION:+--inception-weights "$INCEPTION"} \
        --held-out halves \
        --adm \
        --output "$OUTPUT/figures.json" --overwrite "$@"
}
evaluate --check # a wrong reference shows before 50 000 images are sampled

run launch evaluation.generate \
    --generator "$GENERATOR" \
    --output "$OUTPUT/samples.npz" \
    --vae "${VAE:-stabilityai/sd-vae-ft-ema}" \
    --num-images 50000 \
    --batch-size 64 \
    --dtype fp16 \
    "${@:3}"
evaluate || {
    code=$?
    echo "the samples are kept in $OUTPUT/samples.npz: the same command evaluates them without sampling again" >&2
    exit "$code"
}
echo "the samples are kept in $OUTPUT/samples.npz; nothing reads them later: delete the file when no other space is to judge them"

#!/usr/bin/env bash
# The quality-diversity table of SiT-XL/2, ImageNet 256: the rows of scripts/frontier/sitxl.toml. About three days
# of eight A100, computed (docs/full_size.md); finished rows are kept. REFERENCE, VAE and TIMM_ENCODER as in evaluate_sitxl.sh.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
export REFERENCE="${REFERENCE:-VIRTUAL_imagenet256_labeled.npz}" VAE="${VAE:-stabilityai/sd-vae-ft-ema}"
export TIMM_ENCODER="${TIMM_ENCODER:-convnext_base.fb_in22k_ft_in1k}"

exec python -m evaluation.frontier \
    --recipe sitxl \
    --teacher "${TEACHER:-sit_weights/SiT-XL-2}" \
    --output-dir "${OUTPUT_DIR:-runs/sitxl/frontier}" \
    --evaluate-flags "${INCEPTION:+--inception-weights $(printf %q "$INCEPTION")}" \
    --jobs 1 \
    "$@"

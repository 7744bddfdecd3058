#!/usr/bin/env bash
# The quality-diversity table of SiT-XL/2, ImageNet 256: the published rows and ours. Weeks of one node; finished rows are kept.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

exec python -m evaluation.frontier \
    --recipe sitxl \
    --teacher "${TEACHER:-sit_weights/SiT-XL-2}" \
    --output-dir "${OUTPUT_DIR:-runs/sitxl/frontier}" \
    --base-steps 20000 \
    --extra-steps 2000 \
    --teacher-sampler euler \
    --teacher-steps 250 \
    --jobs 1 \
    "$@"

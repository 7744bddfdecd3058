#!/usr/bin/env bash
# The quality-diversity table on digits: all rows trained, sampled, evaluated. Finished rows are kept.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
export DIGITS="${DIGITS:-runs/digits}" SEED="${SEED:-30}"
began=$SECONDS

bash scripts/pretrain_digits.sh
cores=$(getconf _NPROCESSORS_ONLN)
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" python -m evaluation.frontier \
    --recipe digits \
    --teacher "${TEACHER:-$DIGITS/teacher}" \
    --output-dir "${OUTPUT_DIR:-$DIGITS/frontier}" \
    --base-steps 400 \
    --extra-steps 100 \
    --teacher-sampler euler \
    --teacher-steps 32 \
    --train-flags "--sample-steps 1000" \
    --jobs "$((cores < 6 ? cores : 6))" \
    "$@"
echo "frontier with seed $SEED: $((SECONDS - began)) s"

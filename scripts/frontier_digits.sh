#!/usr/bin/env bash
# The quality-diversity table on digits: all rows trained, sampled, evaluated. Finished rows are kept.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
one_process_unless_asked
export DIGITS="${DIGITS:-runs/digits}" SEED="${SEED:-30}"
began=$SECONDS

run bash scripts/pretrain_digits.sh
# Of the real digits, in the features of the classifier that rewards: what the rows Frechet draw towards.
[ -f "$DIGITS/statistics.npz" ] || run python -m evaluation.statistics \
    --images digits \
    --space "classifier:$DIGITS/classifier_reward" \
    --output "$DIGITS/statistics.npz"
cores=$(getconf _NPROCESSORS_ONLN)
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" run python -m evaluation.frontier \
    --recipe digits \
    --teacher "${TEACHER:-$DIGITS/teacher}" \
    --output-dir "${OUTPUT_DIR:-$DIGITS/frontier}" \
    --base-steps 400 \
    --extra-steps 100 \
    --teacher-sampler euler \
    --teacher-steps 32 \
    --train-flags "--sample-steps 1000" \
    --statistics "$DIGITS/statistics.npz" \
    --black-box scripts/rewards/bright_pixels.py:bright_pixels \
    --jobs "$((cores < 6 ? cores : 6))" \
    "$@"
echo "frontier with seed $SEED: $((SECONDS - began)) s"

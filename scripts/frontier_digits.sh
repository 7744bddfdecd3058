#!/usr/bin/env bash
# The quality-diversity table on digits: the rows of scripts/frontier/digits.toml trained, sampled, evaluated. Finished
# ones are kept. Three seeds of all rows take hours of one core; one seed of two: --seeds 30 --rows ROW ROW
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
one_process_unless_asked
export DIGITS="${DIGITS:-runs/digits}" SEED="${SEED:-30}"
began=$SECONDS

run python -m scripts.jobs scripts/recipes/digits.toml teacher classifiers judge statistics
cores=$(getconf _NPROCESSORS_ONLN)
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" run python -m evaluation.frontier \
    --recipe digits \
    --teacher "${TEACHER:-$DIGITS/teacher}" \
    --output-dir "${OUTPUT_DIR:-$DIGITS/frontier}" \
    --jobs "$((cores < 6 ? cores : 6))" \
    "$@"
echo "frontier: $((SECONDS - began)) s"

#!/usr/bin/env bash
# The quality-diversity table on Fashion-MNIST: the rows of scripts/frontier/fashion.toml trained, sampled, evaluated.
# Finished ones are kept. Hours a seed on two cores; fewer rows: --seeds 30 --rows ROW ROW
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
one_process_unless_asked
export FASHION="${FASHION:-runs/fashion}" SEED="${SEED:-30}" DATA="${DATA_DIR:+--data-dir=$DATA_DIR}"
began=$SECONDS

run python -m scripts.jobs scripts/recipes/fashion.toml \
    vae reward evaluation teacher decoder evaluation_vit statistics
cores=$(getconf _NPROCESSORS_ONLN)
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" run python -m evaluation.frontier \
    --recipe fashion \
    --teacher "${TEACHER:-$FASHION/teacher}" \
    --output-dir "${OUTPUT_DIR:-$FASHION/frontier}" \
    --jobs "$((cores < 6 ? cores : 6))" \
    "$@"
echo "frontier: $((SECONDS - began)) s"

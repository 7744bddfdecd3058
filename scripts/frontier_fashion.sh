#!/usr/bin/env bash
# The quality-diversity table on Fashion-MNIST: the rows of scripts/frontier/fashion.toml trained, sampled, evaluated.
# Finished ones are kept. Hours a seed on two cores; fewer rows: --seeds 30 --rows ROW ROW
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
one_process_unless_asked
export FASHION="${FASHION:-runs/fashion}"
began=$SECONDS

run bash scripts/pretrain_fashion.sh # DATA_DIR: the folder of the idx files, where they cannot be downloaded
# Of the real training images, in the features of the classifier that rewards: what the rows Frechet draw towards.
[ -f "$FASHION/statistics.npz" ] || run python -m evaluation.statistics \
    --images fashion-mnist ${DATA_DIR:+--data-dir "$DATA_DIR"} \
    --space "classifier:$FASHION/classifier_reward" \
    --output "$FASHION/statistics.npz"
cores=$(getconf _NPROCESSORS_ONLN)
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" run python -m evaluation.frontier \
    --recipe fashion \
    --teacher "${TEACHER:-$FASHION/teacher}" \
    --output-dir "${OUTPUT_DIR:-$FASHION/frontier}" \
    --jobs "$((cores < 6 ? cores : 6))" \
    "$@"
echo "frontier: $((SECONDS - began)) s"

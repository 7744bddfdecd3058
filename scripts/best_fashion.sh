#!/usr/bin/env bash
# Beyond the paper, one step, on Fashion-MNIST: a cold start with less momentum, then the KL reward. docs/results.md
# compares it. The data: DATA_DIR, as in scripts/fashion.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
export FASHION="${FASHION:-runs/fashion}" SEED="${SEED:-30}" DATA="${DATA_DIR:+--data-dir=$DATA_DIR}"
run python -m scripts.jobs scripts/recipes/fashion.toml \
    vae reward evaluation teacher decoder evaluation_vit statistics best_cold_start best
echo "the generator: $FASHION/best/generator"

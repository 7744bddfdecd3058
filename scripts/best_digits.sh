#!/usr/bin/env bash
# Beyond the paper, one step, on digits: a cold start with less momentum, then the KL reward. docs/results.md compares it.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
export DIGITS="${DIGITS:-runs/digits}" SEED="${SEED:-30}"
run python -m scripts.jobs scripts/recipes/digits.toml teacher classifiers statistics best_cold_start best
echo "the generator: $DIGITS/best/generator"

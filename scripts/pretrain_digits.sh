#!/usr/bin/env bash
# Stage 0 of the digits recipe: the multi-step teacher and two classifiers of different architecture, one to reward and
# one to evaluate. What is finished is kept, what was interrupted continues. Both side by side, or one alone:
# bash scripts/pretrain_digits.sh [teacher|classifiers]
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
export DIGITS="${DIGITS:-runs/digits}" SEED="${SEED:-30}"
[ $# -gt 0 ] || set -- teacher classifiers
exec python -m scripts.jobs scripts/recipes/digits.toml "$@"

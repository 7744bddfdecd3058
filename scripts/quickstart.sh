#!/usr/bin/env bash
# The whole job on real digits, on any machine: teacher, classifiers, cold start, DMDR, evaluation. Ends with the table of
# results and the paths of the pictures. Finished jobs are kept, an interrupted one continues.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
export DIGITS="${DIGITS:-runs/digits}" SEED="${SEED:-30}"
began=$SECONDS

run python -m scripts.jobs scripts/recipes/digits.toml \
    teacher classifiers cold_start dmdr control samples_of_the_teacher samples results
echo "did it work, and how: open $DIGITS/report.html in a browser"
echo "quickstart with seed $SEED: $((SECONDS - began)) s"

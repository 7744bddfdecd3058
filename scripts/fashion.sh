#!/usr/bin/env bash
# The whole job on Fashion-MNIST in latents: VAE, teacher, classifiers, cold starts of one and two steps, DMDR, evaluation.
# Ends with the table of results and the paths of the pictures. Finished jobs are kept, an interrupted one continues.
# The data: DATA_DIR=FOLDER with the four idx files of Fashion-MNIST, else torchvision downloads them.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
export FASHION="${FASHION:-runs/fashion}" SEED="${SEED:-30}" DATA="${DATA_DIR:+--data-dir=$DATA_DIR}"
export NUM_IMAGES="${NUM_IMAGES:-10000}" # of a row
began=$SECONDS

run python -m scripts.jobs scripts/recipes/fashion.toml \
    vae reward evaluation teacher decoder evaluation_vit cold_start two_steps control dmdr dmdr_strong \
    samples_of_the_teacher samples results
echo "did it work, and how: open $FASHION/report.html in a browser"
echo "Fashion-MNIST with seed $SEED: $((SECONDS - began)) s"

#!/usr/bin/env bash
# Stage 0 of the Fashion-MNIST recipe: a VAE, a teacher of its latents, and classifiers of different architecture, one to
# reward and two to evaluate. What is finished is kept, what was interrupted continues. The data: DATA_DIR=FOLDER with the
# four idx files of Fashion-MNIST, else torchvision downloads them. All jobs, or some of them:
# bash scripts/pretrain_fashion.sh [vae|reward|decoder|teacher|evaluation|evaluation_vit]...
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
export FASHION="${FASHION:-runs/fashion}" SEED="${SEED:-30}" DATA="${DATA_DIR:+--data-dir=$DATA_DIR}"
[ $# -gt 0 ] || set -- vae reward teacher decoder evaluation evaluation_vit
exec python -m scripts.jobs scripts/recipes/fashion.toml "$@"

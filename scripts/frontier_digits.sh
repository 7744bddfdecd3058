#!/usr/bin/env bash
# The quality-diversity table on digits: the rows of scripts/frontier/digits.toml trained, sampled, evaluated. Finished
# ones are kept. Three seeds of all rows take hours of one core; one seed of two: --seeds 30 --rows ROW ROW
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
one_process_unless_asked
export DIGITS="${DIGITS:-runs/digits}"
began=$SECONDS

run bash scripts/pretrain_digits.sh
# A second judge of another architecture.
SECOND="$DIGITS/classifier_evaluation_vit"
[ -f "$SECOND/model.safetensors" ] || run python -m train_cc.pretrain.classifier \
    --dataset digits \
    --output-dir "$SECOND" \
    --purpose evaluation \
    --architecture test_vit \
    --image-size 32 \
    --noise-augmentation 0.1 \
    --learning-rate 1e-3
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
    --jobs "$((cores < 6 ? cores : 6))" \
    "$@"
echo "frontier: $((SECONDS - began)) s"

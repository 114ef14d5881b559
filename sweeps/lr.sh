#!/usr/bin/env bash
# Accuracy for several learning rates.
#
#   sweeps/lr.sh                                                      the digits, two epochs each: minutes on two cores
#   LRS="0.003 0.01 0.03" SEEDS="0 1 2" sweeps/lr.sh --arch D --data /data/imagenet --epochs 20 --schedule cosine --ranks 8
#
# LRS           learning rates at the start ("0.003 0.01 0.03")
# SEEDS         seeds of the weights, the order, the augmentation and dropout ("0")
# For the other variables and flags see sweeps/common.sh and docs/sweeps.md.
set -euo pipefail
. "$(dirname -- "$0")/common.sh"

FLAGS=(--arch A --data digits --epochs 2)
LRS=${LRS:-0.003 0.01 0.03}
SEEDS=${SEEDS:-0}
numbers LRS SEEDS

grid() {
    for lr in $LRS; do
        for seed in $SEEDS; do
            train --lr "$lr" --seed "$seed"
        done
    done
}

sweep "$@"

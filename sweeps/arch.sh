#!/usr/bin/env bash
# Accuracy and speed of the paper's configurations.
#
#   sweeps/arch.sh                                                    the digits, one epoch each: minutes on two cores
#   ARCHS="A B D E" SEEDS="0 1 2" sweeps/arch.sh --data /data/imagenet --epochs 20 --schedule cosine --ranks 8
#
# ARCHS         configurations of Table 1 ("A A-LRN B C D E")
# SEEDS         seeds of the weights, the order, the augmentation and dropout ("0")
# For the other variables and flags see sweeps/common.sh and docs/sweeps.md.
set -euo pipefail
. "$(dirname -- "$0")/common.sh"

FLAGS=(--data digits --epochs 1)
ARCHS=${ARCHS:-A A-LRN B C D E}
SEEDS=${SEEDS:-0}
lists ARCHS
numbers SEEDS

grid() {
    for arch in $ARCHS; do
        for seed in $SEEDS; do
            train --arch "$arch" --seed "$seed"
        done
    done
}

sweep "$@"

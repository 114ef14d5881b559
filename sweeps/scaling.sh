#!/usr/bin/env bash
# How fast training is on several ranks of one machine: with the same batch over all of them (strong), and for each (weak).
#
#   sweeps/scaling.sh                                                 the digits, in minutes on two cores
#   RANKS="1 2 4 8" BATCH_SIZE=256 sweeps/scaling.sh --arch D --data /data/imagenet
#
# RANKS         numbers of ranks; where there are GPUs, each rank uses one ("1 2")
# SCALINGS      strong, weak ("strong weak")
# BATCH_SIZE    images in a step: over all ranks together with strong scaling, on each with weak scaling (32)
# For the other variables and flags see sweeps/common.sh and docs/sweeps.md.
set -euo pipefail
. "$(dirname -- "$0")/common.sh"

FLAGS=(--arch A --data digits)
RANKS=${RANKS:-1 2}
SCALINGS=${SCALINGS:-strong weak}
BATCH_SIZE=${BATCH_SIZE:-32}
counts RANKS
is_whole "$BATCH_SIZE" || refuse BATCH_SIZE "give a whole number"
lists SCALINGS

grid() {
    for scaling in $SCALINGS; do
        for ranks in $RANKS; do
            case $scaling in
                strong) batch_size=$BATCH_SIZE ;;
                weak) batch_size=$((BATCH_SIZE * ranks)) ;;
                *) refuse SCALINGS "give strong, weak or both" ;;
            esac
            throughput --variant "$scaling" --ranks "$ranks" --batch-size "$batch_size"
        done
    done
}

sweep "$@"

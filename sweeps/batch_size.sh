#!/usr/bin/env bash
# How fast training, the step alone and the loader alone are, for several batch sizes.
#
#   sweeps/batch_size.sh                                              the digits, in minutes on two cores
#   BATCH_SIZES="64 128 256 512" sweeps/batch_size.sh --arch D --data /data/imagenet
#   BATCH_SIZES="512 1024 2048" sweeps/batch_size.sh --arch D --data /data/imagenet --ranks 8
#
# BATCH_SIZES   images in a step, over all ranks together ("16 32 64")
# For the other variables and flags see sweeps/common.sh and docs/sweeps.md.
set -euo pipefail
. "$(dirname -- "$0")/common.sh"

FLAGS=(--arch A --data digits)
BATCH_SIZES=${BATCH_SIZES:-16 32 64}
counts BATCH_SIZES

grid() {
    for batch_size in $BATCH_SIZES; do
        throughput --batch-size "$batch_size"
    done
}

sweep "$@"

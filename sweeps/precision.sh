#!/usr/bin/env bash
# How fast training and the step alone are in each precision, with and without torch.compile.
#
#   sweeps/precision.sh                                               the digits, in minutes on two cores
#   PRECISIONS="bf16 fp16 fp32" COMPILES="on off" sweeps/precision.sh --arch D --data /data/imagenet
#
# PRECISIONS    precisions of autocast ("fp32 bf16")
# COMPILES      on or off ("off")
# For the other variables and flags see sweeps/common.sh and docs/sweeps.md.
set -euo pipefail
. "$(dirname -- "$0")/common.sh"

FLAGS=(--arch A --data digits)
PRECISIONS=${PRECISIONS:-fp32 bf16}
COMPILES=${COMPILES:-off}
lists PRECISIONS COMPILES

grid() {
    for compile in $COMPILES; do
        for precision in $PRECISIONS; do
            throughput --compile "$compile" --precision "$precision"
        done
    done
}

sweep "$@"

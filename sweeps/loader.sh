#!/usr/bin/env bash
# How fast the loader alone and training are, for several numbers of DALI threads and prepared batches, and for each decoder.
#
#   sweeps/loader.sh                                                  the digits, in minutes on two cores
#   THREADS="4 8 16" PREFETCHES="1 2 4" DECODERS="gpu cpu" sweeps/loader.sh --arch D --data /data/imagenet
#
# THREADS       numbers of DALI threads in each rank ("1 2 3")
# PREFETCHES    numbers of batches prepared in advance ("2")
# DECODERS      gpu, cpu or auto ("auto")
# For the other variables and flags see sweeps/common.sh and docs/sweeps.md.
set -euo pipefail
. "$(dirname -- "$0")/common.sh"

FLAGS=(--arch A --data digits)
THREADS=${THREADS:-1 2 3}
PREFETCHES=${PREFETCHES:-2}
DECODERS=${DECODERS:-auto}
counts THREADS PREFETCHES
lists DECODERS

grid() {
    for decoder in $DECODERS; do
        for prefetch in $PREFETCHES; do
            for threads in $THREADS; do
                throughput --decoder "$decoder" --prefetch "$prefetch" --threads "$threads"
            done
        done
    done
}

sweep "$@"

#!/usr/bin/env bash
# How fast the loader alone and training are, by DALI's threads, the batches prepared in advance and the decoder.
#
#   sweeps/loader.sh                                                  the digits, in minutes on two cores
#   THREADS="4 8 16" PREFETCHES="1 2 4" DECODERS="gpu cpu" sweeps/loader.sh --arch D --data /data/imagenet
#
# THREADS       of DALI in each rank ("1 2 3")
# PREFETCHES    batches prepared in advance ("2")
# DECODERS      gpu, cpu or auto ("auto")
# All else: sweeps/common.sh.
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

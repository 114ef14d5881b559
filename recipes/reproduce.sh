#!/usr/bin/env bash
# The paper's whole chain: A, the deeper networks from A's layers, S = 384 from S = 256, scale jitter from S = 384, Tables 3–6.
#
#   recipes/reproduce.sh                                                   on the built-in digits, with small settings
#   DATA=/data/imagenet OUT=/data/runs RANKS=8 recipes/reproduce.sh        the paper's (needs ImageNet and 8 GPUs)
#   DATA=/data/imagenet OUT=/data/runs RANKS=8 recipes/reproduce.sh --dry-run     only prints the commands that are left
#
# Each stage has its folder, OUT/<stage>, and is finished when its result.json is there: the last line of its program. Stopped
# (Ctrl-C, SIGTERM) or killed at any moment, the same command goes on: finished stages are skipped, the one that was under
# way continues from its last checkpoint. Remove a stage's folder to have it made again. OUT/data.txt names DATA: other data need
# another OUT.
set -euo pipefail

. "$(dirname -- "$0")/../sweeps/common.sh"

DATA=${DATA:-digits}
OUT=${OUT:-runs/paper}
RANKS=${RANKS:-1}               # processes on this machine: a number, or gpu for one on each GPU
PYTHON=${PYTHON:-python}

dry_run=
case "$#:${1:-}" in
    0:) ;;
    1:--dry-run) dry_run=yes ;;
    *) echo "error: the only flag is --dry-run; DATA, OUT, RANKS and PYTHON are given by environment" >&2; exit 2 ;;
esac
case $OUT in -*) OUT=./$OUT ;; esac  # a folder, not a flag
if [ "$RANKS" != gpu ] && { ! is_whole "$RANKS" || [ "$RANKS" = 0 ]; }; then
    refuse RANKS "give a number of processes, or gpu for one on each GPU"
fi
cd -- "$(dirname -- "$0")/.."
data=$DATA
[ "$DATA" = digits ] || [ ! -e "$DATA" ] || data=$(realpath -- "$DATA")
if [ -s "$OUT/data.txt" ] && [ "$(<"$OUT/data.txt")" != "$data" ]; then
    refuse OUT "$(printf 'holds trainings on %q, and DATA is %q; choose another OUT' "$(<"$OUT/data.txt")" "$data")"
fi
if [ -z "$dry_run" ]; then
    command -v -- "$PYTHON" >/dev/null || refuse PYTHON "no such program; name a Python that has the requirements"
    mkdir -p -- "$OUT" 2>/dev/null && [ -w "$OUT" ] || refuse OUT "cannot be made, or not be written to; choose another OUT"
    [ -s "$OUT/data.txt" ] || printf '%s\n' "$data" >"$OUT/data.txt"
fi

launch=("$PYTHON")
[ "$RANKS" = 1 ] || launch+=(-m torch.distributed.run --standalone --nproc_per_node="$RANKS")

child='' stopped=''
stop() { stopped=yes; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true; }
trap stop INT TERM

# NAME COMMAND…: run it, unless its result is there already.
stage() {
    local folder=$OUT/$1
    if [ -s "$folder/result.json" ]; then
        echo "$1: finished before" >&2
        return
    fi
    if [ -n "$dry_run" ]; then
        printf '%q' "$2"
        printf ' %q' "${@:3}"
        echo
        return
    fi
    echo "$1: begins" >&2
    mkdir -p "$folder"
    "${@:2}" >"$folder/stdout.txt" &
    child=$!
    [ -z "$stopped" ] || stop  # the signal came before the child had its name
    while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done  # a wait ends with each signal
    local status=0
    wait "$child" || status=$?
    child=
    if [ "$status" != 0 ]; then
        echo "$1: ended with exit code $status; the same command goes on from there" >&2
        exit "$status"
    fi
    tail -n 1 "$folder/stdout.txt" >"$folder/result.json.new"
    mv "$folder/result.json.new" "$folder/result.json"
    [ -z "$stopped" ] || exit 75
}

# NAME [FLAG VALUE]: train a recipe; the flag names the weights to begin with.
train() {
    local small=()
    [ "$DATA" != digits ] || set_small "$1"
    stage "$1" "${launch[@]}" train.py --recipe "recipes/$1.yaml" --data "$DATA" --out "$OUT/$1" "${@:2}" "${small[@]}"
}

# NAME: what a recipe has instead on the digits. Scales are times 32/224, rounded down; and so few epochs that the whole chain
# takes less than 20 minutes on two cores.
set_small() {
    small=(--crop 32 --batch-size 32 --schedule cosine --keep 1)
    case "$1" in
        A-256 | A-LRN-256) small+=(--train-scale 36 --epochs 6 --warmup-epochs 1) ;;
        *-256-512) small+=(--train-scale 36-73 --epochs 1 --warmup-epochs 0) ;;
        *-384) small+=(--train-scale 54 --epochs 1 --warmup-epochs 0) ;;
        *) small+=(--train-scale 36 --epochs 3 --warmup-epochs 1) ;;
    esac
}

# NUMBER NAME…: print a table of the paper from these trainings.
table() {
    local checkpoints=() name
    for name in "${@:2}"; do checkpoints+=("$OUT/$name/best.pt"); done
    stage "table-$1" "${launch[@]}" evaluate.py --table "$1" --data "$DATA" --posteriors "$OUT/posteriors" \
        --checkpoint "${checkpoints[@]}"
}

train A-256
train A-LRN-256
for arch in B C D E; do train "$arch-256" --init-from "$OUT/A-256/best.pt"; done
for arch in C D E; do train "$arch-384" --weights "$OUT/$arch-256/best.pt"; done
for arch in C D E; do train "$arch-256-512" --weights "$OUT/$arch-384/best.pt"; done

deep=({C,D,E}-{256,384,256-512})
table 3 A-256 A-LRN-256 B-256 "${deep[@]}"
table 4 B-256 "${deep[@]}"
table 5 {D,E}-256-512
table 6 {D,E}-256-512

[ -z "$dry_run" ] || exit 0
for number in 3 4 5 6; do
    echo
    head -n -1 "$OUT/table-$number/stdout.txt"
done

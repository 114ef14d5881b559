#!/usr/bin/env bash
# Train on two machines, or more, of which some may fail, leave or come back: start this on each, with the same flags.
#
#   HOST=10.0.0.1 sweeps/two_machines.sh --arch D --data /data/imagenet --out /shared/runs/D
#   HOST=10.0.0.1 sweeps/two_machines.sh --dry-run --arch D ...      only prints the command of this machine
#
# HOST is one of them, by name or IPv4 address, and must stay up: it keeps the list of those that take part. OUT must be on
# a file system that all see. When a machine joins, all save and go on together; when one is lost, the others go on from the
# last checkpoint. The batch stays --batch-size, which must divide among any number of ranks that may come about.
set -euo pipefail

HOST=${HOST:?give HOST, the address of the machine that keeps the list of the others}
PORT=${PORT:-29500}
NODES=${NODES:-1:2}             # fewest and most machines
RANKS=${RANKS:-gpu}             # processes on this machine: a number, or gpu for one on each GPU
RESTARTS=${RESTARTS:-100}       # how often this machine may see a rank end; machines that join do not count
LAST_CALL=${LAST_CALL:-30}      # seconds to wait for more machines once the fewest are there
RUN=${RUN:-vgg}                 # a name that all machines agree on
PROGRAM=${PROGRAM:-train.py}

dry_run=
if [ "${1:-}" = --dry-run ]; then
    dry_run="echo"
    shift
fi
cd "$(dirname "$0")/.."

# The address and the interface by which this machine reaches HOST: what its hostname resolves to is often another one.
host_address=$(getent ahostsv4 "$HOST" | awk 'NR == 1 { print $1 }') || true
: "${host_address:?HOST=$HOST: no such machine}"
address=$(ip -o -4 route get "$host_address" | sed -n 's/.* src \([0-9.]*\).*/\1/p')
interface=$(ip -o -4 address show to "$address" | awk 'NR == 1 { print $2 }')
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$interface}
is_host=false
[ "$address" != "$host_address" ] || is_host=true

# torchrun's default, one store for all rounds, hangs when a machine joins (pytorch issue 135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec $dry_run torchrun --nnodes="$NODES" --nproc_per_node="$RANKS" --max-restarts="$RESTARTS" --local-addr="$address" \
    --rdzv_backend=c10d --rdzv_endpoint="$host_address:$PORT" --rdzv_id="$RUN" \
    --rdzv_conf="is_host=$is_host,last_call_timeout=$LAST_CALL" "$PROGRAM" "$@"

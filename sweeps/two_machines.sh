#!/usr/bin/env bash
# Train on two machines, or more, of which some may fail, leave or come back: start this on each, with the same flags.
#
#   HOST=10.0.0.1 sweeps/two_machines.sh --arch D --data /data/imagenet --out /shared/runs/D
#   HOST=10.0.0.1 sweeps/two_machines.sh --dry-run --arch D ...      only prints the command of this machine
#
# HOST is the name or IPv4 address of one of them. It must stay up, since it keeps the list of the machines. OUT must be on a file
# system that all of them see. When a machine joins, all save and continue together. When one is lost, the others continue from
# the last checkpoint. The batch stays --batch-size, which must be divisible by every number of ranks that may occur.
set -euo pipefail

. "$(dirname -- "$0")/common.sh"

HOST=${HOST:-}
PORT=${PORT:-29500}
NODES=${NODES:-1:2}             # fewest and most machines
RANKS=${RANKS:-}                # processes on this machine: a number, or gpu for one on each GPU; 1 where there is none
RESTARTS=${RESTARTS:-100}       # how often this machine may see a rank end; machines that join do not count
LAST_CALL=${LAST_CALL:-30}      # seconds to wait for more machines once the fewest are there
RUN=${RUN:-vgg}                 # a name that all machines agree on
PROGRAM=${PROGRAM:-train.py}

dry_run=
if [ "${1:-}" = --dry-run ]; then
    dry_run="echo"
    shift
fi
cd -- "$(dirname -- "$0")/.."

has_gpu() {
    case ${CUDA_VISIBLE_DEVICES-all} in '' | -1 | NoDevFiles) return 1 ;; esac
    # Some containers have the driver without its program.
    [[ $(timeout 60 nvidia-smi --list-gpus 2>/dev/null) = "GPU "* || $(ls -A /proc/driver/nvidia/gpus 2>/dev/null) ]]
}

is_range() { is_whole "${1%%:*}" && is_whole "${1#*:}" && [ "${1%%:*}" -ge 1 ] && [ "${1%%:*}" -le "${1#*:}" ]; }

is_range "$NODES" || refuse NODES "give a number of machines, or the fewest and the most, as 1:2"
is_whole "$PORT" && [ "$PORT" -ge 1 ] && [ "$PORT" -le 65535 ] || refuse PORT "give the number of a port"
is_whole "$RESTARTS" || refuse RESTARTS "give a whole number"
is_whole "$LAST_CALL" || refuse LAST_CALL "give a whole number of seconds"
if [ -z "$RANKS" ] && is_whole "${SLURM_GPUS_ON_NODE:-}" && [ "$SLURM_GPUS_ON_NODE" != 0 ]; then
    RANKS=$SLURM_GPUS_ON_NODE
elif [ -z "$RANKS" ]; then
    RANKS=1
    ! has_gpu || RANKS=gpu
elif [ "$RANKS" = gpu ]; then
    has_gpu || refuse RANKS "there is no GPU here; give a number of processes"
elif ! is_whole "$RANKS" || [ "$RANKS" = 0 ]; then
    refuse RANKS "give a number of processes, or gpu for one on each GPU"
fi
case $PROGRAM in -*) refuse PROGRAM "give a file of the repository, as train.py" ;; esac
[ -f "$PROGRAM" ] || refuse PROGRAM "no such file in the repository"
case $HOST in
    '') refuse HOST "give HOST, the address of the machine that keeps the list of the others" ;;
    -*) refuse HOST "no such machine" ;;
esac

# The address and the interface by which this machine reaches HOST: what its hostname resolves to is often another one.
host_address=$(getent ahostsv4 "$HOST" | awk 'NR == 1 { print $1 }') || true
[ -n "$host_address" ] || refuse HOST "no such machine"
command -v ip >/dev/null || { echo "error: there is no command ip; install iproute2" >&2; exit 2; }
address=$(ip -o -4 route get "$host_address" 2>/dev/null | sed -n 's/.* src \([0-9.]*\).*/\1/p') || true
[ -n "$address" ] || refuse HOST "no way leads there from this machine"
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

#!/usr/bin/env bash
# Trains on several machines: run this on each of them, with the same arguments.
#   launch/nodes.sh NODES HOST:PORT RANKS KEY=VALUE ...
# NODES: machines; HOST:PORT: one of them, which the others can reach; RANKS: processes (GPUs) on each machine.
# run.dir must lie on a disk that all of them share.
#   RUN_ID        distinguishes runs that share HOST:PORT (default moe_train)
#   MAX_RESTARTS  how often a run whose rank died goes on from its last checkpoint by itself (default 3)
#   STOP_S        seconds for the last step and its checkpoint after a signal to stop (default 120)
set -euo pipefail
usage="usage: launch/nodes.sh NODES HOST:PORT RANKS KEY=VALUE ..."
nodes="${1:?$usage}" endpoint="${2:?$usage}" ranks="${3:?$usage}"
shift 3
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/settings.sh "$ranks"

# torchrun kills its ranks 30 s after it passed a signal on, which may be too soon for a checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${STOP_S:-120}"
exec "$torchrun" --nnodes="$nodes" --nproc-per-node="$ranks" \
    --rdzv-backend=c10d --rdzv-endpoint="$endpoint" --rdzv-id="${RUN_ID:-moe_train}" \
    --max-restarts="${MAX_RESTARTS:-3}" --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    -m moe_train.train "$@"

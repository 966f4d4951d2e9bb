#!/usr/bin/env bash
# Trains with DeepSpeed's launcher, which starts the ranks of all machines in a hostfile over ssh:
#   launch/deepspeed.sh HOSTFILE KEY=VALUE ...
# launch/hostfile.example shows the hostfile. Any engine may be trained so; parallel.engine=deepspeed chooses DeepSpeed's.
#   DEEPSPEED_ARGS  more arguments of the launcher: "--master_port=29501 --ssh_port=2222"
# This launcher neither restarts a run nor passes on signals but SIGINT and SIGTERM: launch/nodes.sh does.
set -euo pipefail
hostfile="$(realpath "${1:?usage: launch/deepspeed.sh HOSTFILE KEY=VALUE ...}")"
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Threads are shared out by the ranks of the first machine.
source launch/settings.sh "$(awk '!/^#/ && match($0, /slots=[0-9]+/) {print substr($0, RSTART + 6, RLENGTH - 6); exit}' "$hostfile")"
deepspeed="$([ -x .venv/bin/deepspeed ] && echo .venv/bin/deepspeed || echo deepspeed)"

read -ra more <<<"${DEEPSPEED_ARGS:-}"
# Without --no_local_rank it would add an argument of its own to ours.
exec "$deepspeed" --hostfile "$hostfile" --no_local_rank ${more[@]+"${more[@]}"} --module moe_train.train "$@"

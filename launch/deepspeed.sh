#!/usr/bin/env bash
# Trains with DeepSpeed's launcher, which starts the ranks of all machines in a hostfile over ssh:
#   launch/deepspeed.sh HOSTFILE KEY=VALUE ...
# launch/hostfile.example shows the hostfile. Any engine may be trained so; parallel.engine=deepspeed chooses DeepSpeed's.
# This launcher neither restarts a run nor passes on signals but SIGINT and SIGTERM: launch/nodes.sh does.
set -euo pipefail
hostfile="$(realpath "${1:?usage: launch/deepspeed.sh HOSTFILE KEY=VALUE ...}")"
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/settings.sh 1
deepspeed="$([ -x .venv/bin/deepspeed ] && echo .venv/bin/deepspeed || echo deepspeed)"

exec "$deepspeed" --hostfile "$hostfile" --module moe_train.train "$@"

#!/usr/bin/env bash
# Trains on one machine: launch/local.sh RANKS KEY=VALUE ...
set -euo pipefail
ranks="${1:?usage: launch/local.sh RANKS KEY=VALUE ...}"
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/settings.sh "$ranks"

exec "$torchrun" --standalone --nproc-per-node="$ranks" -m moe_train.train "$@"

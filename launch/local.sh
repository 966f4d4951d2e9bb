#!/usr/bin/env bash
# Trains on one machine: launch/local.sh RANKS KEY=VALUE ...
# On a CPU it also sets what must be set before a process starts; a variable that is set already is left alone.
set -euo pipefail
ranks="${1:?usage: launch/local.sh RANKS KEY=VALUE ...}"
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
torchrun="$([ -x .venv/bin/torchrun ] && echo .venv/bin/torchrun || echo torchrun)"

cores="$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)"
threads=$((cores / ranks))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
# glibc hands every buffer over 32 MB back to the kernel and faults it in again at each step; let it keep them.
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-4294967296}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-17179869184}"
export MALLOC_TOP_PAD_="${MALLOC_TOP_PAD_:-67108864}"

exec "$torchrun" --standalone --nproc-per-node="$ranks" -m moe_train.train "$@"

# shellcheck shell=bash
# Sourced by the launchers: finds torchrun, and sets what must be set before a process starts, for so many ranks on this
# machine. A variable that is set already is left alone.
# Usage: source launch/settings.sh RANKS   (in the project's folder)

torchrun="$([ -x .venv/bin/torchrun ] && echo .venv/bin/torchrun || echo torchrun)"
export torchrun

cores="$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)"
threads=$((cores / $1))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
# glibc hands every buffer over 32 MB back to the kernel and faults it in again at each step; let it keep them.
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-4294967296}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-17179869184}"
export MALLOC_TOP_PAD_="${MALLOC_TOP_PAD_:-67108864}"

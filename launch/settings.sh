# shellcheck shell=bash
# Sourced by the launchers: finds torchrun, and sets what must be set before a process starts, for so many ranks on this
# machine. A variable that is set already is left alone.
# Usage: source launch/settings.sh RANKS   (in the project's folder)

torchrun="$([ -x .venv/bin/torchrun ] && echo .venv/bin/torchrun || echo torchrun)"
export torchrun

if [ "${MOE_TRAIN_SETTINGS:-}" != 0 ]; then # 0: leave everything alone
    # Physical cores: two hardware threads of a core share its arithmetic. moe_train/config/process.py says the same.
    cores="$({ cat /sys/devices/system/cpu/cpu[0-9]*/topology/thread_siblings_list 2>/dev/null || true; } | sort -u | wc -l)"
    allowed="$(env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)"
    cores=$((cores > 0 && cores < allowed ? cores : allowed))
    threads=$((cores / $1))
    # glibc hands every buffer over 32 MB back to the kernel and faults it in again at each step; let it keep them.
    for setting in MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=67108864 \
        OMP_NUM_THREADS=$((threads > 0 ? threads : 1)); do
        name="${setting%%=*}"
        if [ -z "${!name+set}" ]; then
            export "${setting?}"
            MOE_TRAIN_SETTINGS="${MOE_TRAIN_SETTINGS:+$MOE_TRAIN_SETTINGS,}$name" # whom the run names as having set it
        fi
    done
    export MOE_TRAIN_SETTINGS="${MOE_TRAIN_SETTINGS:-user}"
fi

#!/usr/bin/env bash
# The same set-up as the quickstart, then the whole test-suite but the tests marked slow. Arguments go to pytest.
#   WORKERS  files of tests that run at the same time (default 2; 0: one after the other, for tests that take time)
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh dev
OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses "${WORKERS:-2}" --dist loadfile "$@"

#!/usr/bin/env bash
# The same set-up as the quickstart, then the whole test-suite but the tests marked slow. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh dev
OMP_NUM_THREADS=1 .venv/bin/python -m pytest "$@"

#!/usr/bin/env bash
# From a fresh clone to a trained sparse model: set-up, default corpus, training on two processes with the experts
# sharded over them, a text sample and a report. May be run again: a finished run is shown, an interrupted one resumed.
# Arguments go to the training: bash scripts/quickstart.sh train.steps=50
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
.venv/bin/python -m moe_train.prepare
bash launch/local.sh 2 experiment=quickstart "$@"

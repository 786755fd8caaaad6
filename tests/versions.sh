#!/usr/bin/env bash
# Run the tests on the lowest and on the newest versions that pyproject.toml allows, and on every Python here:
#   bash tests/versions.sh [--renew] [environments] [-- arguments of pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh dev
exec "${DIST_TRAIN_VENV:-.venv}/bin/python" -m tests.versions "$@"

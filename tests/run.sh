#!/usr/bin/env bash
# The whole check, from a bare machine on: set up .venv, then ruff, mypy and the tests.
#   bash tests/run.sh [arguments of pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh dev
slurm=(slurmctld slurmd slurm-client munge)  # for the cluster that tests/test_slurm.py starts
if [ "$(id -u)" = 0 ] && ! PATH=$PATH:/usr/sbin command -v slurmctld munged >/dev/null && command -v apt-get >/dev/null; then
  echo "tests: installing ${slurm[*]}" >&2
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${slurm[@]}"; } \
    >/dev/null 2>&1 || echo "tests: they could not be installed; the tests on Slurm will be skipped" >&2
fi
export PATH=$PWD/.venv/bin:$PATH
ruff check .
ruff format --check .
mypy
exec python -m pytest "$@"

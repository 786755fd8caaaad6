#!/usr/bin/env bash
# The whole check, from a bare machine on: set up .venv, then ruff, mypy and the tests.
#   bash tests/run.sh [arguments of pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh dev
slurm=(slurmctld slurmd slurm-client munge)  # for the cluster that tests/test_slurm.py starts
missing=()
PATH=$PATH:/usr/sbin command -v slurmctld munged >/dev/null || missing+=("${slurm[@]}")
command -v chromium chromium-browser google-chrome >/dev/null || missing+=(chromium)  # to open reports in
if [ "$(id -u)" = 0 ] && [ ${#missing[@]} -gt 0 ] && command -v apt-get >/dev/null; then
  echo "tests: installing ${missing[*]}" >&2
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } \
    >/dev/null 2>&1 || echo "tests: they could not be installed; tests that need them will be skipped" >&2
fi
export PATH=$PWD/.venv/bin:$PATH
ruff check .
ruff format --check .
mypy
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"  # much of the time is waiting, for Slurm above all

#!/usr/bin/env bash
# From a bare machine to a trained network with its curves:
#   bash launch/quickstart.sh [--latest] [arguments of dist-train train]
# Sets up the environment, prepares CIFAR-10 and trains on all GPUs, or on the CPU. Safe to run again.
# --latest and $DIST_TRAIN_VENV: see launch/setup.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
latest=
if [ "${1:-}" = --latest ]; then latest=--latest; shift; fi
bash launch/setup.sh $latest
exec "${DIST_TRAIN_VENV:-.venv}/bin/python" -m dist_train quickstart "$@"

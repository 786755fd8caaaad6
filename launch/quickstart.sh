#!/usr/bin/env bash
# From a bare machine to a trained network with its curves:
#   bash launch/quickstart.sh [arguments of python -m dist_train.main]
# Sets everything up, prepares CIFAR-10 and trains over all GPUs, or on the CPU. Safe to run again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
exec .venv/bin/python -m dist_train.launch.quickstart "$@"

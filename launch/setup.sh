#!/usr/bin/env bash
# Set up an environment for this clone: .venv, or the one that $DIST_TRAIN_VENV names. Does nothing when it is up to date.
#
#   bash launch/setup.sh [--latest] [dev]
#
# dev: also the dependencies of the tests. --latest: the newest versions that pyproject.toml allows, instead of those in
# launch/lock.txt. Without root or a compiler ffcv is skipped, and everything else works.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '%s\n' "setup: $*" >&2; }
fail() { say "$*"; exit 2; }

latest= extras=
for argument; do
  case $argument in
    --latest) latest=--latest ;;
    dev) extras=dev ;;
    *) fail "$argument: there is no such argument; use --latest, dev or none" ;;
  esac
done
environment=${DIST_TRAIN_VENV:-.venv}
python=$environment/bin/python

buildable() { # whether ffcv can be built
  pkg-config --exists opencv4 libturbojpeg 2>/dev/null && command -v g++ >/dev/null &&
    [ -f "$("$1" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ]
}
has_ffcv() { "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("ffcv") is None)' 2>/dev/null; }
usable() { "$1" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

wanted=$(cat pyproject.toml launch/lock.txt | sha256sum | cut -d' ' -f1)
stamp=$environment/.dist_train${extras:+-$extras}
if [ -z "$latest" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] &&
  { has_ffcv || ! buildable "$python" || [ -e "$environment/.dist_train-without-ffcv" ]; }; then exit 0; fi
SECONDS=0

# System packages, where this user may install them: those of ffcv, then those of the tests.
root=none
if command -v apt-get >/dev/null; then
  if [ "$(id -u)" = 0 ]; then root=; elif sudo -n true 2>/dev/null; then root=sudo; fi
fi
install_packages() { # NAME...
  [ "$root" != none ] || return 1
  { $root apt-get update -qq && $root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"; } >"$log" 2>&1
}
log=$(mktemp)
trap 'rm -f "$log"' EXIT

keep=
if [ ! -e "$environment" ]; then
  base=
  for name in python3 python3.1{4,3,2,1,0}; do
    if usable "$name"; then base=$(command -v "$name"); break; fi
  done
  if [ -z "$base" ] && ! command -v uv >/dev/null; then
    say "installing python3 python3-venv python3-dev"
    install_packages python3 python3-venv python3-dev && usable /usr/bin/python3 ||
      fail "there is no Python 3.10 or newer with venv on this machine; install one (on Debian: python3 and python3-venv), or uv, and start again"
    base=/usr/bin/python3
  fi
  if [ -n "$base" ]; then
    say "making $environment with $("$base" --version)"
    "$base" -m venv "$environment"
  else
    say "making $environment with uv"
    uv venv -q --python '>=3.10' "$environment" || fail "uv found no Python 3.10 or newer and could not install one; install Python and start again"
  fi
elif [ ! -x "$python" ]; then
  fail "$environment holds no bin/python: name a virtual or conda environment with DIST_TRAIN_VENV, or a folder that does not exist yet"
elif ! compgen -G "$environment/.dist_train*" >/dev/null; then
  keep=--keep # not made by this script: keep its packages where they satisfy pyproject.toml
fi
environment=$(cd "$environment" && pwd) python=$environment/bin/python

packages=()
if ! buildable "$python"; then
  packages+=(g++ pkg-config libopencv-dev libturbojpeg0-dev)
  if [[ $(readlink -f "$python") == /usr/bin/* ]]; then packages+=(python3-dev); fi
fi
if [ -n "$extras" ]; then
  PATH=$PATH:/usr/sbin command -v slurmctld munged >/dev/null || packages+=(slurmctld slurmd slurm-client munge)
  command -v chromium chromium-browser google-chrome >/dev/null || packages+=(chromium)
fi
system=
if [ ${#packages[@]} -gt 0 ] && [ "$root" != none ]; then
  say "system packages: ${packages[*]}"
  install_packages "${packages[@]}" & # in parallel with the Python packages
  system=$!
fi
"$python" launch/install.py $latest $keep $extras
if [ -n "$system" ]; then
  if wait "$system"; then say "system packages: done"; else tail -n 5 "$log" >&2; say "apt-get could not install them; the end of its output is above"; fi
fi
if ! buildable "$python"; then
  why="building it takes a C++ compiler, pkg-config, Python.h and the headers of OpenCV 4 and libturbojpeg (on Debian: g++ pkg-config python3-dev libopencv-dev libturbojpeg0-dev)"
elif ! "$python" launch/install.py $latest $keep $extras ffcv; then
  why="it could not be built"
  touch "$environment/.dist_train-without-ffcv" # so that the next start does not try again
else
  rm -f "$environment/.dist_train-without-ffcv"
fi
has_ffcv || say "without ffcv, since $why; data_prep writes and reads the betons itself"
echo "$wanted" | tee "$environment/.dist_train" >"$stamp"
say "$environment is ready ($SECONDS s)"

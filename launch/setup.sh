#!/usr/bin/env bash
# Set up .venv beside this folder: system headers for ffcv, then pip install -e ".[$1]". Skips what is done.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=${1:-}

say() { printf '%s\n' "setup: $*" >&2; }
fail() { say "$*"; exit 2; }

wanted=$(sha256sum pyproject.toml | cut -d' ' -f1)
stamp=.venv/.installed${extras:+-$extras}
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then exit 0; fi

python=$(command -v python3 || true)
[ -n "$python" ] || python=none
usable() { "$python" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }
built() { pkg-config --exists opencv4 libturbojpeg 2>/dev/null && command -v g++ >/dev/null; }
headers() { [ -f "$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ]; }

if ! usable || ! built || ! headers; then
  packages=(g++ pkg-config libopencv-dev libturbojpeg0-dev)
  if [ "$python" = none ] || [[ $(readlink -f "$python") == /usr/bin/* ]]; then packages+=(python3 python3-venv python3-dev); fi
  command -v apt-get >/dev/null || fail "ffcv is built here and needs a C++ compiler, pkg-config, the headers of OpenCV 4 and libturbojpeg, and Python 3.10 or newer with venv and headers; install them with this system's package manager (on Debian: ${packages[*]}) and start again"
  root=()
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || fail "these system packages are missing and there is no sudo to install them with: ${packages[*]}; ask an administrator for them and start again"
    root=(sudo)
  fi
  say "installing system packages: ${packages[*]}"
  log=$(mktemp)
  { "${root[@]}" apt-get update -qq && "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}"; } >"$log" 2>&1 || { tail -n 20 "$log" >&2; fail "apt-get could not install ${packages[*]}; the end of its output is above"; }
  rm -f "$log"
  python=$(command -v python3)
  usable || fail "$python is not Python 3.10 or newer with venv; install one, put it first in PATH and start again"
fi

[ -x .venv/bin/python ] || { say "making .venv with $("$python" --version)"; "$python" -m venv .venv; }
say "installing Python packages into .venv (several GB with torch; minutes the first time)"
bar=$([ -t 2 ] && echo on || echo off)
.venv/bin/python -m pip install -q --disable-pip-version-check --progress-bar "$bar" -e ".${extras:+[$extras]}" >&2
echo "$wanted" | tee .venv/.installed >"$stamp"

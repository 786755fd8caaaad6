#!/usr/bin/env bash
# Set up .venv beside this folder: pip install -e ".[$1]", and ffcv where it can be built: with root or sudo the system
# headers for it are installed first. Skips what is done.
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
headers() { [ -f "$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ]; }
buildable() { pkg-config --exists opencv4 libturbojpeg 2>/dev/null && command -v g++ >/dev/null && headers; }  # ffcv is

packages=()
usable || packages+=(python3 python3-venv)
if ! usable || ! buildable; then
  packages+=(g++ pkg-config libopencv-dev libturbojpeg0-dev)
  if [ "$python" = none ] || [[ $(readlink -f "$python") == /usr/bin/* ]]; then packages+=(python3-dev); fi
  root=()
  [ "$(id -u)" = 0 ] || root=(sudo)
  if ! command -v apt-get >/dev/null; then why="there is no apt-get"
  elif [ "$(id -u)" != 0 ] && ! command -v sudo >/dev/null; then why="there is no sudo to install system packages with"
  else
    say "installing system packages: ${packages[*]}"
    log=$(mktemp)
    if { "${root[@]}" apt-get update -qq && "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}"; } >"$log" 2>&1; then why=
    else tail -n 20 "$log" >&2; why="apt-get could not install them; the end of its output is above"; fi
    rm -f "$log"
    python=$(command -v python3 || echo none)
  fi
  usable || fail "Python 3.10 or newer with venv is needed${why:+, and $why}; install it (on Debian: python3 python3-venv), put it first in PATH and start again"
  [ -z "$why" ] || say "going on without ffcv, which is built here from source (on Debian with ${packages[*]}): $why"
fi

[ -x .venv/bin/python ] || { say "making .venv with $("$python" --version)"; "$python" -m venv .venv; }
say "installing Python packages into .venv (several GB with torch; minutes the first time)"
bar=$([ -t 2 ] && echo on || echo off)
install() { .venv/bin/python -m pip install -q --disable-pip-version-check --progress-bar "$bar" -e ".$1" >&2; }
install "${extras:+[$extras]}"
if buildable; then install "[ffcv]" || say "ffcv could not be built; pip's reason is above"; fi
.venv/bin/python -c 'import ffcv' 2>/dev/null || say "all works without ffcv, the betons are the same; to add it later: .venv/bin/python -m pip install -e '.[ffcv]'"
echo "$wanted" | tee .venv/.installed >"$stamp"

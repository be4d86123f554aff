#!/bin/sh
# Make the virtual environment and install ldft with its native module and the tested dependencies. Called by the Makefile.
set -eu
fail() { echo "ldft: $1" >&2; exit 1; }

command -v "$PYTHON" >/dev/null || fail "$PYTHON not found; install Python 3.11 to 3.13 (Debian: apt-get install python3)"
"$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' ||
  fail "$("$PYTHON" --version) is not supported; use Python 3.11, 3.12 or 3.13, e.g. make run PYTHON=python3.12"
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || fail "Python's venv module is missing (Debian: apt-get install python3-venv)"
command -v c++ >/dev/null || command -v g++ >/dev/null || fail "no C++ compiler (Debian: apt-get install g++)"
has_headers() { "$PYTHON" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))'; }
# ldft and DeepSpeed compile against Python's C headers. On Debian they are a package of their own; without it (and without
# root) they are unpacked beside the virtual environment, where ldft's ranks find them too.
unpack_headers() {
  command -v apt-get >/dev/null && command -v dpkg >/dev/null &&
  mkdir -p "$VENV/headers" && cd "$VENV/headers" && apt-get download -qq "lib$1-dev" 2>/dev/null && dpkg -x ./*.deb . && rm ./*.deb
}
version=$("$PYTHON" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
has_headers || [ -d "$VENV/headers/usr" ] || (unpack_headers "$version") ||
  fail "Python's C headers are missing; ldft and DeepSpeed compile against them (Debian: apt-get install python3-dev)"
if [ -d "$VENV/headers/usr" ]; then
  include=$(cd "$VENV/headers/usr/include" && pwd)
  export CPATH="$include/$version:$include" CMAKE_ARGS="-DPython_INCLUDE_DIR=$include/$version"
fi

[ -x "$VENV/bin/python" ] || { echo "ldft: creating $VENV"; "$PYTHON" -m venv "$VENV"; }
echo "ldft: installing dependencies under constraints.txt and building the native module (minutes the first time)"
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check install "$@"; }
pip --quiet wheel # Debian's pip is old: without it DeepSpeed, a source package, is installed with a page of warnings
pip -c constraints.txt -e '.[test]'

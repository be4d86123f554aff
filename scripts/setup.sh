#!/bin/sh
# Called by the Makefile as `setup.sh run|test`: what can be said before there is a Python that runs the rest.
set -eu
fail() { echo "ldft: $1" >&2; exit 1; }

command -v "$PYTHON" >/dev/null || fail "$PYTHON not found; install Python 3.11 to 3.13 (Debian: apt-get install python3)"
"$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' ||
  fail "$("$PYTHON" --version) is not supported; use Python 3.11, 3.12 or 3.13, e.g. make run PYTHON=python3.12"
exec "$PYTHON" -m scripts.setup "$1"

#!/bin/sh
# The tests of placement by role on several DeepSpeed releases, each in a folder of its own over the present environment:
#   scripts/deepspeed_matrix.sh            0.19.5 and the newest
#   scripts/deepspeed_matrix.sh 0.19.6     these
# Needs a network. Each release compiles DeepSpeed's operators first, which is most of the time.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
failed=0
for version in ${*:-0.19.5 newest}; do
    wanted=deepspeed
    [ "$version" = newest ] || wanted="deepspeed==$version"
    here=$folder/$version
    DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $python -m pip install --quiet --no-deps --no-build-isolation --target "$here/packages" "$wanted"
    start=$(date +%s)
    # Before everything else on the path; its operators are its own, too.
    export PYTHONPATH="$here/packages" TORCH_EXTENSIONS_DIR="$here/ops"
    echo "deepspeed $($python -c 'from importlib import metadata; print(metadata.version("deepspeed"))'):"
    $python -m pytest -q -p no:cacheprovider tests/memory/test_roles.py || failed=1
    unset PYTHONPATH TORCH_EXTENSIONS_DIR
    echo "deepspeed $version: $(($(date +%s) - start)) s"
done
exit $failed

#!/bin/sh
# The tests of placement by role and of the update on several DeepSpeed releases, each in a folder of its own over the
# present environment:
#   scripts/deepspeed_matrix.sh            0.19.5 and the newest
#   scripts/deepspeed_matrix.sh 0.19.6     these
# Needs a network. Each release compiles its operators first: about five minutes a release on two cores.
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
    CI=true $python -m pytest -q -p no:cacheprovider tests/training/deepspeed/test_roles.py tests/training/optimizers/test_host_optimizer.py || failed=1
    unset PYTHONPATH TORCH_EXTENSIONS_DIR
    echo "deepspeed $version: $(($(date +%s) - start)) s"
done
exit $failed

# Sourced on a GPU machine without network: installs what .whl/ brings for its Python, and ldft itself, beside its torch.
#   . benchmarks/device_setup.sh
site=${LDFT_SITE:-$HOME/.ldft-site}
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target $site .whl/*.whl 2>/dev/null || exit 1
# Packages that exist only as a build for one machine, such as flash-attn, come as archives of their files.
for archive in .whl/*.tar.xz; do [ ! -e "$archive" ] || tar xJf "$archive" -C $site || exit 1; done
export PYTHONPATH=$PWD:$site DS_IGNORE_CUDA_DETECTION=1 PATH=$site/bin:$PATH
SKBUILD_BUILD_DIR=/tmp/ldft-build python3 -m pip install -q --no-index --no-deps --no-build-isolation --target $site --upgrade . || exit 1
# The checkout itself is what runs; only the native module comes from the build.
cp $site/ldft/_native*.so ldft/ && rm -rf $site/ldft
git config --global --add safe.directory "$PWD"

#!/bin/sh
# Make multirun_analysis/data/ anew: twelve real runs of tiny models on this machine's CPU (minutes), one of which is
# made to exceed its time limit. Then execute the notebooks on it and draw the README's figure. Run it from a clean checkout, and commit what it writes:
#
#     sh multirun_analysis/make_data.sh
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$PWD/.venv/bin/python}
DATA=$PWD/multirun_analysis/data
fail() { echo "make_data: $1" >&2; exit 1; }

if [ "${1:-}" != "--inside" ]; then
  [ -z "$(git status --porcelain)" ] || fail "uncommitted changes: the rows would say git_dirty; commit first"
  # Rows record the host's name; these are to be published, so they are made under another one.
  if unshare --map-root-user --uts true 2>/dev/null; then
    exec unshare --map-root-user --uts sh -c 'hostname example && exec sh "$0" --inside' "$PWD/multirun_analysis/make_data.sh"
  fi
  fail "cannot set another host name (unshare, user namespaces); publish no rows that name your machine"
fi

WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
cd "$WORK" # rows record results.dir as given: a relative path tells nothing about this machine
run() {
  echo "make_data: $*"
  # A failed run is a row, too; the count below says whether all are there.
  "$PYTHON" -m ldft launch.device=cpu checkpointing=gpu results.dir=results train.iterations=8 "$@" >log 2>&1 || tail -n 4 log
}
# Lengths outermost, so that a slow minute of the machine does not fall on one option alone.
for tokens in 512 1024 2048; do
  run model=tiny seq_len.tokens=$tokens
  run model=tiny seq_len.tokens=$tokens checkpointing=none
  run model=tiny seq_len.tokens=$tokens numa=bind_0
done
run model=nano seq_len.tokens=1024
run model=tiny seq_len.tokens=4096
run model=tiny seq_len.tokens=4096 checkpointing=none launch.timeout_s=12

count=$(find results -name row.parquet | wc -l)
[ "$count" -eq 12 ] || fail "$count rows instead of 12; see above"
rm -rf "$DATA"
for row in $(cd results && find . -name row.parquet); do
  mkdir -p "$DATA/$(dirname "$row")"
  cp "results/$row" "results/$(dirname "$row")/trace.parquet" "$DATA/$(dirname "$row")/"
done
cd "$DATA/../.."
"$PYTHON" -m multirun_analysis.notebooks
"$PYTHON" -m multirun_analysis multirun_analysis/data --out "$WORK/figures" >/dev/null
mkdir -p docs/figures
cp "$WORK/figures/throughput.png" docs/figures/ # the README's picture
echo "make_data: 12 rows in multirun_analysis/data, notebooks executed, the README's figure drawn; look at them, then commit"

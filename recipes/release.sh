#!/usr/bin/env bash
# The network in release/: from its dense network to the published file, and its 36 pairs of
# bit-widths. About six hours on 2 CPU cores with bf16.
#
#     recipes/release.sh DATA [RUN]     DATA as for train.py, RUN a folder (runs/release)
#
# It replaces results/release.json and results/sweep.json of this folder.
# GRID=FILE recipes/release.sh ... shows the report's grid.csv beside ours.
# It starts from release/baseline.pth. TRAIN=1 recipes/release.sh ... trains that network anew (10
# minutes on an H100, about a day on 2 CPU cores).
# An interrupted run continues where it was: give the same command again.
set -euo pipefail
DATA=${1:?usage: recipes/release.sh DATA [RUN]}
RUN=${2:-runs/release}
. "$(dirname "$0")/paths.sh"
DATA=$(absolute "$DATA")
RUN=$(absolute "$RUN")
GRID=${GRID:+$(absolute "$GRID")}
cd "$(dirname "$0")/.."
[ -n "${PYTHON:-}" ] || ${MAKE:-make} --no-print-directory venv
PYTHON=${PYTHON:-.venv/bin/python}
C=$RUN/checkpoints
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

# run FILE COMMAND...: unless the file is there. Each is made from the one before it.
last=
run() {
  if [ -e "$1" ] && [ -n "$last" ] && [ "$last" -nt "$1" ]; then
    echo "$1 is older than $last, from which it is made: delete it" >&2
    exit 1
  fi
  [ -e "$1" ] || "$PYTHON" "${@:2}" --data "$DATA" --run-dir "$RUN"
  last=$1
}

if [ -n "${TRAIN:-}" ]; then
  run "$C/baseline.pth" train.py --epochs 181 --lr 0.1 --weight-decay 4e-5 --no-decay-norm \
    --warmup-epochs 2 --label-smoothing 0 --start-side 16 --dropout 0
fi
mkdir -p "$C"
[ -e "$C/baseline.pth" ] || cp release/baseline.pth "$C"
last=$C/baseline.pth

# prune NUMBER FILE FLAGS...: one pruning; each has its own log, which stays while its file does.
prune() {
  [ -e "$C/$2" ] || rm -f "$RUN/logs/prune-$1.jsonl"
  run "$C/$2" prune.py --out "$C/$2" --score obd --max-drop 20 --weight-decay 1e-4 \
    --label-smoothing 0 --distill 0.9 "${@:3}"
  [ -e "$RUN/logs/prune-$1.jsonl" ] || [ ! -e "$RUN/logs/prune.jsonl" ] ||
    mv "$RUN/logs/prune.jsonl" "$RUN/logs/prune-$1.jsonl"
}

# The published networks were pruned when channels that died still took a round beyond --target: 0.9504,
# 0.9656 and 0.9725 of the weights. So this chain's last file will have 1 to 2% more weights.
# The published pruned_a.pth is of a run with `--epochs 1 --last-epochs 40` on a GPU and a CPU that was
# cut short after 13 of the 40: its learning rate never fell. Here it falls.
prune 1 pruned_a.pth --rounds 4 --target 0.95 --epochs 1 --last-epochs 13
prune 2 pruned_b.pth --parent "$C/pruned_a.pth" --teacher "$C/baseline.pth" --rounds 1 \
  --target 0.965 --last-epochs 10 --lr 0.035
prune 3 pruned.pth --parent "$C/pruned_b.pth" --teacher "$C/baseline.pth" --rounds 1 \
  --target 0.972 --last-epochs 18 --lr 0.04
run "$C/quantized.pth" quantize.py --rd-lambda 3.1
run "$C/int8.pth" to_int8.py
run "$C/compressed.nnz" sparse_compress.py
FILES=("$C"/{baseline,pruned_a,pruned_b,pruned,quantized,int8}.pth "$C/compressed.nnz")
"$PYTHON" eval.py "${FILES[@]}" --data "$DATA" --run-dir "$RUN" --split val
"$PYTHON" eval.py "${FILES[@]}" --data "$DATA" --run-dir "$RUN" --split test \
  --results results/release.json --title "Our own network, compressed" \
  --labels baseline.pth,pruned_a.pth,pruned_b.pth,pruned.pth,quantized.pth,int8.pth,mobilenetv2-cifar10.nnz
title="Our own pruned network at every pair of bit-widths"
"$PYTHON" sweep.py --data "$DATA" --run-dir "$RUN" --split test --results results/sweep.json \
  ${GRID:+--beside "$GRID"} \
  --title "$title${GRID:+ (in brackets: the network of the report, in the report)}"

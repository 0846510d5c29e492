#!/usr/bin/env bash
# The reference report's pruned network through our stages, without training and with three epochs of
# QAT: results/reference.json. About 40 minutes on 2 CPU cores, of which QAT takes 30.
#
#     recipes/reference.sh DATA NETWORK [RUN]   NETWORK: the report's pruned.pth, a plain state dict
set -euo pipefail
DATA=${1:?usage: recipes/reference.sh DATA NETWORK [RUN]}
NETWORK=${2:?usage: recipes/reference.sh DATA NETWORK [RUN]}
RUN=${3:-runs/reference}
# Paths are the caller's; the scripts are in the project's folder.
absolute() { case $1 in /* | synthetic) echo "$1" ;; *) echo "$PWD/$1" ;; esac }
DATA=$(absolute "$DATA")
NETWORK=$(absolute "$NETWORK")
RUN=$(absolute "$RUN")
cd "$(dirname "$0")/.."
[ -n "${PYTHON:-}" ] || ${MAKE:-make} --no-print-directory venv
PYTHON=${PYTHON:-.venv/bin/python}
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

# compress NAME FLAGS...: quantize, store as integers, encode; what is there is not made again.
compress() {
  local run=$RUN/$1 flags=("--data" "$DATA" "--run-dir" "$RUN/$1")
  local files=$run/checkpoints
  [ -e "$files/quantized.pth" ] ||
    "$PYTHON" quantize.py --parent "$NETWORK" --assume-downsample 4 "${flags[@]}" "${@:2}"
  [ -e "$files/int8.pth" ] || "$PYTHON" to_int8.py "${flags[@]}"
  [ -e "$files/compressed.nnz" ] || "$PYTHON" sparse_compress.py --run-dir "$run"
}

compress w8a8
compress w4a8 --weight-bits 4
compress ptq --rd-lambda 0.3
compress small --rd-lambda 0.44
compress qat --method qat --rd-lambda 0.43 --epochs 3 --distill 1
"$PYTHON" eval.py "$NETWORK" "$RUN"/{w8a8,w4a8,ptq,small,qat}/checkpoints/compressed.nnz \
  --assume-downsample 4 --data "$DATA" --run-dir "$RUN" --split test \
  --results results/reference.json --title "The reference report's network, compressed" \
  --labels "its state dict (fp32),PTQ W8A8,PTQ W4A8,PTQ at lambda 0.3,PTQ at lambda 0.44,QAT at lambda 0.43"

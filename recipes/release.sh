#!/usr/bin/env bash
# The network in release/: from the images to the published file. About four and a half hours on 2
# CPU cores with bf16.
#
#     recipes/release.sh DATA [RUN]     DATA as for train.py, RUN a folder (runs/release)
#
# An interrupted run continues where it was: give the same command again.
set -euo pipefail
DATA=${1:?usage: recipes/release.sh DATA [RUN]}
RUN=${2:-runs/release}
# Paths are the caller's; the scripts are in the project's folder.
absolute() { case $1 in /* | synthetic) echo "$1" ;; *) echo "$PWD/$1" ;; esac }
DATA=$(absolute "$DATA")
RUN=$(absolute "$RUN")
cd "$(dirname "$0")/.."
[ -n "${PYTHON:-}" ] || ${MAKE:-make} --no-print-directory venv
PYTHON=${PYTHON:-.venv/bin/python}
C=$RUN/checkpoints
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

# run FILE COMMAND...: unless the file is there.
run() {
  [ -e "$1" ] || "$PYTHON" "${@:2}" --data "$DATA" --run-dir "$RUN"
}

run "$C/baseline.pth" train.py --epochs 50 --downsample 8 --dropout 0 --lr 0.1 --schedule linear \
  --warmup-epochs 2 --weight-decay 5e-4 --augment cutout
run "$C/pruned95.pth" prune.py --rounds 5 --target 0.95 --epochs 1 --last-epochs 30 \
  --max-drop 10 --weight-decay 2e-4 --label-smoothing 0 --out "$C/pruned95.pth"
run "$C/pruned.pth" prune.py --parent "$C/pruned95.pth" --teacher "$C/baseline.pth" --rounds 1 \
  --target 0.957 --last-epochs 22 --max-drop 10 --weight-decay 2e-4 --label-smoothing 0
run "$C/quantized.pth" quantize.py --method qat --weight-bits 4 --rd-lambda 0.22 --scale-bits 2 \
  --bias-bits 0 --epochs 2 --lr 2e-5 --distill 1
run "$C/int8.pth" to_int8.py
run "$C/compressed.nnz" sparse_compress.py
FILES=("$C"/{baseline,pruned95,pruned,quantized,int8}.pth "$C/compressed.nnz")
for split in val test; do
  "$PYTHON" eval.py "${FILES[@]}" --data "$DATA" --run-dir "$RUN" --split $split
done

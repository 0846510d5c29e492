#!/usr/bin/env bash
# The course report's own recipe, by our stages: 300 epochs, pruning until validation accuracy has
# fallen by half a point (14 rounds in the report, 30 at most), its quantizer.
#
#     recipes/report.sh DATA [RUN]      for a GPU; DATA as for train.py, RUN a folder (runs/report)
#
# An interrupted run continues where it was: give the same command again.
set -euo pipefail
DATA=${1:?usage: recipes/report.sh DATA [RUN]}
RUN=${2:-runs/report}
. "$(dirname "$0")/paths.sh"
DATA=$(absolute "$DATA")
RUN=$(absolute "$RUN")
cd "$(dirname "$0")/.."
RUN=${RUN#"$PWD"/}  # make takes no path with spaces: the project's folder may have some
${MAKE:-make} --no-print-directory ${PYTHON:+PYTHON="$PYTHON"} all DATA="$DATA" RUN="$RUN" \
  TRAIN_FLAGS="--epochs 300 --lr 0.07 --weight-decay 5e-4 --decay-norm --warmup-epochs 0 \
    --label-smoothing 0.1 --dropout 0.2 --start-side 32" \
  PRUNE_FLAGS="--score magnitude --schedule geometric --prune-fraction 0.2 --rounds 30 --epochs 10 \
    --lr 0.001 --lr-schedule constant --distill 0 --augment auto" \
  QUANTIZE_FLAGS="--method reference" SWEEP_FLAGS="--method reference"

#!/usr/bin/env bash
# The whole chain on CIFAR-10 in about 40 minutes on 2 CPU cores: a check of the chain, at half width
# and six epochs, not a good network.
#
#     recipes/small.sh DATA [RUN]       DATA as for train.py, RUN a folder (runs/small)
set -euo pipefail
DATA=${1:?usage: recipes/small.sh DATA [RUN]}
RUN=${2:-runs/small}
. "$(dirname "$0")/paths.sh"
DATA=$(absolute "$DATA")
RUN=$(absolute "$RUN")
cd "$(dirname "$0")/.."
RUN=${RUN#"$PWD"/}  # make takes no path with spaces: the project's folder may have some
${MAKE:-make} --no-print-directory ${PYTHON:+PYTHON="$PYTHON"} all DATA="$DATA" RUN="$RUN" \
  TRAIN_FLAGS="--epochs 6 --width 0.5 --downsample 8 --lr 0.1 --lr-schedule linear \
    --warmup-epochs 1 --weight-decay 5e-4 --dropout 0.2 --augment light --start-side 32" \
  PRUNE_FLAGS="--rounds 5 --target 0.9 --epochs 1 --lr 0.05 --max-drop 1 --augment light \
    --label-smoothing 0"

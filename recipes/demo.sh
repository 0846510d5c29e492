#!/usr/bin/env bash
# The whole chain on images that the project generates: minutes on 2 CPU cores, no download.
#
#     recipes/demo.sh [RUN]             RUN: a folder (demo), which is made anew if a demo made it
set -euo pipefail
RUN=${1:-demo}
. "$(dirname "$0")/paths.sh"
RUN=$(absolute "$RUN")
if [ -e "$RUN" ] && [ ! -e "$RUN/.demo" ]; then
  echo "$RUN is not of an earlier demo: move it away" >&2
  exit 1
fi
flags=${MAKEFLAGS:-}
flags=${flags%% *}  # the short ones; n: `make -n`, which must change nothing
case $flags in
  -* | *=*) flags= ;;
esac
case $flags in
  *n*) ;;
  *) rm -rf "$RUN" && mkdir -p "$RUN" && touch "$RUN/.demo" ;;
esac
cd "$(dirname "$0")/.."
RUN=${RUN#"$PWD"/}  # make takes no path with spaces: the project's folder may have some
${MAKE:-make} --no-print-directory ${PYTHON:+PYTHON="$PYTHON"} all DATA=synthetic RUN="$RUN" SPLIT=test WANDB= \
  TRAIN_FLAGS="--width 0.35 --downsample 8 --epochs 6 --batch-size 64 --lr 0.1 --lr-schedule linear \
    --warmup-epochs 1.5 --weight-decay 5e-4 --augment light --start-side 32 --no-amp" \
  PRUNE_FLAGS="--rounds 2 --target 0.8 --epochs 1 --batch-size 64 --lr 0.05 --max-drop 3 \
    --label-smoothing 0 --augment light --no-amp" \
  QUANTIZE_FLAGS= INT8_FLAGS= COMPRESS_FLAGS= REPORT_FLAGS= \
  SWEEP_FLAGS="--weight-bits 32,8,4,2 --act-bits 32,8,4,2 --calibration 128"

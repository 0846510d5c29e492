# Train MobileNetV2 on CIFAR-10 and compress it. `make help` lists the targets.
SHELL := bash
.DELETE_ON_ERROR:
.SUFFIXES:
MAKEFLAGS += --no-builtin-rules

DATA ?=
WANDB ?=
SPLIT ?= test
RUN ?= .
TRAIN_FLAGS ?=
PRUNE_FLAGS ?=
QUANTIZE_FLAGS ?=
INT8_FLAGS ?=
COMPRESS_FLAGS ?=
SWEEP_FLAGS ?=
SENSITIVITY_FLAGS ?=
EVAL_FLAGS ?=
IMAGES ?=
REPORT_FLAGS ?=
BENCH_FLAGS ?=
PREDICT_FLAGS ?=

# make PYTHON=python3 ... uses that interpreter as it is; otherwise .venv is made.
PYTHON ?= .venv/bin/python
ifeq ($(PYTHON),.venv/bin/python)
VENV := .venv/installed
endif

ifneq ($(words $(RUN)),1)
$(error RUN must be one path without spaces, not "$(RUN)")
endif
C := $(RUN)/checkpoints
# Stages write atomically, so a file that is there is complete: an error after that must not delete
# the work of hours.
.PRECIOUS: $(C)/baseline.pth $(C)/pruned.pth $(C)/quantized.pth $(C)/int8.pth $(C)/compressed.nnz
COMMON = --run-dir $(RUN) $(if $(DATA),--data "$(DATA)") $(if $(WANDB),--wandb)

# A waiting thread that sleeps leaves its core to others. On cores that are yours alone, ACTIVE
# trains 1.15 times faster; if others use them too, it is slower by more than that.
export OMP_WAIT_POLICY ?= PASSIVE
# Large pages: a training step on 2 cores of a CPU takes 3 to 5% less time (batch 128, full width:
# 0.262 -> 0.251 s at 16x16 pixels, 1.028 -> 0.973 s at 32x32). Only glibc (Linux) reads this.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
export PYTHONUNBUFFERED = 1

# $(call stage,name,flags): run it, with its output on the terminal and in logs/<name>.log. The
# options are set here, since GNU make 3.81 (macOS) has no .SHELLFLAGS: without pipefail, tee's exit
# code would hide a failure of the stage.
stage = @set -eu -o pipefail; \
	mkdir -p $(RUN)/logs; \
	echo "\$$ python $(1) $(COMMON) $(2)"; \
	$(PYTHON) $(1) $(COMMON) $(2) | tee -ia $(RUN)/logs/$(basename $(notdir $(firstword $(1)))).log

.PHONY: all train prune quantize int8 compress sweep sensitivity eval report bench predict verify \
	publish status help clean demo results test venv
all: report  ## every stage, from the images to the report

train: $(C)/baseline.pth        ## CIFAR-10 -> checkpoints/baseline.pth      (TRAIN_FLAGS)
prune: $(C)/pruned.pth          ## baseline -> checkpoints/pruned.pth        (PRUNE_FLAGS)
quantize: $(C)/quantized.pth    ## pruned -> checkpoints/quantized.pth       (QUANTIZE_FLAGS)
int8: $(C)/int8.pth             ## quantized -> checkpoints/int8.pth, .onnx  (INT8_FLAGS)
compress: $(C)/compressed.nnz   ## int8 -> checkpoints/compressed.nnz        (COMPRESS_FLAGS)
sweep: $(RUN)/logs/sweep.csv    ## the grid of bit-widths -> logs/sweep.csv  (SWEEP_FLAGS)
sensitivity: $(RUN)/logs/sensitivity.csv  ## what each layer loses at few bits (SENSITIVITY_FLAGS)

# Scripts are order-only: editing a comment retrains nothing. `make status` says what is stale.
$(C)/baseline.pth: | $(VENV) train.py
	$(call stage,train.py,$(TRAIN_FLAGS))
$(C)/pruned.pth: $(C)/baseline.pth | prune.py
	$(call stage,prune.py,$(PRUNE_FLAGS))
$(C)/quantized.pth: $(C)/pruned.pth | quantize.py
	$(call stage,quantize.py,$(QUANTIZE_FLAGS))
$(C)/int8.pth: $(C)/quantized.pth | to_int8.py
	$(call stage,to_int8.py,$(INT8_FLAGS))
$(C)/compressed.nnz: $(C)/int8.pth | sparse_compress.py
	$(call stage,sparse_compress.py,$(COMPRESS_FLAGS))
$(RUN)/logs/sweep.csv: $(C)/pruned.pth | sweep.py
	$(call stage,sweep.py,$(SWEEP_FLAGS))
$(RUN)/logs/sensitivity.csv: $(C)/pruned.pth | sensitivity.py
	$(call stage,sensitivity.py,$(SENSITIVITY_FLAGS))

eval: $(VENV)  ## accuracy, bytes, MACs of the chain's files, or of FILES="a b" (EVAL_FLAGS)
	$(call stage,eval.py $(FILES),--split $(SPLIT) $(EVAL_FLAGS))

report: $(C)/compressed.nnz $(RUN)/logs/sweep.csv  ## the tables and plots of all stages (REPORT_FLAGS)
	$(call stage,report.py,--split $(SPLIT) $(REPORT_FLAGS))

bench: $(C)/int8.pth  ## speed of the fp32 networks and of int8.onnx -> plots/bench.png (BENCH_FLAGS)
	$(call stage,bench.py,$(BENCH_FLAGS))

predict: $(VENV)  ## classify IMAGES="photo.jpg folder" (PREDICT_FLAGS="--model FILE")
	@$(PYTHON) predict.py --run-dir $(RUN) $(PREDICT_FLAGS) $(IMAGES)

verify: $(VENV)  ## check the published file: its hash, that it decodes, its accuracy on your data
	@$(PYTHON) verify.py $(if $(DATA),--data "$(DATA)")

publish: $(VENV)  ## copy the compressed file, and what eval.py measured on both splits, to release/
	@$(PYTHON) publish.py --run-dir $(RUN)

status: $(VENV)  ## which files are there, which are stale, and why
	@$(PYTHON) report.py --run-dir $(RUN) --status

demo: $(VENV)  ## all stages on generated images, in minutes, in the folder demo/
	@rm -rf demo
	+@MAKE="$(MAKE)" recipes/demo.sh demo

results: $(VENV)  ## RESULTS.md and the tables in README.md, from results/*.json
	@$(PYTHON) results.py

test: $(VENV)  ## the linter and the tests
	$(PYTHON) -m ruff check .
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto

venv: $(VENV)  ## the virtual environment, with pinned dependencies
.venv/installed: requirements.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet -r requirements.txt
	touch $@

clean:  ## delete all outputs but the trained baseline, its log and its state
	$(if $(filter .,$(RUN)),rm -rf demo)
	find $(C) $(RUN)/logs $(RUN)/plots -mindepth 1 ! -name .gitkeep ! -name 'baseline.pth*' \
		! -name 'train.*' -delete 2>/dev/null || true

help:  ## this list
	@awk -F':.*## *' '/^[a-z0-9]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo '  A file that exists is not made again, even with other flags: delete it first, or make -B.'
	@echo '  DATA=DIR (default: download)  WANDB=1  RUN=DIR (default .)  SPLIT=val|test  PYTHON=...'
	@echo '  e.g.  make all DATA=$$HOME/cifar10 TRAIN_FLAGS="--epochs 60" PRUNE_FLAGS="--target 0.97"'

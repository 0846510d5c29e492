# Train MobileNetV2 on CIFAR-10 and compress it. `make help` lists the targets.
SHELL := bash
.DELETE_ON_ERROR:
.SUFFIXES:
MAKEFLAGS += --no-builtin-rules
.DEFAULT_GOAL := help

SPLIT ?= test
RUN ?= .

# The scripts and .venv are in the Makefile's folder. RUN, DATA, FILES and IMAGES are as seen from
# where make was called: with `make -f elsewhere/Makefile PYTHON=...`, elsewhere may be read-only.
HERE := $(addsuffix /,$(abspath $(filter-out ./,$(dir $(lastword $(MAKEFILE_LIST))))))
ifeq ($(wildcard $(HERE)train.py),)
$(error the path of the Makefile must not have spaces: call make in its folder)
endif

# make PYTHON=python3 ... uses that interpreter as it is; otherwise .venv is made, and made anew if
# its interpreter is gone. (With another python3 in PATH it stays: a job may be running in it.)
PYTHON ?= $(HERE).venv/bin/python
ifeq ($(origin PYTHON),file)
VENV := $(HERE).venv/installed
WORKS := $(shell $(PYTHON) -c 'import sys; print("yes" * (sys.version_info >= (3, 11)))' 2>/dev/null)
ifndef WORKS
.PHONY: $(VENV)
endif
else
VENV := check-python
endif
# $(call check-python,interpreter): fail with one line if it is older than 3.11, be it 2.7.
check-python = @$(1) -c 'import sys; sys.version_info < (3, 11) and sys.exit("Python 3.11 or later \
	is needed, and $(1) is %d.%d: put a newer one first in PATH, or make PYTHON=..., one that has \
	the packages of requirements.txt" % sys.version_info[:2])'

# $(call quote,text): one word of the shell. $(call names,text): one word if there is a file of that
# name; else the text as it is, in which names that have spaces are quoted.
quote = '$(subst ','\'',$(1))'
names = $(if $(shell [ -e $(call quote,$(1)) ] && echo yes),$(call quote,$(1)),$(1))

# A misspelt variable would be ignored, and the stage run without it.
VARIABLES := DATA WANDB SPLIT RUN DEVICE PROCESSES PYTHON FILES IMAGES $(foreach stage,TRAIN PRUNE \
	QUANTIZE INT8 COMPRESS SWEEP SENSITIVITY EVAL REPORT BENCH PREDICT,$(stage)_FLAGS)
given = $(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name)))
UNKNOWN := $(filter-out $(VARIABLES) SHELL .SHELLFLAGS MAKE% OMP_% GLIBC_TUNABLES,$(given))
ifneq ($(UNKNOWN),)
$(error no variable is named $(UNKNOWN): `make help` lists them)
endif

ifneq ($(words $(RUN)),1)
$(error RUN must be one path without spaces, not "$(RUN)")
endif
C := $(RUN)/checkpoints
# Stages write atomically, so a file that is there is complete: an error after that must not delete
# the work of hours.
.PRECIOUS: $(C)/baseline.pth $(C)/pruned.pth $(C)/quantized.pth $(C)/int8.pth $(C)/compressed.nnz
COMMON = --run-dir $(RUN) $(if $(DATA),--data $(call quote,$(DATA))) $(if $(filter-out 0 no false,$(WANDB)),--wandb) \
	$(DEVICE_FLAG)
DEVICE_FLAG = $(if $(DEVICE),--device $(DEVICE))
# The stages that several processes share, and how they are started if PROCESSES says how many.
SHARED = train.py prune.py quantize.py sweep.py
LAUNCH = -m torch.distributed.run --standalone --nproc-per-node $(PROCESSES)
launch = $(if $(PROCESSES),$(if $(filter $(1),$(SHARED)),$(LAUNCH) ))

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
	echo $(call quote,$$ python $(call launch,$(1))$(1) $(COMMON) $(2)); \
	$(PYTHON) $(call launch,$(1))$(HERE)$(1) $(COMMON) $(2) | tee -ia $(RUN)/logs/$(basename $(firstword $(1))).log

.PHONY: all train prune quantize int8 compress sweep sensitivity eval report bench predict verify \
	publish status help clean demo results test venv check-python
all: report  ## the whole chain, the sweep and the report

train: $(C)/baseline.pth        ## CIFAR-10 -> checkpoints/baseline.pth      (TRAIN_FLAGS)
prune: $(C)/pruned.pth          ## baseline -> checkpoints/pruned.pth        (PRUNE_FLAGS)
quantize: $(C)/quantized.pth    ## pruned -> checkpoints/quantized.pth       (QUANTIZE_FLAGS)
int8: $(C)/int8.pth             ## quantized -> checkpoints/int8.pth, .onnx  (INT8_FLAGS)
compress: $(C)/compressed.nnz   ## int8 -> checkpoints/compressed.nnz        (COMPRESS_FLAGS)
sweep: $(RUN)/logs/sweep.csv    ## the grid of bit-widths -> logs/sweep.csv  (SWEEP_FLAGS)
sensitivity: $(RUN)/logs/sensitivity.csv  ## what each layer loses at few bits (SENSITIVITY_FLAGS)

# Scripts are order-only: editing a comment retrains nothing. `make status` says what is stale.
$(C)/baseline.pth: | $(VENV) $(HERE)train.py
	$(call stage,train.py,$(TRAIN_FLAGS))
$(C)/pruned.pth: $(C)/baseline.pth | $(HERE)prune.py
	$(call stage,prune.py,$(PRUNE_FLAGS))
$(C)/quantized.pth: $(C)/pruned.pth | $(HERE)quantize.py
	$(call stage,quantize.py,$(QUANTIZE_FLAGS))
$(C)/int8.pth: $(C)/quantized.pth | $(HERE)to_int8.py
	$(call stage,to_int8.py,$(INT8_FLAGS))
$(C)/compressed.nnz: $(C)/int8.pth | $(HERE)sparse_compress.py
	$(call stage,sparse_compress.py,$(COMPRESS_FLAGS))
$(RUN)/logs/sweep.csv: $(C)/pruned.pth | $(HERE)sweep.py
	$(call stage,sweep.py,$(SWEEP_FLAGS))
$(RUN)/logs/sensitivity.csv: $(C)/pruned.pth | $(HERE)sensitivity.py
	$(call stage,sensitivity.py,$(SENSITIVITY_FLAGS))

eval: $(VENV)  ## accuracy, bytes, MACs of the chain's files, or of FILES="a b" (EVAL_FLAGS)
	$(call stage,eval.py $(call names,$(FILES)),--split $(SPLIT) $(EVAL_FLAGS))

report: $(C)/compressed.nnz $(RUN)/logs/sweep.csv  ## the tables and plots of all stages (REPORT_FLAGS)
	$(call stage,report.py,--split $(SPLIT) $(REPORT_FLAGS))

bench: $(C)/int8.pth  ## speed of the fp32 networks and of int8.onnx -> plots/bench.png (BENCH_FLAGS)
	$(call stage,bench.py,$(BENCH_FLAGS))

predict: $(VENV)  ## classify IMAGES="photo.jpg folder" (PREDICT_FLAGS="--model FILE")
	@$(PYTHON) $(HERE)predict.py --run-dir $(RUN) $(DEVICE_FLAG) $(PREDICT_FLAGS) $(call names,$(IMAGES))

verify: $(VENV)  ## check the published files: hashes, that they decode, their accuracy on your data
	@$(PYTHON) $(HERE)verify.py $(if $(DATA),--data $(call quote,$(DATA))) $(DEVICE_FLAG)

publish: $(VENV)  ## replace release/: this run's .nnz, baseline.pth, charts and measurements
	@$(PYTHON) $(HERE)publish.py --run-dir $(RUN)

status: $(VENV)  ## which files are there, which are stale, and why
	@$(PYTHON) $(HERE)report.py --run-dir $(RUN) --status

demo: $(VENV)  ## the whole chain on generated images, in minutes, in the folder demo/
	+@MAKE="$(MAKE)" $(if $(filter file,$(origin PYTHON)),,PYTHON=$(call quote,$(PYTHON))) \
		$(HERE)recipes/demo.sh demo

results: $(VENV)  ## RESULTS.md and the tables in README.md, from results/*.json
	@$(PYTHON) $(HERE)results.py --folder $(HERE).

test: $(VENV)  ## the linter and the tests
	cd $(HERE). && $(PYTHON) -m ruff check .
	cd $(HERE). && OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto

venv: $(VENV)  ## the virtual environment, with pinned dependencies
$(HERE).venv/installed: $(HERE)requirements.txt
ifndef WORKS
	$(call check-python,python3)
	rm -rf $(HERE).venv
	python3 -m venv $(HERE).venv
endif
	$(HERE).venv/bin/python -m pip install --quiet -r $<
	touch $@
check-python:
	$(call check-python,$(PYTHON))

# From elsewhere, the folder of one's own project is the default.
FOREIGN = $(and $(HERE),$(filter file,$(origin RUN)))
OUTPUTS = $(wildcard $(C) $(RUN)/logs $(RUN)/plots)
clean:  ## delete all of checkpoints/, logs/, plots/, demo/ but the trained baseline and its log
	$(if $(FOREIGN),$(error clean deletes all of ./checkpoints, ./logs and ./plots: give RUN=. if that is meant))
	$(if $(filter .,$(RUN)),$(if $(wildcard demo/.demo),rm -rf demo))
	$(if $(OUTPUTS),find $(OUTPUTS) -mindepth 1 -maxdepth 1 ! -name .gitkeep \
		! -name 'baseline.pth*' ! -name 'train.*' -exec rm -rf {} +)

help:  ## this list
	@awk -F':.*## *' '/^[a-z0-9]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' \
		$(HERE)Makefile
	@echo
	@echo '  A target that makes a file, bench and report run every earlier stage whose file is missing,'
	@echo '  then the later ones again: make -n TARGET shows which.'
	@echo '  Dates alone are compared: to make a file with other flags, delete it first.'
	@echo '  DATA=DIR (default: download)  WANDB=1  RUN=DIR (default .)  PYTHON=...'
	@echo '  SPLIT=val|test (default test): of eval and report'
	@echo '  DEVICE=cuda:1 (default: GPU 0 if it works, else the CPU)'
	@echo '  PROCESSES=4: four processes train, prune, sweep (and quantize by qat), on a GPU each or the CPU'
	@echo "  One file with spaces: IMAGES='a b.png'; several: IMAGES=\"'a b.png' c.png\"; FILES= alike."
	@echo '  Paths are as seen from where make is called, also with make -f elsewhere/Makefile.'
	@echo '  e.g.  make all DATA=$$HOME/cifar10 TRAIN_FLAGS="--epochs 300" PRUNE_FLAGS="--target 0.97"'

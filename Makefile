# Every target sets up what it needs: a machine with Python, pip and make is enough.
#   make train                               trains the digits preset: samples and weights in runs/digits
#   make train ARGS="--preset cifar10-small" any option of scripts/train.py
#   make evaluate                            measures what it made: runs/digits/eval.json and eval.md
#   make test                                the default tests; CONSTRAINTS=constraints-lowest.txt: at the oldest versions
#   make test-device                         the suites that use a device, on a simulated accelerator (g++)
#   make gpu ARGS="--data ../data/cifar10"   measures a GPU: docs/gpu/<card>.md
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
ARGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install train evaluate test test-slow test-package test-order style format bench gpu test-core test-device clean

help:
	@echo "make train | evaluate | test | test-slow | test-package | style | format | bench | gpu | test-device | clean      (ARGS=... are passed on, PYTHON=... picks the Python)"

# Debian without python3-venv has no ensurepip: then the machine's own pip fills the environment.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
		{ $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[test]"
	touch $@

install: $(STAMP)

# Plain python, not a launcher: Ctrl-C and SIGTERM then reach the training itself, and its exit code is the command's.
train: $(STAMP)
	$(BIN)/python scripts/train.py $(ARGS)

# One process per core, a file at a time each.
test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not gpu and not hub" $(ARGS)

# The sdist and the wheel as they would be published, used outside the checkout.
test-package: $(STAMP)
	$(BIN)/python -m pytest -m slow tests/test_packaging.py $(ARGS)

# What every version must pass: the mathematics, scheduler, pipeline, networks, averages and checkpoints.
CORE_TESTS := test_schedules test_process test_reverse test_losses test_likelihood test_scheduler test_scheduler_contract \
	test_pipeline test_pipeline_portable test_unet test_ema test_checkpoint test_sample
test-core: $(STAMP)
	$(BIN)/python -m pytest $(CORE_TESTS:%=tests/%.py) $(ARGS)

# With the simulated accelerator as Accelerate's device. It is built once (under a minute) and cached; deselected.txt
# beside it names what cannot run there, with the reason.
DEVICE_TESTS ?= test_device test_bound test_train test_resume test_sample test_evaluate test_calibrate \
	$(patsubst tests/%.py,%,$(wildcard tests/test_scheduler*.py tests/test_pipeline*.py))
ON_DEVICE := PYTHONPATH=tests $(BIN)/python
test-device: $(STAMP)
	$(ON_DEVICE) -c "import accelerator; accelerator.install()"
	$(ON_DEVICE) -m pytest -p accelerator.plugin -m "not slow and not hub" -n auto --dist loadfile \
		$(DEVICE_TESTS:%=tests/%.py) $(ARGS)

test-order: $(STAMP)
	$(BIN)/python -m pytest tests/test_import_order.py

style: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# 297 test digits, 1,000 samples each: bits/dim, Frechet distances, plots, the table runs/digits/eval.md. Two processes of
# one thread: the digits' network is too small to share an image's work, and the results do not depend on their number.
EVALUATE := OMP_NUM_THREADS=1 $(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml --num_processes 2 \
	scripts/evaluate.py --cpu --extractor pixels --num_samples 1000 --plots
evaluate: $(STAMP)
	$(EVALUATE) --metrics bpd,fid --variance_type fixed_small,fixed_large --sampler ddpm,ddim \
		--num_inference_steps 100,50,10 $(ARGS)
	$(EVALUATE) --metrics fid --variance_type fixed_large --num_inference_steps 1000 $(ARGS)

gpu: $(STAMP)
	$(BIN)/python -m benchmarks.gpu $(ARGS)

bench: $(STAMP)
	$(BIN)/python benchmarks/speed.py $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

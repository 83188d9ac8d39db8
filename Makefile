# SPDX-License-Identifier: Apache-2.0
#
#   make demo    small clips of the built-in model, on any CPU
#   make test    everything that must pass before a change goes in
#   make clean   remove what the two made
#
# Both need Python 3.11 or newer and, the first time, the network.

PYTHON ?= python3

# why: pyproject.toml allows several versions and pip would take the newest; this one is tested.
# Another build can be named: make test TORCH='torch==2.13.0 --index-url ...'
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
DEMO := build/demo

.PHONY: demo test clean
.NOTPARALLEL:

demo: $(VENV)/runtime.stamp $(DEMO)/nano/bundle.json
	$(BIN)/pw generate --model $(DEMO)/nano --prompts pw_runtime/data/demo_prompts.txt \
		--preset nano --out outputs/demo --contact-sheet
	@echo
	@echo "clips and contact sheet:"
	@ls outputs/demo/*.mp4 outputs/demo/*.png

# why one thread: libgomp's threads spin while they wait, and two test processes with two threads
# each on two cores then take ten times as long.
test: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

clean:
	rm -rf $(VENV) build dist outputs/demo .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(DEMO)/nano/bundle.json: $(DEMO)/checkpoint/pixelwizard/highres.pt
	$(BIN)/pw convert --wan $(DEMO)/checkpoint --highres $< --out $(DEMO)/nano

$(DEMO)/checkpoint/pixelwizard/highres.pt: $(wildcard export/pw_export/nano/trained/*.safetensors) \
		| $(VENV)/runtime.stamp
	rm -rf $(DEMO)
	$(BIN)/python -m pw_export.nano --out $(DEMO)/checkpoint

$(VENV)/torch.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "PixelWizard Runtime needs Python 3.11 or newer"; \
		echo "  got: $(PYTHON), which is $$($(PYTHON) --version 2>&1)"; \
		echo "  do this: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	touch $@

$(VENV)/runtime.stamp: $(VENV)/torch.stamp pyproject.toml
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/dev.stamp: $(VENV)/torch.stamp pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@ $(VENV)/runtime.stamp

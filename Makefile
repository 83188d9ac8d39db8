# SPDX-License-Identifier: Apache-2.0
#
#   make demo         small clips of the built-in model, on any CPU
#   make test         everything that must pass before a change goes in
#
#   make fix          ruff's fixes, then its format
#   make check        lint, format, import contracts, types
#   make quick        the tests that matter most, in under a minute
#   make test-latest  the tests on the newest versions that pyproject.toml allows
#   make lock         renew requirements/*.txt
#   make wheel        dist/*.whl
#   make docs         the documentation as a site: build/site/index.html
#   make clean        remove what the others made, requirements/*.txt excepted
#
# Each sets up what it needs with Python 3.11 or newer and, the first time, the network.

PYTHON ?= python3

# why not locked by hash: the index has a CUDA build, many machines take another one.
# That other build can be named: make test TORCH='torch==2.13.0 --index-url ...'
TORCH ?= torch==2.13.0
# What make test-latest installs, within the range of pyproject.toml.
TORCH_LATEST ?= torch
UV := uv==0.13.9

VENV := .venv
BIN := $(VENV)/bin
LATEST := .venv-latest
DEMO := build/demo

# why one thread: libgomp's threads spin while they wait, and two test processes with two threads
# each on two cores then take ten times as long.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
QUICK := tests/e2e/test_generate.py tests/machine tests/models tests/planning tests/sampling \
	tests/stages/test_decode.py tests/video

# why the lock first: it holds torch's own dependencies, so that torch adds only its build's.
# why no isolation: an isolated build would take the newest build back end, not the locked one.
define install
$(BIN)/python -m pip install --quiet --no-deps --require-hashes --requirement $(1)
$(BIN)/python -m pip install --quiet $(TORCH)
$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
$(BIN)/python -m pip check
touch $@
endef

.PHONY: demo test fix check quick test-latest lock wheel docs clean FORCE
.NOTPARALLEL:

demo: $(VENV)/runtime.stamp $(DEMO)/nano/bundle.json
	$(BIN)/pw generate --model $(DEMO)/nano --prompts pw_runtime/data/demo_prompts.txt \
		--preset nano --out outputs/demo --contact-sheet --overwrite --fresh
	@echo
	@echo "clips and contact sheet:"
	@ls outputs/demo/*.mp4 outputs/demo/*.png

test: check
	$(PYTEST)

fix: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

quick: $(VENV)/dev.stamp
	$(PYTEST) -m "not slow" $(QUICK)

test-latest: BIN = $(LATEST)/bin
test-latest:
	$(PYTHON) -m venv --clear $(LATEST)
	$(BIN)/python -m pip install --quiet $(TORCH_LATEST) --editable '.[dev]'
	$(BIN)/python requirements/newest.py $(TORCH)
	$(PYTEST)

lock:
	$(PYTHON) -m venv --clear build/lock
	build/lock/bin/python -m pip install --quiet $(UV)
	build/lock/bin/python requirements/lock.py $(TORCH)

wheel: $(VENV)/dev.stamp
	$(BIN)/python -m build --wheel --no-isolation

docs: $(VENV)/dev.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --config-file docs/site/mkdocs.yml
	@echo 'build/site/index.html; with its search: $(BIN)/python -m http.server --directory build/site'

clean:
	rm -rf $(VENV) $(LATEST) build dist outputs/demo
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(DEMO)/nano/bundle.json: $(DEMO)/checkpoint/pixelwizard/highres.pt
	$(BIN)/pw convert --wan $(DEMO)/checkpoint --highres $< --out $(DEMO)/nano

$(DEMO)/checkpoint/pixelwizard/highres.pt: $(wildcard export/pw_export/nano/trained/*.safetensors) \
		| $(VENV)/runtime.stamp
	rm -rf $(DEMO)
	$(BIN)/python -m pw_export.nano --out $(DEMO)/checkpoint

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "PixelWizard Runtime needs Python 3.11 or newer"; \
		echo "  got: $(PYTHON), which is $$($(PYTHON) --version 2>&1)"; \
		echo "  do this: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)

# Changes only when another TORCH is asked for.
$(VENV)/torch.txt: $(VENV)/pyvenv.cfg FORCE
	@echo '$(TORCH)' | cmp --silent - $@ || echo '$(TORCH)' > $@

$(VENV)/runtime.stamp: $(VENV)/torch.txt requirements/runtime.txt pyproject.toml
	$(call install,requirements/runtime.txt)

$(VENV)/dev.stamp: $(VENV)/torch.txt requirements/dev.txt pyproject.toml
	$(call install,requirements/dev.txt)
	touch $(VENV)/runtime.stamp

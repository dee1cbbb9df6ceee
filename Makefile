# Every target does its own set-up: a virtual environment in .venv with the exact versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
NOTEBOOK := ERA_S12_Assignment.ipynb
NOTEBOOKS := $(NOTEBOOK) more.ipynb solutions.ipynb

# What NumPy of this version chooses at run time, and this CPU has: without it, it computes as on an older one.
NPY_FEATURES := from numpy._core._multiarray_umath import __cpu_dispatch__ as d, __cpu_features__ as f; print(*(n for n in d if f.get(n)))

.PHONY: help run test numeric app publish push space-check colab-check faults notebook bench lint clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(READY) ## execute the notebook into runs/, then serve the Space that came out of it
	@$(BIN)/python -m tools.run run

test: $(READY) ## all tests, the notebooks and the app in a browser among them; COVERAGE=1 measures what they run
	SMOKE_TEST=1 $(BIN)/python $(if $(COVERAGE),-m coverage run) -m pytest tests $(NOTEBOOKS) \
		--nbval-lax --nbval-current-env --nbval-cell-timeout=600

numeric: $(READY) ## the tests that compare computed numbers, with the instructions of older CPUs and with one thread
	SMOKE_TEST=1 ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(BIN)/python -m pytest tests -m numeric
	features=$$($(BIN)/python -c "$(NPY_FEATURES)") && \
		SMOKE_TEST=1 NPY_DISABLE_CPU_FEATURES="$$features" $(BIN)/python -m pytest tests -m numeric
	SMOKE_TEST=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m numeric

app: $(READY) ## serve the committed Space
	@$(BIN)/python -m tools.run app

publish: $(READY) ## promote the newest finished run on CIFAR-10 (or RUN=runs/...) to the committed results
	@$(BIN)/python -m tools.publish $(RUN)

push: $(READY) ## send the committed Space to Hugging Face, SPACE=user/name, its weights, MODEL=user/name, or both; DRY_RUN=1 only says what, YES=1 does not ask
	@$(BIN)/python -m tools.push $(SPACE) $(if $(MODEL),--model $(MODEL)) $(if $(filter-out 0 no false,$(DRY_RUN)),--dry-run) $(if $(filter 1 yes true,$(YES)),--yes)

space-check: $(READY) ## install and try the Space in an empty environment, as Hugging Face does
	@$(BIN)/python -m tools.space_check

colab-check: $(READY) ## run the notebook with what Colab preinstalls, in an environment of its own
	@$(BIN)/python -m tools.colab_check

faults: $(READY) ## the long form of the fault-injection tests; prints what survived and what was lost
	FAULTS=long $(BIN)/python -m pytest tests/test_faults.py tests/test_devices.py tests/test_fuzz.py tests/test_download.py -q

notebook: $(READY) ## open the notebook
	$(BIN)/jupyter lab $(NOTEBOOK)

bench: $(READY) ## speed as ratios within one run, more than an hour; accuracy: python -m benchmarks.accuracy RECIPE
	$(BIN)/python -m benchmarks.speed

lint: $(READY) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean: ## remove caches and the environment; runs/, checkpoints/ and data/ stay
	rm -rf .venv .pytest_cache .ruff_cache .gradio space/.gradio .coverage*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): requirements.txt requirements-dev.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15) and "Python 3.11 to 3.14 is needed (PYTHON=python3.13 names another), this is " + sys.version)'
	@echo "Setting up .venv: about 6 GB, a few minutes the first time"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	@touch $(READY)

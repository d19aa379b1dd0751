# `make demo` and `make test` each set up .venv (Python 3.12, pinned versions) and then do their job.

SHELL := /bin/bash
PYTHON := .venv/bin/python
TORCHRUN := .venv/bin/torchrun
# Ranks share the cores: one thread each.
export OMP_NUM_THREADS ?= 1
TEST_WORKERS ?= 2

.PHONY: install demo demo-long demo-rl demo-served test test-slow test-serving test-rl test-te test-trackers test-browser lint clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@if command -v uv >/dev/null; then uv venv --quiet --allow-existing --python 3.12 .venv; \
	else $$(command -v python3.12 || echo python3) -m venv .venv; fi
	@command -v uv >/dev/null || [ -x .venv/bin/uv ] || $(PYTHON) -m pip install --quiet uv
	@PATH="$$PATH:.venv/bin" uv pip install --quiet --python $(PYTHON) --constraint constraints.txt --editable '.[test]'
	@# Compiled once here: where bytecode is not written, each process would compile megatron-core and torch again.
	@$(PYTHON) -m compileall -q -j 0 .venv/lib >/dev/null 2>&1 || true
	@touch $@

# demo-long: the same with more games and steps, for an agent that plays better.
demo-long: WORLD := --games 400 --aimless-games 60 --pretrain-steps 700
demo-long: TRAINING := --set hyperparameters.max_steps=500
demo-long: demo
demo: install
	$(PYTHON) tools/make_demo.py --out demo $(WORLD)
	@[ runs/demo/config.toml -nt demo/stamp.json ] || rm -rf runs/demo  # of another demo model
	$(TORCHRUN) --nproc-per-node 4 tools/train.py --config configs/demo.toml $(TRAINING)
	$(PYTHON) tools/check_adapter.py demo/model runs/demo/adapter demo/data/validation.jsonl --run-dir runs/demo
	$(PYTHON) -m examples.crafter.play demo/model runs/demo/adapter

# The adapter of `make demo` through a few steps of GRPO in TRL, and on with megasft from there (2 minutes).
demo-rl: install .venv-rl/installed
	@[ -d runs/demo/adapter ] || { echo "runs/demo/adapter: no such folder; run make demo first" >&2; exit 2; }
	rm -rf runs/demo-grpo runs/demo-after-grpo
	.venv-rl/bin/python examples/rl/grpo.py demo/model runs/demo/adapter demo/data/train.jsonl --out runs/demo-grpo
	.venv/bin/megasft train --config configs/demo.toml --set job.init_adapter=runs/demo-grpo \
		--set job.output_dir=runs/demo-after-grpo --set hyperparameters.max_steps=4

# The adapter of `make demo` in vLLM and llama.cpp over HTTP, and whether their tokens are megasft's (5 minutes).
demo-served: install .venv-serving/installed
	@[ -d runs/demo/adapter ] || { echo "runs/demo/adapter: no such folder; run make demo first" >&2; exit 2; }
	$(PYTHON) examples/serving/check_served.py runs/demo demo/data/validation.jsonl

lint: install
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# Two files of tests at a time, in the order of tests/conftest.py; those of one file share what they set up. Prints the ten
# longest.
test: lint
	$(PYTHON) -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

# What `make test` leaves out, 15 to 20 minutes: two nodes over a network, ranks that hang, models at their true sizes.
test-slow: install
	$(PYTHON) -m pytest -m slow

# Adapters in vLLM, llama.cpp and trainers that read them, in an environment of their own (6 GB, 5 minutes).
test-serving: install .venv-serving/installed
	$(PYTHON) -m pytest -m serving tests/serving -rP

.venv-serving/installed: tests/serving/requirements.txt | install
	@PATH="$$PATH:.venv/bin" uv venv --quiet --allow-existing --python $(PYTHON) .venv-serving
	@PATH="$$PATH:.venv/bin" uv pip install --quiet --python .venv-serving/bin/python --no-deps --requirement $<
	@touch $@

# Adapters through TRL's GRPO and back, in an environment of its own (5 GB, 5 minutes).
test-rl: install .venv-rl/installed
	$(PYTHON) -m pytest -m rl tests/rl

.venv-rl/installed: examples/rl/requirements.txt constraints.txt | install
	@PATH="$$PATH:.venv/bin" uv venv --quiet --allow-existing --python $(PYTHON) .venv-rl
	@PATH="$$PATH:.venv/bin" uv pip install --quiet --python .venv-rl/bin/python --constraint constraints.txt --requirement $<
	@.venv-rl/bin/python -m compileall -q -j 0 .venv-rl/lib >/dev/null 2>&1 || true
	@touch $@

# Transformer Engine's real Python on the CPU, in an environment of its own (1 minute): names, shapes, checks of arguments.
# TE_WHEEL is a wheel of transformer_engine_torch, which PyPI has as source only (docs/gpu-setup.md).
test-te: install .venv-te/installed
	OMP_NUM_THREADS=1 .venv-te/bin/python -m pytest -m te tests/te

.venv-te/installed: tests/te/requirements.txt constraints.txt | install
	@[ -f "$(TE_WHEEL)" ] || { echo "TE_WHEEL=FILE make test-te: FILE is a wheel of transformer_engine_torch 2.20.2, see docs/gpu-setup.md" >&2; exit 2; }
	@PATH="$$PATH:.venv/bin" uv venv --quiet --allow-existing --python $(PYTHON) .venv-te
	@PATH="$$PATH:.venv/bin" uv pip install --quiet --python .venv-te/bin/python --constraint constraints.txt \
		--requirement $< --editable '.[test]' "$(TE_WHEEL)"
	@touch $@

# Weights & Biases, MLflow and Trackio, offline, read back by their own APIs, in an environment of their own (2 minutes).
test-trackers: install .venv-trackers/installed
	.venv-trackers/bin/python -m pytest -m trackers tests/trackers -rP

.venv-trackers/installed: tests/trackers/overrides.txt pyproject.toml constraints.txt | install
	@PATH="$$PATH:.venv/bin" uv venv --quiet --allow-existing --python $(PYTHON) .venv-trackers
	@PATH="$$PATH:.venv/bin" uv pip install --quiet --python .venv-trackers/bin/python --constraint constraints.txt \
		--override $< --editable '.[test,wandb,mlflow,trackio]'
	@.venv-trackers/bin/python -m compileall -q -j 0 .venv-trackers/lib >/dev/null 2>&1 || true
	@touch $@

# The dashboard and the report in the system's Chromium (apt-get install chromium), 1 minute. CHROMIUM names another one.
test-browser: install .venv/browser-installed
	$(PYTHON) -m pytest -m browser tests/browser

.venv/browser-installed: tests/browser/requirements.txt | install
	@PATH="$$PATH:.venv/bin" uv pip install --quiet --python $(PYTHON) --constraint constraints.txt --requirement $<
	@touch $@

clean:
	rm -rf .venv .venv-serving .venv-rl .venv-te .venv-trackers demo runs

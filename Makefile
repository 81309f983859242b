# `make help` lists the targets. Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3.11
VENV := .venv
RUN := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-lowest check style cards figures schema speed clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.installed

demo: $(VENV)/.installed ## train a small Swin on real handwritten digits, load it with AutoModel, classify a picture
	$(RUN) recipes/finetune.py fit
	$(RUN) recipes/demo.py

test: $(VENV)/.installed-dev ## the default tests: no network, minutes
	$(RUN) -m pytest -n auto

test-slow: $(VENV)/.installed-dev ## the slow tests: compilers, exporters, faults step by step
	$(RUN) -m pytest -n auto -m slow

test-lowest: ## the default tests with the lowest versions that pyproject.toml names, in .venv-lowest
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet uv
	.venv-lowest/bin/uv pip install --python .venv-lowest/bin/python --resolution lowest-direct --editable '.[dev]'
	.venv-lowest/bin/python -m pytest -n auto

check: $(VENV)/.installed-dev ## report: ruff, mypy, generated files
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) model_cards/render.py --check

style: $(VENV)/.installed-dev ## repair what ruff can
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

cards: $(VENV)/.installed-dev ## rewrite model_cards/
	$(RUN) model_cards/render.py

figures: $(VENV)/.installed-dev ## redraw the figures of docs/swin.md
	$(RUN) docs/figures.py docs/figures

schema: $(VENV)/.installed ## rewrite the JSON schemas of the YAML files of swin_hf/training/configs
	$(RUN) recipes/finetune.py --print_schema > swin_hf/training/configs/finetune.schema.json
	$(RUN) recipes/pretrain.py --print_schema > swin_hf/training/configs/pretrain.schema.json
	$(RUN) recipes/segment.py --print_schema > swin_hf/training/configs/segment.schema.json
	$(RUN) recipes/finetune.py --task multi-label-classification --print_schema > swin_hf/training/configs/multi_label.schema.json
	$(RUN) recipes/finetune.py --task image-regression --print_schema > swin_hf/training/configs/regression.schema.json

speed: $(VENV)/.installed-dev ## measure against transformers, timm and torchvision; rewrites the README's table
	$(RUN) -m benchmarks --readme README.md

clean: ## remove what tools leave behind; runs/ stays
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info

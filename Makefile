# sandan: every stage from one command. `make help` lists the targets.
#
# The command `sandan` runs the chain (src/sandan/command/): a stage reruns only when its recipe file, its script, its data
# or an earlier stage's result.json is newer than its own result.json.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

RECIPE ?= tiny
# Options for one stage, as in: make sft ARGS="--learning_rate 1e-3". A stage that is given options always reruns.
ARGS ?=
# cpu | single_gpu | ddp | fsdp2 | zero3 | multi_node: a file of recipes/accelerate_configs/
LAUNCH ?= cpu
SEED ?=
# Who ranks, in: make rank ANNOTATOR=yuki
ANNOTATOR ?=
SEEDS ?= 1 2 3
PYTHON ?= python3
EXTRAS ?= dev
# What pins the packages that setup installs.
CONSTRAINTS ?= constraints.txt
# Two test files at a time, a core each: the chain, which runs on one, is half of the time.
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder

VENV := .venv
BIN := $(VENV)/bin
OUT := outputs/$(RECIPE)
STAGES := $(shell $(PYTHON) src/sandan/core/chain.py)
# With `make -n` it says which commands it would run; for that it needs nothing that is not installed.
PLAN := $(if $(findstring n,$(firstword -$(MAKEFLAGS))),--plan)
SANDAN := PYTHONPATH=$(CURDIR)/src$(if $(PYTHONPATH),:$(PYTHONPATH)) \
	$(if $(PLAN),$(or $(wildcard $(BIN)/python),$(PYTHON)),$(BIN)/python) -m sandan.command
RUN := --recipe $(RECIPE) --launch $(LAUNCH) $(PLAN)

##@ Start here
.PHONY: help
help: ## List the targets
	@awk 'BEGIN {FS = ":.*## "} /^##@ \(stages\)/ {system("$(PYTHON) src/sandan/core/chain.py help"); next} /^##@/ {printf "\n%s\n", substr($$0, 5); fflush()} /^[a-z_-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2; fflush()}' Makefile
	@printf '\nOptions: RECIPE=%s LAUNCH=%s ARGS="--any_field value" SEED=1\n' "$(RECIPE)" "$(LAUNCH)"

.PHONY: demo
demo: $(VENV)/.ready ## Set up, run the whole chain on the embedded data, print the table (2 cores, no network)
	+@$(SANDAN) demo --launch $(LAUNCH) $(if $(SEED),--seed $(SEED)) $(PLAN) $(ARGS)

.PHONY: test
test: $(VENV)/.ready quality ## Set up, check the style, run every test but those of test-launch, the embedded chain included
	$(BIN)/python -m pytest $(WORKERS) -m "not launch"

.PHONY: setup
setup: ## Make .venv and install the pinned packages (EXTRAS=dev,gpu adds more)
	@rm -f $(VENV)/.ready
	@$(MAKE) --no-print-directory $(VENV)/.ready

.PHONY: setup-oldest
setup-oldest: ## Make .venv with the oldest versions that setup.cfg allows; `make setup` returns to the pinned ones
	@mkdir -p $(VENV)
	@$(PYTHON) tests/helpers/oldest_versions.py > $(VENV)/oldest.txt
	@$(MAKE) --no-print-directory setup CONSTRAINTS=$(VENV)/oldest.txt

$(VENV)/.ready: setup.cfg constraints.txt pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned packages into $(VENV) (once, about 2 minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable ".[$(EXTRAS)]"
	@touch $@

##@ The chain
.PHONY: chain
chain: $(VENV)/.ready ## Run every stage of RECIPE, each only if something before it changed
	+@$(SANDAN) chain $(RUN) $(if $(SEED),--seed $(SEED)) $(ARGS)

.PHONY: $(STAGES)
##@ (stages)
$(STAGES): $(VENV)/.ready
	+@$(SANDAN) $(if $(SEED),chain --until $@ --seed $(SEED),$@) $(RUN) $(if $(filter rank,$@),$(ANNOTATOR:%=--annotator %)) $(ARGS)

.PHONY: seeds force
seeds: $(SEEDS:%=$(OUT)-seeds/%.json) ## Run the whole chain for each of SEEDS and keep each report (-k goes on after a failure)

$(OUT)-seeds/%.json: $(VENV)/.ready force
	+@$(SANDAN) chain $(RUN) --seed $*
	@mkdir -p $(@D) && cp $(OUT)/report/report.json $@

.PHONY: chat
chat: $(VENV)/.ready ## Talk to the models of RECIPE side by side and vote; ARGS="--text" in the terminal
	+@$(SANDAN) chat --recipe $(RECIPE) $(PLAN) $(ANNOTATOR:%=--annotator %) $(ARGS)

##@ Trust
.PHONY: check
check: $(VENV)/.ready ## Check RECIPE without training: settings, data, tokens, steps, memory, disk
	+@$(SANDAN) check --recipe $(RECIPE) $(PLAN) $(ARGS)

HUB_ID ?=
LICENSE_NAME ?=
PUBLIC ?=

.PHONY: push
push: $(VENV)/.ready ## Push the results of RECIPE to the Hub, private: make push HUB_ID=alice/tiny
	$(if $(HUB_ID),,$(error HUB_ID is missing, as in: make push RECIPE=$(RECIPE) HUB_ID=alice/$(RECIPE)))
	+@$(SANDAN) push --recipe $(RECIPE) $(PLAN) --hub_id $(HUB_ID) \
		$(if $(LICENSE_NAME),--license $(LICENSE_NAME)) $(if $(PUBLIC),--public true)

KILLS ?= 5

.PHONY: test-faults
test-faults: $(VENV)/.ready ## Kill every training stage KILLS times in each way; each must go on bit for bit (6 minutes)
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
		$(BIN)/python tests/helpers/faults.py "$$folder/runs" --kills $(KILLS) 2> "$$folder/log" || { tail -5 "$$folder/log"; exit 1; }

.PHONY: test-launch
test-launch: $(VENV)/.ready ## The benchmarks of several GPUs on two CPU processes: equal to one, killed and resumed (minutes)
	$(BIN)/python -m pytest -m launch

##@ Development
.PHONY: data
data: $(VENV)/.ready ## Write data/ again from the world's code (the same bytes)
	$(BIN)/python -m sandan.world.generate data

.PHONY: docs
docs: $(VENV)/.ready ## Build the documents and the reference as a site, build/site (first: make setup EXTRAS=dev,docs)
	@test -x $(BIN)/mkdocs || { echo "error: mkdocs is missing; run: make setup EXTRAS=dev,docs" >&2; exit 2; }
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

.PHONY: style
style: $(VENV)/.ready ## Format and lint
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

.PHONY: quality
quality: $(VENV)/.ready ## Check format, lint, and who imports whom
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/lint-imports --no-logo --no-cache

.PHONY: test-fast
test-fast: $(VENV)/.ready ## The tests without the slow ones and the embedded chain
	$(BIN)/python -m pytest $(WORKERS) -m "not slow and not e2e and not launch"

.PHONY: clean
clean: ## Remove the outputs of RECIPE
	$(if $(wildcard recipes/$(RECIPE)/*.yaml),,$(error RECIPE=$(RECIPE): no such recipe))
	rm -rf $(OUT)

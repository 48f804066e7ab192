# sandan: every stage from one command. `make help` lists the targets.
#
# make's own rules run the chain: a stage reruns only when its recipe file, its script, its data or an earlier stage's
# result.json is newer than its own result.json.

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
RECIPE_DIR := recipes/$(RECIPE)
# The rows of src/sandan/core/chain.py, each as name:script:cpu_only:needs,...
ROWS := $(shell $(PYTHON) src/sandan/core/chain.py)
comma := ,
# $(call column,NUMBER,STAGE)
column = $(subst $(comma), ,$(word $(1),$(subst :, ,$(subst ::,:-:,$(filter $(2):%,$(ROWS))))))
STAGES := $(foreach row,$(ROWS),$(firstword $(subst :, ,$(row))))
# The stages that this recipe has.
CHAIN := $(foreach stage,$(STAGES),$(if $(wildcard $(RECIPE_DIR)/$(stage).yaml),$(stage)))
CPU_ONLY := $(foreach stage,$(STAGES),$(if $(filter cpu,$(call column,3,$(stage))),$(stage)))
# One process on the CPU needs no launcher, which takes 2.5 s to start: what recipes/accelerate_configs/cpu.yaml says.
LAUNCHER_cpu := ACCELERATE_USE_CPU=true $(BIN)/python
launcher = $(or $(LAUNCHER_$(1)),$(BIN)/accelerate launch --config_file recipes/accelerate_configs/$(1).yaml --quiet)

ifeq ($(wildcard $(RECIPE_DIR)),)
$(error RECIPE=$(RECIPE): no such recipe; there are: $(filter-out accelerate_configs,$(notdir $(wildcard recipes/*))))
endif
ifeq ($(wildcard recipes/accelerate_configs/$(LAUNCH).yaml),)
$(error LAUNCH=$(LAUNCH): no such file; there are: $(basename $(notdir $(wildcard recipes/accelerate_configs/*.yaml))))
endif

export HF_HUB_DISABLE_TELEMETRY ?= 1
export TOKENIZERS_PARALLELISM ?= false

##@ Start here
.PHONY: help
help: ## List the targets
	@awk 'BEGIN {FS = ":.*## "} /^##@ \(stages\)/ {system("$(PYTHON) src/sandan/core/chain.py help"); next} /^##@/ {printf "\n%s\n", substr($$0, 5); fflush()} /^[a-z_-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2; fflush()}' Makefile
	@printf '\nOptions: RECIPE=%s LAUNCH=%s ARGS="--any_field value" SEED=1\n' "$(RECIPE)" "$(LAUNCH)"

.PHONY: demo
demo: ## Set up, run the whole chain on the embedded data, print the table (2 cores, no network)
	@$(MAKE) --no-print-directory chain RECIPE=tiny

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
	$(if $(ARGS),$(error ARGS are for one stage, as in: make sft ARGS="$(ARGS)"))
	@$(MAKE) --no-print-directory $(OUT)/report/result.json

.PHONY: $(STAGES)
##@ (stages)
$(filter-out $(if $(ANNOTATOR),rank),$(STAGES)): %: $(VENV)/.ready
	@$(MAKE) --no-print-directory $(OUT)/$*/result.json ONLY=$*

# With an annotator, `make rank` opens the page. What people did lies outside outputs/, where `make clean` does not reach.
ifdef ANNOTATOR
rank: $(VENV)/.ready
	@$(MAKE) --no-print-directory --silent $(OUT)/candidates/result.json
	@$(BIN)/python scripts/annotate.py --candidates_file $(OUT)/candidates/candidates.jsonl \
		--log_file annotations/$(RECIPE)/judgements.jsonl --annotator $(ANNOTATOR) $(ARGS)
endif

# Whether the stage reruns unasked: it was given a seed, or it is the one that ARGS are for.
forced = $(or $(SEED),$(if $(filter $(1),$(ONLY)),$(ARGS)))

script_of = $(call column,2,$(1))
# The results that a stage needs, of the stages that this recipe has.
needs = $(patsubst %,$(OUT)/%/result.json,$(filter $(call column,4,$(1)),$(CHAIN)))
# Local data files and logs of annotators named in the stage's recipe.
data_of = $(wildcard $(shell grep -oE '\b(data|annotations)/[A-Za-z0-9_./-]+' $(RECIPE_DIR)/$(1).yaml 2>/dev/null))

.PHONY: force
define stage_rule
$(OUT)/$(1)/result.json: $(RECIPE_DIR)/$(1).yaml scripts/$(call script_of,$(1)).py $(call data_of,$(1)) $(call needs,$(1)) $(if $(call forced,$(1)),force)
	@printf '\n\033[1m── %s ──\033[0m\n' "$(RECIPE): $(1)"
	@$(call launcher,$(if $(filter $(1),$(CPU_ONLY)),cpu,$(LAUNCH))) \
		scripts/$(call script_of,$(1)).py --config $(RECIPE_DIR)/$(1).yaml $(if $(SEED),--seed $(SEED)) $(if $(filter $(1),$(ONLY)),$(ARGS))
endef
$(foreach stage,$(STAGES),$(eval $(call stage_rule,$(stage))))

.PHONY: seeds
seeds: $(SEEDS:%=$(OUT)-seeds/%.json) ## Run the whole chain for each of SEEDS and keep each report (-k goes on after a failure)

$(OUT)-seeds/%.json: $(VENV)/.ready force
	@mkdir -p $(@D)
	@$(MAKE) --no-print-directory chain SEED=$*
	@cp $(OUT)/report/report.json $@

##@ Trust
.PHONY: check
check: $(VENV)/.ready ## Check RECIPE without training: settings, data, tokens, steps, memory, disk
	@failed=; for pair in $(foreach stage,$(CHAIN),$(stage):$(call script_of,$(stage))); do stage=$${pair%:*}; script=$${pair#*:}; \
		printf '\n\033[1m── %s ──\033[0m\n' "$(RECIPE): $$stage"; \
		$(BIN)/python scripts/$$script.py --config $(RECIPE_DIR)/$$stage.yaml --dry_run true $(ARGS) || failed="$$failed $$stage"; \
	done; if [ -n "$$failed" ]; then echo "not ready:$$failed" >&2; exit 2; fi

HUB_ID ?=
LICENSE_NAME ?=
PUBLIC ?=

.PHONY: push
push: $(VENV)/.ready ## Push the results of RECIPE to the Hub, private: make push HUB_ID=alice/tiny
	$(if $(HUB_ID),,$(error HUB_ID is missing, as in: make push RECIPE=$(RECIPE) HUB_ID=alice/$(RECIPE)))
	@$(BIN)/python scripts/push.py --recipe_dir $(OUT) --hub_id $(HUB_ID) \
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
	rm -rf $(OUT)

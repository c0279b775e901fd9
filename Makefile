# GNU make and a POSIX shell. Everything runs in an environment of its own, made on first use from requirements.lock.
#   make reproduce-table2 JOBS=2          two runs of a grid at a time
#   make test TORCH_INDEX=ADDRESS         take torch and torchvision from another package index: on Linux the default
#                                         one may hold the CUDA build of several GB; the CPU build lies on PyTorch's own
#   make test PYTHON3=python3.12          make the environment with this Python (3.11 to 3.13)
#   make train-svd DEVICE=cuda            on a GPU
VENV ?= .venv
RIVALS ?= .venv-rivals
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
UNFINISHED := $(VENV)/.unfinished
PYTHON3 ?= python3 python3.13 python3.12 python3.11
TORCH_INDEX ?=
JOBS ?= 2
DEVICE ?= cpu
PYTEST_ARGS ?= -q
PIP := $(BIN)/python -m pip --disable-pip-version-check
LAUNCHER := $(if $(JOBS),hydra/launcher=joblib hydra.launcher.n_jobs=$(JOBS)) device=$(DEVICE)

# The tables and figures. experiments/index.toml says which grids each is made of; experiments/grids.py reads it.
RESULTS := $(shell sed -n 's/^\[\(.*\)\]$$/\1/p' experiments/index.toml)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install install-language rivals reproduce train train-language train-svd search-table1 smoke test check-records verify index list-grids lint format docs readme bench chaos notebook lock clean
.PHONY: $(RESULTS:%=reproduce-%) $(RESULTS:%=table-%)

help:  ## this list
	@echo "make TARGET"
	@sed -n 's/^\([A-Za-z0-9-]*\):.*## /  \1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-20s %s\n", $$1, $$2 }'
	@echo "NAME is one of: $(RESULTS)"

install: $(STAMP)  ## the environment in .venv (every other target makes it where it is missing)

# An installation that was cut short is begun anew; an environment that is only out of date is brought up to date.
$(STAMP): requirements.lock pyproject.toml
	@set -e; \
	if [ -e $(UNFINISHED) ] || ! $(PIP) --version >/dev/null 2>&1; then \
	    for python in $(PYTHON3) none; do \
	        if [ $$python = none ]; then echo "no Python 3.11, 3.12 or 3.13 among: $(PYTHON3); set PYTHON3=" >&2; exit 1; fi; \
	        if $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then break; fi; \
	    done; \
	    echo "making the environment in $(VENV) with $$python"; \
	    $$python -m venv --clear $(VENV); \
	fi; \
	rm -f $@; : > $(UNFINISHED)
	@echo "installing requirements.lock"
	@$(PIP) install -q -r requirements.lock $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@$(PIP) install -q --no-deps --no-build-isolation -e .
	@rm -f $(UNFINISHED)
	@touch $@

install-language: $(STAMP)  ## what language models need, besides: transformers and what that needs
	@$(PIP) install -q -r requirements-language.lock

rivals: $(STAMP)  ## .venv-rivals: AIMET from its wheel, whose dependencies stay out of .venv, with spectrim beside it
	$(BIN)/python -m venv $(RIVALS)
	@$(RIVALS)/bin/python -m pip --disable-pip-version-check install -q -r requirements.lock -r requirements-rivals.lock \
	    $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@$(RIVALS)/bin/python -m pip --disable-pip-version-check install -q --no-deps --no-build-isolation -e .

reproduce-NAME:  ## run the grids of a table or figure, write results/, compare with the committed records
	@echo "NAME is one of: $(RESULTS)"
# $(call run_grids,NAME [--quick|--long]): run the grids of NAME. A grid that was interrupted continues where it stopped;
# `make clean` makes it start anew.
run_grids = @set -e; grids=$$($(BIN)/python experiments/grids.py $(1)); \
    for grid in $$grids; do $(BIN)/spectrim -m experiment=$$grid records=build/records $(LAUNCHER); done
# $(call copy_records,NAME): put the committed records of the long grids of NAME into build/records. A copied record stands
# for its run, unless the settings have changed since. Some `cp -n` report a file that exists as a failure.
copy_records = @set -e; mkdir -p build/records; folders=$$($(BIN)/python experiments/grids.py $(1) --long | cut -d/ -f1 | sort -u); \
    for folder in $$folders; do cp -R -n results/records/$$folder build/records/ || true; done
$(RESULTS:%=reproduce-%): reproduce-%: $(STAMP)
	$(call run_grids,$* --quick)
	$(call copy_records,$*)
	$(call run_grids,$* --long)
	$(BIN)/python experiments/$*.py --records build/records --out results --against results/records

reproduce-table3 reproduce-figure7: install-language

# Figure 4 first: Table 6 copies its whole folder of records, and a copied record is not made again.
reproduce: reproduce-figure4 $(RESULTS:%=reproduce-%)  ## every table and figure

table-NAME:  ## a table or figure from the committed records: no run, no torch
	@echo "NAME is one of: $(RESULTS)"
$(RESULTS:%=table-%): table-%: $(STAMP)
	$(BIN)/python experiments/$*.py --records results/records --out results

list-grids:  ## the grids of every table and figure, one a line
	@$(or $(wildcard $(BIN)/python),$(firstword $(PYTHON3))) experiments/grids.py

verify: $(STAMP)  ## rebuild every table, figure and page from the records and compare byte for byte; PASS or what differs
	@$(BIN)/python experiments/verify.py

index: $(STAMP)  ## results/index anew: the runs that each table and figure needs (minutes)
	@$(BIN)/python experiments/grids.py | $(BIN)/python experiments/check_records.py --records results/records --write

check-records: $(STAMP)  ## check that every cell of every grid has a record, and every record a cell
	@$(BIN)/python experiments/grids.py | $(BIN)/python experiments/check_records.py --records results/records

train: $(STAMP)  ## the committed checkpoints that are missing (hours on two cores)
	$(BIN)/spectrim-train -m model=resnet20 seed=0,1,2
	$(BIN)/spectrim-train -m model=resnet56,resnext20,densenet22
	$(BIN)/spectrim-train -m model=lenet5 data=mnist,fashion_mnist seed=0,1,2
	$(BIN)/spectrim-train model=vgg19_half stored_as=float16
	$(BIN)/spectrim-train model=resnet20 data=digits recipe=digits threads=1
	$(BIN)/spectrim-train -m model=bias_free_mlp data=digits model.depth=2,3,4,5,6 seed=0,1,2 threads=1 \
	    'names.model=bias_free_mlp$${model.depth}' checkpoints=results/checkpoints/table8

train-language: install-language  ## the committed checkpoint of MiniLM where it is missing (an hour or two on two cores)
	$(BIN)/spectrim-train model=minilm data=imdb stored_as=float16

train-svd: $(STAMP)  ## the trainings behind Table 5 and Figure 5 anew (hours on two cores), then both
	$(call run_grids,table5)
	$(BIN)/python experiments/table5.py --records build/records --out results --against results/records
	$(BIN)/python experiments/figure5.py --records build/records --out results --against results/records

search-table1: $(STAMP)  ## all of Table 1 and Figure 6 anew, searches and trainings too (days on one core)
	$(call run_grids,table1)
	$(BIN)/python experiments/table1.py --records build/records --out results
	$(BIN)/python experiments/figure6.py --records build/records --out results

smoke: $(STAMP)  ## two minutes on small digits, no network: train, every algorithm, a table in build/smoke
	$(BIN)/spectrim-train model=mlp data=digits checkpoints=build/checkpoints
	$(BIN)/spectrim -m experiment=smoke records=build/records
	$(BIN)/python experiments/table2.py --experiment smoke --records build/records --out build/smoke

test: $(STAMP)  ## the tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(STAMP)  ## ruff, mypy, the layers of the imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src experiments docs/_sphinx
	$(BIN)/lint-imports

format: $(STAMP)  ## what ruff can mend by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## the site in build/site: the pages, the tables and the reference; a dead link inside is an error
	rm -rf build/site build/doctrees  # a source page is not made anew where it exists
	$(BIN)/python -m sphinx -q -W --keep-going -j 2 -c docs -d build/doctrees . build/site
	@echo "open build/site/index.html"

readme: $(STAMP)  ## the tables that README and docs show, copied into them from results/tables
	$(BIN)/python experiments/readme.py

bench: $(STAMP)  ## the benchmarks, into results/benchmarks
	$(BIN)/python benchmarks/run.py

chaos: $(STAMP)  ## kill, starve and crowd every writer, damage every file that is read: some 20 minutes
	$(BIN)/python benchmarks/chaos/campaign.py --out results/benchmarks

notebook: $(STAMP)  ## run the notebooks
	$(BIN)/jupytext --to ipynb notebooks/*.py
	$(BIN)/jupyter-execute --inplace notebooks/*.ipynb

# torch and torchvision are the pair to pin, without the local name (+cpu) of the build that happens to be here.
FREEZE := build/lock/bin/python -m pip freeze --all --exclude pip --exclude-editable | sed 's/^\(torch[a-z]*==[0-9.]*\)+.*/\1/'
lock:  ## the lock files anew: the newest of everything that pyproject.toml admits, in a fresh environment
	$(firstword $(PYTHON3)) -m venv --clear build/lock
	build/lock/bin/python -m pip install -q torch==2.13.0 torchvision==0.28.0 -e '.[dev]'
	@{ sed -n '/^#/p' requirements.lock; $(FREEZE); } > build/requirements.lock
	build/lock/bin/python -m pip install -q -c build/requirements.lock -e '.[language]'
	@{ sed -n '/^#/p' requirements-language.lock; $(FREEZE) | grep -vxF -f build/requirements.lock; } > build/language.lock
	build/lock/bin/python -m pip install -q -c build/requirements.lock -c build/language.lock -e '.[rivals]'
	@{ sed -n '/^#/p' requirements-rivals.lock; $(FREEZE) | grep -vxF -f build/requirements.lock -f build/language.lock; } \
	    > build/rivals.lock
	mv build/requirements.lock requirements.lock
	mv build/language.lock requirements-language.lock
	mv build/rivals.lock requirements-rivals.lock
	rm -rf build/lock

clean:  ## remove build/ (fresh records, unfinished trainings) and caches; .venv and results/ stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find src tests experiments -name __pycache__ -type d -prune -exec rm -rf {} +

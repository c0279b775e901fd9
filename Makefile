# This file needs GNU make and a POSIX shell. Every target runs in .venv, which is made on first use from requirements.lock.
#   make reproduce-table2 JOBS=2          run two cells of a grid at a time
#   make test TORCH_INDEX=ADDRESS         take torch and torchvision from another package index. On Linux the default
#                                         one may hold the CUDA build of several GB; PyTorch's own has the CPU build.
#   make test PYTHON3=python3.12          make the environment with this Python (3.11 to 3.13)
#   make train-svd DEVICE=cuda            run on a GPU
#   make test PYTEST_ARGS='-q tests/data' run some of the tests, in one process
VENV ?= .venv
RIVALS ?= .venv-rivals
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LANGUAGE := $(VENV)/.language
ZOO := $(VENV)/.zoo
UNFINISHED := $(VENV)/.unfinished
PYTHON3 ?= python3 python3.13 python3.12 python3.11
TORCH_INDEX ?=
JOBS ?= 2
DEVICE ?= cpu
# At most 8 processes, of about 0.8 GB each. A file of tests runs in one of them, since its tests share fixtures.
PYTEST_ARGS ?= -q -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
PIP := $(BIN)/python -m pip --disable-pip-version-check
LAUNCHER := $(if $(JOBS),hydra/launcher=joblib hydra.launcher.n_jobs=$(JOBS)) device=$(DEVICE)

# The tables and figures. experiments/index.toml says which grids each is made of; experiments/grids.py reads it.
RESULTS := $(shell sed -n 's/^\[\(.*\)\]$$/\1/p' experiments/index.toml)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install install-language rivals reproduce train train-language train-svd search-table1 smoke test check-records verify index list-grids lint format docs readme bench chaos zoo notebook lock clean release report
.PHONY: $(RESULTS:%=reproduce-%) $(RESULTS:%=table-%)

help:  ## print this list
	@echo "make TARGET"
	@sed -n 's/^\([A-Za-z0-9-]*\):.*## /  \1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-20s %s\n", $$1, $$2 }'
	@echo "NAME is one of: $(RESULTS)"

install: $(STAMP)  ## make the environment in .venv; every other target does so where it is missing

# An interrupted installation starts anew. An environment that is only out of date is updated.
$(STAMP): requirements.lock requirements-torch.lock pyproject.toml
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
	@$(call install_locked,$(PIP),requirements.lock)
	@$(PIP) install -q --no-deps --no-build-isolation -e .
	@rm -f $(UNFINISHED)
	@touch $@

# $(call install_locked,PIP,LOCK...): install the files whose sha256 is in LOCK, then torch, whose build depends on the index.
# --use-pep517: one package has no wheel, and pip warns where it builds one by setup.py alone.
# --no-deps: a package that no lock names is an error of `pip check`, not a file that nobody has checked.
install_locked = $(1) install -q --use-pep517 --no-deps --require-hashes $(addprefix -r ,$(2)) \
    && $(1) install -q -r requirements-torch.lock $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

install-language: $(LANGUAGE)  ## add transformers and what language models need

$(LANGUAGE): requirements-language.lock $(STAMP)
	@echo "installing requirements-language.lock"
	@$(PIP) install -q --no-deps --require-hashes -r requirements-language.lock
	@touch $@

rivals: $(STAMP)  ## make .venv-rivals, with AIMET from its wheel and spectrim; .venv stays free of AIMET's dependencies
	$(BIN)/python -m venv $(RIVALS)
	@$(call install_locked,$(RIVALS)/bin/python -m pip --disable-pip-version-check,requirements.lock requirements-rivals.lock)
	@$(RIVALS)/bin/python -m pip --disable-pip-version-check install -q --no-deps --no-build-isolation -e .

reproduce-NAME:  ## run the grids of a table or figure, build it in results/ and compare with the committed records
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

reproduce-table3 reproduce-figure7 reproduce-figure8 reproduce-figure9: install-language

# Figure 4 first: Table 6 copies its whole folder of records, and a copied record is not made again.
reproduce: reproduce-figure4 $(RESULTS:%=reproduce-%)  ## do that for every table and figure

table-NAME:  ## build a table or figure from the committed records, without a run and without torch
	@echo "NAME is one of: $(RESULTS)"
$(RESULTS:%=table-%): table-%: $(STAMP)
	$(BIN)/python experiments/$*.py --records results/records --out results

list-grids:  ## print the grids of every table and figure, one a line
	@$(or $(wildcard $(BIN)/python),$(firstword $(PYTHON3))) experiments/grids.py

verify: $(STAMP)  ## rebuild every table, figure and page from the records and compare byte for byte; PASS or what differs
	@$(BIN)/python experiments/verify.py

index: $(STAMP)  ## results/index anew: the runs that each table and figure needs (minutes)
	@$(BIN)/python experiments/grids.py | $(BIN)/python experiments/check_records.py --records results/records --write

check-records: $(STAMP)  ## check that every cell of every grid has a record, and every record a cell
	@$(BIN)/python experiments/grids.py | $(BIN)/python experiments/check_records.py --records results/records

train: $(STAMP)  ## train the committed checkpoints that are missing (hours on two cores)
	$(BIN)/spectrim-train -m model=resnet20 seed=0,1,2
	$(BIN)/spectrim-train -m model=resnet56,resnext20,densenet22,cct2
	$(BIN)/spectrim-train -m model=lenet5 data=mnist,fashion_mnist seed=0,1,2
	$(BIN)/spectrim-train model=vgg19_half stored_as=float16
	$(BIN)/spectrim-train model=resnet20 data=digits recipe=digits threads=1
	$(BIN)/spectrim-train -m model=bias_free_mlp data=digits model.depth=2,3,4,5,6 seed=0,1,2 threads=1 \
	    'names.model=bias_free_mlp$${model.depth}' checkpoints=results/checkpoints/table8

train-language: install-language  ## train the committed checkpoint of MiniLM if it is missing (one or two hours on two cores)
	$(BIN)/spectrim-train model=minilm data=imdb stored_as=float16

train-svd: $(STAMP)  ## the trainings behind Table 5 and Figure 5 anew (hours on a GPU, days on two cores), then both
	$(call run_grids,table5)
	$(BIN)/python experiments/table5.py --records build/records --out results --against results/records
	$(BIN)/python experiments/figure5.py --records build/records --out results --against results/records

search-table1: $(STAMP)  ## run all grids of Table 1 and Figure 6, searches and trainings too, and build both (days on one core)
	$(call run_grids,table1)
	$(BIN)/python experiments/table1.py --records build/records --out results
	$(BIN)/python experiments/figure6.py --records build/records --out results

smoke: $(STAMP)  ## train, run every algorithm and build a table in build/smoke: two minutes, no network
	$(BIN)/spectrim-train model=mlp data=digits checkpoints=build/checkpoints
	$(BIN)/spectrim -m experiment=smoke records=build/records
	$(BIN)/python experiments/table2.py --experiment smoke --records build/records --out build/smoke

test: install-language  ## run the tests, those of language models too
	$(BIN)/python -m pytest $(PYTEST_ARGS)

release: $(STAMP)  ## the wheel in dist, and in build/release what SPECTRIM_RELEASE points to: records and checkpoints
	$(BIN)/python -m hatchling build -t wheel -d dist
	$(BIN)/python experiments/release.py --out build/release

lint: $(STAMP)  ## run ruff, mypy and the check of the import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src experiments dashboards docs/_sphinx
	$(BIN)/lint-imports

format: $(STAMP)  ## fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

report: $(STAMP)  ## a site of every table, figure and run in build/report, to open without a server
	$(BIN)/python experiments/report.py

docs: $(STAMP)  ## build the site in build/site from the pages, the tables and the docstrings; a dead link is an error
	rm -rf build/site build/doctrees  # a source page is not made anew where it exists
	$(BIN)/python -m sphinx -q -W --keep-going -j 2 -c docs -d build/doctrees . build/site
	@echo "open build/site/index.html"

readme: $(STAMP)  ## copy the tables in results/tables into the pages that show them
	$(BIN)/python experiments/readme.py

bench: $(STAMP)  ## run the benchmarks into results/benchmarks
	$(BIN)/python benchmarks/run.py

chaos: $(STAMP)  ## kill, starve and crowd every writer and damage every file that is read (20 minutes)
	$(BIN)/python benchmarks/chaos/campaign.py --out results/benchmarks

zoo: $(ZOO)  ## run architectures of torchvision, timm and transformers, and write a table of what works (half an hour)
	$(BIN)/python benchmarks/zoo/zoo.py
	$(BIN)/python experiments/readme.py

$(ZOO): requirements-zoo.lock $(LANGUAGE)
	@echo "installing requirements-zoo.lock"
	@$(PIP) install -q --no-deps --require-hashes -r requirements-zoo.lock
	@touch $@

notebook: $(STAMP)  ## run the notebooks
	$(BIN)/jupytext --to ipynb notebooks/*.py
	$(BIN)/jupyter-execute --inplace notebooks/*.ipynb

# Every package of build/lock but torch, which has a lock of its own, and the tools that write the locks.
FREEZE := build/lock/bin/python -m pip freeze --all --exclude pip --exclude uv --exclude-editable --exclude torch --exclude torchvision
# The sha256 of every file of these releases that the index lists, for all platforms.
HASHED := build/lock/bin/uv pip compile -q - --no-deps --universal --python-version 3.11 --generate-hashes --no-header --no-annotate
lock:  ## write the lock files anew, with the newest versions that pyproject.toml allows
	$(firstword $(PYTHON3)) -m venv --clear build/lock
	build/lock/bin/python -m pip install -q uv -r requirements-torch.lock -e '.[dev]'
	$(FREEZE) > build/lock/core
	build/lock/bin/python -m pip install -q -c build/lock/core -e '.[language]'
	$(FREEZE) | grep -vxF -f build/lock/core > build/lock/language
	build/lock/bin/python -m pip install -q -c build/lock/core -c build/lock/language -e '.[zoo]'
	$(FREEZE) | grep -vxF -f build/lock/core -f build/lock/language > build/lock/zoo
	build/lock/bin/python -m pip uninstall -q -y -r build/lock/zoo  # each lock has all that it needs beside the first two
	build/lock/bin/python -m pip install -q -c build/lock/core -c build/lock/language -e '.[rivals]'
	$(FREEZE) | grep -vxF -f build/lock/core -f build/lock/language > build/lock/rivals
	@set -e; for part in core language rivals zoo; do \
	    if [ $$part = core ]; then file=requirements.lock; else file=requirements-$$part.lock; fi; \
	    { sed -n '/^#/p' $$file; $(HASHED) < build/lock/$$part; } > build/lock/written; \
	    mv build/lock/written $$file; \
	done
	rm -rf build/lock

clean:  ## remove build/ (fresh records, unfinished trainings) and caches; .venv and results/ stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find src tests experiments -name __pycache__ -type d -prune -exec rm -rf {} +

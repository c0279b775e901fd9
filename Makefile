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

# A table or figure is made by experiments/NAME.py of the records of its grids, conf/experiment/GRID.yaml.
RESULTS := table1 table2 table3 table4 table5 table6 table7 table8 table9 figure1 figure2 figure3 figure4 figure5 figure6 figure7
# A grid of Table 1 is two files: a net, and what runs on it.
on_nets = $(foreach net,lenet5 resnet20 vgg19_half,$(foreach grid,$(1),[table1_$(net),$(grid)]))
GRIDS_table1 := $(call on_nets,table1 table1_own)
# Grids that search or train: hours. `reproduce-` takes the committed records for them, `make search-table1` and
# `make train-svd` run them.
TRAININGS_table1 := $(call on_nets,table1_threshold table1_search table1_fine_tuning table1_fine_tuning_search table1_training table1_svd_training) \
    [table1_lenet5,table1_scratch] [table1_lenet5,table1_scratch_svd]
GRIDS_table2 := $(foreach nets,table2 table2_resnet20,$(nets)_baseline $(nets) $(nets)_verified)
# As those of Table 1: what is quick is run, and the committed records stand for the rest, hours on a processor.
GRIDS_table3 := [table3_minilm,table3_truncation]
TRAININGS_table3 := $(foreach grid,table3 table3_embeddings table3_embeddings_uniform table3_refit table3_expansion \
        table3_interaction table3_plain table3_selection_minilm,[table3_minilm,$(grid)]) \
    $(foreach grid,table3 table3_expansion table3_plain table3_selection table3_truncation,[table3_smollm2,$(grid)])
GRIDS_table4 := table4 table4_truncation
GRIDS_table5 := table5_baseline table5_baseline_global table5_selection table5_resnet20_baseline table5_resnet20_selection \
    table5_vgg19_half_baseline
TRAININGS_table5 := table5 table5_epsilon table5_tight table5_scratch table5_printed table5_fashion \
    table5_fine_tuning table5_tight_long \
    table5_resnet20 $(addprefix table5_resnet20_,more long regularisers fine_tuning uncut scratch) \
    $(addprefix table5_vgg19_half,_fine_tuning _scratch) table5_vgg19_half
GRIDS_table6 := table6 table6_plain table6_layers table6_width table6_calibration table6_calibration_joint
# Searches of many minutes, run once, for Figure 4.
TRAININGS_table6 := figure4_aimet figure4_sensitivity
RECORDS_table6 := figure4
GRIDS_table7 := table7 table7_leakage
GRIDS_table8 := table8 table8_untrained table8_selection
GRIDS_table9 := table9 table9_expansion table9_effort table9_decomposers
GRIDS_figure1 := $(GRIDS_table2)
GRIDS_figure4 := figure4 figure4_refitted figure4_rivals figure4_truncation figure4_energy figure4_alds \
    figure4_nets figure4_nets_rivals figure4_lossless
# In an environment of its own (`make rivals`), or of many minutes a run: the committed records stand for them, as for
# the trainings.
TRAININGS_figure4 := figure4_aimet figure4_sensitivity figure4_lossless_nets
GRIDS_figure5 := $(GRIDS_table5)
TRAININGS_figure5 := $(TRAININGS_table5)
GRIDS_figure6 := $(GRIDS_table1)
TRAININGS_figure6 := $(TRAININGS_table1)
# Where the records of the trainings lie: under the name of the table where nothing else is said.
RECORDS_figure5 := table5
RECORDS_figure6 := table1
RECORDS_figure7 := table3
GRIDS_figure7 := $(GRIDS_table3)
TRAININGS_figure7 := $(TRAININGS_table3)
GRIDS_figure3 := figure3 $(GRIDS_table2)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install install-language rivals reproduce train train-language train-svd search-table1 smoke test check-records list-grids lint format docs readme bench chaos notebook lock clean
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
# A grid that was interrupted goes on where it stopped; `make clean` makes it start anew.
# No file names are looked for (-f): a grid in brackets is not a pattern.
run_grids = @set -ef; for grid in $(1); do $(BIN)/spectrim -m experiment=$$grid records=build/records $(LAUNCHER); done
# The committed record of a training stands for it, unless its settings have changed since. Some `cp -n` call a file that
# is there already a failure.
$(RESULTS:%=reproduce-%): reproduce-%: $(STAMP)
	$(call run_grids,$(or $(GRIDS_$*),$*))
	$(if $(TRAININGS_$*),@mkdir -p build/records && cp -R -n results/records/$(or $(RECORDS_$*),$*) build/records/ || true)
	$(call run_grids,$(TRAININGS_$*))
	$(BIN)/python experiments/$*.py --records build/records --out results --against results/records

reproduce-table3 reproduce-figure7: install-language

reproduce: $(RESULTS:%=reproduce-%)  ## every table and figure

table-NAME:  ## a table or figure from the committed records: no run, no torch
	@echo "NAME is one of: $(RESULTS)"
$(RESULTS:%=table-%): table-%: $(STAMP)
	$(BIN)/python experiments/$*.py --records results/records --out results

# The grids of every table and figure, a line each.
list-grids:
	@:$(foreach grid,$(sort $(foreach name,$(RESULTS),$(or $(GRIDS_$(name)),$(name)) $(TRAININGS_$(name)))),$(info $(grid)))

check-records: $(STAMP)  ## each committed record is met by a cell of a grid, and each cell by a record
	@$(MAKE) -s list-grids | $(BIN)/python experiments/check_records.py --records results/records

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
	$(call run_grids,$(GRIDS_table5) $(TRAININGS_table5))
	$(BIN)/python experiments/table5.py --records build/records --out results --against results/records
	$(BIN)/python experiments/figure5.py --records build/records --out results --against results/records

search-table1: $(STAMP)  ## all of Table 1 and Figure 6 anew, searches and trainings too (days on one core)
	$(call run_grids,$(GRIDS_table1) $(TRAININGS_table1))
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

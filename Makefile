# Everything is installed into the active virtualenv or conda environment (conda's base does not count), else into .venv, once.
# The versions are those of constraints/tested.txt, which the tests passed with.
# ARGS reaches the command: make test ARGS="-k fastv", make demo ARGS="--device cpu". WORKERS: how many tests run at once.

CONDA := $(if $(filter-out base,$(CONDA_DEFAULT_ENV)),$(CONDA_PREFIX))
ENV := $(or $(VIRTUAL_ENV),$(CONDA),.venv)
PYTHON_IN_ENV := "$(ENV)/bin/python"
WORKERS ?= 2
PYTEST := -m pytest -n $(WORKERS) --dist worksteal
LOWER_BOUNDS := $(shell sed -n '/^install_requires/,/^$$/s/^ *\([A-Za-z_-]*\)>=\(.*\)/"\1==\2.*"/p' setup.cfg)

.PHONY: help demo test test-method named test-slow test-gpu test-browser test-newest test-oldest lock quality style install readme docs notebooks release-check clean
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 22

demo: install  ## full model against three methods on the embedded checkpoint, under a minute
	@$(PYTHON_IN_ENV) -m vtr demo $(ARGS)

test: install  ## the tests that need no GPU and no network, about 6 minutes on 2 cores
	@$(PYTHON_IN_ENV) $(PYTEST) $(ARGS)

test-method: named install  ## contract and tests of one method, under 20 seconds: make test-method NAME=fastv
	@$(PYTHON_IN_ENV) -m pytest --method "$(NAME)" tests/test_contract.py tests/methods/test_$(NAME).py $(ARGS)

named:
	@test -n "$(NAME)" || { echo "test-method: give the method, make test-method NAME=fastv"; exit 2; }

test-slow: install  ## the same and the slow ones: every method on every host
	@$(PYTHON_IN_ENV) -m pytest --slow $(ARGS)

test-gpu: install  ## the tests that need CUDA
	@$(PYTHON_IN_ENV) -m pytest -m gpu $(ARGS)

test-browser:  ## the page, also in Chromium (the one on the path, or CHROMIUM=PATH), in .venv-ui
	@EXTRAS=dev,ui,video CONSTRAINTS=constraints/ui.txt scripts/install.sh .venv-ui "playwright>=1.50"
	@.venv-ui/bin/python -m pytest --slow --browser tests/ui $(ARGS)

test-newest:  ## `make test` with the newest of everything, in .venv-newest, made anew
	@rm -rf .venv-newest
	@CONSTRAINTS= scripts/install.sh .venv-newest
	@.venv-newest/bin/python $(PYTEST) $(ARGS)

test-oldest:  ## `make test` with the oldest versions that setup.cfg allows, in .venv-oldest
	@EXTRAS=dev CONSTRAINTS= scripts/install.sh .venv-oldest $(LOWER_BOUNDS)
	@.venv-oldest/bin/python $(PYTEST) $(ARGS)

lock:  ## write constraints/tested.txt from the environment in use; after `make test-newest`: make lock ENV=.venv-newest; ui.txt: SET=ui ENV=.venv-ui
	@$(PYTHON_IN_ENV) scripts/lock.py $(SET)

quality: install  ## check: ruff, formatting, types
	@$(PYTHON_IN_ENV) -m ruff check --quiet .
	@$(PYTHON_IN_ENV) -m ruff format --quiet --check .
	@$(PYTHON_IN_ENV) -m mypy --no-error-summary

style: install  ## fix what ruff can fix
	@$(PYTHON_IN_ENV) -m ruff check --quiet --fix .
	@$(PYTHON_IN_ENV) -m ruff format --quiet .

readme: install  ## write the tables of README, docs and cards again
	@$(PYTHON_IN_ENV) scripts/update_readme.py

docs: install  ## build the site into out/site
	@PYTHONPATH=. NO_MKDOCS_2_WARNING=1 $(PYTHON_IN_ENV) -m mkdocs build --quiet --strict
	@echo "open out/site/index.html"

notebooks: install  ## run the notebooks again and store what they print
	@$(PYTHON_IN_ENV) scripts/run_notebooks.py

release-check: install  ## build and install the last commit as a user would get it; ARGS=--full: with all requirements from the index
	@$(PYTHON_IN_ENV) scripts/release.py $(ARGS)

install:  ## only install
	@scripts/install.sh "$(ENV)"

clean:  ## remove what builds and checks left; environments and out/ stay
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find vtr scripts tests -name __pycache__ -prune -exec rm -rf {} +

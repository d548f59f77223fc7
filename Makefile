# Two commands do all the set-up on a fresh Debian 12 machine: `make run` and `make test`.
PYTHON := /usr/bin/python3
VENV := .venv
REPAVE := $(VENV)/bin/repave
T ?=

.PHONY: help env first-run package package-test faults soak soak-hour crashes sabotage kills run test power-loss check rack bench docs clean install

help: ## This list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

install: $(VENV)/installed ## Debian packages and the virtual environment (the other targets call it)

$(VENV)/installed: requirements.txt pyproject.toml tools/packages.txt
	@PYTHON=$(PYTHON) tools/install $(VENV)

run: install ## The main job on the virtual rack: two machines reinstalled by one PUT of the official SDK; SCRIPTED=1 without firmware, in seconds
	@$(VENV)/bin/python -m repave.lab.demo $(if $(SCRIPTED),--scripted)

first-run: ## The first ten minutes as a stranger has them, with a clock: a clone, make run, and again without a network (15 minutes)
	@$(PYTHON) tests/usability/first_run.py

env: ## Endpoint, project id, AK and SK of the rack that make run has up, as shell exports
	@$(REPAVE) rack env

test: install ## All tests; T=unit|contract|browser|flow|rack|power_loss for one lane
	@tools/test $(T)

package: install ## dist/: the wheel and the Debian package
	@tools/build-deb dist

package-test: install ## Both built twice, installed, started, asked and removed, in places of their own (3 minutes)
	@tools/test package

power-loss: install ## Power lost at any write of the agent: 20,000 disks judged, 104 booted (20 minutes); IMAGES= BOOTS=
	@$(VENV)/bin/python -u tests/power_loss $(if $(IMAGES),--images $(IMAGES)) $(if $(BOOTS),--boots $(BOOTS))

check: install ## Format, lint, types, import directions, generated docs
	$(VENV)/bin/ruff format --check src tests bench integrations conftest.py
	$(VENV)/bin/ruff check src tests bench integrations conftest.py
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/python -m repave.cli.docs --check
	$(VENV)/bin/python tests/flow/fault_matrix.py --check

rack: install ## A virtual rack of two machines that stays up; end it with: .venv/bin/repave rack down
	$(REPAVE) rack up 2

soak: install ## Simulated fleets on a virtual clock: SEEDS=20000 worlds of ten reinstalls each
	@$(VENV)/bin/python tests/simulation --seeds $(or $(SEEDS),20000) --first $(or $(FIRST),1)

soak-hour: install ## The real service under reinstalls with faults for an hour, its memory and open files watched: MINUTES=60
	@$(VENV)/bin/python -m bench soak $(or $(MINUTES),60)

crashes: install ## The service dies at every point of every ending, then twice: PAIRS=2000; real processes at each step, on both databases
	@$(VENV)/bin/python tests/simulation/crash_points.py --pairs $(or $(PAIRS),2000)
	@$(VENV)/bin/python -u tests/flow/engine_points.py --whole

faults: install ## Faults at the wire: every request of a reinstall and of the BMC driver; ONLY= part of a cell's name
	@PYTHONPATH=tests/outside $(VENV)/bin/python -u tests/flow/faults.py $(if $(ONLY),--only "$(ONLY)")

sabotage: install ## Each observer's planted bug must be found, in the simulator and on real racks (10 minutes)
	@$(VENV)/bin/python tests/sabotage.py

kills: install ## SIGKILLs of the service at random moments of running batches: KILLS=300, half on PostgreSQL with two workers (25 minutes)
	@$(VENV)/bin/python -u tests/outside/kills.py --kills $(or $(KILLS),300) --seed $(or $(SEED),1)

bench: install ## Figures beside references measured in the same run
	$(VENV)/bin/python -m bench

docs: install ## Renders the docs that are made from code, and all of docs/ as a site in .repave/docs
	$(VENV)/bin/python -m repave.cli.docs
	$(VENV)/bin/python tests/flow/fault_matrix.py
	$(VENV)/bin/zensical build --strict

clean: ## Ends the rack and removes all that was built
	@if [ -x $(REPAVE) ] && [ -d .repave ]; then $(REPAVE) rack down || true; fi
	rm -rf .repave $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

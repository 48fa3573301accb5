# Every target that a person calls has "## text"; `make help` shows them.
PYTHON := .venv/bin/python
# The first Python that runs and is new enough; a plain python3 otherwise, which then says what it is.
SYSTEM_PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11 /usr/bin/python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && exit; done; echo python3)
# The longest first: two run at a time.
SUITES := integration fleet clients chaos endurance contract

.DEFAULT_GOAL := help
.PHONY: help env system test-system demo up test check protos protos-check lint format type imports unit contract integration fleet \
        clients chaos endurance bench nightly stubs docs wheels where promises clean

help: ## show this list
	@awk -F':[^#]*## ' '/^[a-z-]+:.*## /{printf "  %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: ## make .venv from the hash-pinned lock (needs Python 3.11 or newer, nothing else)
	@$(SYSTEM_PYTHON) -m tools.bootstrap

system: ## install the distribution packages that are missing (as root or with sudo), or name them
	@$(SYSTEM_PYTHON) -m tools.system

test-system: ## the same with what only the tests need: compilers and other languages
	@$(SYSTEM_PYTHON) -m tools.system --tests

demo: env system ## run the main job on a throw-away fleet [NODES=1 DRIVER=qemu NONCE=text]
	@$(PYTHON) -m tools.demo

up: env system ## keep a fleet in the foreground [NODES=1 DRIVER=qemu PORT=0 RANGE=… METRICS=1]; Ctrl-C ends it
	@$(PYTHON) -m tools.up

test: env test-system ## do all set-up and run every test; a skip is a failure
	@rm -rf build/results
	@$(PYTHON) -m tools.suites --check --promises $(SUITES)

check: env ## format, lint, types, imports, protos and unit tests, in parallel
	@$(PYTHON) -m tools.check

protos: env ## generate the Python and Go stubs, the services of Java, the image and the pages of docs/ that are made
	@$(PYTHON) -m tools.protos generate
	@$(PYTHON) -m tools.go_stubs generate
	@$(PYTHON) -m tools.java_services generate
	@$(PYTHON) -m tools.pages

protos-check: env ## lint the protos, look for breaking changes and for stubs out of date
	@$(PYTHON) -m tools.check protos go java pages

format: env ## format all Python
	@.venv/bin/ruff format .

lint: env ## ruff
	@$(PYTHON) -m tools.check format lint

type: env ## mypy --strict
	@$(PYTHON) -m tools.check types

imports: env ## the layers: who may import whom
	@$(PYTHON) -m tools.check imports

unit: env ## tests of pure logic
	@$(PYTHON) -m tools.suites unit

contract: env test-system ## one suite of promises against every driver and backend
	@$(PYTHON) -m tools.suites contract

integration: env test-system ## real back ends, the truth read from outside
	@$(PYTHON) -m tools.suites integration

fleet: env test-system ## the public API of a running fleet
	@$(PYTHON) -m tools.suites fleet

clients: env test-system ## other programs against a running fleet
	@$(PYTHON) -m tools.suites clients

chaos: env test-system ## seeded faults under load [ROUNDS=n SEED=n]
	@$(PYTHON) -m tools.suites --once chaos

endurance: env test-system ## leaks, power cuts, upgrades, restores, restarts under load [CYCLES=n SEED=n]
	@$(PYTHON) -m tools.suites endurance

bench: env system ## measure, print a table, write bench/results.json and docs/performance.md [PEER=1 BENCH_MIB=n]
	@$(PYTHON) -m bench

nightly: test ## everything, with the long runs
	@ROUNDS=$${ROUNDS:-50} $(PYTHON) -m tools.suites --once chaos
	@VIRTFLEET_CONFORMANCE_SLOW=1 $(PYTHON) -m pytest -q tests/clients/test_conformance.py -k fake
	@CYCLES=$${CYCLES:-1000} CUTS=$${CUTS:-400} $(PYTHON) -m tools.suites --once endurance
	@$(PYTHON) -m tests.endurance.soak
	@$(PYTHON) -m bench

stubs: env ## generate stubs into build/stubs for LANGUAGE=name; without it, list the languages
	@$(PYTHON) -m tools.stubs $(LANGUAGE)

docs: env ## build the documentation site into build/site; dead links fail
	@$(PYTHON) -m tools.site

wheels: env ## build the wheel of every distribution into build/wheels
	@$(PYTHON) -m tools.wheels

where: ## say where something is defined (NAME=x)
	@$(PYTHON) -m tools.where '$(NAME)'

promises: ## hold tests/promises.toml against the last run
	@$(PYTHON) -m tools.promises

clean: ## end what a killed fleet left and remove all build products (not .venv)
	@if [ -x $(PYTHON) ]; then $(PYTHON) -m tools.fleet; fi
	@rm -rf build .run .hypothesis .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# Everything runs in .venv, which is made on first use; what tries other packages in .venv-clients, which has them, and what
# tries the lowest versions in .venv-lowest. The versions are those of constraints.txt; with CONSTRAINTS= the newest.
#   make demo     set up, then run the demo into demo/
#   make check    set up, then format check, lint, types, tests
#   make quick    set up, then a quick part of the tests, QUICK below
#   make lowest   set up, then that part with the lowest versions of what tomevit needs, those of constraints-lowest.txt
#   make lowest-extras   set up, then build the site and test programs with the lowest versions of what those extras need
#   make dist     set up, then build wheel and sdist into dist/ and try them in an empty environment, with the quick part of
#                 the sdist's tests; make dist TESTS=all runs them all
#   make docs     set up, then build the site into build/site and test it
#   make clients  set up, then try the models with other packages, and store what came of it for docs/works_with.md
#   make faults   set up, then try broken and hostile files, machines and networks, and store it for docs/promises.md
#   make gpu      on a machine with a GPU: its tests and figures, as far as nine minutes go; with the Python that is there
#   make soak     set up, then the long ones of these, as thousands of files, a hundred kills
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
MINUTES ?= 9
OUT ?= build/gpu
SCRIPTS := $(if $(filter Windows_NT,$(OS)),Scripts,bin)
BIN := .venv/$(SCRIPTS)
CLIENTS := .venv-clients/$(SCRIPTS)
LOWEST := .venv-lowest/$(SCRIPTS)
LOWEST_PROGRAMS := .venv-lowest-programs/$(SCRIPTS)
# Of each part of create(), from names and numbers to files and answers; nothing that compiles, and no network.
QUICK := $(patsubst %,tests/core/test_%.py,checkpoint formats golden headers output schedule transform typed zoo)
TESTS ?= $(QUICK)

.PHONY: demo check docs clients faults gpu soak quick lowest lowest-extras dist lint test coverage fix clean

demo: .venv/demo
	$(BIN)/tomevit demo -o demo

check: lint test

docs: .venv/test
	$(BIN)/python -m sphinx -E -W --keep-going -q -c docs . build/site
	$(BIN)/pytest -m site
	@echo 'built: build/site/index.html'

clients: .venv-clients/clients
	$(CLIENTS)/pytest --numprocesses=auto -m clients tests/clients --store docs/works_with.json
	$(CLIENTS)/python -m docs.written_tables

faults: .venv/test
	$(BIN)/pytest --numprocesses=auto --dist=worksteal -m 'faults and not soak' tests --store docs/promises.json
	$(BIN)/python -m docs.written_tables

gpu:
	$(PYTHON) -m benchmarks.gpu --minutes $(MINUTES) --out $(OUT)

soak: .venv/test
	$(BIN)/pytest -m soak --durations=0

quick: .venv/quick
	$(BIN)/pytest --numprocesses=auto --dist=worksteal $(QUICK)

lowest: .venv-lowest/quick
	$(LOWEST)/pytest --numprocesses=auto --dist=worksteal $(QUICK)

lowest-extras: .venv-lowest/extras .venv-lowest-programs/extras
	$(LOWEST)/python -m sphinx -E -W --keep-going -q -c docs . build/site-lowest
	$(LOWEST_PROGRAMS)/pytest --numprocesses=auto --dist=worksteal tests/tools/test_export_programs.py

dist: .venv/dist
	PIP_CONSTRAINT='$(abspath $(CONSTRAINTS))' $(BIN)/python scripts/try_dist.py $(TESTS)

lint: .venv/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: .venv/test
	$(BIN)/pytest --numprocesses=auto --dist=worksteal

coverage: .venv/test
	$(BIN)/pytest --numprocesses=auto --dist=worksteal --cov --cov-report=term

fix: .venv/test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .venv-clients .venv-lowest .venv-lowest-programs build demo dist

.venv/demo: EXTRAS := plot
.venv/dist: EXTRAS := dist
.venv/quick: EXTRAS := quick
.venv/test: EXTRAS := test
.venv/demo .venv/dist .venv/quick .venv/test: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile $(addprefix --constraint ,$(CONSTRAINTS)) --editable '.[$(EXTRAS)]'
# pip would compile on one core only. What needs a later Python lies in torch's _internal, and is not needed.
	-$(BIN)/python -m compileall -q -j 0 -x '/(tests|_internal)/' .venv/lib tomevit benchmarks examples
	touch $@

.venv-clients/clients: pyproject.toml constraints.txt constraints-clients.txt
	test -x $(CLIENTS)/python || $(PYTHON) -m venv .venv-clients
	$(CLIENTS)/python -m pip install --quiet --no-compile $(addprefix --constraint ,$(CONSTRAINTS)) --constraint constraints-clients.txt --editable '.[clients]'
	touch $@

.venv-lowest/quick: EXTRAS := quick,engines,parquet
.venv-lowest/extras: EXTRAS := quick,engines,parquet,video,docs,ray
.venv-lowest/quick .venv-lowest/extras: pyproject.toml constraints-lowest.txt
	test -x $(LOWEST)/python || $(PYTHON) -m venv .venv-lowest
	$(LOWEST)/python -m pip install --quiet --no-compile --constraint constraints-lowest.txt --editable '.[$(EXTRAS)]'
	touch $@

.venv-lowest-programs/extras: pyproject.toml constraints-lowest-programs.txt
	test -x $(LOWEST_PROGRAMS)/python || $(PYTHON) -m venv .venv-lowest-programs
	$(LOWEST_PROGRAMS)/python -m pip install --quiet --no-compile --constraint constraints-lowest-programs.txt --editable '.[quick,openvino]'
	touch $@

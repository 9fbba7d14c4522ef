PYTHON ?= python3
VENV ?= .venv
BOARD ?= .3.1 .2.. .... ...4
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: solve web picture test check format clean

solve: $(VENV)/.installed  ## set up, and solve a board: make solve BOARD=".3.1 .2.. .... ...4"
	@$(BIN)/python examples/sudoku/solve.py "$(BOARD)"

web: $(VENV)/.installed  ## build the page that runs nano in a browser: examples/web/dist
	PIP_CONSTRAINT=constraints.txt $(PIP) install -e ".[onnx]"
	@$(BIN)/python examples/web/build.py

picture: $(VENV)/.installed  ## draw README's picture from its recording
	@$(BIN)/dgemma replay docs/canvas.jsonl --svg docs/canvas.svg --columns 76 --force

test: check  ## set up, and run every test, a module at a time on every core
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadscope

check: $(VENV)/.dev  ## lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(PIP) install -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	PIP_CONSTRAINT=constraints.txt $(PIP) install -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info

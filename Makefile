# `make demo` and `make test` set up everything that they need in .venv.
# PYTHON chooses the interpreter (3.11 or later), TORCH the requirement for PyTorch that pip is given.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: demo test clean

demo: .venv/ready demo/config.json
	$(BIN)/ttt-omni answer --model demo examples/question.wav --output answer.wav --max-new-tokens 32

demo/config.json: | .venv/ready
	$(BIN)/ttt-omni make-tiny demo

test: .venv/ready-to-test
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$(TORCH)" --editable .
	touch $@

.venv/ready-to-test: .venv/ready
	$(BIN)/pip install --quiet "$(TORCH)" --editable ".[test]"
	touch $@

clean:
	rm -rf .venv demo answer.wav

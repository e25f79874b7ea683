# Shortcuts; everything here is one command that also works without make.
PY := .venv/bin/python

.PHONY: setup test lint type format bench gpu-check
setup:
	python3 run.py setup
test:
	python3 run.py test
lint:
	.venv/bin/ruff check .
type:
	.venv/bin/mypy
format:
	.venv/bin/ruff format .
bench:
	$(PY) -m eval.bench surrogate && $(PY) -m eval.bench scale && $(PY) -m eval.bench env && $(PY) -m eval.bench startup
gpu-check:  # everything that needs a GPU, into one file; at most eight minutes (docs/gpu.md)
	$(if $(wildcard $(PY)),$(PY),python3) -m eval.gpu_check --json gpu-check.json

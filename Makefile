# The two commands: `make demo` and `make test`; `make docs` builds the site. All set up what they need in .venv.
PYTHON ?= python3
VENV := .venv
RUN := runs/demo
# seconds of the soak among the slow tests; an hour without make
export COMAD_SOAK ?= 300

.PHONY: demo test docs test-slow test-faults teachers benchmarks results clean
.DELETE_ON_ERROR:

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(VENV)/bin/comad distill --run.out $(RUN)

test: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile \
		--jaxtyping-packages=comad,beartype.beartype

docs: $(VENV)/installed
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(VENV)/bin/python docs/notebook.py
	$(VENV)/bin/zensical build --clean --strict

test-slow: $(VENV)/installed
	$(VENV)/bin/python -m pytest -m slow

test-faults: $(VENV)/installed
	$(VENV)/bin/python -m pytest tests/faults -m 'slow or not slow'

teachers: $(VENV)/installed
	$(VENV)/bin/python benchmarks/teachers.py

benchmarks: $(VENV)/installed
	$(VENV)/bin/python benchmarks/performance.py --run

results: $(VENV)/installed
	$(VENV)/bin/python benchmarks/results.py

clean:
	rm -rf $(VENV) dist build

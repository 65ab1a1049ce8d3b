# make book   the rendered book, with every notebook executed
# make test   everything that is checked, ending with one line of pytest
# make lab    the notebooks in JupyterLab
# make exercises   notebooks without solutions, in exercises/
#
# Options: PYTHON=python3.12  a certain interpreter;  PIP_ARGS="..."  extra arguments for pip,
# for instance an index with CPU builds of torch.

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
# A notebook that runs beside another one on few cores is fastest with one thread.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: book test lab exercises venv clean
.DEFAULT_GOAL := book

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'speechlearn needs Python 3.10 or newer; say make PYTHON=...')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[book,dev,synth]" || \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[book,dev]"
	touch $@

venv: $(VENV)/installed

book: venv
	$(BIN)/python book/build.py

test: venv
	$(BIN)/python book/browser.py
	SPEECHLEARN_QUICK=1 $(ONE_THREAD) $(BIN)/nbdev_test --n_workers 2
	$(BIN)/python book/build.py
	$(ONE_THREAD) $(BIN)/python -m pytest --jaxtyping-packages=speechlearn,beartype.beartype

lab: venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[lab]"
	$(BIN)/jupyter lab nbs

exercises: venv
	$(BIN)/python -m speechlearn.exercises nbs exercises

clean:
	rm -rf _build exercises

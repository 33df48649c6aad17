# make play | demo | test | clean.  Without make: see README.md, "By hand".
# VENV=folder of the environment, PYTHON=interpreter to make it with, WINDOW=1 for a desktop window, LAB='more options for JupyterLab'
VENV   ?= .venv
PYTHON ?=
WINDOW ?=
LAB    ?=

BIN := $(VENV)/bin
FIT := import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))

.PHONY: help env play demo test clean
help:
	@echo 'make play            a self-test, play.gif, then the player in JupyterLab (WINDOW=1: in a desktop window)'
	@echo 'make demo            the self-test and play.gif only'
	@echo 'make test            all tests (under 20 minutes on 2 cores)'
	@echo 'make env             only the environment $(VENV); the other targets make it when it is missing'
	@echo 'make clean           removes the environment, play.gif and build leftovers; runs/ stays'

env: $(VENV)/.ok

$(VENV)/.ok: settings.ini setup.py pyproject.toml constraints.txt
	@start=$$(date +%s); python=; \
	for p in $(if $(PYTHON),'$(PYTHON)',python3 python3.13 python3.12 python3.11 python3.10); do \
	  if "$$p" -c '$(FIT)' 2>/dev/null; then python=$$p; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo 'This needs Python 3.10 to 3.13 with its venv module (Debian: python3-venv): install one, or name one with make PYTHON=/its/path.' >&2; exit 1; \
	fi; \
	echo "Making $(VENV) with $$("$$python" -V): torch, ViZDoom, JupyterLab and what they need. Once; it may take minutes."; \
	"$$python" -m venv '$(VENV)' && \
	'$(BIN)/python' -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]' && \
	took=$$(($$(date +%s)-start)) && echo "$$took" > '$@' && echo "The environment is ready after $$took s."

demo: $(VENV)/.ok
	@'$(BIN)/gamengen' demo --gif play.gif

ifneq ($(WINDOW),)
play: demo
	@'$(BIN)/gamengen' play --window
else
play: demo
	@echo 'JupyterLab starts. Open the address it prints, run the first cell, click the picture and press arrow keys. Ctrl-C twice ends it.'
	@'$(BIN)/jupyter' lab --LabApp.default_url=/lab/tree/nbs/10_player.ipynb --log-level=ERROR \
	  $$([ "$$(id -u)" != 0 ] || echo --allow-root) \
	  $$([ -n "$$DISPLAY$$WAYLAND_DISPLAY" ] || [ "$$(uname)" = Darwin ] || echo --no-browser) $(LAB)
endif

test: $(VENV)/.ok
	@'$(BIN)/python' tests/run_all.py

clean:
	rm -rf '$(VENV)' build dist *.egg-info _proc .pytest_cache play.gif
	find gamengen_nb nbs tests -name __pycache__ -o -name .ipynb_checkpoints -o -name _vizdoom -o -name _vizdoom.ini | xargs rm -rf

# Every target sets up .venv first; where that is done already it starts at once.
# Variables: PYTHON, the interpreter .venv is made from; ARGS, passed on by `make demo` and `make test`.

.DEFAULT_GOAL := help
.PHONY: help setup demo test docs lab readme clean

PY := .venv/bin/python
# The set-up holds for one place, because .venv stores where it is: a checkout that was moved or copied is set up again.
STAMP := .venv/ready-$(shell pwd -P | cksum | cut -d ' ' -f 1)
CANDIDATES := $(if $(PYTHON),'$(PYTHON)',python3 python3.12 python3.11 python3.13 python)

help:
	@echo 'make demo    audit an attention, meta-learn with it, and write a report to out/ (ARGS="--preset full --out DIR" for more)'
	@echo 'make test    run every check (ARGS="pages tests" for some of them)'
	@echo 'make docs    build the site into _docs (needs Quarto)'
	@echo 'make lab     open the notebooks in JupyterLab'
	@echo 'make readme  write README.md from nbs/index.ipynb'
	@echo 'make clean   remove what building and testing left behind, but neither .venv nor results'
	@echo
	@echo 'All of them need Python 3.11 or newer; what else there is to install goes into .venv.'

setup: $(STAMP)

demo: $(STAMP)
	@.venv/bin/theria contract $(if $(ARGS),$(ARGS),--preset quick)

test: $(STAMP)
	@$(PY) scripts/check.py $(ARGS)

docs: $(STAMP)
	@$(PY) scripts/pages.py

lab: $(STAMP)
	@$(PY) -m jupyterlab nbs

readme: $(STAMP)
	@$(PY) scripts/readme.py

clean:
	rm -rf _proc _docs build dist *.egg-info .pytest_cache .hypothesis nbs/.last_checked
	find nbs theria tests scripts examples -name __pycache__ -prune -exec rm -rf {} + -o -name .ipynb_checkpoints -prune -exec rm -rf {} +

$(STAMP): requirements.txt settings.ini setup.py
	@for p in $(CANDIDATES); do \
	  if "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$p; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "theria needs Python 3.11 or newer, and $(if $(PYTHON),$(PYTHON) is not,none was found on PATH): install one, or name one with \`make $(MAKECMDGOALS) PYTHON=/path/to/python3.12\`." >&2; exit 1; \
	fi; \
	echo "Setting up .venv with $$("$$python" --version): one to three minutes."; \
	"$$python" -m venv .venv || { echo "$$python cannot make a virtual environment: install its venv module (Debian and Ubuntu: apt install python3-venv)." >&2; exit 1; }
	@$(PY) -m pip install -qq --disable-pip-version-check -r requirements.txt
	@$(PY) -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@$(PY) -m pip check
	@if [ -e .git ] && command -v git >/dev/null && ! git config --local --get-all include.path | grep -qxF ../.gitconfig; then \
	  git config --local --add include.path ../.gitconfig || true; \
	fi
	@touch $@

# make run    the main job: the 5-way 1-shot comparison, from download to table
# make test   the tests, with linter and type checker
# Both make the environment first: .venv, with the exact versions of requirements.lock.

SHELL := /bin/bash
PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin
export PATH := $(BIN):$(PATH)

.PHONY: run glyphs test setup lock

run: setup
	@if dvc repro --quiet fetch; then \
	    dvc repro compare@5w1s && python -m rich.markdown --width 110 reports/5w1s.md; \
	elif [ -n "$$OMNIGLOT_MIRROR" ]; then \
	    exit 1; \
	else \
	    printf '\n%s\n%s\n\n' 'There is no Omniglot (see above), so the same now runs on glyphs, characters drawn by a program.' \
	        'What follows is NOT Omniglot. It runs in a folder of its own; params.yaml and the committed results stay.'; \
	    $(MAKE) --no-print-directory glyphs; \
	fi

# The 5-way 1-shot comparison on generated characters, as a DVC experiment named glyphs.
glyphs: setup
	@dvc exp run --temp --force --name glyphs -S data.source=glyphs compare@5w1s
	@experiment=$$(git for-each-ref --format='%(objectname)' --sort=-creatordate 'refs/exps/**/glyphs' | head -n 1); \
	    git show "$$experiment:reports/5w1s.md" | python -m rich.markdown --width 110 -

test: setup
	ruff check .
	ruff format --check .
	mypy
	pytest

setup: .venv/installed

.venv/installed: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "metalib needs Python 3.11 or newer, for instance: make PYTHON=python3.11 run")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	touch $@

# After a change of pyproject.toml: the newest versions that fit. CUDA's packages are for Linux alone.
lock:
	rm -rf .lock && $(PYTHON) -m venv .lock
	sed -n '/^dependencies/,/^]/p; /^dev = /p' pyproject.toml | grep -oE '"[^"]+"' | tr -d '"' >.lock/wanted
	.lock/bin/python -m pip install --quiet --requirement .lock/wanted
	(echo '# Exact versions; made by: make lock'; .lock/bin/python -m pip freeze | \
	    sed -E "/^(nvidia|cuda|triton)/ s/$$/ ; sys_platform == 'linux'/") >requirements.lock
	rm -rf .lock

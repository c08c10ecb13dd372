# make run    the main job: the 5-way 1-shot comparison, from download to table
# make test   the tests, with linter and type checker
# make faults end every stage in every way, and run it again; writes docs/faults.md; ten minutes
# Both make the environment first: .venv, with the exact versions of requirements.lock.

SHELL := /bin/bash
PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin
export PATH := $(BIN):$(PATH)

# The stages of 5-way 1-shot in the order of params.yaml's algorithms, each learner tested right after its training.
# DVC's own order varies; with --single-item it runs exactly these stages in this order.
STAGES = fetch preprocess cells split@5w1s \
    $$(dvc stage list --name-only | sed -n 's/^evaluate@\(.*-5w1s\)$$/meta_train@\1 evaluate@\1/p') compare@5w1s
STOPPED = trap 'printf "\nStopped; what is finished is kept. To go on: make $@\n"; exit 130' INT

.PHONY: run glyphs test faults setup lock

run: setup
	@$(STOPPED); \
	echo 'About 20 minutes on 2 cores, 6 of them for MAML and about one for each of the other 11 learners.'; \
	echo 'Each is tested right after its training, those of the slides first; the table of all comes last.'; \
	if dvc repro --quiet fetch; then \
	    dvc repro --single-item $(STAGES) && python -m rich.markdown --width 110 reports/5w1s.md; \
	elif [ -n "$$OMNIGLOT_MIRROR" ]; then \
	    exit 1; \
	else \
	    printf '\n%s\n%s\n\n' 'Omniglot cannot be had (see above), so the same now runs on glyphs, characters drawn by a program.' \
	        'What follows is NOT Omniglot. It runs in a folder of its own; params.yaml and the committed results stay as they are.'; \
	    $(MAKE) --no-print-directory glyphs; \
	fi

# The 5-way 1-shot comparison on generated characters, as a DVC experiment named glyphs.
glyphs: setup
	@$(STOPPED); \
	dvc exp run --temp --force --name glyphs -S data.source=glyphs --single-item $(STAGES) && \
	experiment=$$(git for-each-ref --format='%(objectname)' --sort=-creatordate 'refs/exps/**/glyphs' | head -n 1) && \
	git show "$$experiment:reports/5w1s.md" | python -m rich.markdown --width 110 -

test: setup
	ruff check .
	ruff format --check .
	mypy
	pytest

faults: setup
	OMP_NUM_THREADS=1 pytest -m slow tests/faults

setup: .venv/installed

.venv/installed: requirements.lock
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "metalib needs Python 3.11 or newer, for instance: make PYTHON=python3.11 run")'
	"$(PYTHON)" -m venv .venv
	"$(BIN)/python" -m pip install --quiet --requirement requirements.lock
	touch $@

# After a change of pyproject.toml: the newest versions that fit. CUDA's packages are for Linux alone.
lock:
	rm -rf .lock && "$(PYTHON)" -m venv .lock
	sed -n '/^dependencies/,/^]/p; /^pipeline/,/^]/p; /^dev = /p' pyproject.toml | grep -oE '"[^"]+"' | tr -d '"' >.lock/wanted
	.lock/bin/python -m pip install --quiet --requirement .lock/wanted
	(echo '# Exact versions; made by: make lock'; .lock/bin/python -m pip freeze | \
	    sed -E "/^(nvidia|cuda|triton)/ s/$$/ ; sys_platform == 'linux'/") >requirements.lock
	rm -rf .lock

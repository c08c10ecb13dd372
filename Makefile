# make run    the main job: the 5-way 1-shot comparison, from download to table
# make test   the tests, with linter and type checker
# make verify whether the committed results are what the runs made, and the tables what the results say
# make faults every stage ended in every way and run again; writes docs/faults.md; a quarter of an hour
# All make the environment first: .venv, with the exact versions of requirements.lock.

SHELL := /bin/bash
PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin
export PATH := $(BIN):$(PATH)

# The stages of 5-way 1-shot in the order of params.yaml's algorithms, each learner tested right after its training.
# DVC's own order varies; with --single-item it runs exactly these stages in this order.
# Without --wait-for-lock it would not record a stage at whose end another command has DVC's lock for over 3 seconds.
STAGES = fetch preprocess cells split@5w1s \
    $$(dvc stage list --name-only | sed -n 's/^evaluate@\(.*-5w1s\)$$/meta_train@\1 evaluate@\1/p') compare@5w1s
STOPPED = trap 'printf "\nStopped; what is finished is kept. To go on: make $@\n"; exit 130' INT

.PHONY: run glyphs test verify faults setup lock

# DVC repeats on stderr the status that a stage exits with: fetch's 3 says that Omniglot's host gave no archive.
run: setup
	@$(STOPPED); \
	echo 'About 20 minutes on 2 cores, 6 of them for MAML and about one for each of the other 11 learners.'; \
	echo 'Each is tested right after its training, those of the slides first; the table of all comes last.'; \
	exec 3>&1; said=$$(dvc repro fetch 2>&1 >&3); failed=$$?; \
	[ -z "$$said" ] || echo "$$said" >&2; \
	if [ $$failed = 0 ]; then \
	    dvc --wait-for-lock repro --single-item $(STAGES) && python -m rich.markdown --width 110 reports/5w1s.md; \
	elif [[ "$$said" != *'stages.fetch, exited with 3'* ]]; then \
	    exit 1; \
	else \
	    printf '\n%s\n%s\n\n' 'Omniglot cannot be had (see above), so the same now runs on glyphs, characters drawn by a program.' \
	        'What follows is NOT Omniglot. It runs in a folder of its own; params.yaml and the committed results stay as they are.'; \
	    $(MAKE) --no-print-directory glyphs; \
	fi

# The 5-way 1-shot comparison on generated characters, as a DVC experiment named glyphs.
# For one, DVC writes the project's path and .git/config anew, in ASCII.
glyphs: setup
	@if { pwd -P; cat "$$(git rev-parse --git-path config)" 2>/dev/null; } | LC_ALL=C grep -q '[^[:print:][:space:]]'; then \
	    echo "error: DVC runs an experiment only where the project's path and .git/config are ASCII; move the folder or" \
	        'change what is in .git/config, or set data.source to glyphs in params.yaml and run: dvc repro compare@5w1s' >&2; \
	    exit 1; \
	fi
	@$(STOPPED); \
	dvc --wait-for-lock exp run --temp --force --name glyphs -S data.source=glyphs --single-item $(STAGES) && \
	experiment=$$(git for-each-ref --format='%(objectname)' --sort=-creatordate 'refs/exps/**/glyphs' | head -n 1) && \
	git show "$$experiment:reports/5w1s.md" | python -m rich.markdown --width 110 -

test: setup
	ruff check .
	ruff format --check .
	mypy
	pytest -n logical --maxprocesses 8 --dist worksteal

verify: setup
	@python -m stages.verify

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

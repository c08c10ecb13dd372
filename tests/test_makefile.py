"""What `make` does around DVC: where it runs, and when it takes glyphs in place of Omniglot."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import zc.lockfile

from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
Make = Callable[..., tuple[int, str]]
PIPELINE = """
stages:
  fetch: {cmd: python -m stages.fetch}
  preprocess: {cmd: "true"}
  cells: {cmd: python -m stages.cells}
  split: {matrix: {setting: [5w1s]}, cmd: "true"}
  compare: {matrix: {setting: [5w1s]}, cmd: "true"}
"""
HOLDER = """
import os, time, zc.lockfile
reading, writing = os.pipe()
if os.fork():
    os.close(writing)
    os.read(reading, 1)  # until the child has the lock
else:
    lock = zc.lockfile.LockFile(".dvc/tmp/lock")
    os.closerange(0, 3)
    os.write(writing, b"1")
    time.sleep(5)
"""
DVC = f"""#!/bin/bash
case "$1" in
    --wait-for-lock) [ "$2" = repro ] && exec '{sys.executable}' -m dvc "$@" || echo "experiment in $PWD:" "$@" ;;
    stage) ;;
    *) exec '{sys.executable}' -m dvc "$@" ;;
esac
"""


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Run make in a project of this name, whose stage fetch ends with this status and whose DVC runs no experiment."""

    def run(
        target: str,
        status: int = 0,
        name: str = "my folder",
        config: str = "",
        locked: bool = False,
        cells: str = "",
        worktree: bool = False,
    ) -> tuple[int, str]:
        folder = tmp_path / name
        folder.mkdir()
        for file in ("Makefile", "requirements.lock"):
            shutil.copy(ROOT / file, folder)
        script(folder / ".venv/bin/dvc", DVC)
        script(folder / ".venv/bin/python", f"#!/bin/sh\nexec '{sys.executable}' \"$@\"\n")
        (folder / ".venv/installed").touch()
        (folder / ".dvc/tmp").mkdir(parents=True)
        (folder / ".dvc/config").touch()
        (folder / "dvc.yaml").write_text(PIPELINE)
        (folder / "stages").mkdir()
        (folder / "stages/fetch.py").write_text(f"raise SystemExit({status})\n")
        (folder / "stages/cells.py").write_text(cells)
        home = tmp_path / "home" if worktree else folder
        subprocess.run(["git", "init", "--quiet", home], check=True)
        if worktree:
            commit = [
                "-c",
                "user.name=t",
                "-c",
                "user.email=t@example.org",
                "commit",
                "--quiet",
                "--allow-empty",
                "-m",
                "empty",
            ]
            subprocess.run(["git", *commit], cwd=home, check=True)
            subprocess.run(["git", "worktree", "add", "--quiet", "--detach", tmp_path / "tree"], cwd=home, check=True)
            shutil.move(tmp_path / "tree/.git", folder)
        with open(home / ".git/config", "a", encoding="utf-8") as file:
            file.write(config)
        held = zc.lockfile.LockFile(str(folder / ".dvc/tmp/lock")) if locked else None
        environment = {name: value for name, value in os.environ.items() if name not in ("OMNIGLOT_MIRROR", "DVC_ROOT")}
        done = subprocess.run(
            ["make", target], cwd=folder, capture_output=True, text=True, env=environment | {"PYTHONUTF8": "1"}
        )
        if held:
            held.close()
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.mark.parametrize(
    ("status", "locked", "complaint"),
    [
        (1, False, "stages.fetch, exited with 1"),
        (0, True, "Unable to acquire lock"),
        (3, False, "follows is NOT Omniglot"),
    ],
)
def test_only_a_failed_download_leads_to_glyphs(make: Make, status: int, locked: bool, complaint: str) -> None:
    """Seen failing: every failure of `dvc repro fetch` did, and --quiet hid which it was."""
    code, said = make("run", status, locked=locked)
    assert complaint in said
    assert ("--name glyphs -S data.source=glyphs --single-item fetch" in said) == (status == 3)
    assert code or status == 3


@pytest.mark.parametrize(
    ("name", "config", "worktree", "refused"),
    [
        ("my folder", "", False, False),
        ("my folder", "", True, False),
        ("Übung", "", False, True),
        ("project", "[user]\n\tname = Jürgen\n", False, True),
        ("project", "[user]\n\tname = Jürgen\n", True, True),
    ],
)
def test_glyphs_where_dvc_cannot_run_an_experiment(make: Make, name: str, config: str, worktree: bool, refused: bool) -> None:
    """Seen failing: DVC's "unexpected error - 'ascii' codec can't encode character"; a worktree's configuration unread."""
    code, said = make("glyphs", name=name, config=config, worktree=worktree)
    assert ("only where the project's path and .git/config are ASCII" in said) == refused
    assert (f"{name}: --wait-for-lock exp run --temp" in said) != refused and bool(code) >= refused


def test_a_stage_is_recorded_though_the_lock_is_taken_at_its_end(make: Make, tmp_path: Path) -> None:
    """By `dvc status`, say. Seen failing without --wait-for-lock: DVC gives up, and the stage would run again."""
    _, said = make("run", cells=HOLDER)
    assert "  cells:\n" in (tmp_path / "my folder/dvc.lock").read_text(), said


def test_the_environment_is_made_in_a_folder_with_a_space(tmp_path: Path) -> None:
    """Seen failing with BIN not in quotation marks."""
    folder = tmp_path / "my folder"
    script(folder / "a python", '#!/bin/bash\n[ "$2" != venv ] || { mkdir -p .venv/bin && cp "$0" .venv/bin/python; }\n')
    for file in ("Makefile", "requirements.lock"):
        shutil.copy(ROOT / file, folder)
    done = subprocess.run(["make", f"PYTHON={folder}/a python", "setup"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (folder / ".venv/installed").exists()

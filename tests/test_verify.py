"""`make verify` names what in metrics, plots and reports is not as a run left it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stages import verify
from tests.conftest import ROOT, Stage

PIPELINE = """
stages:
  evaluate:
    matrix: {setting: [5w1s, 5w5s]}
    cmd: "true"
    metrics:
    - metrics/${item.setting}/maml.json: {cache: false}
    plots:
    - plots/${item.setting}/maml: {cache: false}
  compare:
    matrix: {setting: [5w1s, 5w5s]}
    cmd: "true"
    deps:
    - metrics/${item.setting}
    outs:
    - reports/${item.setting}.md: {cache: false}
  leaderboard:
    cmd: "true"
    deps: [metrics]
    outs:
    - reports/leaderboard.md: {cache: false}
"""
ROW = "| maml | 97.84 ± 0.42 | 96.24 ± 0.54 | 98.7 ± 0.4 |"
TABLE = f"# 5-way 1-shot\n\n| learner | transductive |\n| :-- | --: |\n{ROW} 3 |\n"
README = f"# metalib\n\n| learner | transductive, % |\n| :-- | --: |\n{ROW}\n\nMore.\n"


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def dvc(*arguments: str) -> None:
    run(sys.executable, "-m", "dvc", *arguments)


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project whose outputs are as dvc.lock says."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / ".dvcignore", tmp_path)
    run("git", "init", "--quiet")
    for name, content in {
        ".dvc/config": "",
        "dvc.yaml": PIPELINE,
        "README.md": README,
        "reports/index.md": "by hand",
        "reports/5w1s.md": TABLE,
        "reports/5w5s.md": TABLE,
        "reports/leaderboard.md": TABLE,
        "metrics/5w1s/maml.json": '{"accuracy": 97.84}',
        "metrics/5w5s/maml.json": '{"accuracy": 99.1}',
        "plots/5w1s/maml/by_step.csv": "step\n1\n",
        "plots/5w5s/maml/by_step.csv": "step\n1\n",
    }.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(content)
    dvc("commit", "--force")
    run("git", "add", ".")


def test_what_no_run_left_is_named(recorded: None, stage: Stage) -> None:
    """Each of them seen unnoticed before there was the command."""
    Path("metrics/5w1s/.maml.json.swp").touch()  # an editor's: no output, and no change of one
    assert "every file is what a run wrote" in stage(verify.app)

    Path("metrics/5w5s/maml.json").write_text('{"accuracy": 99.3}')  # of a later run, that its table does not show
    dvc("commit", "--force", "--quiet", "evaluate@5w5s")
    Path("metrics/5w1s/maml.json").write_text('{"accuracy": 98.84}')
    Path("plots/5w1s/maml/by_step.csv").write_text("step\n2\n")
    Path("plots/5w5s/maml/more.csv").write_text("step\n2\n")
    Path("reports/5w1s.md").write_text(TABLE.replace("97.84", "98.84"))
    Path("reports/5w5s.md").unlink()
    Path("metrics/5w1s/mamel.json").write_text("{}")
    run("git", "add", "metrics/5w1s/mamel.json")  # committed, and no longer there
    Path("metrics/5w1s/mamel.json").unlink()
    Path("plots/scratch.csv").touch()
    said = stage(verify.app, fails=True)
    for sentence in (
        "metrics/5w1s/maml.json was changed by hand after evaluate@5w1s wrote it;",
        "plots/5w1s/maml was changed by hand after evaluate@5w1s wrote it;",
        "plots/5w5s/maml was changed by hand after evaluate@5w5s wrote it;",
        "reports/5w1s.md was changed by hand after compare@5w1s wrote it;",
        "reports/5w5s.md is missing after compare@5w5s wrote it;",
        "metrics/5w5s is not as compare@5w5s read it, so that its page is of other results; dvc repro compare@5w5s",
        "metrics is not as leaderboard read it,",
        "metrics/5w1s/mamel.json was made by no run that dvc.lock knows;",
        "plots/scratch.csv was made by no run that dvc.lock knows;",
        "README.md says of maml: 97.84 ± 0.42, 96.24 ± 0.54, 98.7 ± 0.4, but reports/5w1s.md says: 98.84 ± 0.42",
    ):
        assert sentence in said
    assert said.count("error:") == 11  # compare@5w1s reads the edited metric, too


def test_each_row_of_the_readme_is_the_pages() -> None:
    assert not list(verify.misquoted(README, TABLE))
    (said,) = verify.misquoted(README, TABLE + "| reptile | 97.00 ± 0.49 | 94.84 ± 0.62 | - | 10 |\n")
    assert said.startswith("README.md says of reptile: None, but reports/5w1s.md says: 97.00 ± 0.49")


def test_without_a_pipeline_it_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: Stage) -> None:
    monkeypatch.chdir(tmp_path)
    assert "dvc.lock is not in" in stage(verify.app, fails=True)

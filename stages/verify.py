"""Whether the committed results are what the pipeline's runs made, and the tables what the results say."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape
from ruamel.yaml import YAML

from stages.command import console, one_sentence

FOLDERS = ("metrics", "plots", "reports")
LOCK = Path("dvc.lock")
BY_HAND = "reports/index.md"
README, TABLE = Path("README.md"), Path("reports/5w1s.md")  # the README's table is the first columns of this page's
app = typer.Typer(add_completion=False)


@app.command()
@one_sentence
def main() -> None:
    """Say in a sentence each what in metrics/, plots/, reports/ and the README's table is not as the runs left it; exit 1.

    DVC compares files with dvc.lock, where each run recorded what it read and wrote. That code or params are newer than the
    results is not said here: `dvc status` does.
    """
    if not LOCK.exists():
        raise ValueError(f"{LOCK} is not in {Path.cwd()}; run from the root of a project whose pipeline has run")
    lock = YAML(typ="safe").load(LOCK)["stages"]
    present = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "--exclude-from=.dvcignore", *FOLDERS)
    found = [
        *changed(lock, json.loads(run(sys.executable, "-m", "dvc", "--wait-for-lock", "status", "--json"))),
        *unmade(lock, present.splitlines()),
        *misquoted(README.read_text(), TABLE.read_text()),
    ]
    for sentence in found:
        console.print(f"[bold red]error:[/] {escape(sentence)}", highlight=False)
    if found:
        raise typer.Exit(1)
    console.print(f"{', '.join(FOLDERS)}: every file is what a run wrote, and every table what the results say")


def run(*command: str) -> str:
    """A command's output; ValueError with its last line of complaint where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(command)} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def changed(lock: dict[str, Any], status: dict[str, Any]) -> Iterator[str]:
    """Outputs that are no longer what their stage wrote, and pages of other results than there are now."""

    def committed(change: dict[str, Any], kind: str) -> list[tuple[str, str]]:
        return sorted((path, state) for path, state in change.get(kind, {}).items() if path.split("/")[0] in FOLDERS)

    for stage in sorted(status.keys() & lock.keys()):
        wrote = {out["path"] for out in lock[stage].get("outs", [])}
        for change in status[stage]:
            if isinstance(change, dict):  # a changed command is a string
                for path, state in committed(change, "changed outs"):
                    if path in wrote:  # what a stage has begun to write since its last run is not there yet
                        what = "is missing" if state == "deleted" else "was changed by hand"
                        yield f"{path} {what} after {stage} wrote it; git checkout {path}, or dvc repro {stage}"
                for path, state in committed(change, "changed deps"):
                    if state == "modified":
                        yield f"{path} is not as {stage} read it, so that its page is of other results; dvc repro {stage}"


def unmade(lock: dict[str, Any], present: list[str]) -> Iterator[str]:
    """Files that are no output, nor in a folder that is one, of any run."""
    outputs = {entry["path"] for stage in lock.values() for entry in stage.get("outs", [])}
    for path in present:
        if path != BY_HAND and not outputs & {path, *map(str, Path(path).parents)}:
            yield f"{path} was made by no run that dvc.lock knows; delete it, or run the stage that makes it"


def misquoted(readme: str, page: str) -> Iterator[str]:
    """Learners whose row of the README's table is not the page's."""
    quoted, made = rows(readme), rows(page)
    for name in sorted(quoted.keys() | made.keys()):
        if quoted.get(name) != made.get(name):
            yield f"{README} says of {name}: {quoted.get(name)}, but {TABLE} says: {made.get(name)}"


def rows(text: str) -> dict[str, str]:
    """Learner -> transductive, inductive and published accuracy, from a page's first table."""
    lines = text[text.index("| :--") :].split("\n\n")[0].splitlines()[1:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name: ", ".join(numbers[:3]) for name, *numbers in cells}


if __name__ == "__main__":
    app()

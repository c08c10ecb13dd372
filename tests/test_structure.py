"""Imports run one way; the pipeline's stages follow params.yaml."""

import ast
import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from metalib import algorithms
from tests.conftest import ROOT, copy_project

ALLOWED = {  # a module may import those on its right, and itself
    "types": set(),
    "randomness": set(),
    "tree": {"types"},
    "inner": {"tree", "types"},
    "models": {"types", "models"},
    "data": {"types", "randomness", "data"},
    "numerics": {"tree", "types"},
    "algorithms": {"inner", "numerics", "tree", "types"},
    "training": {"tree", "types"},
    "evaluation": {"types", "data", "models"},
    "studies": {
        "algorithms",
        "data",
        "evaluation",
        "inner",
        "models",
        "numerics",
        "randomness",
        "studies",
        "training",
        "tree",
        "types",
    },
}


def imports(file: Path) -> set[str]:
    """Full names of what a file imports."""
    names = set[str]()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_imports_run_one_way() -> None:
    """Seen failing with an import of metalib.models in maml.py, and of stages in tree.py."""
    for file in (ROOT / "metalib").rglob("*.py"):
        part = file.relative_to(ROOT / "metalib").with_suffix("").parts[0]
        found = imports(file)
        assert not {name.split(".")[0] for name in found} & {"stages", "dvc", "typer", "ruamel", "yaml", "tests"}, file
        ours = {name.split(".")[1] for name in found if name.startswith("metalib.")}
        assert part == "__init__" or ours <= ALLOWED[part], f"{file}: {ours - ALLOWED[part]}"
        if part == "algorithms" and file.stem != "__init__":  # nor from each other
            assert not any(name.startswith("metalib.algorithms") for name in found), file


def test_dvc_has_a_stage_for_every_algorithm_and_setting() -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "dvc", "stage", "list", "--name-only", "--fail"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    settings = ["5w1s", "5w5s", "20w1s", "20w5s"]
    cells = [f"{name}-{setting}" for name in algorithms.names() for setting in settings]
    studies = YAML(typ="safe").load(ROOT / "params.yaml")["studies"]
    expected = {"fetch", "preprocess", "leaderboard", *(f"{s}@{x}" for s in ("split", "compare") for x in settings), *studies}
    assert set(listed) == expected | {f"{s}@{cell}" for s in ("meta_train", "evaluate") for cell in cells}


def test_adding_a_learner_is_one_file_and_one_section(tmp_path: Path) -> None:
    """A toy learner in a copy of the project is found, has its stages, and is held to the contract, nothing else edited."""
    copy_project(tmp_path)
    fomaml = (tmp_path / "metalib/algorithms/fomaml.py").read_text()
    (tmp_path / "metalib/algorithms/toy.py").write_text(fomaml.replace("class FOMAML", "class Toy"))
    yaml = YAML()
    content = yaml.load(tmp_path / "params.yaml")
    content["algorithms"]["toy"] = content["algorithms"]["fomaml"]
    yaml.dump(content, tmp_path / "params.yaml")

    def run(*command: str) -> str:
        done = subprocess.run([sys.executable, "-m", *command], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    listed = run("dvc", "stage", "list", "--name-only", "--fail").split()
    assert {f"{stage}@toy-20w5s" for stage in ("meta_train", "evaluate")} <= set(listed)
    assert " passed" in run("pytest", "tests/test_contract.py", "-k", "toy", "--color=no", "-o", "addopts=")


NAMES = re.findall(r"\[`([\w.]+)`\]\(\.\./(\S+?)\.py\)", (ROOT / "docs/slides.md").read_text())


@pytest.mark.parametrize(("name", "path"), NAMES)
def test_the_slides_map_points_at_what_there_is(name: str, path: str) -> None:
    """[`module.Class.method`](../path/module.py) in docs/slides.md. Seen failing with a misspelt method and another file."""
    assert len(NAMES) > 20
    module, *parts = name.split(".")
    assert module == path.split("/")[-1] and parts
    found: object = import_module(path.replace("/", "."))
    for part in parts:
        found = getattr(found, part)
    assert getattr(found, "__module__", None) == path.replace("/", ".")  # defined there, not imported


@pytest.mark.parametrize("setting", ["5w1s", "5w5s", "20w1s", "20w5s"])
def test_every_committed_learner_has_learned(setting: str) -> None:
    """More accurate than random initial weights, by more than both intervals."""
    rows = {name: json.loads((ROOT / f"metrics/{setting}/{name}.json").read_text()) for name in algorithms.names()}
    floor = rows.pop("scratch")
    for name, row in rows.items():
        assert row["accuracy"] - row["ci95"] > floor["accuracy"] + floor["ci95"], name

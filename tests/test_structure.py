"""Imports run one way; the pipeline's stages follow params.yaml."""

import ast
import subprocess
import sys
from pathlib import Path

from metalib import algorithms
from tests.conftest import ROOT

ALLOWED = {  # a module may import those on its right, and itself
    "types": set(),
    "randomness": set(),
    "tree": {"types"},
    "inner": {"tree", "types"},
    "models": {"types", "models"},
    "data": {"types", "randomness", "data"},
    "algorithms": {"inner", "tree", "types"},
    "training": {"types", "tree", "algorithms", "data", "models"},
    "evaluation": {"types", "tree", "algorithms", "data", "models"},
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
    expected = {"fetch", "preprocess", "leaderboard", *(f"{s}@{x}" for s in ("split", "compare") for x in settings)}
    assert set(listed) == expected | {f"{s}@{cell}" for s in ("meta_train", "evaluate") for cell in cells}

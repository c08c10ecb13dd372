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
from tests import problems
from tests.conftest import ROOT, copy_project

LIBRARY = {  # a module of metalib may import those on its right, and its own package's
    "types": set(),
    "complaints": set(),
    "randomness": set(),
    "meters": set(),
    "files": set(),
    "checkpoint": {"files"},
    "comparison": set(),
    "cuda_graph": set(),
    "tree": {"types"},
    "inner": {"tree", "types"},
    "numerics": {"tree", "types"},
    "models": {"files", "types"},
    "data": {"types", "randomness"},
    "algorithms": {"complaints", "inner", "numerics", "tree", "types"},
    "optimisers": {"tree", "types"},
    "training": {"checkpoint", "cuda_graph", "optimisers", "tree", "types"},
    "evaluation": {"types", "data", "models"},
}
ABOVE = {  # and a package those on its right
    "metalib": set(),
    "stages": {"metalib"},
    "studies": {"metalib", "stages"},
    "benchmarks": {"metalib", "stages"},
    "tuning": {"benchmarks", "metalib", "stages"},
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


def modules() -> dict[str, Path]:
    """Every module of ours by its full name."""
    found = {}
    for package in ABOVE:
        for file in (ROOT / package).rglob("*.py"):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def test_imports_run_one_way() -> None:
    """Seen failing with an import of metalib.models in maml.py, and of stages in tree.py."""
    for module, file in modules().items():
        package, _, part = module.partition(".")
        found = imports(file)
        ours = {name.split(".")[0] for name in found} & set(ABOVE)
        assert ours <= ABOVE[package] | {package}, f"{file}: {ours}"
        if package == "metalib" and part:
            assert not {name.split(".")[0] for name in found} & {"dvc", "typer", "ruamel", "yaml", "tests"}, file
            part = part.split(".")[0]
            parts = {name.split(".")[1] for name in found if name.startswith("metalib.")} - {part}
            assert parts <= LIBRARY[part], f"{file}: {parts - LIBRARY[part]}"
        if module.startswith("metalib.algorithms."):  # nor from each other
            assert not any(name.startswith("metalib.algorithms") for name in found), file


def test_no_module_imports_its_importer() -> None:
    """No circle, not even through several modules or for type checking alone; seen failing on an import of loss in conv4.py."""
    known = modules()
    edges = {}
    for module, file in known.items():
        names = imports(file)
        wanted = {name if name in known else name.rpartition(".")[0] for name in names}
        edges[module] = (wanted & set(known)) - {module}
    done, path = set[str](), list[str]()

    def visit(module: str) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        path.append(module)
        for other in sorted(edges[module]):
            visit(other)
        done.add(path.pop())

    for module in edges:
        visit(module)


def test_yaml_is_easy_to_read() -> None:
    for name in ("params.yaml", "dvc.yaml"):
        long = [line for line in (ROOT / name).read_text().splitlines() if len(line) > 120]
        assert not long, f"{name}: {long}"


def test_every_stage_says_what_it_does() -> None:
    stages = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
    assert not [name for name, stage in stages.items() if not stage.get("desc")]


def test_every_stage_names_the_code_it_imports() -> None:
    """What a stage's module imports of metalib, and what that imports, is among its deps, or cannot change a result.

    Seen failing with metalib/tree.py taken from meta_train's deps.
    """
    harmless = {"metalib", "metalib.types", "metalib.complaints", "metalib.files", "metalib.algorithms", "metalib.data"}
    harmless.add("metalib.data.omniglot")  # fetch and preprocess name it; from it the others have types and constants
    known = modules()
    for name, stage in YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"].items():
        if name in ("cells",):
            continue  # it checks values with the code of all learners, which cannot change them
        deps = [dep for dep in stage["deps"] if dep.endswith(".py") or "." not in dep]
        wanted, todo = set[str](), [re.search(r"-m ([\w.]+)", stage["cmd"])[1]]  # type: ignore[index]
        todo = [known_name for known_name in (todo[0], f"{todo[0]}.__main__") if known_name in known]
        while todo:
            module = todo.pop()
            for imported in imports(known[module]):
                found = imported if imported in known else imported.rpartition(".")[0]
                ours = ("metalib", "studies", "stages.palette", "stages.tables")
                if found in known and found not in wanted and found.startswith(ours):
                    wanted.add(found)
                    todo.append(found)
        missing = [
            module
            for module in sorted(wanted - harmless)
            if not any((ROOT / dep) in (known[module], *known[module].parents) for dep in deps if not dep.startswith("data"))
        ]
        assert not missing, f"{name}: {missing}"


def test_protocols_depends_on_the_learners_that_it_trains() -> None:
    deps = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]["protocols"]["deps"]
    learners = YAML(typ="safe").load(ROOT / "params.yaml")["studies"]["protocols"]["common"]["learners"]
    assert {dep for dep in deps if "/algorithms/" in dep} == {f"metalib/algorithms/{name}.py" for name in learners}


def test_adding_a_learner_is_one_file_and_one_section(tmp_path: Path) -> None:
    """A toy learner in a copy of the project is found and held to the contract, nothing else edited.

    DVC has a stage for it, as for every algorithm in every setting.
    """
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
    settings, studies = content["settings"], content["studies"]
    cells = [f"{name}-{setting}" for name in [*algorithms.names(), "toy"] for setting in settings]
    expected = {"fetch", "preprocess", "cells", "leaderboard", *studies}
    expected |= {f"{stage}@{setting}" for stage in ("split", "compare") for setting in settings}
    expected |= {f"page@{study}" for study in studies}
    assert set(listed) == expected | {f"{s}@{cell}" for s in ("meta_train", "evaluate") for cell in cells}
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
    """All the project's own have a result, more accurate than random initial weights by more than both intervals.

    A result may be missing of a new learner, and none is left of one that is gone.
    """
    paths = [path for path in (ROOT / f"metrics/{setting}").glob("*.json") if not path.name.endswith(".run.json")]
    rows = {path.stem: json.loads(path.read_text()) for path in paths}
    assert set(problems.HYPER) <= set(rows) <= set(algorithms.names())
    floor = rows.pop("scratch")
    for name, row in rows.items():
        assert row["accuracy"] - row["ci95"] > floor["accuracy"] + floor["ci95"], name

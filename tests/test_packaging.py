"""`pip install .` installs the library and nothing else; the pipeline runs from the checkout whatever is installed."""

import subprocess
import sys
import zipfile
from pathlib import Path

from tests.conftest import ROOT, copy_project


def test_the_wheel_is_the_library_with_its_compiled_engine(tmp_path: Path) -> None:
    """Seen failing without native.cpp among the package's data."""
    copy_project(tmp_path / "project")
    for name in ("README.md", "LICENSE"):
        (tmp_path / "project" / name).write_text((ROOT / name).read_text())
    command = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), "."]
    subprocess.run([sys.executable, "-m", *command], cwd=tmp_path / "project", check=True, capture_output=True)
    (wheel,) = tmp_path.glob("metalib-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"metalib/models/native.cpp", "metalib/algorithms/maml.py", "metalib/data/tasks.py"} <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"metalib"}


def test_a_stage_imports_the_checkout_even_where_a_copy_is_installed(tmp_path: Path) -> None:
    """The working folder comes before installed packages, for which a folder on PYTHONPATH stands in."""
    (tmp_path / "metalib").mkdir()
    (tmp_path / "metalib/__init__.py").write_text("raise ImportError('the installed copy')")
    done = subprocess.run(
        [sys.executable, "-m", "stages.split", "--help"],
        cwd=ROOT, env={"PYTHONPATH": str(tmp_path), "PATH": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "Usage" in done.stdout, done.stderr

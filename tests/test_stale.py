"""What makes a stage out of date, and what does not."""

import json
import subprocess
import sys
from pathlib import Path

from ruamel.yaml import YAML

from tests.conftest import ROOT, copy_project

STRAY = (
    "metalib/models/.conv4.py.swp", "metalib/models/.#conv4.py", "metalib/models/#conv4.py#", "metalib/models/conv4.py~",
    "metalib/models/conv4.py.orig", "metalib/models/.DS_Store", "metalib/models/.ipynb_checkpoints/conv4-checkpoint.py",
    "metalib/models/__pycache__/conv4.pyc", "studies/protocols/.page.md.swp", "studies/protocols/.idea/workspace.xml",
    "metrics/.DS_Store", "metrics/5w1s/.maml.json.swp", "metrics/5w1s/maml.json~", "metrics/5w1s/.maml.json.part",
)  # fmt: skip


def test_stray_files_are_no_dependency_and_a_new_settings_results_are(tmp_path: Path) -> None:
    """Seen failing with __pycache__ and *.part alone in .dvcignore, and with the first settings as the leaderboard's deps."""

    def dvc(*arguments: str) -> str:
        done = subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def touch(*names: str) -> None:
        for path in map(tmp_path.joinpath, names):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("something")

    copy_project(tmp_path)
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    leaderboard = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]["leaderboard"]
    folders = {"cmd": "true", "deps": ["metalib/models", "studies/protocols"], "outs": [{"reports/page.md": {"cache": False}}]}
    YAML().dump({"stages": {"leaderboard": leaderboard, "folders": folders}}, tmp_path / "dvc.yaml")
    touch("metrics/5w1s/maml.json", "reports/leaderboard.md", "plots/leaderboard.csv", "reports/page.md")
    dvc("commit", "--force")
    touch(*STRAY)
    assert json.loads(dvc("status", "--json")) == {}
    touch("metrics/10w2s/maml.json", "metalib/models/another.py")
    assert set(json.loads(dvc("status", "--json"))) == {"leaderboard", "folders"}

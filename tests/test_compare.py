"""The pages and pictures, from results invented here in the layout that evaluate leaves."""

import csv
import json
import re
import shutil
import string
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from stages import compare, files, leaderboard, palette, tables
from tests import problems
from tests.conftest import ROOT, Stage

ACCURACY = {"maml": 0.9, "reptile": 0.8, "leap": 0.7, "scratch": 0.3}


def result(setting: str, name: str, accuracy: float, seeds: int = 1, tasks: int = 200) -> None:
    """What evaluate@name-setting would leave, of a learner that is right by chance with that probability."""
    draws = np.random.default_rng(len(name)).random((seeds, 3, tasks, 5)) < accuracy
    right = draws.mean(-1, dtype="float32")
    mean = round(100 * float(right[:, -1].mean()), 2)
    numbers = {"accuracy": mean, "ci95": 1.5, "inductive": mean - 1, "inductive_ci95": 1.6, "validation": mean}
    way, shot = setting.removesuffix("s").split("w")
    run = {"algorithm": name, "setting": setting, "budget": "quick", "data": "glyphs", "images": "16 px area", "way": int(way),
           "shot": int(shot), "query": 1, "split": "characters", "test_rotations": "none", "tasks": tasks, "seeds": seeds,
           "train_shot": 1, "train_query": 1, "train_rotations": "classes", "train_statistics": "transductive",
           "engine": "native", "meta_steps": 0 if name == "scratch" else 40, "meta_batch": 2, "inner_steps": 2}  # fmt: skip
    if seeds > 1:
        numbers["seed_std"] = 0.5
    files.write_json(files.metrics_file(setting, name), numbers)
    files.write_json(files.run_file(setting, name), run)
    of, folder = {"algorithm": name, "setting": setting}, files.plots_folder(setting, name)
    steps = [0] if name == "scratch" else [20, 40]
    files.write_csv(folder / "learning_curve.csv", [of | {"step": step, "validation": mean} for step in steps])
    by_step = [of | {"inner_step": step, "transductive": mean - 2 + step, "inductive": mean - 3 + step} for step in range(3)]
    files.write_csv(folder / "by_step.csv", by_step)
    files.save_arrays(files.results_file(setting, name), transductive=right, inductive=right)


@pytest.fixture
def four(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with four learners' results in one setting, and no params.yaml."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    for name, accuracy in ACCURACY.items():
        result("5w1s", name, accuracy)
    return tmp_path


def test_a_page_of_all_that_was_evaluated(four: Path, stage: Stage) -> None:
    assert "4 learners, 6 differences" in stage(compare.app, "5w1s")
    page = Path("reports/5w1s.md").read_text()
    assert page.startswith("# 5-way 1-shot\n") and "data glyphs, 16 px area; split characters; budget quick" in page
    assert re.findall(r"^\| (\w+) \| \d", page, re.MULTILINE) == list(ACCURACY)  # by rank
    assert re.search(r"\| maml \|.*\| 98.7 ± 0.4 \| - \| 2 \| 1 \+ 1 \| 40 x 2 \|", page)
    assert re.search(r"\| scratch \|.*\| none \|", page)
    with open("plots/differences/5w1s.csv", newline="") as table:
        rows = list(csv.DictReader(table))
    assert len(rows) == 6 and {row["first"] for row in rows} == {"maml", "reptile", "leap"}
    gap = next(float(row["mean"]) for row in rows if (row["first"], row["second"]) == ("maml", "reptile"))
    assert f"| maml - reptile | +{100 * gap:.2f} ±" in page and "maml is better" in page
    assert Path("reports/5w1s.png").read_bytes().startswith(b"\x89PNG")
    assert not list(Path(".").rglob("*.part"))


def test_only_some_of_them_are_printed_and_nothing_is_written(four: Path, stage: Stage) -> None:
    result("5w1s", "maml", 0.9, seeds=3)
    before = sorted(four.rglob("*"))
    said = stage(compare.app, "5w1s", "--only", "reptile", "--only", "maml")
    assert "| maml - reptile |" in said and "one pair" in said and "leap" not in said and ".csv" not in said
    assert "training seeds: 1 and 3" in said and "| 0.50 |" in said
    assert sorted(four.rglob("*")) == before
    said = stage(compare.app, "5w1s", "--only", "mamel", fails=True)
    assert said == "error: --only: 'mamel' has no result in 5w1s; there are leap, maml, reptile, scratch"


def test_one_learner_alone_has_no_differences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: Stage) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    result("10w2s", "scratch", 0.3)
    stage(compare.app, "10w2s")
    assert Path("plots/differences/10w2s.csv").read_text() == "first,second,mean,ci95,p\n"
    page = Path("reports/10w2s.md").read_text()
    assert page.startswith("# 10-way 2-shot\n") and "Differences" not in page


def test_what_is_missing_is_named_with_the_command_that_makes_it(four: Path, stage: Stage) -> None:
    assert "dvc repro compare@20w1s" in stage(compare.app, "20w1s", fails=True)
    for path in (
        files.run_file("5w1s", "maml"),
        files.plots_folder("5w1s", "maml") / "by_step.csv",
        files.results_file("5w1s", "maml"),
    ):
        content = path.read_bytes()
        path.unlink()
        said = stage(compare.app, "5w1s", fails=True)
        assert str(path) in said and "make it with: dvc repro evaluate@maml-5w1s" in said
        path.write_bytes(content)


def test_a_result_that_is_not_the_metric_s_is_refused(four: Path, stage: Stage) -> None:
    """As after params.yaml, dvc.lock and metrics were put back. Seen failing with a page of both numbers."""
    metrics = files.metrics_file("5w1s", "maml")
    kept = json.loads(metrics.read_text())
    result("5w1s", "maml", 0.8, seeds=3)
    found = json.loads(metrics.read_text())["accuracy"]
    files.write_json(metrics, kept)
    for only in ((), ("--only", "maml", "--only", "leap")):
        assert stage(compare.app, "5w1s", *only, fails=True) == (
            f"error: results/5w1s/maml.npz has an accuracy of {found:.2f}, {metrics} {kept['accuracy']:.2f}; "
            "make both anew: dvc repro evaluate@maml-5w1s"
        )
    assert not Path("reports").exists()


def test_colours_mean_learners_and_no_axis_stretches_to_the_untrained(four: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen failing with axes that include `scratch`."""
    drawn = list[plt.Figure]()
    monkeypatch.setattr(plt, "close", drawn.append)
    rows = tables.results("5w1s")
    compare.draw(four / "picture.png", "5w1s", rows)
    left, middle, right = drawn[0].axes
    looks = palette.style(list(rows))
    for axis in (middle, right):
        assert [line.get_color() for line in axis.lines] == [looks[name]["color"] for name in rows if name != "scratch"]
    colours = {line.get_color() for line in left.lines}
    assert colours == {looks[name]["color"] for name in rows if name != "scratch"}
    assert all(axis.get_xlim()[0] > 50 for axis in (left,)) and all(axis.get_ylim()[0] > 50 for axis in (middle, right))
    assert "not trained" in "".join(text.get_text() for text in left.texts)


@pytest.mark.parametrize("count", [1, 12, 14, 40])
def test_no_two_learners_share_a_colour(count: int) -> None:
    looks = palette.style(list(string.printable[:count]))
    assert len({look["color"] for look in looks.values()}) == len(looks) == count
    assert list(looks) == sorted(looks) and palette.style(list(reversed(looks))) == looks


def test_a_learner_looks_the_same_in_every_figure() -> None:
    """Also beside one that a user added. Seen failing with looks by the place among a figure's own names."""
    assert set(palette.LEARNERS) == set(problems.HYPER)
    looks = palette.style([*palette.LEARNERS, "a_new_one"])
    for name in palette.LEARNERS:
        assert palette.style([name]) == {name: looks[name]}


def test_the_plots_page_of_dvc_has_the_colours_of_the_pictures() -> None:
    template = json.loads((ROOT / ".dvc/plots/curves.json").read_text())
    assert template["encoding"]["color"]["scale"]["range"] == list(palette.COLOURS)


def test_the_leaderboard_is_of_what_lies_in_metrics(four: Path, stage: Stage) -> None:
    """Settings by way and shot, learners by their accuracy in the first; other folders of metrics/ are none of its business."""
    result("20w1s", "maml", 0.6)
    result("20w1s", "anil", 0.5)
    result("10w2s", "anil", 0.5)
    files.write_json(Path("metrics/studies/some.json"), {"accuracy": 1.0})
    assert "5 learners in 3 settings" in stage(leaderboard.app)
    board = Path("reports/leaderboard.md").read_text()
    assert "| learner | 5-way 1-shot | 10-way 2-shot | 20-way 1-shot |" in board
    transductive = board.split("## Inductive")[0]
    assert re.findall(r"^\| (\w+) \|", transductive, re.MULTILINE)[1:] == [*ACCURACY, "anil"]
    assert "| maml, published | 98.7 ± 0.4 | - | 95.8 ± 0.3 |" in transductive
    assert "- 10-way 2-shot: data glyphs" in board
    lines = Path("plots/leaderboard.csv").read_text().splitlines()
    assert lines[0] == "setting,algorithm,accuracy,ci95,inductive,budget,data" and len(lines) == 8
    assert lines[1].startswith("5w1s,maml,")


def test_a_leaderboard_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: Stage) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    assert "metrics/ holds no result" in stage(leaderboard.app, fails=True)

"""Lists of tries: what they stand for, and that every committed one can be run."""

from pathlib import Path

import pytest

from benchmarks import step_cost
from stages import params
from tests.conftest import Stage
from tuning import tries

LISTS = sorted(Path(tries.__file__).parent.glob("*.yaml"))


def write(folder: Path, text: str) -> Path:
    path = folder / "list.yaml"
    path.write_text(text)
    return path


def test_an_entry_stands_for_a_product(tmp_path: Path) -> None:
    """Learner by setting by value, in this order, and single values in each.

    Seen failing with the first setting in every try, and with values paired instead of crossed.
    """
    listed = tries.read(
        write(
            tmp_path,
            "- {learner: [maml, anil], setting: [5w1s, 20w1s], seconds: 40, set: {inner_lr: [0.1, 0.2], outer.meta_batch: 4}}\n"
            "- {learner: leap, setting: 5w5s, seconds: 60, seeds: 2}\n",
        )
    )
    assert [(one.learner, one.setting, one.changes) for one in listed[:-1]] == [
        (learner, setting, {"inner_lr": lr, "outer.meta_batch": 4})
        for learner in ("maml", "anil")
        for setting in ("5w1s", "20w1s")
        for lr in (0.1, 0.2)
    ]
    assert listed[-1] == tries.Try("leap", "5w5s", {}, seconds=60, share=None, seeds=2)


@pytest.mark.parametrize("path", LISTS, ids=[path.stem for path in LISTS])
def test_a_committed_list_can_be_run(path: Path) -> None:
    """Its learners, settings and keys are those of params.yaml, and no try is there twice.

    Seen failing with `inner_lrr`, with setting 5w2s, and with ANIL's fixed head tried against itself.
    """
    file, found = params.read(), list[tuple[object, ...]]()
    for one in tries.read(path):
        cell = one.cell(file)
        assert cell.seeds == [*range(one.seeds)]
        found.append((cell.model_dump_json(exclude={"own"}), one.seconds, one.share))
    assert len(set(found)) == len(found) > 1


@pytest.mark.parametrize(("text", "complaint"), [
    ("- {learner: maml, setting: 5w1s}", r"list\.yaml\.0: give either seconds or share"),
    ("- {learner: maml, setting: 5w1s, share: 1, seconds: 1}", r"list\.yaml\.0: give either seconds or share"),
    ("- {learner: maml, setting: 5w1s, share: -1}", r"list\.yaml\.0\.share: Input should be greater than 0, got -1"),
    ("- {learner: maml, setting: 5w1s, time: 1}", r"list\.yaml\.0\.time is not a parameter here"),
    ("- {learner: maml, setting: 5w1s, share: 1}\n- {learner: maml, setting: 5w1s, seconds: 1}", "seconds in all entries"),
    ("[]", "give at least one entry"),
    ("- {learner", "is not YAML"),
])  # fmt: skip
def test_a_wrong_list_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        tries.read(write(tmp_path, text))


@pytest.mark.parametrize(("entry", "complaint"), [
    ("learner: maml, setting: 5w2s, share: 1", "setting: '5w2s' is not one of"),
    ("learner: mamel, setting: 5w1s, share: 1", "'mamel' is not one of"),
    ("learner: maml, setting: 5w1s, share: 1, set: {inner_lrr: 1}", "inner_lrr is not a parameter here"),
    ("learner: scratch, setting: 5w1s, seconds: 1", "scratch takes no meta-steps"),
])  # fmt: skip
def test_a_wrong_try_is_refused(tmp_path: Path, entry: str, complaint: str) -> None:
    (one,) = tries.read(write(tmp_path, f"- {{{entry}}}"))
    with pytest.raises(ValueError, match=complaint):
        one.cell(params.read())


def test_a_list_is_run(data: None, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A share of the meta-steps, or as many as the seconds allow; the table says how many, and the header how to make it again.

    A learner without meta-steps is validated once, which stands in the last column.
    """
    monkeypatch.setitem(tries.VALIDATION_TASKS, "5w1s", 4)
    monkeypatch.setattr(step_cost, "seconds_per_step", lambda *_: 0.5)
    shares = "- {learner: maml, setting: 5w1s, share: 1.5, seeds: 2, set: {inner_lr: [0.1, 0.2]}}\n"
    path = write(Path("."), shares + "- {learner: scratch, setting: 5w1s, share: 1}\n")
    stage(tries.app, str(path), "--validations", "2")
    text = Path("tuning/results/list.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "| 5w1s |" in line]
    assert "python -m tuning.tries" in text and "; threads: 1; " in text and "commit " in text
    found = [[row[2], row[3], row[5]] for row in rows]
    assert found == [["inner_lr=0.1", "2", "6"], ["inner_lr=0.2", "2", "6"], ["quick", "1", "0"]]
    assert all(" to " in score for row in rows[:2] for score in row[6:])
    assert rows[2][6] == "" and float(rows[2][7]) > 0
    stage(tries.app, str(write(Path("."), "- {learner: maml, setting: 5w1s, seconds: 2, seeds: 2}")), "--out", "timed.md")
    assert "| maml | 5w1s | quick | 2 | 2 | 8 |" in Path("timed.md").read_text()  # 2 s for each of 2 seeds, 0.5 s a meta-step

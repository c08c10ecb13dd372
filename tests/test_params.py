"""params.yaml: what is wrong is named; numbers are what DVC takes them for."""

import datetime
from pathlib import Path
from typing import Any

import pytest

from metalib import algorithms
from stages import params
from tests.conftest import ROOT, Edit


def test_the_committed_file_serves_every_algorithm_setting_and_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    file = params.read()
    assert sorted(file.algorithms) == algorithms.names()
    for budget in file.budgets:
        for name in file.algorithms:
            for setting in file.settings:
                cell = params.cell(file, name, setting, budget)
                counts = params.counts(file, setting, budget)
                assert len(cell.seeds) == file.budgets[budget].seeds
                assert cell.validation_tasks <= file.tasks.validation
                assert counts.test_tasks <= file.tasks.test


@pytest.mark.parametrize(("values", "complaint"), [
    ({"data__sauce": "omniglot"}, "params.yaml.data.sauce is not a parameter here"),
    ({"split__validation": -5}, "split.validation: Input should be greater than 0, got -5"),
    ({"split__scheme": "alphabet"}, "split.scheme: Input should be 'characters', 'vinyals' or 'alphabets', got 'alphabet'"),
    ({"data__resize": None}, "params.yaml.data.resize is missing"),
    ({"meta_train__seed": "one"}, "meta_train.seed: Input should be a valid integer"),
    ({"algorithms__maml__quick__common__inner_lr": -0.4}, "maml.inner_lr: Input should be greater than 0, got -0.4"),
    ({"algorithms__maml__quick__common__inner_rate": 0.4}, "maml.inner_rate is not a parameter here"),
    ({"algorithms__maml__quick__common__inner_steps": None}, "maml.inner_steps is missing"),
    ({"algorithms__maml__quick__common__test": {"inner_steps": 1.5}}, "maml.inner_steps: Input should be a valid integer"),
    ({"algorithms__maml__quick__common__outer__lr": -1e-3}, "outer.lr: Input should be greater than 0, got -0.001"),
    ({"algorithms__maml__quick__common__outer__optimizer": "adam"}, "outer.optimizer is not a parameter here"),
    ({"budgets__quick__network__features": "max"}, "features: Input should be 'flatten' or 'mean'"),
    ({"algorithms__maml__quick__common": None}, "params.yaml has no common where algorithms.maml.quick"),
    ({"algorithms__maml__quick__own": {}}, "algorithms.maml.quick.own is neither common nor a setting"),
    ({"algorithms__maml__quick__common__outer__optimiser": "adam", "algorithms__maml__quick__common__outer__kernel_lr": 0.1},
     "kernel_lr and kernel_decay go with optimiser muon"),
    ({"budgets__quick__counts__s5w1s": {"tasks": 3}}, "budgets.quick.counts.tasks is not a parameter here"),
    ({"tasks__query": 25}, "tasks.query: 25 queries and 1 support images"),
    # accepted until the training was over, or written into results as they stood
    ({"budgets__quick__network__way": 5}, "algorithms.maml.quick.network.way is not a parameter here (value 5)"),
    ({"algorithms__maml__quick__common__network": {"image_size": 28}}, "algorithms.maml.quick.network.image_size is not a"),
    ({"budgets__quick__network__filters": 10**9}, "network.filters: Input should be less than or equal to 1024"),
    ({"algorithms__maml__quick__common__inner_steps": "3"}, "maml.inner_steps: Input should be a valid integer, got '3'"),
    ({"algorithms__maml__quick__common__inner_steps": True}, "maml.inner_steps: Input should be a valid integer, got True"),
    ({"meta_train__tf32": "yes"}, "meta_train.tf32: Input should be a valid boolean, got 'yes'"),
    ({"budgets__quick__counts__s5w1s": {"test_tasks": 1}}, "counts.test_tasks: Input should be greater than or equal to 2"),
    ({"budgets__quick__counts__s5w1s": 3}, "budgets.quick.counts.s5w1s: Input should be an object, got 3"),
    ({"algorithms__maml__quick__s5w1s": [1]}, "algorithms.maml.quick.s5w1s: Input should be an object, got [1]"),
    # memory or time without bounds
    ({"budgets__quick__seeds": 10**12}, "budgets.quick.seeds: Input should be less than or equal to 100"),
    ({"tasks__test": 10**12}, "tasks.test: Input should be less than or equal to 100000"),
    ({"data__glyphs__background": 10**9}, "glyphs.background: Input should be less than or equal to 100"),
    ({"algorithms__maml__quick__s5w1s__outer__meta_batch": 10**9}, "outer.meta_batch: Input should be less than or equal"),
    # what no key may hold
    ({"algorithms__maml__quick__common__inner_lr": float("nan")}, "maml.quick.common.inner_lr: nan is no finite number"),
    ({"studies__protocols__quick__share": float("inf")}, "params.yaml.studies.protocols.quick.share: inf is no finite number"),
    ({"split__seed": 2**63}, "params.yaml.split.seed: 9223372036854775808 is beyond 64 bits"),
    ({"split__seed": datetime.date(2026, 1, 1)}, "params.yaml.split.seed: a date is neither a number, a word, a list nor a"),
    ({"settings": ["5w1s", "5w1"]}, "settings: '5w1' is not of the form 5w1s"),
    ({"settings": ["5w1s", "../5w1s"]}, "settings: '../5w1s' is not of the form 5w1s"),
    ({"settings": ["5w1s", "5w1s"]}, "settings: '5w1s' is listed twice"),
])  # fmt: skip
def test_what_is_wrong_is_named(edit: Edit, values: dict[str, Any], complaint: str) -> None:
    edit(**values)
    with pytest.raises(ValueError) as refused:
        file = params.read()
        params.cell(file, "maml", "5w1s")
        params.setting(file, "5w1s")
    assert complaint in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(("name", "values", "complaint"), [
    ("finetune", {"quick__common__classes": 100}, "finetune.quick.classes: 100, but the characters in 4 quarter turns are 140"),
    ("finetune", {"quick__common__classes": "6492"}, "finetune.classes: Input should be a valid integer, got '6492'"),
    ("finetune", {"quick__common__classes": 10**12}, "finetune.quick.classes: 1000000000000, but at most 1000000 can be"),
    ("reptile", {"quick__common__moments": "carried"}, "reptile: moments: carried needs inner_optimiser adam"),
    ("reptile", {"quick__s5w": {}}, "reptile.quick.s5w is neither common nor a setting"),
    ("reptile", {"quick__common__moments": "carried", "quick__common__inner_optimiser": "adam"},
     "reptile.quick.moments: carried goes with outer.optimiser sgd"),
    ("reptile", {"quick__common__train": {"shot": 20}}, "reptile.quick.train: 20 support and 1 query images of a class"),
    ("reptile", {"quick__common__train": 5}, "reptile.quick.train: expected a mapping, got 5"),
    ("imaml", {"quick__common__proximal": "last", "quick__common__inner_optimiser": "nesterov"},
     "imaml: proximal: last needs inner_optimiser sgd"),
    ("imaml", {"quick__common__lam": 0, "quick__common__inner_optimiser": "nesterov"}, "nesterov wants inner_lr * lam above 0"),
])  # fmt: skip
def test_what_does_not_go_together_is_named(edit: Edit, name: str, values: dict[str, Any], complaint: str) -> None:
    edit(**{f"algorithms__{name}__{key}": value for key, value in values.items()})
    with pytest.raises(ValueError) as refused:
        params.cell(params.read(), name, "5w1s")
    assert complaint in str(refused.value) and "\n" not in str(refused.value) and "ArgsKwargs" not in str(refused.value)


def test_numbers_are_yaml_1_2(edit: Edit, tmp_path: Path) -> None:
    """PyYAML reads 1e-3 as a string; DVC and this reader as a number."""
    edit()
    file = tmp_path / "params.yaml"
    file.write_text(file.read_text().replace("inner_lr: 0.4", "inner_lr: 4e-1"))
    assert "inner_lr: 4e-1" in file.read_text()
    assert params.cell(params.read(), "maml", "5w1s").learner["inner_lr"] == 0.4


def test_values_lie_over_each_other_group_by_group(edit: Edit) -> None:
    """What the budget shares, the algorithm's common values, those of the setting; which came from the last is known."""
    edit(algorithms__maml__quick__s5w1s={"inner_lr": 0.7, "outer": {"meta_steps": 9}}, budgets__quick__outer__lr=0.5)
    cell = params.cell(params.read(), "maml", "5w1s")
    other = params.cell(params.read(), "maml", "20w1s")
    assert (cell.learner["inner_lr"], cell.outer.meta_steps, cell.own) == (0.7, 9, ["inner_lr", "outer.meta_steps"])
    assert cell.outer.lr == other.outer.lr == 0.5
    assert other.learner["inner_lr"] == 0.4


@pytest.mark.parametrize("place", ["algorithms__maml__quick__common__outer", "budgets__quick__outer"])
def test_another_optimiser_does_not_want_the_rates_of_muon(edit: Edit, place: str) -> None:
    edit(**{f"{place}__optimiser": "adam"})
    outer = params.cell(params.read(), "maml", "5w1s").outer
    assert (outer.optimiser, outer.kernel_lr) == ("adam", None)


def test_changes_lie_over_everything(edit: Edit) -> None:
    edit()
    cell = params.cell(params.read(), "maml", "5w1s", "paper", {"inner_lr": 0.5, "outer.meta_steps": 7})
    assert (cell.budget, cell.learner["inner_lr"], cell.outer.meta_steps) == ("paper", 0.5, 7)


def test_joint_classes_are_those_of_the_data(edit: Edit) -> None:
    edit()
    assert params.cell(params.read(), "finetune", "5w1s").learner["classes"] == 4 * 7 * 5
    edit(data__source="omniglot")
    assert params.cell(params.read(), "finetune", "5w1s").learner["classes"] == 4 * 1623


def test_a_setting_of_ones_own_is_one_edit(edit: Edit) -> None:
    edit(settings=["5w1s", "10w2s"])
    file = params.read()
    assert params.setting(file, "10w2s") == params.Setting(way=10, shot=2, query=2)
    for name in file.algorithms:
        assert params.cell(file, name, "10w2s").outer.meta_steps >= 0


@pytest.mark.parametrize(("name", "complaint"), [
    ("7w1s", "'7w1s' is not one of 5w1s, 5w5s, 20w1s, 20w5s"), ("1w1s", "'1w1s' is not one of"), ("maml", "is not one of"),
])  # fmt: skip
def test_unknown_settings_are_refused(edit: Edit, name: str, complaint: str) -> None:
    edit()
    with pytest.raises(ValueError, match=complaint):
        params.setting(params.read(), name)


def test_a_broken_or_missing_file_is_one_sentence(edit: Edit, tmp_path: Path) -> None:
    edit()
    file = tmp_path / "params.yaml"
    for content in ("data: [", "just words", ""):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"params\.yaml is not a YAML mapping"):
            params.read()
    file.unlink()
    with pytest.raises(ValueError, match=r"run from the project's root"):
        params.read()

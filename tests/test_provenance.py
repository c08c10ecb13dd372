"""A model says what it is of, and evaluate refuses one that does not fit its cell and data."""

import hashlib
import json
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from stages import cells, evaluate, meta_train, preprocess, split
from tests.conftest import Edit, Stage

MODEL = Path("models/5w1s/maml")


def test_a_model_says_what_it_is_of(data: None, stage: Stage) -> None:
    """Its code is what dvc.yaml declares for it, and no other learner's."""
    stage(meta_train.app, "maml", "5w1s")
    found = json.loads((MODEL / "meta.json").read_text())
    assert found["learner"]["inner_lr"] == 0.4 and found["outer"]["meta_steps"] == 4 and found["train_shot"] == 1
    assert (found["data"], found["engine"], found["threads"]) == ("glyphs", "wide", torch.get_num_threads())
    assert found["versions"]["torch"] == version("torch") and found["versions"]["python"] == platform.python_version()
    assert found["device"].startswith("cpu (") and len(found["sha256"]["code"]) == 64
    for name, path in (("characters", "data/characters.npz"), ("tasks", "data/tasks/5w1s.npz")):
        assert found["sha256"][name] == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    for name, differs in (("reptile", False), ("maml", True)):
        Path("metalib/algorithms").mkdir(parents=True, exist_ok=True)
        Path(f"metalib/algorithms/{name}.py").write_text("another")
        stage(meta_train.app, "maml", "5w1s")
        again = json.loads((MODEL / "meta.json").read_text())
        assert (again != found) == differs == (again["sha256"]["code"] != found["sha256"]["code"])


def test_a_model_that_does_not_fit_is_refused(data: None, edit: Edit, stage: Stage) -> None:
    """Values, numbers of seeds, tasks or characters have changed since; or the model does not say."""
    stage(meta_train.app, "maml", "5w1s")
    stage(evaluate.app, "maml", "5w1s")
    before = {path: path.read_bytes() for path in Path("metrics").rglob("*.json")}

    def refused(said: str) -> None:
        sentence = stage(evaluate.app, "maml", "5w1s", fails=True)
        assert said in sentence and "dvc repro meta_train@maml-5w1s" in sentence and "Traceback" not in sentence
        assert before == {path: path.read_bytes() for path in Path("metrics").rglob("*.json")}

    file = MODEL / "meta.json"
    honest = file.read_text()
    for missing in ("sha256", "outer", "seeds"):
        file.write_text(json.dumps({key: value for key, value in json.loads(honest).items() if key != missing}))
        refused(f"'{missing}'")
    file.write_text(honest)
    edit(algorithms__maml__quick__common__inner_lr=0.3)
    stage(cells.app)
    refused("models/5w1s/maml was trained with learner.inner_lr 0.4, but data/cells now has 0.3")
    edit(algorithms__maml__quick__common__inner_lr=0.4, algorithms__maml__quick__common__test=None)
    stage(cells.app)
    refused("models/5w1s/maml was trained with test.inner_steps 3, but data/cells now has nothing")
    edit(algorithms__maml__quick__common__test={"inner_steps": 3}, budgets__quick__seeds=1)
    stage(cells.app)
    refused("models/5w1s/maml was trained with seeds [0, 1], but data/cells now has [0]")
    edit(budgets__quick__seeds=2, tasks__seed=8)
    stage(cells.app)
    stage(split.app, "5w1s")
    refused("models/5w1s/maml was trained on other tasks")
    edit(tasks__seed=7, data__resize="area")
    stage(split.app, "5w1s")
    stage(preprocess.app)
    refused("models/5w1s/maml was trained on other characters")

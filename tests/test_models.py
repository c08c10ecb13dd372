"""Models' files, damaged or foreign: evaluate refuses in one sentence that names the file, and tests no other weights."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML
from safetensors.torch import load_file, save, save_file
from typer.testing import CliRunner, Result

from metalib.complaints import checked
from stages import cells, evaluate, fetch, meta_train, preprocess, split
from tests.conftest import ROOT, change, shrink
from tests.test_fuzz import ANYTHING, few, refused_or

MODEL = Path("models/5w1s/maml")
META, WEIGHTS, HISTORY = MODEL / "meta.json", MODEL / "seed0.safetensors", MODEL / "seed0.csv"
METRICS, RUN = Path("metrics/5w1s/maml.json"), Path("metrics/5w1s/maml.run.json")
PLACES = ("metrics", "plots", "results")  # what evaluate writes
REMEDY = "dvc repro meta_train@maml-5w1s"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, bytes]:
    """A folder in which only the test of a model with two seeds is left to do; the content of the model's files."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(ROOT / "dvc.yaml", folder)
    shutil.copy(ROOT / "params.yaml", folder)
    shrink(folder / "params.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("DVC_ROOT", raising=False)
        patch.setenv("METALIB_DEVICE", "cpu")
        for app in (fetch.app, preprocess.app, cells.app):
            app([], standalone_mode=False)
        split.app(["5w1s"], standalone_mode=False)
        meta_train.app(["maml", "5w1s"], standalone_mode=False)
        stages = YAML(typ="safe").load(folder / "dvc.yaml")["stages"]  # of which the others would be read each time
        change(folder / "dvc.yaml", {f"stages.{name}": None for name in stages if name != "evaluate"})
    return {path: path.read_bytes() for path in sorted((folder / MODEL).iterdir())}


@pytest.fixture
def model(project: dict[Path, bytes], monkeypatch: pytest.MonkeyPatch) -> dict[Path, bytes]:
    """The working folder is that one, as it was; the content of the model's files."""
    folder = next(iter(project)).parents[3]
    monkeypatch.chdir(folder)
    monkeypatch.setenv("METALIB_DEVICE", "cpu")
    found = {path.relative_to(folder): content for path, content in project.items()}
    restore(found)
    return found


def restore(model: dict[Path, bytes]) -> None:
    for place in (MODEL, *PLACES):
        shutil.rmtree(place, ignore_errors=True)
    MODEL.mkdir()
    for path, content in model.items():
        path.write_bytes(content)


def refused(path: Path) -> str:
    """What evaluate says, which is one sentence about this file or its folder."""
    return require_refusal(path, CliRunner().invoke(evaluate.app, ["maml", "5w1s"]))


def require_refusal(path: Path, outcome: Result) -> str:
    assert isinstance(outcome.exception, SystemExit) and outcome.exit_code == 1, outcome.exception or outcome.output
    said = outcome.output
    assert said.startswith((f"error: {path} ", f"error: {MODEL} ")) and REMEDY in said, said
    assert said.count("\n") == 1 and len(said) < 700, said
    assert not any(Path(place).exists() for place in PLACES)
    return said


def changed(**tensors: Any) -> Callable[[], None]:
    """Other tensors of these names in the file of weights; none where it is None."""

    def change() -> None:
        some = load_file(WEIGHTS) | {name.replace("_", "."): value for name, value in tensors.items()}
        save_file({name: value for name, value in some.items() if value is not None}, WEIGHTS)

    return change


def header(text: bytes, content: bytes = b"", length: int | None = None) -> Callable[[], object]:
    return lambda: WEIGHTS.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + content)


@pytest.mark.parametrize(("damage", "words"), [
    (changed(head_bias=None), "head.bias is missing"),
    (changed(rate=torch.zeros(1)), "rate is none of the learner's weights"),
    (changed(conv1_weight=torch.zeros(4, 1, 3, 3)), "conv1.weight is torch.float32 (4, 1, 3, 3), not"),
    (changed(head_bias=torch.zeros(1)), "head.bias is torch.float32 (1,), not torch.float32 (5,)"),
    (changed(norm2_bias=torch.zeros(4, dtype=torch.float64)), "norm2.bias is torch.float64 (4,), not torch.float32 (4,)"),
    (changed(norm2_bias=torch.zeros(4, dtype=torch.int32)), "norm2.bias is torch.int32"),
    (changed(norm2_bias=torch.zeros(4, dtype=torch.bfloat16)), "norm2.bias is torch.bfloat16"),
    (changed(norm2_bias=torch.tensor([0, 0, 0, torch.nan])), "norm2.bias is not finite"),
    (changed(head_weight=torch.full((5, 4), -torch.inf)), "head.weight is not finite"),
    (lambda: WEIGHTS.write_bytes(save({})), "is missing"),
    (header(b"{}", length=2**63), ""),
    (header(b"{}", length=10**8), ""),
    (header(b"[]"), ""),
    (header(b'{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}', b"0"), ""),
    (header(b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}'), ""),
    (header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            bytes(4)), ""),
    (lambda: WEIGHTS.write_bytes(b""), ""),
    (lambda: WEIGHTS.write_bytes(WEIGHTS.read_bytes() + b"x"), ""),
    (lambda: WEIGHTS.write_bytes(b"PK\x03\x04" + bytes(200)), ""),
    (lambda: WEIGHTS.unlink(), ""),
    (lambda: (WEIGHTS.unlink(), WEIGHTS.mkdir()), ""),
])  # fmt: skip
def test_weights_that_are_no_such_learner_s(model: dict[Path, bytes], damage: Callable[[], object], words: str) -> None:
    """Seen failing: with a traceback, a number, or a sentence that named no file."""
    damage()
    assert words in refused(WEIGHTS)


@pytest.mark.parametrize("text", [
    "", "{", "[1]", "5", "null", "[" * 100_000, '{"a":' * 900 + "1" + "}" * 900, "\xff\xfe", '{"seeds": []}',
])  # fmt: skip
def test_what_a_model_is_of_cannot_be_read(model: dict[Path, bytes], text: str) -> None:
    """Seen failing with tracebacks of RecursionError."""
    META.write_bytes(text.encode("latin-1"))
    refused(META)


def test_what_is_said_twice_is_refused(model: dict[Path, bytes]) -> None:
    """Seen failing: the second one counted."""
    META.write_text(META.read_text().replace('"threads": ', '"threads": 8,\n "threads": '))
    assert "'threads' is there twice" in refused(META)


@pytest.mark.parametrize(("path", "value"), [
    (("seeds", 0, "validation"), "98"), (("seeds", 0, "validation"), float("nan")), (("seeds", 1, "validation"), 101),
    (("seeds", 0, "validation"), None), (("seeds", 0, "seed"), "../../x"), (("seeds", 0, "seed"), True), (("seeds",), {"a": 1}),
    (("threads",), "1"), (("versions",), None), (("versions", "torch"), 2), (("device",), 5), (("engine",), {}),
    (("cuda_graph",), 1), (("sha256",), "x"), (("network", "filters"), 64), (("learner", "inner_lr"), "x" * 10_000),
    (("learner",), {"a\nb" * 1000: 1}), (("outer",), []),
])  # fmt: skip
def test_values_that_are_none(model: dict[Path, bytes], path: tuple[Any, ...], value: Any) -> None:
    """Seen failing with tracebacks, and with values that were taken."""
    *parents, last = path
    place = meta = json.loads(META.read_text())
    for parent in parents:
        place = place[parent]
    place[last] = value
    META.write_text(json.dumps(meta))
    refused(META)


@pytest.mark.parametrize("name", ["versions", "device", "threads", "engine", "cuda_graph", "budget", "seeds", "sha256"])
def test_values_that_are_missing(model: dict[Path, bytes], name: str) -> None:
    """Seen failing with a KeyError's traceback for what the record alone has."""
    META.write_text(json.dumps({key: value for key, value in json.loads(META.read_text()).items() if key != name}))
    assert name in refused(META)


@pytest.mark.parametrize("text", [
    "", "step,validation\n", "step,validation\n2,nan\n4,50\n", "step,validation\n2,50\n4,101\n", "step,validation\n4,50\n",
    "step,validation\n2,50\n2,50\n4,50\n", "step,validation\n2\n4\n", "step\n2\n", "step,validation\n2,50\n4,\xff\n",
    "step,validation\n2,50\n-4,50\n",
])  # fmt: skip
def test_a_history_that_is_none(model: dict[Path, bytes], text: str) -> None:
    """Seen failing: with a curve of what was left, or a traceback."""
    HISTORY.write_bytes(text.encode("latin-1"))
    refused(HISTORY)


def test_any_damage(model: dict[Path, bytes]) -> None:
    """Bytes changed anywhere: a refusal, or the same record but for what no other file tells."""

    def record() -> tuple[Any, ...]:
        return tuple(path.read_bytes() for path in (METRICS, RUN))

    assert CliRunner().invoke(evaluate.app, ["maml", "5w1s"]).exit_code == 0
    metrics, run = record()

    @few
    @given(which=st.sampled_from(sorted(model)), place=st.integers(0, 10**6), junk=st.binary(max_size=8), bit=st.integers(0, 7))
    def damage(which: Path, place: int, junk: bytes, bit: int) -> None:
        restore(model)
        content = model[which]
        place %= len(content)
        new = junk or bytes([content[place] ^ 1 << bit])
        which.write_bytes(content[:place] + new + content[place + len(new) :])
        outcome = CliRunner().invoke(evaluate.app, ["maml", "5w1s"])
        if outcome.exit_code:
            require_refusal(which, outcome)
        elif which.suffix == ".safetensors":
            assert record()[1] == run
        else:
            assert record()[0] == metrics
            differ = {key for key, value in json.loads(run).items() if json.loads(record()[1])[key] != value}
            assert differ <= {"versions", "device", "threads", "engine", "cuda_graph"}

    damage()


@few
@given(key=st.sampled_from(["seeds", "versions", "device", "threads", "engine", "cuda_graph"]), value=ANYTHING)
def test_any_value_of_what_is_said_of_a_training(key: str, value: Any) -> None:
    meta = {"seeds": [], "versions": {}, "device": "cpu", "threads": 1, "engine": "wide", "cuda_graph": None}
    assert refused_or(lambda: checked(evaluate.Trained, meta, "model")) is not None
    found = refused_or(lambda: checked(evaluate.Trained, meta | {key: value}, "model"))
    assert found is None or (type(found["threads"]) is int and found["threads"] > 0 and type(found["device"]) is str)

"""The benchmarks at toy size: the alternatives compute our meta-gradients, and results name what was not there to be timed."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import accuracy, convolutions, gpu, peers, plan, report, reproducibility, speed, step_cost, work
from benchmarks.peers import libraries, loop, vmap
from metalib import algorithms
from stages import cells, meta_train, params
from tests import problems
from tests.conftest import Edit, Stage

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METALIB_DEVICE", "cpu")
    monkeypatch.setenv("METALIB_ENGINE", "wide")  # which the benchmarks change


def toy(learner: str) -> work.Item:
    """Three inner steps, so that one with a wrong rate, batch or graph is not the only one."""
    item = work.LEARNERS[learner]
    return replace(item, way=3, tasks=2, hyper=item.hyper | {"inner_steps": 3})


@pytest.mark.parametrize(
    ("means", "learner"), [*(("loop", name) for name in loop.LOOP), *(("vmap", name) for name in vmap.VMAP)]
)
def test_an_alternative_has_our_gradient(means: str, learner: str) -> None:
    """Every learner on Conv4 against a loop over tasks in everyday PyTorch, in float64, away from its initial weights.

    Seen failing with a sign turned in wide.NormReLUBackward.backward, with create_graph=False in maml.py and in anil.py, with
    library_norm in grad of vmap, without iMAML's lam, and with MAML++'s first batch norm in every step.
    """
    item, random = toy(learner), torch.Generator().manual_seed(2)
    params, batch = item.data(CPU, torch.float64)
    params = {
        name: value + 0.05 * torch.randn(value.shape, generator=random, dtype=value.dtype) for name, value in params.items()
    }
    theirs = peers.PEERS[means](item, params, batch)
    assert theirs is not None
    assert speed.difference(theirs(), speed.ours(item, params, batch, "wide")()) < 1e-10


def test_a_report_says_what_was_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong gradient, libraries that are not installed, and a learner that benchmarks/work.py does not know."""
    assert set(problems.HYPER) <= set(loop.LOOP) & set(work.LEARNERS)  # the project's own are all timed
    known = algorithms.names()
    monkeypatch.setattr(algorithms, "names", lambda: [*known, "newcomer"])
    monkeypatch.setitem(loop.LOOP, "maml", loop.fomaml)
    monkeypatch.setitem(work.ITEMS, "toy", toy("maml"))
    monkeypatch.delenv("LEARN2LEARN", raising=False)
    libraries.learn2learn_maml.cache_clear()
    for module in ("learn2learn", "learn2learn.algorithms", "learn2learn.algorithms.maml", "higher", "torchopt", "jax"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(speed, "SIDE", 64)
    out = tmp_path / "speed.md"
    threads = str(torch.get_num_threads())
    ran = CliRunner().invoke(speed.app, ["--items", "toy", "--repeats", "1", "--threads", threads, "--out", str(out)])
    assert ran.exit_code == 0, ran.output
    text = out.read_text()
    assert all(f"- {name} is absent: " in text for name in ("learn2learn", "higher", "TorchOpt", "JAX"))
    row = next(line for line in text.splitlines() if line.startswith("| toy | maml: 2 tasks of 3 classes"))
    assert row.count("another gradient") == 1
    assert "Not timed, without an item in benchmarks/work.py: newcomer." in text


def test_a_report_names_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With "+" once tracked code has changed.  Seen failing with every changed file counted, results among them."""

    def git(*command: str) -> str:
        name = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        return subprocess.run(["git", *name, *command], capture_output=True, text=True, check=True).stdout.strip()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert report.commit() == "none"
    git("init", "--quiet")
    for name in ("code.py", "result.md"):
        (tmp_path / name).touch()
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    commit = git("rev-parse", "--short", "HEAD")
    (tmp_path / "result.md").write_text("new")
    assert report.commit() == commit
    (tmp_path / "code.py").write_text("new")
    assert report.commit() == f"{commit}+"
    assert f"; commit {commit}+; " in report.header("Title", "benchmarks.speed", CPU).replace("\n\n", "; ")


def test_arithmetic_by_hand() -> None:
    """FOMAML: forward and two products backward for each image and step, but no gradient of the images."""
    first, others, head = 14 * 14 * 9 * 64, 9 * 64 * 64 * (7 * 7 + 4 * 4 + 2 * 2), 64 * 20
    image = 2 * (2 * first + 3 * others + 3 * head)
    assert speed.arithmetic(work.ITEMS["W5"], CPU) == 16 * 20 * (5 + 1) * image


@pytest.mark.parametrize(("size", "channels"), [(7, 3), (4, 64)])
def test_all_implementations_of_a_convolution_agree(size: int, channels: int) -> None:
    """Seen failing with the kernels of the groups in reverse order."""
    convolutions.agree(convolutions.implementations(2, 3, size, channels, CPU))


def test_what_trainings_cost(data: None, edit: Edit, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan and accuracy take learners and settings from params.yaml. One without meta-steps costs its tests alone."""
    others = {f"algorithms__{name}": None for name in algorithms.names() if name not in ("maml", "scratch")}
    edit(**others, settings=["5w1s"], studies__protocols__common__learners=["maml"])
    edit(budgets__paper__counts__common__validation_tasks=4, budgets__paper__network__filters=4)
    edit(budgets__paper__outer__meta_batch=2)
    monkeypatch.setattr(step_cost, "WARM", 1)
    monkeypatch.setitem(step_cost.TIMED, "cpu", 2)
    monkeypatch.setitem(plan.TASKS, "cpu", 2)
    stage(plan.app)
    rows = [line for line in Path("benchmarks/results/plan-quick.md").read_text().splitlines() if "| 5w1s |" in line]
    assert [row.split(" | ")[3] for row in rows] == ["4", "0"]
    assert [row.split(" | ")[5] for row in rows] == ["16", "8"]  # 2 seeds, 4 tasks, 2 validations or 1
    assert rows[1].startswith("| scratch | 5w1s | 0.0 |")
    assert "dvc repro meta_train@maml-5w1s" in stage(accuracy.app, fails=True)
    stage(cells.app)
    for name in ("maml", "scratch"):
        stage(meta_train.app, name, "5w1s")
    stage(accuracy.app, "--limit", "0.01")
    text = Path("benchmarks/results/accuracy.md").read_text()
    assert all(f"| {row} | " in text for row in ("maml | quick | 4", "scratch | quick | 0 | 0.0", "maml | paper | 0"))


def test_how_far_apart_trainings_end(data: None, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same training twice, and one of more meta-steps that stands for another engine."""
    other = reproducibility.Means("other", {})
    monkeypatch.setattr(reproducibility, "means", lambda cell: [reproducibility.Means("first", {}), other])

    def here(one: reproducibility.Means, steps: int, tasks: int, names: list[str]) -> dict[str, reproducibility.Model]:
        cells = [params.cell(params.read(), name, "5w1s") for name in names]
        return {cell.algorithm: reproducibility.train(cell, steps + (one == other), tasks) for cell in cells}

    monkeypatch.setattr(reproducibility, "in_fresh_process", here)
    stage(reproducibility.app, "--steps", "2", "--tasks", "3", "--learners", "maml,scratch")
    text = Path("benchmarks/results/reproducibility.md").read_text()
    assert all(f"| {row} | 0 | 0 | 0 | 0 |" in text for row in ("maml | first", "scratch | first", "scratch | other"))
    assert "| maml | other | 0 | " in text and "| maml | other | 0 | 0 |" not in text
    assert "'mamel' is not among" in stage(reproducibility.app, "--learners", "mamel", fails=True)


def test_a_learner_without_a_gradient_has_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen failing with nan."""
    monkeypatch.setattr(gpu, "LEARNERS", {"scratch": gpu.LEARNERS["scratch"]})
    assert "| scratch | - | - |" in gpu.references(CPU)

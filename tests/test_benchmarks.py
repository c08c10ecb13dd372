"""The benchmarks at toy size: the alternatives compute our meta-gradients, and results name what was not there to be timed."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import convolutions, peers, speed, tries, work
from metalib import algorithms

CPU = torch.device("cpu")
LISTS = sorted(Path(tries.__file__).parent.glob("*.yaml"))


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METALIB_DEVICE", "cpu")
    monkeypatch.setenv("METALIB_ENGINE", "wide")  # which the benchmarks change


def toy(learner: str) -> work.Item:
    item = work.EVERY_LEARNER[learner]
    return replace(item, way=3, tasks=2, hyper=item.hyper | {"inner_steps": min(3, item.hyper["inner_steps"])})


def test_every_learner_is_timed() -> None:
    assert set(work.EVERY_LEARNER) == set(algorithms.names()) == set(peers.LOOP)


@pytest.mark.parametrize(
    ("means", "learner"), [*(("loop", name) for name in peers.LOOP), *(("vmap", name) for name in peers.VMAP)]
)
def test_an_alternative_has_our_gradient(means: str, learner: str) -> None:
    """Seen failing with library_norm in grad of vmap, without iMAML's lam, and with MAML++'s first batch norm in every step."""
    item = toy(learner)
    params, batch = item.data(CPU, torch.float64)
    theirs = peers.PEERS[means](item, params, batch)
    assert theirs is not None
    assert speed.difference(theirs(), speed.ours(item, params, batch, "wide")()) < 1e-10


def test_a_wrong_gradient_is_not_timed_and_absent_libraries_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.LOOP, "maml", peers.fomaml)
    monkeypatch.setitem(work.ITEMS, "toy", toy("maml"))
    monkeypatch.delenv("LEARN2LEARN", raising=False)
    peers.learn2learn_maml.cache_clear()
    for module in ("learn2learn", "learn2learn.algorithms", "learn2learn.algorithms.maml", "higher", "torchopt", "jax"):
        monkeypatch.setitem(sys.modules, module, None)
    out = tmp_path / "speed.md"
    threads = str(torch.get_num_threads())
    ran = CliRunner().invoke(speed.app, ["--items", "toy", "--repeats", "1", "--threads", threads, "--out", str(out)])
    assert ran.exit_code == 0, ran.output
    text = out.read_text()
    assert all(f"- {name} is absent: " in text for name in ("learn2learn", "higher", "TorchOpt", "JAX"))
    row = next(line for line in text.splitlines() if line.startswith("| toy | maml: 2 tasks of 3 classes"))
    assert row.count("another gradient") == 1


def test_arithmetic_by_hand() -> None:
    """FOMAML: forward and two products backward for each image and step, but no gradient of the images."""
    first, others, head = 14 * 14 * 9 * 64, 9 * 64 * 64 * (7 * 7 + 4 * 4 + 2 * 2), 64 * 20
    image = 2 * (2 * first + 3 * others + 3 * head)
    assert speed.arithmetic(work.ITEMS["W5"], CPU) == 16 * 20 * (5 + 1) * image


@pytest.mark.parametrize(("size", "channels"), [(7, 3), (4, 64)])
def test_all_roads_of_a_convolution_lead_to_one_product(size: int, channels: int) -> None:
    """Seen failing with the kernels of the groups in reverse order."""
    convolutions.agree(convolutions.roads(2, 3, size, channels, CPU))


@pytest.mark.parametrize("path", LISTS, ids=[path.name for path in LISTS])
def test_what_was_tried_can_be_tried_again(path: Path) -> None:
    """Every line is a learner, a setting and keys of params.yaml. Seen failing with `inner_lrr`, and with setting 5w2s."""
    for one in tries.read(path):
        tries.cell(one.learner, one.setting, one.changes, one.seeds)

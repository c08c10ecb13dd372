"""The compiled engine against PyTorch's operators (wide), and what it does when it cannot serve."""

import ctypes
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from metalib import algorithms, tree
from metalib.data.tasks import with_support
from metalib.models import native
from metalib.models.conv4 import Conv4
from metalib.models.loss import Conv4Loss
from metalib.types import Params
from tests import problems
from tests.test_conv4 import different

Engine = Callable[[str], None]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    return lambda name: monkeypatch.setenv("METALIB_ENGINE", name)


@pytest.fixture(autouse=True)
def compiled() -> Iterator[None]:
    """On one thread: PyTorch's small operations on two wait for each other when the machine has other work."""
    if native.library() is None:
        pytest.skip("no C++ compiler here")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    native.library.cache_clear()  # a test may have had another


def images(net: Conv4, count: int, tasks: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """x (tasks, count, 1, H, W), y (tasks, count)."""
    shots = -(-count // net.way)
    batch = problems.image_batch(tasks, net.way, shots, 1, dtype, net.image_size)
    return batch.support_x[:, :count], batch.support_y[:, :count]


def derivatives(net: Conv4, weights: Params, x: Tensor, y: Tensor, support: int | None = None) -> list[Tensor]:
    """Losses, their gradients times `gout`, and the derivative of <gradients, direction> by the weights and by `gout`."""
    loss = Conv4Loss(net) if support is None else Conv4Loss(net, support=support)
    weights = tree.detach(weights)
    gout = torch.tensor([1.0, -2.0, 0.5][: len(x)], dtype=x.dtype, requires_grad=True)
    losses = loss(weights, x, y)
    grads = torch.autograd.grad(losses, list(weights.values()), gout, create_graph=True)
    direction = problems.directions({k: v.detach().double() for k, v in weights.items()}, 1)[0]
    slope = sum((g * d.to(g.dtype)).sum() for g, d in zip(grads, direction.values(), strict=True))
    return [t.detach() for t in (losses, *grads, *torch.autograd.grad(slope, [*weights.values(), gout]))]


def body(net: Conv4, weights: Params, x: Tensor, support: int | None = None, some: list[str] | None = None) -> list[Tensor]:
    """Features, and the gradients that a random one with respect to them brings to the body's weights (or to some)."""
    leaves = {k: v.detach().requires_grad_(some is None or k in some) for k, v in tree.without(weights, "head.").items()}
    features = Conv4Loss(net, support=support).body(leaves, x)
    to_features = torch.randn(features.shape, generator=torch.Generator().manual_seed(4), dtype=x.dtype)
    return [features.detach(), *torch.autograd.grad(features, [v for v in leaves.values() if v.requires_grad], to_features)]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


every_use = pytest.mark.parametrize(("choices", "count", "support"), [
    ({"features": "flatten"}, 5, None),
    ({"features": "flatten"}, 12, 5),
    ({"features": "mean"}, 7, None),
    ({"features": "mean", "way": 3}, 8, 2),
    ({"features": "flatten", "way": 20}, 20, None),
    ({"features": "flatten", "image_size": 16}, 11, None),
    ({"features": "mean", "image_size": 16, "way": 2}, 9, 4),
    ({"features": "flatten", "image_size": 33}, 5, 5),  # the support set alone
])  # fmt: skip


@every_use
def test_value_gradient_and_hessian_vector_product(
    engine: Engine, choices: dict[str, object], count: int, support: int | None
) -> None:
    """Seen failing with `- mean_dot` turned to plus (Hessian alone), with `i < s` left out of norm_relu_backward (inductive
    alone), with `statistics` of all images (inductive alone), with a term left out of q_dot (Hessian alone), with `spread`
    not dividing (mean alone) and with the slope's sign turned (the derivative by gout alone), and with `silent` where
    the first image alone is (inductive alone)."""
    net, params = problems.network(**choices)  # type: ignore[arg-type]
    weights, (x, y) = different(params, 2), images(net, count, tasks=2)
    engine("native")
    found = derivatives(net, weights, x, y, support)
    engine("wide")
    assert_close(found, derivatives(net, weights, x, y, support), 1e-10)


@every_use
@pytest.mark.parametrize("weights_of", [different, tree.tile])
def test_the_body_and_its_gradient(
    engine: Engine,
    weights_of: Callable[[Params, int], Params],
    choices: dict[str, object],
    count: int,
    support: int | None,
) -> None:
    """For three tasks with weights of their own, and with the same ones.

    Seen failing with `spread` left out (mean alone), with the statistics of all images in norm_relu_backward (inductive
    alone), with xhat not kept, with the first task's weights for all (different ones alone), and with one layer's r too few
    in `room` (a crash).
    """
    net, params = problems.network(**choices)  # type: ignore[arg-type]
    weights, (x, _) = weights_of(params, 3), images(net, count)
    engine("native")
    found = body(net, weights, x, support)
    engine("wide")
    assert_close(found, body(net, weights, x, support), 1e-10)


def test_a_head_of_zero_leaves_out_what_is_zero(engine: Engine) -> None:
    """In one task of two. Seen failing with the product of g_dot and w left out, too."""
    net, params = problems.network()
    weights, (x, y) = different(params, 2), images(net, 5, tasks=2)
    weights["head.weight"][1] = 0
    engine("native")
    found = derivatives(net, weights, x, y)
    engine("wide")
    assert_close(found, derivatives(net, weights, x, y), 1e-10)


@pytest.mark.parametrize("features", ["flatten", "mean"])
@pytest.mark.parametrize(("name", "steps"), [("maml", 1), ("maml", 3), ("fomaml", 3)])
def test_meta_gradients_are_the_same(engine: Engine, name: str, steps: int, features: str) -> None:
    """Seen failing with gamma_dot left out of k_dot (MAML) and with the gradient kept from the forward not multiplied by
    gout (both)."""
    net, params = problems.network(features=features)
    batch = problems.image_batch(tasks=2, way=5, shot=1, query=2)
    learner = algorithms.build(name, {"inner_lr": 0.4, "inner_steps": steps})
    found = []
    for choice in ("native", "wide"):
        engine(choice)
        grads, losses = learner.meta_gradient(Conv4Loss(net), params, batch)
        found.append([losses, *grads.values()])
    assert_close(*found, tolerance=1e-9)


@pytest.mark.parametrize("case", problems.cases())
def test_every_learner_has_the_same_meta_gradient(engine: Engine, case: str) -> None:
    """With the hyper-parameters of tests/problems.py, and in its variants.

    Seen failing (the learners that use several products of one graph) with a Hessian-vector product kept for the next.
    """
    net, params = problems.network()
    batch = problems.image_batch(tasks=2, way=5, shot=2, query=1)
    learner = problems.build(case)
    found = []
    for choice in ("native", "wide"):
        engine(choice)
        grads, losses = learner.meta_gradient(Conv4Loss(net), learner.init(params), batch)
        found.append([losses, *grads.values()])
    assert_close(*found, tolerance=1e-7)


@pytest.mark.parametrize("statistics", ["transductive", "inductive"])
@pytest.mark.parametrize("learner", ["anil", "finetune"])
def test_halves_give_the_same_meta_gradient_to_replicas(engine: Engine, learner: str, statistics: str) -> None:
    """Two, of two tasks each. Seen failing with the first replica's weights for both, and with the statistics of all images
    (joint training alone: ANIL's body goes alone for the support set, which has no others)."""
    net, params = problems.network()
    batch = problems.image_batch(tasks=4, way=5, shot=1, query=2)
    loss = Conv4Loss(net)
    if statistics == "inductive":
        batch, loss = with_support(batch), Conv4Loss(net, support=5)
    start = problems.build(learner).init(params)
    both = tree.map_with(lambda a, b: torch.stack([a, b]), start, tree.map_with(lambda v: v + 0.02, start))
    found = []
    for choice in ("native", "wide"):
        engine(choice)
        with tree.replicas(2):
            grads, losses = problems.build(learner).meta_gradient(loss, both, batch)
        found.append([losses, *grads.values()])
    assert_close(*found, tolerance=1e-9)


def test_float32_is_close(engine: Engine) -> None:
    """To float64, on a task without a ReLU so near its kink that rounding turns it. Seen failing with EPS 2e-5."""
    net, params = problems.network()
    weights, (x, y) = different(params, 2), images(net, 5, tasks=2)
    engine("native")
    found = derivatives(net, {k: v.float() for k, v in weights.items()}, x.float(), y)
    engine("wide")
    expected = derivatives(net, weights, x, y)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert float((a - b).norm()) < 1e-4 * float(b.norm())


def test_weights_in_any_memory_layout_agree(engine: Engine) -> None:
    """One copy for all tasks, a copy each, and memory in another order. Seen failing with a shared kernel transposed in
    the first call alone, and with _by_task returning what it was given."""
    engine("native")
    net, params = problems.network()
    x, y = images(net, 5)
    shared = tree.tile(params, 3)
    derivatives(net, tree.tile(tree.axpy(0.1, params, params), 3), x, y)  # leaves other kernels in memory that is used again
    separate = {k: v.contiguous() for k, v in shared.items()}
    expected = derivatives(net, separate, x, y) + body(net, separate, x)
    mirrored = {k: v.transpose(1, -1).contiguous().transpose(1, -1) for k, v in shared.items() if v.ndim > 2}
    one_mirrored = tree.tile({k: v.mT.contiguous().mT if v.ndim > 1 else v for k, v in params.items()}, 3)
    x_of_one = x.transpose(0, 1).contiguous().transpose(0, 1)
    for weights, drawings in ((shared, x), (shared | mirrored, x), (one_mirrored, x), (shared, x_of_one)):
        for a, b in zip(derivatives(net, weights, drawings, y) + body(net, weights, drawings), expected, strict=True):
            assert torch.equal(a, b)


def test_only_what_is_asked_for(engine: Engine) -> None:
    """Gradients and Hessian-vector products of some of the weights.

    Seen failing with `lowest` taken from the highest layer wanted."""
    engine("native")
    net, params = problems.network()
    x, y = images(net, 5)
    weights = tree.detach(different(params, 3))
    for some in (["conv3.weight"], ["norm2.bias", "head.weight"], ["head.bias"]):
        found = []
        for asked in (list(weights), some):
            mixed = {k: v.detach().requires_grad_(k in asked) for k, v in weights.items()}
            at = [mixed[k] for k in some]
            grads = torch.autograd.grad(Conv4Loss(net)(mixed, x, y).sum(), at, create_graph=True)
            found.append([g.detach() for g in (*grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), at))])
        assert_close(*found, tolerance=1e-12)
        if below := [k for k in some if not k.startswith("head.")]:
            all_of_them = dict(zip(native.BODY, body(net, weights, x)[1:], strict=True))
            assert_close(body(net, weights, x, some=below)[1:], [all_of_them[k] for k in below], 1e-12)


def test_backward_twice(engine: Engine) -> None:
    """The gradient kept from the forward is given away once. Seen failing with it kept and multiplied in place again."""
    engine("native")
    net, params = problems.network()
    x, y = images(net, 5)
    weights = tree.detach(different(params, 3))
    loss = Conv4Loss(net)(weights, x, y).mean()
    features = Conv4Loss(net).body(weights, x)
    for value, at in ((loss, weights), (features.sum(), tree.without(weights, "head."))):
        first = [g.clone() for g in torch.autograd.grad(value, list(at.values()), retain_graph=True)]
        assert_close(list(torch.autograd.grad(value, list(at.values()))), first, 1e-12)


def test_a_diverged_task_leaves_its_neighbours_alone(engine: Engine) -> None:
    """And shows itself. Seen failing (in showing) with a ReLU that makes 0 of nan."""
    engine("native")
    net, params = problems.network(torch.float32)
    x, y = images(net, 5, dtype=torch.float32)
    weights = different(params, 3)
    healthy = derivatives(net, weights, x, y)
    for name, wrong in (("conv1.weight", float("nan")), ("norm3.weight", float("inf")), ("head.bias", float("nan"))):
        broken = {k: v.clone() for k, v in weights.items()}
        broken[name][1, 0] = wrong
        for a, b in zip(derivatives(net, broken, x, y), healthy, strict=True):
            assert torch.equal(a[0], b[0]) and torch.equal(a[2], b[2])
        assert not torch.isfinite(Conv4Loss(net)(broken, x, y)[1])
        features = Conv4Loss(net).body(broken, x)
        assert features[[0, 2]].isfinite().all() and (name.startswith("head.") or not features[1].isfinite().all())


def test_the_same_bits_whatever_the_threads(engine: Engine) -> None:
    """Also whatever else is in the batch."""
    engine("native")
    net, params = problems.network(torch.float32)
    x, y = images(net, 5, dtype=torch.float32)
    weights = different(params, 3)
    found = []
    for count in (1, 2, 3, 3):
        torch.set_num_threads(count)
        found.append(derivatives(net, weights, x, y) + body(net, weights, x))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    alone = Conv4Loss(net)({k: v[1:2] for k, v in weights.items()}, x[1:2], y[1:2])
    assert torch.equal(alone, found[0][0][1:2])


def test_third_derivatives_are_refused(engine: Engine) -> None:
    engine("native")
    net, params = problems.network()
    x, y = images(net, 5)
    kernel = (weights := tree.detach(tree.tile(params, 3)))["conv2.weight"]
    (first,) = torch.autograd.grad(Conv4Loss(net)(weights, x, y).sum(), kernel, create_graph=True)
    with pytest.raises(RuntimeError, match="no third derivatives"):
        torch.autograd.grad(first.square().sum(), kernel, create_graph=True)


def test_second_derivatives_of_the_body_alone_are_refused(engine: Engine) -> None:
    """Seen failing with torch's once_differentiable, and without any."""
    engine("native")
    net, params = problems.network()
    x, _ = images(net, 5)
    kernel = (weights := tree.detach(tree.tile(params, 3)))["conv2.weight"]
    with pytest.raises(RuntimeError, match="no second derivatives; PyTorch's operators have: METALIB_ENGINE=wide"):
        torch.autograd.grad(Conv4Loss(net).body(weights, x).square().sum(), kernel, create_graph=True)
    engine("wide")
    (first,) = torch.autograd.grad(Conv4Loss(net).body(weights, x).square().sum(), kernel, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), kernel)[0].any()


# ------------------------------------------------------------------------------------------------ choice and build


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("shutil.which", lambda name: None)
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def test_without_a_compiler_one_line_says_so_and_wide_serves(
    no_compiler: None, engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    net, params = problems.network()
    x, y = images(net, 5)
    engine("auto")
    losses = [Conv4Loss(net)(tree.tile(params, 3), x, y) for _ in range(2)]
    assert capsys.readouterr().err == (
        "metalib: the faster CPU engine cannot be built (no C++ compiler); PyTorch's operators serve\n"
    )
    engine("wide")
    assert torch.equal(losses[1], Conv4Loss(net)(tree.tile(params, 3), x, y))
    engine("native")
    with pytest.raises(ValueError, match="native does not cover a machine on which it cannot be built"):
        Conv4Loss(net)(tree.tile(params, 3), x, y)


def test_a_failed_build_leaves_nothing_behind(
    engine: Engine, tmp_path: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", ["-no-such-flag"])
    native.library.cache_clear()
    try:
        assert native.library() is None
    finally:
        native.library.cache_clear()
    assert "no-such-flag" in capsys.readouterr().err
    assert not list((tmp_path / "metalib").iterdir())  # type: ignore[operator]


@pytest.mark.parametrize("content", [b"", b"whole", b"half", b"not a library"])
def test_a_damaged_library_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """Reported: a file cut short ended the process with a bus error, an empty or a foreign one was never replaced."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "SOURCE", small_source(tmp_path))
    for _ in range(2):
        native.library.cache_clear()
        assert value(native.library()) == 7
        (made,) = (tmp_path / "metalib").iterdir()
        whole = made.read_bytes()
        damaged = {b"whole": whole, b"half": whole[: len(whole) // 2]}.get(content, content)
        os.replace(made, tmp_path / "loaded")  # which stays as this process has it mapped
        made.write_bytes(damaged)
    native.library.cache_clear()
    assert value(native.library()) == 7


@pytest.mark.parametrize("home", ["a file", "read-only", "not to be run from", "none"])
def test_without_a_cache_it_is_built_for_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reported: each of them meant the slower engine, and no home a traceback."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(native, "SOURCE", small_source(tmp_path))
    native.library.cache_clear()
    if home == "none":
        monkeypatch.setattr(Path, "home", refuse(RuntimeError("Could not determine home directory.")))
    elif home == "read-only":
        monkeypatch.setattr(Path, "mkdir", refuse(OSError(errno.EROFS, "Read-only file system")))
    elif home == "not to be run from":
        honest = ctypes.CDLL
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setattr(ctypes, "CDLL", lambda file: refuse(OSError("not mapped"))() if ".cache" in file else honest(file))
    else:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert value(native.library()) == 7 and capsys.readouterr().err == ""
    assert not list(tmp_path.rglob("*.so"))


def test_a_compiler_that_makes_no_library_leaves_none_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho nonsense > "$2"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    native.library.cache_clear()
    assert native.library() is None and "the faster CPU engine cannot be built" in capsys.readouterr().err
    assert not list((tmp_path / "metalib").iterdir())


def refuse(error: Exception) -> Callable[..., None]:
    def refused(*_: object, **__: object) -> None:
        raise error

    return refused


def small_source(folder: Path) -> Path:
    """A library that compiles at once."""
    source = folder / "small.cpp"
    source.write_text('extern "C" int value() { return 7; }\n')
    return source


def value(library: ctypes.CDLL | None) -> int:
    assert library is not None
    return library.value()


def test_a_compiler_without_openmp_serves_with_one_thread(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen failing without the second attempt."""
    engine("native")
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1; esac\nexec {shutil.which("c++")} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    net, params = problems.network()
    weights = different(params, 3)
    expected = derivatives(net, weights, *images(net, 5))
    native.library.cache_clear()
    try:
        torch.set_num_threads(2)
        found = derivatives(net, weights, *images(net, 5))
    finally:
        native.library.cache_clear()
    assert list((tmp_path / "metalib").iterdir())
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize(("choices", "words"), [
    ({"downsample": "maxpool"}, "downsample maxpool"),
    ({"filters": 8}, r"8 filters \(only 64\)"),
])  # fmt: skip
def test_what_native_does_not_cover(engine: Engine, choices: dict[str, object], words: str) -> None:
    net, params = problems.network(**choices)  # type: ignore[arg-type]
    x, y = images(net, 5)
    engine("auto")
    assert torch.isfinite(Conv4Loss(net)(tree.tile(params, 3), x, y)).all()
    engine("native")
    for call in (lambda: Conv4Loss(net)(tree.tile(params, 3), x, y), lambda: Conv4Loss(net).body(tree.tile(params, 3), x)):
        with pytest.raises(ValueError, match=f"METALIB_ENGINE: native does not cover {words}; use auto or wide"):
            call()
    engine("fast")
    with pytest.raises(ValueError, match="METALIB_ENGINE: 'fast' is not one of auto, native, wide"):
        Conv4Loss(net)(tree.tile(params, 3), x, y)


def test_what_does_not_fit_together_is_refused(engine: Engine) -> None:
    """Compiled code would read past the end of an array."""
    engine("native")
    net, params = problems.network()
    weights, (x, y) = tree.tile(params, 3), images(net, 5)
    with pytest.raises(ValueError, match=r"labels must be \(3, 5\) int64 in \[0, 5\)"):
        Conv4Loss(net)(weights, x, y + 1)
    with pytest.raises(ValueError, match=r"head.weight: shape \(3, 5, 64\), not \(3, 5, 256\)"):
        Conv4Loss(net)(weights | {"head.weight": weights["head.weight"][..., :64]}, x, y)
    with pytest.raises(ValueError, match=r"norm2.bias: shape \(3, 63\), not \(3, 64\)"):
        Conv4Loss(net).body(weights | {"norm2.bias": weights["norm2.bias"][..., :63]}, x)

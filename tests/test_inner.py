"""Inner-loop optimisers against plain loops, torch.optim, recursions by hand and theory.

Each of these was seen failing on a deliberate error before it was trusted; the docstrings say on which.
"""

import pytest
import torch
from torch import Tensor

from metalib import inner, tree
from metalib.types import Params
from tests import problems


def cut(params: Params) -> Params:
    return {name: value.detach() for name, value in params.items()}


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize(("lam", "batch"), [(0.7, None), (0.7, 4), (0.0, 4)])
def test_sgd_is_descent_on_the_regularised_loss(create_graph: bool, lam: float, batch: int | None) -> None:
    """A plain loop with autograd of L + lam/2 ||phi - phi_0||^2, images 4 step, 4 step + 1, ... modulo 6 in each step.

    With create_graph the derivative of the adapted query loss, too: phi_0 in the regulariser is a function of itself.

    Seen failing with lam doubled, with the pull towards the previous step's weights, with minibatch left out, with create_graph
    ignored, and (derivative) with phi_0 detached.
    """
    params, tasks = problems.smooth_problem()
    theta = tree.detach(tree.axpy(0.2, problems.directions(tree.tile(params, 4))[0], tree.tile(params, 4)))
    phi = theta
    for step in range(5):
        rows = torch.arange(6) if batch is None else (4 * step + torch.arange(4)) % 6
        away = sum(((phi[name] - theta[name]) ** 2).sum() for name in phi)
        total = problems.smooth_loss(phi, tasks.support_x[:, rows], tasks.support_y[:, rows]).sum() + lam / 2 * away
        grads = torch.autograd.grad(total, list(phi.values()), create_graph=True)
        phi = {name: value - 0.4 * g for (name, value), g in zip(phi.items(), grads, strict=True)}
    seen: list[Params] = []
    result = inner.sgd(
        problems.smooth_loss, theta, tasks.support_x, tasks.support_y,
        lr=0.4, steps=5, batch=batch, lam=lam, create_graph=create_graph, watch=seen.append,
    )  # fmt: skip
    assert len(seen) == 6
    for name in phi:
        torch.testing.assert_close(result[name].detach(), phi[name].detach(), rtol=1e-12, atol=1e-13)
    if not create_graph:
        assert all(value.grad_fn is None for value in result.values())
        return
    expected = tree.grad(problems.smooth_loss(phi, tasks.query_x, tasks.query_y).sum(), theta)
    grads = tree.grad(problems.smooth_loss(result, tasks.query_x, tasks.query_y).sum(), theta)
    for name, value in expected.items():
        torch.testing.assert_close(grads[name], value, rtol=1e-10, atol=1e-12)


def test_nesterov_by_hand() -> None:
    """L(w) = (w - 7)^2 / 2 from 3, lr 1/4, lam 1: G'(w) = 2 (w - 5), sqrt kappa = 2, momentum 1/3.

        y = 3,                      G' = -4,      phi_1 = 4
        y = 4 + 1/3 = 13/3,         G' = -4/3,    phi_2 = 14/3
        y = 14/3 + 2/9 = 44/9,      G' = -2/9,    phi_3 = 44/9 + 1/18 = 89/18

    The second task, with its minimum at 3, stays.

    Seen failing with momentum 0, with the momentum's root left out, with the gradient taken at phi, with
    the step taken from phi, and with the pull forgotten.
    """
    start = {"w": torch.tensor([[3.0], [3.0]], dtype=torch.float64)}
    seen: list[Params] = []
    inner.nesterov(
        problems.quadratic_loss, start, torch.ones(2, 1, 1, dtype=torch.float64),
        torch.tensor([[7.0], [3.0]], dtype=torch.float64), lr=0.25, steps=3, lam=1.0, watch=seen.append,
    )  # fmt: skip
    assert [phi["w"][0].item() for phi in seen] == pytest.approx([3, 4, 14 / 3, 89 / 18], rel=1e-15)
    assert [phi["w"][1].item() for phi in seen] == [3] * 4


def test_nesterov_is_faster_than_descent_as_theory_says() -> None:
    """G(phi_j) - G* <= (1 - 1/sqrt kappa)^j (G(phi_0) - G* + lam/2 ||phi_0 - phi*||^2), Nesterov's theorem 2.2.3.

    Eigenvalues of G's Hessian from lam = 1 to 1/lr = 100, kappa 100. Plain descent breaks the bound: 1 - 1/sqrt kappa = 0.9
    a step, and descent shrinks the gap by (1 - 1/kappa)^2 = 0.98 where it is slowest.

    Seen failing with momentum 0.
    """
    d, lam = 30, 1.0
    values = torch.logspace(0, 2, d, dtype=torch.float64) - lam
    x = torch.diag(values).expand(2, d, d)
    y = torch.randn(2, d, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    start = {"w": torch.zeros(2, d, dtype=torch.float64)}
    best = values * y / (values + lam)

    def objective(phi: Params) -> Tensor:
        return problems.quadratic_loss(phi, x, y) + lam / 2 * phi["w"].square().sum(1)

    gaps: dict[str, list[Tensor]] = {"nesterov": [], "sgd": []}
    for name, seen in gaps.items():
        watch = lambda phi: seen.append(objective(cut(phi)) - objective({"w": best}))  # noqa: E731, B023
        getattr(inner, name)(problems.quadratic_loss, start, x, y, lr=0.01, steps=200, lam=lam, watch=watch)
    bound = gaps["sgd"][0] + lam / 2 * best.square().sum(1)
    for j, gap in enumerate(gaps["nesterov"]):
        assert (gap <= 0.9**j * bound).all()
    assert (gaps["sgd"][200] > 100 * 0.9**200 * bound).all()


@pytest.mark.parametrize(("beta2", "eps", "batch"), [(0.999, 1e-8, None), (0.9, 1e-2, 4)])
def test_adam_is_torchs_step_by_step(beta2: float, eps: float, batch: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.optim.Adam(betas=(0, beta2)) on the same losses; then anew from other weights, its state kept.

    Seen failing with eps inside the root, with the bias left uncorrected, with lerp's weight beta2 for 1 - beta2, with the
    weight restarted from 0 (second run), and with `second` not handed on (second run).
    """
    monkeypatch.setattr(inner, "BETA2", beta2)
    monkeypatch.setattr(inner, "EPS", eps)
    params, tasks = problems.smooth_problem()
    theta = tree.tile(params, 4)
    runs = [cut(theta), tree.axpy(0.1, problems.directions(theta)[0], theta)]
    leaves = [value.clone().requires_grad_() for value in theta.values()]
    optimiser = torch.optim.Adam(leaves, lr=0.02, betas=(0.0, beta2), eps=eps)
    second, weight = tree.scale(0.0, theta), torch.zeros(4, dtype=torch.float64)
    for run, start in enumerate(runs):
        seen: list[Params] = []
        phi, second, weight = inner.adam(
            problems.smooth_loss, start, tasks.support_x, tasks.support_y, lr=0.02, steps=4,
            batch=batch, second=second, weight=weight, watch=seen.append,
        )  # fmt: skip
        assert len(seen) == 5 and all(value.grad_fn is None for value in phi.values())
        for leaf, value in zip(leaves, start.values(), strict=True):
            leaf.data.copy_(value)
        for step in range(4):
            rows = torch.arange(6) if batch is None else (4 * step + torch.arange(4)) % 6
            optimiser.zero_grad()
            here = dict(zip(theta, leaves, strict=True))
            problems.smooth_loss(here, tasks.support_x[:, rows], tasks.support_y[:, rows]).sum().backward()
            optimiser.step()
            for name, leaf in here.items():
                torch.testing.assert_close(seen[step + 1][name].detach(), leaf.detach(), rtol=1e-12, atol=1e-13)
        for leaf, value in zip(leaves, second.values(), strict=True):
            torch.testing.assert_close(value, optimiser.state[leaf]["exp_avg_sq"], rtol=1e-12, atol=1e-18)
        assert weight.tolist() == pytest.approx([1 - beta2 ** (4 * (run + 1))] * 4, rel=1e-13)


@pytest.mark.parametrize(("size", "batch"), [(6, 2), (5, 2), (7, 3), (3, 1), (7, 6), (5, 5), (5, 7), (5, None)])
def test_minibatch_uses_every_image_once_before_any_twice(size: int, batch: int | None) -> None:
    """Laid end to end, the batches count 0, 1, ..., size - 1 round and round, across the end of a batch, too.

    A batch as large as the set or larger is the set, in every step. Images and labels stay together.

    Seen failing with the rest dropped at the end of the set, with every step starting at 0, with a batch after the end
    starting at 0 again, with the labels' turn forgotten, and with `batch >= size` left out (5, 7).
    """
    x = torch.arange(2 * size).view(2, size, 1)
    y = 10 * x[:, :, 0]
    rows: list[int] = []
    for step in range(3 * size):
        images, labels = inner.minibatch(x, y, batch, step)
        assert images.shape == (2, min(batch or size, size), 1)
        assert torch.equal(labels, 10 * images[:, :, 0]) and torch.equal(images[1], images[0] + size)
        rows += images[0, :, 0].tolist()
    assert rows == [i % size for i in range(len(rows))]

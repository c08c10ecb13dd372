"""Conv4 for T tasks at once, each with its own weights, in PyTorch's operators: twice differentiable, fast, on any device.

`body` and `head` are the network; below them are the functions they are made of.

Layout. Activations are "wide": (B, H, W, T * C), the tasks as groups of channels, so that one grouped convolution serves
all tasks, or one bmm over the same memory. Kernels are (T, C_out, 3, 3, C_in). Convolutions have 3 x 3 taps and padding 1.

Why hand-written. Second-order meta-learning differentiates a backward pass, and PyTorch's own second derivative of a
convolution is slow; of batch norm it is a long chain of small operations. Here each is an autograd Function whose backward
is made of Functions again, so a double backward runs the same fast kernels. Third derivatives are refused, not wrong.
The tests compare all of it with `Conv4.forward`, value, gradient and Hessian-vector product, in float64.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from metalib.models.conv4 import EPS, LAYERS, Conv4
from metalib.types import Params

# ------------------------------------------------------------------------------------------------ network


def logits(net: Conv4, params: Params, x: Tensor, statistics_from: int | None = None) -> Tensor:
    """Logits (T, B, way) of images (T, B, 1, H, W) under weights (T, *shape); see `body` and `head`."""
    return head(params, body(net, params, x, statistics_from))


def body(net: Conv4, params: Params, x: Tensor, statistics_from: int | None = None) -> Tensor:
    """Features (T, B, F) of images (T, B, 1, H, W) under weights (T, *shape).

    Batch norm's statistics come from the first `statistics_from` images of each task, or from all of them (None).
    """
    tasks, images = x.shape[:2]
    known = min(images, statistics_from or images)
    stride = 2 if net.downsample == "stride" else 1
    y = first_layer(
        x, params["conv1.weight"], params["norm1.weight"], params["norm1.bias"], stride, known
    )  # (B, H, W, T * filters), as all the following
    y = _pool(net, y)
    for layer in range(2, LAYERS + 1):
        gamma, beta = params[f"norm{layer}.weight"], params[f"norm{layer}.bias"]
        y = Conv.apply(y, params[f"conv{layer}.weight"], stride)
        _, h, w, channels = y.shape
        rows = NormReLU.apply(y.reshape(-1, channels), gamma.flatten(), beta.flatten(), known * h * w)
        y = _pool(net, rows.view(y.shape))
    maps = y.unflatten(3, (tasks, net.filters))  # (B, H, W, T, filters)
    if net.features == "mean":
        return maps.mean((1, 2)).transpose(0, 1)
    return maps.permute(3, 0, 1, 2, 4).reshape(tasks, images, -1)


def head(params: Params, features: Tensor) -> Tensor:
    """Logits (T, B, way) of features (T, B, F); of fewer heads than tasks, (R, way, F), each serves T / R consecutive tasks."""
    heads = len(params["head.weight"])
    rows = features.reshape(heads, -1, features.shape[-1])
    scores = torch.baddbmm(params["head.bias"].unsqueeze(1), rows, params["head.weight"].mT)
    return scores.view(*features.shape[:2], -1)


def _pool(net: Conv4, y: Tensor) -> Tensor:
    return F.max_pool2d(y.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1) if net.downsample == "maxpool" else y


# ------------------------------------------------------------------------------------------------ convolution
# A convolution y = conv(x, w) is bilinear, and so are the two halves of its derivative, grad_input(g, w) and
# grad_kernel(x, g). The derivative of each of the three is made of the other two:
#   conv'        at (x, w) against g:  grad_input(g, w),  grad_kernel(x, g)
#   grad_input'  at (g, w) against u:  conv(u, w),        grad_kernel(u, g)
#   grad_kernel' at (x, g) against v:  grad_input(g, v),  conv(x, v)


class Conv(Function):
    """x (B, H, W, T*C_in), w (T, C_out, 3, 3, C_in) -> (B, H', W', T*C_out), H' = ceil(H / stride)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.stride = stride
        if _as_products(x):
            return _conv_by_patches(x, w, stride)
        if _shared(w):
            return _widen(F.conv2d(_by_image(x, len(w)), w[0].permute(0, 3, 1, 2), None, stride, 1), len(w))
        return F.conv2d(_channels_first(x), _grouped(w), None, stride, 1, 1, len(w)).permute(0, 2, 3, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, w = ctx.saved_tensors
        (g,) = grads
        to_x, to_w, _ = ctx.needs_input_grad
        return (
            GradInput.apply(g, w, x.shape, ctx.stride) if to_x else None,
            GradKernel.apply(x, g, w.shape, ctx.stride) if to_w else None,
            None,
        )


class GradInput(Function):
    """g (B, H', W', T*C_out), w -> gradient with respect to x, of shape `shape`."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, w: Tensor, shape: torch.Size, stride: int) -> Tensor:
        ctx.save_for_backward(g, w)
        ctx.stride = stride
        if _as_products(g):
            return _grad_input_by_taps(g.contiguous(), w, shape, stride)
        if _shared(w):
            images, height, width, channels = shape
            x = g.new_empty(images * len(w), height, width, channels // len(w)).permute(0, 3, 1, 2)
            return _widen(
                torch.ops.aten.convolution_backward(
                    _by_image(g, len(w)), x, w[0].permute(0, 3, 1, 2), None, [stride, stride], [1, 1], [1, 1], False, [0, 0], 1,
                    [True, False, False],
                )[0], len(w),
            )  # fmt: skip
        g = g.contiguous()
        if shape[1] <= 4:  # where benchmarks.convolutions finds it as fast or faster, like GradKernel's bound
            return _grad_input_by_taps(g, w, shape, stride)
        x = g.new_empty(shape).permute(0, 3, 1, 2)  # only its shape and strides are read
        return torch.ops.aten.convolution_backward(
            _channels_first(g), x, _grouped(w), None, [stride, stride], [1, 1], [1, 1], False, [0, 0], len(w),
            [True, False, False],
        )[0].permute(0, 2, 3, 1)  # fmt: skip

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        g, w = ctx.saved_tensors
        (u,) = grads
        to_g, to_w, *_ = ctx.needs_input_grad
        return (
            Conv.apply(u, w, ctx.stride) if to_g else None,
            GradKernel.apply(u, g, w.shape, ctx.stride) if to_w else None,
            None,
            None,
        )


class GradKernel(Function):
    """x (B, H, W, T*C_in), g (B, H', W', T*C_out) -> gradient with respect to w, (T, C_out, 3, 3, C_in)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor, shape: torch.Size, stride: int) -> Tensor:
        ctx.save_for_backward(x, g)
        ctx.shape, ctx.stride = shape, stride
        x, g = x.contiguous(), g.contiguous()
        tasks, c_out, _, _, c_in = shape
        if _as_products(x) or x.shape[1] <= (7 if x.shape[0] <= 5 else 4):
            return _grad_kernel_by_patches(x, g, shape, stride)
        w = g.new_empty(tasks * c_out, 3, 3, c_in).permute(0, 3, 1, 2)  # only its shape and strides are read
        return (
            torch.ops.aten.convolution_backward(
                _channels_first(g), _channels_first(x), w, None, [stride, stride], [1, 1], [1, 1], False, [0, 0], tasks,
                [False, True, False],
            )[1].permute(0, 2, 3, 1).reshape(shape)
        )  # fmt: skip

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, g = ctx.saved_tensors
        (v,) = grads
        to_x, to_g, *_ = ctx.needs_input_grad
        return (
            GradInput.apply(g, v, x.shape, ctx.stride) if to_x else None,
            Conv.apply(x, v, ctx.stride) if to_g else None,
            None,
            None,
        )


def _as_products(x: Tensor) -> bool:
    """Whether every convolution is a bmm over patches or taps: on a GPU, unless it may round to TF32.

    cuDNN's grouped convolutions of exact float32 are loops over the groups, two to ten times slower; those of TF32 are up to
    six times faster than bmm (benchmarks/results/gpu.md).
    """
    return x.is_cuda and torch.backends.cudnn.conv.fp32_precision != "tf32"  # type: ignore[attr-defined]


# Before the first inner step all tasks have the same kernels, and a convolution is a dense one over all tasks' images, which
# runs several times faster than a grouped one, even with the copies there and back. (Not so for several replicas, whose tasks
# share nothing with those of others: their kernels are copied for each task, and take the grouped convolution. And not so as
# products: a bmm reads one matrix for all as it reads many.)


def _shared(w: Tensor) -> bool:
    """Whether w (T, ...) is one tensor for all tasks, as tree.tile makes it."""
    return len(w) > 1 and w.stride(0) == 0


def _by_image(x: Tensor, tasks: int) -> Tensor:
    """(B, H, W, T*C) -> (B*T, C, H, W) in channels-last memory."""
    return x.unflatten(3, (tasks, -1)).transpose(1, 3).transpose(2, 3).flatten(0, 1).contiguous().permute(0, 3, 1, 2)


def _widen(x: Tensor, tasks: int) -> Tensor:
    """(B*T, C, H, W) -> (B, H, W, T*C)."""
    return x.permute(0, 2, 3, 1).unflatten(0, (-1, tasks)).permute(0, 2, 3, 1, 4).flatten(3)


def _channels_first(x: Tensor) -> Tensor:
    return x.contiguous().permute(0, 3, 1, 2)


def _grouped(w: Tensor) -> Tensor:
    """(T, C_out, 3, 3, C_in) -> (T*C_out, C_in, 3, 3) in channels-last memory, as a grouped convolution wants it."""
    return w.reshape(-1, *w.shape[2:]).permute(0, 3, 1, 2)


def _patches(x: Tensor, tasks: int, stride: int) -> Tensor:
    """(B, H, W, T*C) -> (T, B*H'*W', 9*C): the nine neighbours of every output position."""
    images, height, width, channels = x.shape
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    windows = padded.unfold(1, 3, stride).unfold(2, 3, stride)  # (B, H', W', T*C, 3, 3)
    windows = windows.unflatten(3, (tasks, channels // tasks))
    return windows.permute(3, 0, 1, 2, 5, 6, 4).reshape(tasks, -1, 9 * (channels // tasks))


def _conv_by_patches(x: Tensor, w: Tensor, stride: int) -> Tensor:
    """Conv as one bmm."""
    tasks, c_out = w.shape[:2]
    images, height, width, _ = x.shape
    y = _product(_patches(x, tasks, stride), w.reshape(tasks, c_out, -1).mT)
    return y.view(images, -(-height // stride), -(-width // stride), -1)


def _grad_kernel_by_patches(x: Tensor, g: Tensor, shape: torch.Size, stride: int) -> Tensor:
    """GradKernel as one bmm; g is contiguous."""
    tasks, c_out = shape[:2]
    return torch.bmm(g.view(-1, tasks, c_out).permute(1, 2, 0), _patches(x, tasks, stride)).view(shape)


def _grad_input_by_taps(g: Tensor, w: Tensor, shape: torch.Size, stride: int) -> Tensor:
    """GradInput as one bmm for all nine taps, which are then added where they belong; g is contiguous."""
    images, h, v, _ = g.shape
    tasks, c_out, _, _, c_in = w.shape
    taps = torch.bmm(g.view(-1, tasks, c_out).transpose(0, 1), w.reshape(tasks, c_out, 9 * c_in))
    taps = taps.view(tasks, images, h, v, 3, 3, c_in)
    padded = g.new_zeros(images, stride * (h - 1) + 3, stride * (v - 1) + 3, tasks, c_in)
    by_task = padded.permute(3, 0, 1, 2, 4)
    for i in range(3):
        for j in range(3):
            by_task[:, :, i : i + stride * (h - 1) + 1 : stride, j : j + stride * (v - 1) + 1 : stride] += taps[..., i, j, :]
    return padded[:, 1 : shape[1] + 1, 1 : shape[2] + 1].reshape(shape)


# ------------------------------------------------------------------------------------------------ batch norm and ReLU
# x (n, c), a column per channel, statistics from the first s rows (all of them in transductive use, the support set's in
# inductive use). With m = 1/s on those rows and 0 elsewhere, sums over all rows:
#   mu = sum m x,  r = (sum m (x - mu)^2 + eps)^-1/2,  xhat = (x - mu) r,  y = relu(gamma xhat + beta)
# Backward of g, with h = g [y > 0], A = sum h, B = sum h xhat:
#   gx = gamma r (h - m (A + xhat B)),   dgamma = B,   dbeta = A
# Backward of that, for adjoints u of gx, v of dgamma, w of dbeta, with
#   ub = sum m u,  p = sum m u xhat,  q = sum u h - ub A - p B,  f = v - gamma r p:
#   dg = [y > 0] (gamma r u + f xhat + w - gamma r ub),   dgamma = r q
#   t  = f h - gamma r B m u                                 (the adjoint of xhat)
#   dx = r (t - m (sum t + xhat (sum t xhat + gamma r q)))


class NormReLU(Function):
    """Batch norm with batch statistics, then ReLU. x (n, c), gamma and beta (c,), statistics from rows [0, s)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, s: int) -> Tensor:
        xhat = x - x[:s].mean(0)
        r = torch.rsqrt(xhat[:s].square().mean(0).add_(EPS))
        xhat.mul_(r)
        y = torch.addcmul(beta, xhat, gamma).relu_()
        ctx.save_for_backward(x, gamma, xhat, y, r)
        ctx.s = s
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (g,) = grads
        return (*NormReLUBackward.apply(g, *ctx.saved_tensors, ctx.s), None)


class NormReLUBackward(Function):
    """The derivative of NormReLU as a function of (g, x, gamma); xhat, y and r follow from x and are passed in ready."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, gamma: Tensor, xhat: Tensor, y: Tensor, r: Tensor, s: int
    ) -> tuple[Tensor, ...]:
        h = torch.ops.aten.threshold_backward(g, y, 0)
        a, b, k = h.sum(0), (h * xhat).sum(0), gamma * r
        gx = h * k
        gx[:s].addcmul_(xhat[:s], k * b, value=-1 / s).sub_(k * a, alpha=1 / s)
        ctx.save_for_backward(h, gamma, xhat, y, r, a, b)
        ctx.s = s
        return gx, b, a

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        _refuse_third_derivative()
        u, v, w = grads
        h, gamma, xhat, y, r, a, b = ctx.saved_tensors
        s, k = ctx.s, gamma * r
        ub = u[:s].mean(0)
        p = (u[:s] * xhat[:s]).mean(0)
        # addcmul: each is one launch on a GPU, where vectors of c numbers cost as much as all of x
        q = (u * h).sum(0).addcmul_(ub, a, value=-1).addcmul_(p, b, value=-1)
        f, kb = torch.addcmul(v, k, p, value=-1), k * b
        sum_t = (f * a).addcmul_(kb, ub, value=-1)
        rest = (f * b).addcmul_(kb, p, value=-1).addcmul_(k, q)  # sum t xhat + gamma r q
        dx = h * (r * f)
        dx[:s].addcmul_(u[:s], r * kb, value=-1 / s).addcmul_(xhat[:s], r * rest, value=-1 / s).sub_(r * sum_t, alpha=1 / s)
        dg = torch.addcmul(torch.addcmul(w, k, ub, value=-1), u, k).addcmul_(xhat, f)
        return torch.ops.aten.threshold_backward(dg, y, 0), dx, r * q, None, None, None, None


def _refuse_third_derivative() -> None:
    # torch's once_differentiable is not enough: autograd.grad prunes its error away, and the result would be silently wrong
    if torch.is_grad_enabled():
        raise RuntimeError("Conv4 has no third derivatives: take its second derivative without create_graph")


# ------------------------------------------------------------------------------------------------ first layer
# The images are never differentiated, so the first layer's patches P are built once, and batch norm's mean and variance of
# the linear map P w follow from P's own mean m and covariance c: mu = m w, var = w' c w. Convolution, batch norm and ReLU
# together are then one matrix product: relu([P 1] [w k; beta - mu k]), k = gamma rsqrt(var + eps).


def first_layer(x: Tensor, w: Tensor, gamma: Tensor, beta: Tensor, stride: int, statistics_from: int) -> Tensor:
    """Images (T, B, 1, H, W), w (T, C, 3, 3, 1), gamma and beta (T, C) -> (B, H', W', T*C).

    Statistics from the first `statistics_from` images. Twice differentiable in w, gamma and beta, not in x.
    """
    tasks, images, _, height, width = x.shape
    windows = F.pad(x[:, :, 0], (1, 1, 1, 1)).unfold(2, 3, stride).unfold(3, 3, stride)  # (T, B, H', W', 3, 3)
    h, v = windows.shape[2:4]
    p = windows.new_empty(tasks, images * h * v, 10)
    p[:, :, :9] = windows.reshape(tasks, -1, 9)
    p[:, :, 9] = 1
    known = p[:, : statistics_from * h * v, :9]
    m = known.mean(1, keepdim=True)
    c = torch.baddbmm(m.mT @ m, known.mT, known, beta=-1, alpha=1 / known.shape[1])

    w = w.reshape(tasks, -1, 9).mT  # (T, 9, C)
    gamma, beta = gamma.unsqueeze(1), beta.unsqueeze(1)
    k = gamma * torch.rsqrt((w * (c @ w)).sum(1, keepdim=True) + EPS)
    y: Tensor = LinearReLU.apply(p, torch.cat([w * k, beta - (m @ w) * k], 1))
    return y.view(images, h, v, -1)


class LinearReLU(Function):
    """p (T, n, k), w (T, k, C) -> relu(p w) as (n, T, C); p is taken as constant."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, w: Tensor) -> Tensor:
        y = _product(p, w).relu_()
        ctx.save_for_backward(p, y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, LinearReLUBackward.apply(grads[0], *ctx.saved_tensors)


class LinearReLUBackward(Function):
    """g (n, T, C) -> gradient with respect to w, p' (g [y > 0]), (T, k, C)."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, p: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(p, y)
        return torch.bmm(p.mT, torch.ops.aten.threshold_backward(g, y, 0).transpose(0, 1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        _refuse_third_derivative()
        p, y = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(_product(p, grads[0]), y, 0), None, None


def _product(p: Tensor, w: Tensor) -> Tensor:
    """p (T, n, k) times w (T, k, C), written straight to (n, T, C)."""
    out = p.new_empty(p.shape[1], len(p), w.shape[2])
    torch.bmm(p, w, out=out.transpose(0, 1))
    return out

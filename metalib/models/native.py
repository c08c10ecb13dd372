"""Conv4's loss for many tasks at once by compiled code on the CPU: native.cpp, built on first use.

It is twice differentiable: its gradient is a Function, and the gradient's derivative a Hessian-vector product. Between calls
it keeps no activations, so memory does not grow with what an inner step computes. The body alone, which a learner evaluates
once for a set, is differentiable once and keeps its activations till then. `lacks` says what the code does not cover.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from metalib.models.conv4 import LAYERS, Conv4
from metalib.types import Params

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = [
    "-std=c++17", "-O3", "-march=native", "-shared", "-fPIC",
    # the parts of -ffast-math that keep inf and nan, and the process's treatment of denormals, as they are
    "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math",
]  # fmt: skip
NAMES = [*(f"{part}{n}.{kind}" for n in (1, 2, 3, 4) for part, kind in (
    ("conv", "weight"), ("norm", "weight"), ("norm", "bias"))), "head.weight", "head.bias"]  # fmt: skip
BODY = NAMES[:-2]


# ------------------------------------------------------------------------------------------------ reach and build


def serves(net: Conv4, params: Params, x: Tensor) -> bool:
    """Whether the compiled code can compute this loss."""
    return lacks(net, params, x) is None


def lacks(net: Conv4, params: Params, x: Tensor) -> str | None:
    """What of this loss the compiled code does not cover, in words; None where it covers everything."""
    if net.downsample != "stride":
        return f"downsample {net.downsample}"
    if net.filters != 64:
        return f"{net.filters} filters (only 64)"
    if net.image_size < 16 or x.shape[2:] != (1, net.image_size, net.image_size):
        return f"images of shape {tuple(x.shape[2:])}"
    if x.requires_grad:
        return "gradients with respect to images"
    tensors = [x, *params.values()]
    if any(p.device.type != "cpu" for p in tensors):
        return "devices other than the CPU"
    if x.dtype not in (torch.float32, torch.float64) or any(p.dtype != x.dtype for p in tensors):
        return f"numbers of type {', '.join(sorted({str(p.dtype) for p in tensors}))}"
    return "a machine on which it cannot be built" if library() is None else None


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled code; None where it cannot be built, for a reason given in one line on stderr.

    Where the user's cache cannot be written or run from, it is built in a temporary folder, for this process alone.
    """
    try:
        try:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metalib"
            cache.mkdir(parents=True, exist_ok=True)
            return load(cache)
        except (OSError, RuntimeError):  # RuntimeError: there is no home
            with tempfile.TemporaryDirectory() as folder:
                return load(Path(folder))
    except (OSError, subprocess.CalledProcessError) as error:
        detail = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        reason = next((line for line in detail.splitlines() if "error" in line), detail.partition("\n")[0])
        print(f"metalib: the faster CPU engine cannot be built ({reason}); PyTorch's operators serve", file=sys.stderr)
        return None


def load(folder: Path) -> ctypes.CDLL:
    """native.cpp compiled for this processor, out of `folder`; compiled into it first, unless it lies there whole.

    A file's name holds the digest of its content: running one that is cut short would end the process.
    """
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    if compiler is None:
        raise FileNotFoundError("no C++ compiler")
    key = hashlib.sha256(repr((SOURCE.read_bytes(), compiler, FLAGS, _processor())).encode()).hexdigest()[:16]
    for there in sorted(folder.glob(f"native-{key}-*.so")):
        if there.name == _name(key, there):
            return ctypes.CDLL(str(there))
        there.unlink()
    with tempfile.TemporaryDirectory(dir=folder) as beside:  # renamed when whole: others see nothing or all of it
        made = Path(beside) / "made.so"
        for openmp in (["-fopenmp"], []):  # clang may lack OpenMP; one thread then does it all
            command = [compiler, *FLAGS, *openmp, str(SOURCE), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
            if done.returncode == 0:
                break
        done.check_returncode()
        loaded = ctypes.CDLL(str(made))  # what cannot be loaded is not kept
        made.replace(folder / _name(key, made))
    return loaded


def _name(key: str, file: Path) -> str:
    return f"native-{key}-{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}.so"


def _processor() -> str:
    """Which instructions -march=native may use here."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"


# ------------------------------------------------------------------------------------------------ calls


class Problem(ctypes.Structure):
    """The structure of the same name in native.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tasks", "images", "size", "way", "known", "skip", "mean", "threads")),
        *((name, ctypes.c_void_p) for name in ("x", "y", "gout", "loss")),
        ("weight", ctypes.c_void_p * len(NAMES)),
        ("stride", ctypes.c_int64 * len(NAMES)),
        ("tangent", ctypes.c_void_p * len(NAMES)),
        ("tangent_stride", ctypes.c_int64 * len(NAMES)),
        ("result", ctypes.c_void_p * len(NAMES)),
        *((name, ctypes.c_void_p) for name in ("features", "from_features", "kept")),
        ("room", ctypes.c_int64),
    ]


class Images:
    """The part of a loss that is not differentiated: images, labels, which images lend statistics and which count."""

    def __init__(self, net: Conv4, x: Tensor, y: Tensor | None, support: int | None):
        self.x, self.y = x.detach().contiguous(), None if y is None else y.contiguous()
        self.mean = net.features == "mean"
        self.known = min(support or x.shape[1], x.shape[1])
        self.skip = support if support is not None and x.shape[1] > support else 0

    def run(
        self,
        weights: tuple[Tensor, ...],
        wanted: tuple[bool, ...],
        gout: Tensor | None = None,
        tangents: tuple[Tensor, ...] | None = None,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Losses (T,) and their gradients (T, *shape), of the weights wanted and times gout (T,).

        With tangents v (T, *shape): the losses' slopes <v, gradient> (T,) and the Hessian-vector products, likewise.
        """
        loss = self.x.new_empty(len(self.x))
        return loss, self._call(weights, wanted, tangents, y=self.y, gout=gout, loss=loss)

    def up(self, weights: tuple[Tensor, ...], keep: bool) -> tuple[Tensor, Tensor | None]:
        """Features (T, B, F) of the body's weights, and the maps that `down` needs."""
        tasks, images, _, size, _ = self.x.shape
        filters = len(weights[-1][0])
        positions = [(-(-size // 2**layer)) ** 2 for layer in range(1, LAYERS + 1)]
        features = self.x.new_empty(tasks, images, filters * (1 if self.mean else positions[-1]))
        room = filters * (images * (positions[0] + 2 * sum(positions[1:])) + LAYERS - 1)
        kept = self.x.new_empty(tasks, room) if keep else None
        self._call(weights, (False,) * len(weights), features=features, kept=kept)
        return features, kept

    def down(
        self, weights: tuple[Tensor, ...], wanted: tuple[bool, ...], gradient: Tensor, kept: Tensor
    ) -> list[Tensor | None]:
        """The gradient (T, B, F) with respect to the features -> those with respect to the weights wanted, (T, *shape)."""
        return self._call(weights, wanted, from_features=gradient, kept=kept)

    def _call(
        self,
        weights: tuple[Tensor, ...],
        wanted: tuple[bool, ...],
        tangents: tuple[Tensor, ...] | None = None,
        **arrays: Tensor | None,
    ) -> list[Tensor | None]:
        """Fill what is empty of `arrays`, which have names of Problem's, and return what is wanted."""
        tasks, images, _, size, _ = self.x.shape
        results = [w.new_empty(w.shape) if want else None for w, want in zip(weights, wanted, strict=True)]
        weights = tuple(_by_task(w) for w in weights)
        given = {name: value.contiguous() for name, value in arrays.items() if value is not None}
        room = given["kept"].shape[1] if "kept" in given else 0
        problem = Problem(
            tasks, images, size, len(weights[-1][0]), self.known, self.skip, self.mean, torch.get_num_threads(),
            self.x.data_ptr(), room=room, **{name: value.data_ptr() for name, value in given.items()},
        )  # fmt: skip
        count = len(weights)  # without the head, the body's alone
        problem.weight[:count] = [w.data_ptr() for w in weights]
        problem.stride[:count] = [w.stride(0) for w in weights]
        problem.result[:count] = [None if r is None else r.data_ptr() for r in results]
        if tangents is not None:
            tangents = tuple(_by_task(v) for v in tangents)
            problem.tangent[:] = [v.data_ptr() for v in tangents]
            problem.tangent_stride[:] = [v.stride(0) for v in tangents]
        compiled = library()
        assert compiled is not None
        (compiled.run_float if self.x.dtype == torch.float32 else compiled.run_double)(ctypes.byref(problem))
        return results


def _by_task(value: Tensor) -> Tensor:
    """(T, *shape) such that each task's part is contiguous; tasks that share one copy (stride 0) go on sharing it."""
    if value[0].is_contiguous():
        return value
    return value[0].contiguous().expand(value.shape) if value.stride(0) == 0 else value.contiguous()


# ------------------------------------------------------------------------------------------------ functions


def loss(net: Conv4, params: Params, x: Tensor, y: Tensor, support: int | None = None) -> Tensor:
    """Mean cross-entropy of each task, (T,). Weights (T, *shape), x (T, B, 1, H, W), y (T, B).

    Batch norm's statistics come from the first `support` images, which then do not count unless they are all there are;
    without `support`, from all. Twice differentiable in the weights.
    """
    _check(net, params, x, NAMES)
    if y.shape != x.shape[:2] or y.dtype != torch.int64 or int(y.min()) < 0 or int(y.max()) >= net.way:
        raise ValueError(f"labels must be {tuple(x.shape[:2])} int64 in [0, {net.way})")
    return Loss.apply(Images(net, x, y, support), torch.is_grad_enabled(), *(params[name] for name in NAMES))


def features(net: Conv4, params: Params, x: Tensor, support: int | None = None) -> Tensor:
    """What the body makes of images x (T, B, 1, H, W) under weights (T, *shape): features (T, B, F).

    Batch norm's statistics come from the first `support` images, or from all. Differentiable in the weights, once.
    """
    _check(net, params, x, BODY)
    return Features.apply(Images(net, x, None, support), torch.is_grad_enabled(), *(params[name] for name in BODY))


def _check(net: Conv4, params: Params, x: Tensor, names: list[str]) -> None:
    """PyTorch's operators check shapes; compiled code would read past the end of an array."""
    kernel, channels = (net.filters, 3, 3), (net.filters,)
    features = net.filters * (net.last_size**2 if net.features == "flatten" else 1)
    shapes = [
        (*kernel, 1),
        channels,
        channels,
        *3 * [(*kernel, net.filters), channels, channels],
        (net.way, features),
        (net.way,),
    ]
    for name, shape in zip(names, shapes, strict=False):
        if params[name].shape != (len(x), *shape):
            raise ValueError(f"{name}: shape {tuple(params[name].shape)}, not {(len(x), *shape)}")


class Loss(Function):
    """Weights -> losses (T,). If a gradient will be wanted, it is computed along with them, from the same maps."""

    @staticmethod
    def forward(ctx: Any, images: Images, gradient_follows: bool, *weights: Tensor) -> Tensor:
        ctx.images = images
        ctx.save_for_backward(*weights)
        wanted = ctx.needs_input_grad[2:] if gradient_follows else (False,) * len(weights)
        loss, ctx.ready = images.run(weights, wanted)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ready, ctx.ready = ctx.ready, None  # handed over once and not kept
        return None, None, *Gradient.apply(ctx.images, ready, ctx.needs_input_grad[2:], *grads, *ctx.saved_tensors)


class Gradient(Function):
    """gout (T,), weights -> gout times the gradients, (T, *shape); None for weights not wanted."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Images,
        ready: list[Tensor | None] | None,
        wanted: tuple[bool, ...],
        gout: Tensor,
        *weights: Tensor,
    ) -> tuple[Tensor | None, ...]:
        ctx.images = images
        ctx.save_for_backward(gout, *weights)
        if ready is None:
            ready = images.run(weights, wanted, gout)[1]
        elif not bool((gout == 1).all()):
            for grad in ready:
                if grad is not None:
                    grad.mul_(gout.view(-1, *[1] * (grad.ndim - 1)))
        return tuple(ready)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # torch's once_differentiable is not enough, see wide.py
        if torch.is_grad_enabled():
            raise RuntimeError("Conv4 has no third derivatives: take its second derivative without create_graph")
        gout, *weights = ctx.saved_tensors
        tangents = tuple(
            torch.zeros_like(w[0]).expand(w.shape) if v is None else v for v, w in zip(grads, weights, strict=True)
        )
        slope, products = ctx.images.run(tuple(weights), ctx.needs_input_grad[4:], gout, tangents)
        return None, None, None, slope, *products


class Features(Function):
    """The body's weights -> features (T, B, F). If a gradient will be wanted, the maps are kept for it."""

    @staticmethod
    def forward(ctx: Any, images: Images, gradient_follows: bool, *weights: Tensor) -> Tensor:
        features, kept = images.up(weights, gradient_follows and any(ctx.needs_input_grad))
        ctx.images = images
        ctx.save_for_backward(kept, *weights)
        return features

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("the compiled body has no second derivatives; PyTorch's operators have: METALIB_ENGINE=wide")
        kept, *weights = ctx.saved_tensors
        return None, None, *ctx.images.down(tuple(weights), ctx.needs_input_grad[2:], grads[0], kept)

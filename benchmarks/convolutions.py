"""Which implementation is fastest on this device for each convolution of metalib/models/wide.py and its two derivatives."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from benchmarks import report
from benchmarks.timing import alternate, median, prepared
from metalib.models import wide
from stages.command import one_sentence

LAYERS = {2: 14, 3: 7, 4: 4}  # pixels along a side; 64 channels, stride 2. The first layer is computed as one matrix product
CALLS = 10  # timed together, to keep a GPU busy
Products = dict[str, Callable[[], Tensor]]
app = typer.Typer(add_completion=False)


@app.command()
@one_sentence
def main(
    tasks: Annotated[list[int], typer.Option(min=2)] = [16, 96],  # noqa: B006
    images: Annotated[list[int], typer.Option(min=1, help="in a task")] = [5, 25],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    out: Annotated[Path, typer.Option()] = report.RESULTS / "convolutions.md",
) -> None:
    """Write a table of times: a row for each layer and product, a column for each implementation."""
    device = prepared(threads)
    head = report.header("Implementations of a convolution", "benchmarks.convolutions", device)
    rows = list[list[str]]()
    names = list[str]()
    for t in tasks:
        for b in images:
            for layer, size in LAYERS.items():
                typer.echo(f"{t} tasks of {b} images, layer {layer}")
                products = implementations(t, b, size, 64, device)
                agree(products)
                for product, calls in products.items():
                    found = alternate({name: in_a_row(call) for name, call in calls.items()}, repeats, device)
                    micro = {name: 1e6 * median(found[name]) / CALLS for name in calls}
                    names = list(calls)
                    rows.append([str(t), str(b), str(layer), product, *(f"{micro[name]:.0f}" for name in names)])
    report.write(
        out,
        head,
        "Microseconds for a product of the strided network in float32, each task with kernels of its own. `wide`: as in "
        "wide.py. grouped: PyTorch's convolution with a group for each task, in either memory order, without the copies from "
        "one order to the other. bmm: batched matrix products over patches or taps, with their copies.",
        report.table(["tasks", "images", "layer", "product", *names], rows, left=4),
    )
    typer.echo(f"written: {out}")


def implementations(tasks: int, images: int, size: int, channels: int, device: torch.device) -> dict[str, Products]:
    """Calls that compute each product: {product: {name: call}}. Each returns it in the layout of wide.py."""
    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=device)

    half = -(-size // 2)
    x, w = normal(images, size, size, tasks * channels), normal(tasks, 64, 3, 3, channels)
    g = normal(images, half, half, tasks * 64)
    last = [x.permute(0, 3, 1, 2), wide._grouped(w), g.permute(0, 3, 1, 2)]
    first = [value.contiguous() for value in last]

    def grouped(values: list[Tensor]) -> Products:
        def backward(mask: list[bool]) -> Tensor:
            x, w, g = values
            found = torch.ops.aten.convolution_backward(g, x, w, None, [2, 2], [1, 1], [1, 1], False, [0, 0], tasks, mask)
            return found[mask.index(True)].permute(0, 2, 3, 1)

        return {
            "conv": lambda: torch.nn.functional.conv2d(values[0], values[1], None, 2, 1, 1, tasks).permute(0, 2, 3, 1),
            "grad_input": lambda: backward([True, False, False]),
            "grad_kernel": lambda: backward([False, True, False]).reshape(w.shape),
        }

    by_bmm = {
        "conv": lambda: wide._conv_by_patches(x, w, 2),
        "grad_input": lambda: wide._grad_input_by_taps(g, w, x.shape, 2),
        "grad_kernel": lambda: wide._grad_kernel_by_patches(x, g, w.shape, 2),
    }
    as_wide = {
        "conv": lambda: wide.Conv.apply(x, w, 2),
        "grad_input": lambda: wide.GradInput.apply(g, w, x.shape, 2),
        "grad_kernel": lambda: wide.GradKernel.apply(x, g, w.shape, 2),
    }
    every = {"wide": as_wide, "grouped, channels last": grouped(last), "grouped, channels first": grouped(first), "bmm": by_bmm}
    return {product: {name: calls[product] for name, calls in every.items()} for product in as_wide}


def agree(products: dict[str, Products]) -> None:
    """AssertionError if an implementation computes something else."""
    for product, calls in products.items():
        want = calls["wide"]()
        for name, call in calls.items():
            torch.testing.assert_close(call(), want, rtol=1e-3, atol=1e-3 * float(want.abs().max()), msg=f"{product}: {name}")


def in_a_row(call: Callable[[], Tensor]) -> Callable[[], None]:
    def calls() -> None:
        for _ in range(CALLS):
            call()

    return calls


if __name__ == "__main__":
    app()

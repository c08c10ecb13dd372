"""Invented alphabets in Omniglot's layout, for tests, offline machines and a first look. They are not Omniglot.

A character is a random stroke program: a few Bezier curves. A drawer repeats it with their own hand: control points that
wander, a slant, a size, a place, a pen width.
"""

import io
import zipfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from pydantic import ConfigDict, Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from metalib.data.omniglot import ARCHIVES, DRAWERS, SIDE
from metalib.randomness import generator

_POINTS = 24  # of the polyline that stands for a curve


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Glyphs:
    background: int = Field(ge=1, le=100)  # alphabets in the background archive
    evaluation: int = Field(ge=1, le=100)  # alphabets in the evaluation archive
    characters: PositiveInt = Field(le=99)  # in each alphabet
    seed: int


def write(folder: Path, glyphs: Glyphs) -> None:
    """Write the two archives, named and laid out as Omniglot's; the same glyphs give the same bytes."""
    identity = 0
    for archive, alphabets in zip(ARCHIVES, (glyphs.background, glyphs.evaluation), strict=True):
        with zipfile.ZipFile(folder / f"{archive}.zip", "w") as opened:
            for alphabet in range(1, alphabets + 1):
                for character in range(1, glyphs.characters + 1):
                    identity += 1
                    place = f"{archive}/Glyphs_{archive[7:]}_{alphabet:02}/character{character:02}/{identity % 10000:04}"
                    for drawer, image in enumerate(draw(generator(glyphs.seed, "glyphs", identity)), 1):
                        png = io.BytesIO()
                        image.save(png, "PNG")
                        opened.writestr(zipfile.ZipInfo(f"{place}_{drawer:02}.png"), png.getvalue())


def draw(random: torch.Generator) -> list[Image.Image]:
    """One new character, drawn by 20 drawers: 105 x 105 one-bit images, paper 1."""
    strokes = int(torch.randint(1, 5, (), generator=random))
    curves = [_curve(int(torch.randint(2, 5, (), generator=random)), random) for _ in range(strokes)]
    slant, size, aspect = (_around(mean, spread, random) for mean, spread in ((0, 0.12), (0.92, 0.08), (1, 0.08)))
    place = 0.5 + 0.04 * torch.randn(DRAWERS, 1, 2, generator=random)
    pens = torch.randint(4, 7, (DRAWERS,), generator=random).tolist()
    images = [Image.new("1", (SIDE, SIDE), 1) for _ in pens]
    for curve in curves:
        x, y = (curve - 0.5).unbind(-1)
        hand = torch.stack([(x + slant * y) * aspect, y / aspect], -1) * size.unsqueeze(-1) + place
        for image, points, pen in zip(images, (hand * SIDE).tolist(), pens, strict=True):
            pencil = ImageDraw.Draw(image)
            pencil.line([tuple(p) for p in points], fill=0, width=pen, joint="curve")
    return images


def _curve(points: int, random: torch.Generator) -> Tensor:
    """A Bezier curve from each drawer's version of the control points: (20, 24, 2) in the unit square."""
    control = 0.02 + 0.96 * torch.rand(points, 2, generator=random)
    control = control + 0.03 * torch.randn(DRAWERS, points, 2, generator=random)
    t = torch.linspace(0, 1, _POINTS).unsqueeze(1)
    k = torch.arange(points)
    binomials = torch.exp(torch.lgamma(torch.tensor(points)) - torch.lgamma(k + 1.0) - torch.lgamma(points - k.float()))
    return (binomials * t**k * (1 - t) ** (points - 1 - k)) @ control


def _around(mean: float, spread: float, random: torch.Generator) -> Tensor:
    return mean + spread * torch.randn(DRAWERS, 1, generator=random)

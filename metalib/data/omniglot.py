"""Omniglot's archives: reading, checking, and turning into one array.

Lake, Salakhutdinov, Tenenbaum, "Human-level concept learning through probabilistic program induction", Science 2015;
https://github.com/brendenlake/omniglot (MIT). Two zip archives of PNG files, 105 x 105, one bit, paper 1:

    <archive>/<Alphabet>/characterNN/<4-digit id>_<2-digit drawer>.png
"""

import hashlib
import io
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ARCHIVES = ("images_background", "images_evaluation")
DRAWERS = 20
SIDE = 105  # pixels of an original drawing
BYTES = 1 << 16  # of a drawing's file, at most; the largest has a few hundred
MEMBERS = 200_000  # of an archive, at most; the larger one has 19,280
DIGESTS = {  # of the content, see content_digest: the same for every genuine copy, however it was zipped
    "images_background": "447b25cf0506c514594a9bd79e8ed04ce3b08b31c3626a2e3262a797a53d8957",
    "images_evaluation": "398dc7495384d0289afa9c5d742fe588e317d4a45029d239dda68857fd50d4bb",
}
Resize = Literal["nearest", "area", "lanczos"]
_FILTERS = {"nearest": Image.Resampling.NEAREST, "area": Image.Resampling.BOX, "lanczos": Image.Resampling.LANCZOS}
_MEMBER = re.compile(r"(?P<archive>\w+)/(?P<alphabet>[^/\\]+)/(?P<character>character\d\d)/\d{4}_\d\d\.png")
# what the readers of zip and PNG files raise at damaged ones
_DAMAGED = (OSError, EOFError, ValueError, SyntaxError, IndexError, OverflowError, struct.error, zlib.error)


class _Refused(Exception):
    """Why an archive is not taken."""


class Drawing(NamedTuple):
    """One PNG of an archive."""

    path: str  # inside the archive
    alphabet: str
    character: str
    ink: NDArray[np.bool_]  # (105, 105)


class Characters(NamedTuple):
    """All characters in their fixed order: background before evaluation, then by alphabet, then by character."""

    images: NDArray[np.uint8]  # (N, 20, H, W), ink 255 on paper 0
    alphabets: NDArray[np.str_]  # (N,) the alphabet of each
    characters: NDArray[np.str_]  # (N,) its name in the alphabet
    background: NDArray[np.bool_]  # (N,) whether it is of the background archive
    source: str  # "omniglot" or "glyphs"
    drawn: str  # size and method of the images, for instance "28 px lanczos"


def drawings(archive: Path, known_as: str = "") -> Iterator[Drawing]:
    """The drawings of one archive in sorted path order. Nothing is unpacked to disk, and no more than a drawing to memory.

    ValueError, about `known_as` where the file lies here for a moment only, when it is not a whole zip archive, or holds
    anything but PNG files of the layout and the size above.
    """
    what = known_as or str(archive)
    try:
        with zipfile.ZipFile(archive) as opened:
            members = sorted((m for m in opened.infolist() if not m.is_dir()), key=lambda member: member.filename)
            if len(members) > MEMBERS:
                raise _Refused(f"{len(members)} files are in it, but at most {MEMBERS} can be drawings")
            for member in members:
                path = member.filename
                parts = _MEMBER.fullmatch(path)
                if not parts or parts["archive"] != archive.stem or parts["alphabet"].startswith("."):
                    raise _Refused(f"{path!r} is not of the form {archive.stem}/<Alphabet>/characterNN/0000_00.png")
                if member.file_size > BYTES:
                    raise _Refused(f"{path} has {member.file_size} bytes, but a drawing has at most {BYTES}")
                if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or member.flag_bits & 1:
                    raise _Refused(f"{path} is encrypted, or compressed in another way than deflate")
                yield Drawing(path, parts["alphabet"], parts["character"], _ink(opened.read(member), path))
    except _Refused as error:
        raise ValueError(f"{what}: {error}") from None
    except (*_DAMAGED, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]  # zipfile quotes whole names
        raise ValueError(
            f"{what} is not a whole zip archive of PNG files ({reason}); fetch it again, or another copy"
        ) from None


def _ink(content: bytes, path: str) -> NDArray[np.bool_]:
    """The (105, 105) ink mask of a PNG."""
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            if image.size != (SIDE, SIDE) or image.mode != "1":
                raise _Refused(f"{path} is {image.size} {image.mode!r}, not 105 x 105 one-bit")
            return ~np.asarray(image)
    except (*_DAMAGED, Image.DecompressionBombError) as error:
        raise _Refused(f"{path} is no whole PNG file ({error})") from None


def content_digest(archive: Path, known_as: str = "") -> str:
    """sha256 over the drawings in sorted path order, of each its path, a newline, and its packed ink mask row by row."""
    digest = hashlib.sha256()
    for drawing in drawings(archive, known_as):
        digest.update(_record(drawing))
    return digest.hexdigest()


def read(archives: tuple[Path, Path], digests: dict[str, str], source: str, size: int, resize: Resize) -> Characters:
    """The background and the evaluation archive as one array of `size` x `size` images.

    ValueError when an archive's content does not match `digests`, or a character does not have 20 drawings.
    """
    images: list[NDArray[np.uint8]] = []
    names: list[tuple[str, str, str]] = []
    for archive in archives:
        digest = hashlib.sha256()
        for drawing in drawings(archive):
            digest.update(_record(drawing))
            images.append(shrink(drawing.ink, size, resize))
            names.append((archive.stem, drawing.alphabet, drawing.character))
        require_digest(archive, digest.hexdigest(), digests[archive.stem])
    if any(len(set(names[i : i + DRAWERS])) > 1 for i in range(0, len(names), DRAWERS)) or len(names) % DRAWERS:
        raise ValueError(f"{archives[0].parent}: a character does not have {DRAWERS} drawings")
    parts, alphabets, characters = (np.array(column) for column in zip(*names[::DRAWERS], strict=True))
    stacked = np.stack(images).reshape(-1, DRAWERS, size, size)
    return Characters(stacked, alphabets, characters, parts == archives[0].stem, source, f"{size} px {resize}")


def require_digest(archive: Path, found: str, expected: str) -> None:
    """ValueError unless the content is the expected one."""
    if found != expected:
        raise ValueError(
            f"{archive.name}: the content's sha256 is {found}, but the genuine archive's is {expected}; use a genuine copy"
        )


def shrink(ink: NDArray[np.bool_], size: int, resize: Resize) -> NDArray[np.uint8]:
    """(105, 105) ink mask -> (size, size) uint8, ink 255. `nearest` stays binary, as in the code of MAML, Reptile and Leap."""
    image = Image.fromarray(ink.astype(np.uint8) * 255)
    return np.asarray(image.resize((size, size), _FILTERS[resize]))


def _record(drawing: Drawing) -> bytes:
    return f"{drawing.path}\n".encode() + np.packbits(drawing.ink).tobytes()

"""Get Omniglot's two archives, from the official host or a mirror, or draw glyphs in their place."""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

import requests
import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from metalib.data import glyphs, omniglot
from metalib.files import locked
from stages import files, params
from stages.command import console, one_sentence
from stages.guard import guarded

MIRROR = "OMNIGLOT_MIRROR"
ATTEMPTS = 4
PARTIAL = Path(".downloads")  # what a broken download left, for the next attempt or the next run to go on from
REMEDIES = (
    f"set {MIRROR} to a folder or URL that holds {' and '.join(f'{a}.zip' for a in omniglot.ARCHIVES)}, "
    "or take generated characters instead with data.source=glyphs"
)
app = typer.Typer(add_completion=False)


class Unreachable(ValueError):
    """No archive could be downloaded. Where the official host gave none, `make run` knows by the status, and takes glyphs."""

    status = 3


@app.command()
@one_sentence
@guarded("fetch")
def main() -> None:
    """Write data/raw: the two archives, kept zipped, and digests.json with the sha256 of their content.

    Omniglot comes from its official host, or from the folder, file:// or http(s):// address in OMNIGLOT_MIRROR. Its content
    is checked against pinned digests, whatever the source. With data.source glyphs the archives are drawn.
    """
    data, mirror = params.read().data, os.environ.get(MIRROR, "")
    with files.whole(files.RAW) as folder:
        folder.mkdir()
        if data.source == "glyphs":
            console.print(f"drawing glyphs (seed {data.glyphs.seed}); this is not Omniglot")
            glyphs.write(folder, data.glyphs)
        digests = {}
        for name in omniglot.ARCHIVES:
            archive = folder / f"{name}.zip"
            if data.source == "omniglot":
                obtain(archive, mirror)
            digests[name] = omniglot.content_digest(archive, f"{archive.name} of {mirror or 'the official host'}")
            if data.source == "omniglot":
                omniglot.require_digest(archive, digests[name], omniglot.DIGESTS[name])
            console.print(f"{archive.name}: content sha256 {digests[name]}")
        (folder / "digests.json").write_text(json.dumps(digests, indent=1) + "\n")


def obtain(archive: Path, mirror: str) -> None:
    """Copy or download one archive to `archive`; ValueError (Unreachable: by the official host) says what to do if it fails."""
    if not mirror:
        from torchvision.datasets import Omniglot  # imported here: it is slow, and a mirror does not need it

        download(f"{Omniglot.download_url_prefix}/{archive.name}", archive)
        md5 = hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest()
        if md5 != (expected := Omniglot.zips_md5[archive.stem]):
            raise ValueError(f"{archive.name}: the download's MD5 is {md5}, but the official one is {expected}; run again")
        return
    address = urlsplit(mirror)
    if address.scheme in ("http", "https"):
        try:
            download(f"{mirror.rstrip('/')}/{archive.name}", archive)
        except Unreachable as error:  # who names a mirror wants Omniglot
            raise ValueError(str(error)) from None
        return
    if address.scheme not in ("", "file"):
        raise ValueError(f"{MIRROR}: {mirror!r} is not a folder, file:// or http(s):// address")
    source = Path(unquote(address.path) if address.scheme else mirror).expanduser() / archive.name
    if not source.is_file():
        raise ValueError(f"{MIRROR}: {source} does not exist; {REMEDIES}")
    shutil.copyfile(source, archive)


def download(url: str, archive: Path, pause: float = 1.0) -> None:
    """Download with a progress bar. A connection that breaks is taken up where it broke, ATTEMPTS times in all."""
    PARTIAL.mkdir(exist_ok=True)
    partial = PARTIAL / f"{archive.name}.part"
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    reason = ""
    with locked(partial.with_suffix(".lock")), Progress(*columns, console=console) as bar:
        task = bar.add_task(archive.name, total=None)
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(pause * 2 ** (attempt - 1))
            have = partial.stat().st_size if partial.exists() else 0
            try:
                with requests.get(url, headers={"Range": f"bytes={have}-"} if have else {}, stream=True, timeout=30) as answer:
                    if answer.status_code == 416:  # nothing is left to send: what is here is no part of the file
                        partial.unlink()
                        continue
                    if 400 <= answer.status_code < 500:
                        raise Unreachable(f"{url} answered {answer.status_code} {answer.reason}; {REMEDIES}")
                    answer.raise_for_status()
                    if answer.status_code != 206:
                        have = 0
                    length = answer.headers.get("Content-Length")
                    bar.update(task, completed=have, total=have + int(length) if length else None)
                    with files.placed(partial), open(partial, "ab" if have else "wb") as file:
                        for block in answer.iter_content(1 << 16):
                            file.write(block)
                            bar.advance(task, len(block))
                if length and partial.stat().st_size < have + int(length):
                    raise requests.ConnectionError(f"the connection closed after {partial.stat().st_size} bytes")
            except requests.RequestException as error:
                reason = type(error).__name__ if not str(error) else _innermost(error)
                continue
            shutil.move(partial, archive)  # data may be on another disk
            return
    raise Unreachable(f"{url} could not be downloaded in {ATTEMPTS} attempts ({reason}); {REMEDIES}")


def _innermost(error: BaseException) -> str:
    """The short reason at the bottom of a chain of connection errors."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error)


if __name__ == "__main__":
    app()

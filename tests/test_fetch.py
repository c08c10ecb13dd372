"""Where the archives come from, what is refused, and that nothing half-written stays."""

import contextlib
import http.server
import io
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import requests

from metalib.data import glyphs, omniglot, splits
from metalib.data.omniglot import ARCHIVES
from stages import fetch, preprocess
from tests.conftest import Edit, Stage

REAL = os.path.abspath(os.environ["OMNIGLOT_MIRROR"]) if os.environ.get("OMNIGLOT_MIRROR") else None


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder with two small archives, and their digests."""
    folder = tmp_path_factory.mktemp("drawn")
    glyphs.write(folder, glyphs.Glyphs(background=10, evaluation=10, characters=5, seed=0))
    return folder, {name: omniglot.content_digest(folder / f"{name}.zip") for name in ARCHIVES}


@pytest.fixture
def mirror(drawn: tuple[Path, dict[str, str]], edit: Edit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with those archives, which are taken for the genuine ones."""
    edit(data__source="omniglot")
    folder = shutil.copytree(drawn[0], tmp_path / "a mirror")
    monkeypatch.setattr(omniglot, "DIGESTS", drawn[1])
    monkeypatch.setattr(fetch.time, "sleep", lambda seconds: None)
    return folder


@pytest.fixture
def served(mirror: Path) -> Iterator[tuple[str, list[str | None]]]:
    """The mirror over http. Every first answer breaks off after 65,536 bytes; the Range headers asked for are noted."""
    asked: list[str | None] = []
    broken = set[str]()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = (mirror / Path(self.path).name).read_bytes() if (mirror / Path(self.path).name).exists() else None
            if content is None:
                self.send_error(404)
                return
            span = self.headers.get("Range")
            asked.append(span)
            start = int(span.removeprefix("bytes=").rstrip("-")) if span else 0
            self.send_response(206 if span else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            first = self.path not in broken
            broken.add(self.path)
            self.wfile.write(content[start : start + 65536] if first else content[start:])

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/omniglot", asked
        server.shutdown()


def nothing_is_left() -> bool:
    return not Path("data").exists() or not list(Path("data").iterdir())


@pytest.mark.parametrize("form", ["folder", "file", "~"])
def test_a_mirror_on_disk(mirror: Path, stage: Stage, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setenv("HOME", str(mirror.parent))
    given = {"folder": str(mirror), "file": mirror.as_uri(), "~": f"~/{mirror.name}"}
    monkeypatch.setenv("OMNIGLOT_MIRROR", given[form])
    stage(fetch.app)
    for name in ARCHIVES:
        assert Path(f"data/raw/{name}.zip").read_bytes() == (mirror / f"{name}.zip").read_bytes()


def test_a_broken_download_goes_on_where_it_broke(
    mirror: Path, served: tuple[str, list[str | None]], stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, asked = served
    monkeypatch.setenv("OMNIGLOT_MIRROR", address)
    stage(fetch.app)
    assert asked == [None, "bytes=65536-"] * 2
    for name in ARCHIVES:
        assert Path(f"data/raw/{name}.zip").read_bytes() == (mirror / f"{name}.zip").read_bytes()
    assert list(Path(".downloads").iterdir()) == []


def test_a_full_disk_of_downloads_is_named(
    mirror: Path, served: tuple[str, list[str | None]], stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which may be another than that of data/raw. Seen failing: data/raw was named."""
    part = Path(".downloads/images_background.zip.part")
    part.parent.mkdir()
    part.symlink_to("/dev/full")
    monkeypatch.setenv("OMNIGLOT_MIRROR", served[0])
    assert f"error: {part}: No space left on device" in stage(fetch.app, fails=True) and nothing_is_left()


def test_two_downloads_of_one_archive_come_one_after_the_other(
    mirror: Path, served: tuple[str, list[str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share what a broken download left. Seen failing without the lock."""
    name, both, met, get = f"{ARCHIVES[0]}.zip", threading.Barrier(2), list[int](), requests.get

    def meet(*arguments: object, **options: object) -> requests.Response:
        with contextlib.suppress(threading.BrokenBarrierError):
            met.append(both.wait(timeout=1))
        return get(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(fetch.requests, "get", meet)
    targets = [Path(folder) / name for folder in ("one", "other")]
    for target in targets:
        target.parent.mkdir()
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda target: fetch.download(f"{served[0]}/{name}", target), targets))
    assert not met and all(target.read_bytes() == (mirror / name).read_bytes() for target in targets)
    assert list(Path(".downloads").iterdir()) == []


def test_an_address_without_the_archives_is_one_sentence(
    served: tuple[str, list[str | None]], mirror: Path, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    (mirror / "images_background.zip").unlink()
    for place, complaint in ((served[0], "answered 404 Not Found"), (str(mirror), "images_background.zip does not exist")):
        monkeypatch.setenv("OMNIGLOT_MIRROR", place)
        said = stage(fetch.app, fails=True)
        assert complaint in said and "data.source=glyphs" in said and nothing_is_left()
    monkeypatch.setenv("OMNIGLOT_MIRROR", "ftp://somewhere/omniglot")
    assert "'ftp://somewhere/omniglot' is not a folder, file:// or http(s)://" in stage(fetch.app, fails=True)


def test_a_refusal_by_the_official_host_has_a_status_of_its_own(
    edit: Edit, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one than a typing error in params.yaml has: `make run` tells them apart by it."""
    edit(data__source="omniglot")
    reply = requests.Response()
    reply.status_code, reply.reason, reply.raw = 403, "Forbidden", io.BytesIO()
    monkeypatch.setattr(fetch.requests, "get", lambda *_, **__: reply)
    assert "answered 403 Forbidden" in stage(fetch.app, fails=fetch.Unreachable.status) and nothing_is_left()


def test_the_official_host_out_of_reach_names_both_remedies(
    mirror: Path, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def get(url: str, **_: object) -> None:
        tried.append(url)
        raise requests.ConnectionError("Name or service not known")

    monkeypatch.setattr(fetch.requests, "get", get)
    said = stage(fetch.app, fails=fetch.Unreachable.status)  # of its own: `make run` goes on with glyphs
    assert len(tried) == 4 and all(url.endswith("/images_background.zip") for url in tried)
    assert "could not be downloaded in 4 attempts" in said
    assert "OMNIGLOT_MIRROR" in said and "data.source=glyphs" in said and nothing_is_left()


def test_a_truncated_archive_is_refused(mirror: Path, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = (mirror / "images_evaluation.zip").read_bytes()
    (mirror / "images_evaluation.zip").write_bytes(whole[:-2000])
    monkeypatch.setenv("OMNIGLOT_MIRROR", str(mirror))
    said = stage(fetch.app, fails=True)  # about the mirror's file: the copy of it is gone
    assert f"images_evaluation.zip of {mirror} is not a whole zip archive" in said and "data/" not in said
    assert nothing_is_left()


def test_another_content_is_refused_with_both_digests(mirror: Path, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    glyphs.write(mirror, glyphs.Glyphs(background=4, evaluation=3, characters=5, seed=1))
    monkeypatch.setenv("OMNIGLOT_MIRROR", str(mirror))
    said = stage(fetch.app, fails=True)
    found = omniglot.content_digest(mirror / "images_background.zip")
    assert "images_background.zip" in said and found in said and omniglot.DIGESTS["images_background"] in said
    assert nothing_is_left()


def test_a_damaged_cache_object_does_not_pass(mirror: Path, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNIGLOT_MIRROR", str(mirror))
    stage(fetch.app)
    glyphs.write(Path("data/raw"), glyphs.Glyphs(background=4, evaluation=3, characters=5, seed=1))
    assert "the genuine archive's is" in stage(preprocess.app, fails=True)
    assert not Path("data/characters.npz").exists()


@pytest.mark.skipif(REAL is None, reason="OMNIGLOT_MIRROR is not set")
def test_genuine_omniglot(edit: Edit, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digests pinned in the code, the counts of the paper, and the published splits."""
    edit(data__source="omniglot")
    monkeypatch.setenv("OMNIGLOT_MIRROR", str(REAL))
    stage(fetch.app)
    stage(preprocess.app)
    with np.load("data/characters.npz") as arrays:
        data = omniglot.Characters(**{name: arrays[name] for name in omniglot.Characters._fields})
    data = data._replace(source=str(data.source))
    assert data.images.shape == (1623, 20, 16, 16)
    assert len(np.unique(data.alphabets[data.background])) == 30 and len(np.unique(data.alphabets[~data.background])) == 20
    sizes = {"vinyals": (1028, 172, 423), "characters": (1100, 100, 423)}
    for scheme, expected in sizes.items():
        classes = splits.divide(data, splits.Split(scheme=scheme, seed=1, validation=100, test=423))  # type: ignore[arg-type]
        assert tuple(len(part) for part in classes) == expected
        assert sorted(np.concatenate(classes)) == list(range(1623))
    # train and test of the Vinyals split share Gurmukhi alone
    train, _, test = splits.divide(data, splits.Split(scheme="vinyals", seed=1, validation=1, test=1))
    assert set(data.alphabets[train]) & set(data.alphabets[test]) == {"Gurmukhi"}
    train, validation, test = splits.divide(data, splits.Split(scheme="alphabets", seed=1, validation=100, test=1))
    assert len(train) + len(validation) == 964 and len(test) == 659

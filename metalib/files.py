"""Files that are there whole or not at all, and locks that end with their process, killed or not."""

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place beside `path` to write a file or a folder to; on success it replaces `path`, otherwise it is deleted.

    Each place has a name of its own, so that of two processes neither disturbs the other; the later one's work stays. It is on
    the disk before it replaces `path`. What a killed process left is removed by the next one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, glob.escape(path.name))
    with contextlib.ExitStack() as own:
        while True:
            folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
            own.callback(shutil.rmtree, folder, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):  # another process was faster and took it for a killed one's
                own.enter_context(locked(folder / ".lock"))
                break
        made = folder / path.name
        yield made
        for part in (made, *made.rglob("*")):
            _sync(part)
        while True:
            if made.is_dir() or path.is_dir():  # only a file is replaced at one stroke; a folder is moved away before
                with contextlib.suppress(FileNotFoundError):
                    os.replace(path, Path(tempfile.mkdtemp(dir=folder)) / path.name)
            try:
                os.replace(made, path)
                break
            except OSError as error:  # go on where another process has put something there since
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR):
                    raise
    _sync(path.parent)


def sweep(folder: Path, name: str = "*") -> None:
    """Remove what killed processes left in the folder of `whole`, for paths whose name has this pattern."""
    for left in folder.glob(f".{name}.*.part"):
        with contextlib.suppress(OSError), locked(left / ".lock", wait=None):
            shutil.rmtree(left)


def _sync(path: Path) -> None:
    """Have the file, or the folder's list of names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(path: Path, *, shared: bool = False, wait: Callable[[], object] | None = lambda: None) -> Iterator[None]:
    """Hold the lock that the file `path` stands for, alone or with others that share it; the file goes with the last one.

    Where another process holds it, `wait` is called and then waited; BlockingIOError where `wait` is None.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        with open(path, "a") as file:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                if wait is None:
                    raise
                wait()
                fcntl.flock(file, kind)
            if not _is(file.fileno(), path):  # the holder before removed it
                continue
            try:
                yield
            finally:
                with contextlib.suppress(BlockingIOError):  # still shared
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if _is(file.fileno(), path):
                        path.unlink()
            return


def _is(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False

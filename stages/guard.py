"""What a stage depends on must not change while it runs.

DVC hashes a stage's inputs after its command: what changed meanwhile would stand in dvc.lock as if the outputs had been made
from it. So every stage (`guarded`) notes what dvc.yaml declares for it when it begins, its code before Python loads it, and
`files.whole` compares (`check`) just before an output is put in its place.
"""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ParamSpec

from pathspec import GitIgnoreSpec
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

P = ParamSpec("P")
PIPELINE, PARAMS, IGNORED = Path("dvc.yaml"), Path("params.yaml"), Path(".dvcignore")


def digest(path: Path) -> str:
    """sha256 of a file's content, or that there is none."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return "missing"


# All our code when this module was loaded, which stages/__init__.py and studies/__init__.py do before they load any other.
CODE = {
    path: digest(path)
    for package in ("metalib", "stages", "studies")
    for path in (Path(__file__).parents[1] / package).rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}


class Inputs:
    """What dvc.yaml declares for a stage: `began`, a digest for each file and the value of each parameter at the start."""

    def __init__(self, stage: str, item: Mapping[str, object]):
        try:
            declared = YAML(typ="safe").load(PIPELINE)["stages"][stage]
        except FileNotFoundError:
            raise ValueError(f"{PIPELINE} is not in {Path.cwd()}; run from the project's root") from None
        except (YAMLError, KeyError, TypeError, OSError) as error:
            raise ValueError(f"{PIPELINE} has no stage {stage} that can be read ({' '.join(str(error).split())})") from None

        def filled_in(texts: list[str]) -> list[str]:
            """${item.x} and ${a.b} replaced by their values."""
            return [re.sub(r"\$\{([\w.]+)\}", lambda name: str(value(name[1])), text) for text in texts]

        def value(dotted: str) -> Any:
            return _value({"item": item} if dotted.startswith("item.") else _params(), dotted)

        self.deps, self.keys = filled_in(declared.get("deps", [])), filled_in(declared.get("params", []))
        self.name = "@".join(filter(None, [stage, "-".join(str(item[key]) for key in declared.get("matrix", {}))]))
        now = self.now()
        self.began = {name: CODE.get(Path(name).absolute(), state) for name, state in now.items()}

    def now(self) -> dict[str, str]:
        """The same at this moment."""
        found = {path.as_posix(): digest(path) for dep in self.deps for path in _files(Path(dep))}
        params = _params() if self.keys else {}
        for key in self.keys:
            found |= {f"{PARAMS}: {name}": value for name, value in leaves({key: _value(params, key)})}
        return found

    def check(self) -> None:
        """ValueError names what is not as it was at the start."""
        now = self.now()
        changed = sorted(name for name in self.began | now if self.began.get(name) != now.get(name))
        if changed:
            more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            raise ValueError(
                f"{changed[0]}{more} changed while {self.name} ran, so the result is not recorded: dvc.lock would say that it "
                "is of the new version; run it again"
            )


_running = list[Inputs]()


def guarded(stage: str) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """For a stage's main: its inputs are those of this stage in dvc.yaml, the arguments the items of its matrix."""

    def decorate(main: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(main)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
            _running.append(Inputs(stage, kwargs))
            try:
                main(*args, **kwargs)
                check()  # a change between two outputs
            finally:
                _running.pop()

        wrapped.stage = stage  # type: ignore[attr-defined]  # for the sentences of stages.command
        return wrapped

    return decorate


def check() -> None:
    """ValueError when an input of the stage that is running, if one is, has changed since it began."""
    if _running:
        _running[-1].check()


def began() -> dict[str, str]:
    """Digests of the inputs of the stage that is running, by path, as they were when it began."""
    return dict(_running[-1].began)


def leaves(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The innermost values of nested mappings by their dotted names, as text."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from ((f"{key}.{name}", text) for name, text in leaves(value))
        else:
            yield key, json.dumps(value, default=str)


def _files(path: Path) -> Iterator[Path]:
    """A file; of a folder, all that DVC does not ignore."""
    if not path.is_dir():
        yield path
        return
    ignored = GitIgnoreSpec.from_lines(IGNORED.read_text().splitlines() if IGNORED.exists() else [])
    yield from (file for file in sorted(path.rglob("*")) if file.is_file() and not ignored.match_file(file))


def _params() -> dict[str, Any]:
    """params.yaml; nothing where it cannot be read, which stages.params says in a sentence."""
    try:
        return _parsed(PARAMS.read_text())
    except (OSError, YAMLError, TypeError, ValueError):
        return {}


@functools.lru_cache(maxsize=1)  # every check reads the same again
def _parsed(text: str) -> dict[str, Any]:
    return dict(YAML(typ="safe").load(text))


def _value(values: Any, dotted: str) -> Any:
    """values["a"]["b"] for "a.b"; None where there is none."""
    for key in dotted.split("."):
        values = values.get(key) if isinstance(values, dict) else None
    return values

"""What all studies' computing shares: parts that are kept until all are finished, and the file of all that was found."""

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

import metalib
from metalib.checkpoint import Checkpoint, keep
from stages import files
from stages.command import commit, console, device_name, stoppable

T = TypeVar("T")


class Study:
    """What a study has computed: parts that are finished, and in the end all that its page is made of.

    Parts are kept until `write`, so that a study that was stopped goes on.
    """

    def __init__(self, name: str, values: Any, device: torch.device, checkpoint: Checkpoint):
        self.name, self.values, self.device, self.checkpoint = name, values, device, checkpoint
        state = checkpoint.load(torch.device("cpu")) or {"parts": {}, "seconds": 0.0}
        self.parts: dict[str, Any] = state["parts"]
        self.began = time.monotonic() - state["seconds"]
        if self.parts:
            say(name, f"goes on after {len(self.parts)} finished part(s)")

    def part(self, name: str, make: Callable[[Checkpoint], T]) -> T:
        """What `make` returns, which is called where this part has not been finished before.

        Numbers, strings, tensors on the CPU, and lists, tuples and dicts of them. `make` is given a checkpoint for a training,
        which serves until the part is finished.
        """
        path = self.checkpoint.path
        with keep(path.with_name(f"{path.stem}-{name}.pt"), lambda text: say(self.name, f"{name}: {text}")) as training:
            if name not in self.parts:  # otherwise its checkpoint may have been left, by a study that was killed just then
                self.parts[name] = make(training)
                self.checkpoint.save(parts=self.parts, seconds=time.monotonic() - self.began)
        found: T = self.parts[name]
        return found

    def write(self, **found: Any) -> None:
        """Write results/studies/<name>.json, all that the study's page needs: `found`, and the values it was computed with.

        reports/studies/<name>.run.json holds where and when.
        """
        here = {"device": self.device.type, "threads": torch.get_num_threads()}
        files.write_json(files.study_file(self.name), {"values": asdict(self.values), **here, **found})
        run = {
            "commit": commit(),
            "device": f"{self.device.type} ({device_name(self.device)})",
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "seconds": round(time.monotonic() - self.began),
        }
        files.write_json(Path(f"reports/studies/{self.name}.run.json"), run)
        say(self.name, f"{run['seconds']} s on {self.device}")


@contextmanager
def study(name: str, values: Any, device: torch.device, *facts: Any, inputs: Sequence[Path] = ()) -> Iterator[Study]:
    """The block in which a study is computed, and written at the end. Ctrl-C says in one line what the same command will do.

    Args:
        values, device, facts: what determines the result, beside code and `inputs`: the files that are read.
    """
    everything = [asdict(values), str(device), torch.__version__, torch.get_num_threads(), *facts]
    code = (Path(metalib.__path__[0]), Path(__file__).parent / name)
    path = files.checkpoint(f"studies/{name}-{files.fingerprint(everything, *inputs, *code)}")

    def again() -> str:
        return "goes on from there" if any(path.parent.glob(f"{path.stem}*.pt")) else "starts again"

    with stoppable(name, again), keep(path, lambda text: say(name, text)) as checkpoint:
        yield Study(name, values, device, checkpoint)


def say(name: str, text: str) -> None:
    console.print(f"{name}: {text}", highlight=False)

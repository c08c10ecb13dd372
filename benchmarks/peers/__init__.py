"""The same meta-gradients by other means.

A peer is a function (item, params, batch) -> call; the call returns the meta-gradient, named and shaped as ours. What a
training does once (modules, the kernels' layout) is done before the call. None: the peer lacks this learner; ImportError: it
is not installed.

All peers compute Conv4.forward with the mean head on kernels of PyTorch's own layout, (out, in, 3, 3), and the query loss.
"""

import importlib
from collections.abc import Callable
from importlib.metadata import version

from benchmarks.peers import jax, libraries, loop, vmap
from benchmarks.peers.network import Call
from benchmarks.work import Item
from metalib.types import Params, TaskBatch

PEERS: dict[str, Callable[[Item, Params, TaskBatch], Call | None]] = {
    "loop": loop.prepare,
    "learn2learn": libraries.learn2learn,
    "higher": libraries.higher,
    "TorchOpt": libraries.torchopt,
    "vmap": vmap.prepare,
    "JAX vmap": jax.by_vmap,
    "JAX map": jax.by_map,
}
PER_TASK = ("loop", "learn2learn", "higher", "TorchOpt")  # what a user has who does not batch tasks by hand


def installed() -> tuple[dict[str, str], dict[str, str]]:
    """Versions of the libraries that can be imported, and why the others cannot."""
    versions, absent = dict[str, str](), dict[str, str]()
    for name in ("learn2learn", "higher", "TorchOpt", "JAX"):
        try:
            if name == "learn2learn":
                libraries.learn2learn_maml()
                versions[name] = str(importlib.import_module("learn2learn._version").__version__)
            else:
                importlib.import_module(name.lower())
                versions[name] = version(name)
        except Exception as error:  # libraries older than what they depend on fail to import in many ways
            absent[name] = str(error).partition("\n")[0]
    return versions, absent

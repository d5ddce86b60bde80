"""Traced graphs of earlier compilations, `graphs/` in the cache folder.

A traced graph depends on a model's configuration, on the names, shapes and types of its weights, and on no
value of them: a model that is compiled again by another scheme, or another that was tuned from the same base,
need not be traced. The graph is the one that tracing would give. The folder is never needed: what cannot be
read or written is traced.

A file holds the graph's text, the names that its weights have in the checkpoint, and the tensors that tracing
made (rotary frequencies).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ..frontend.skeleton import model_class
from ..frontend.source import ModelSource
from ..frontend.trace import trace_source
from ..ir.core import Graph
from ..ir.parser import parse
from ..ir.printer import print_graph
from ..ir.weights import ArrayTensor, LazyTensor
from ..plugins.entries import registered
from ..runtime.cache_folder import cache_folder, fingerprint, trim, write_whole
from .extensions import GROUP

_LIMIT_BYTES = 64 << 20  # of all graphs
_LARGEST = 8 << 20  # of what tracing makes: masks of a long context would be larger
_PACKAGES = ("torch", "transformers", "numpy")
_SOURCES = ("frontend", "ir")


def trace_once(source: ModelSource) -> Graph:
    """`frontend.trace.trace_source`, or what an earlier compilation had from it."""
    key = _key(source)
    if key is None:
        return trace_source(source)
    path = cache_folder() / "graphs" / f"{key}.npz"
    try:
        return _read(path, source)
    except Exception:  # noqa: BLE001  (it is not there; or damaged, in any of an archive's parts)
        graph = trace_source(source)
    content = _content(graph, source)
    if content is not None:
        with contextlib.suppress(OSError):
            write_whole(path, content)
            trim(path.parent, path.suffix, _LIMIT_BYTES)
    return graph


def _key(source: ModelSource) -> str | None:
    """A hash of all that a traced graph depends on, its name aside; None where that cannot be told."""
    # A module of the user's may be anything; code of other packages may be changed at any time.
    if source.kind == "module" or source.config_only or registered(GROUP):
        return None
    module = model_class(source.config)[0].__module__
    code = getattr(sys.modules[module], "__file__", None)
    if not module.startswith("transformers.") or code is None:
        return None  # a class that somebody registered there
    held = source.weights  # before the configuration is read: making a module settles some of it
    config = source.config.to_dict()
    # Where it lies, and of a text part the whole model: neither changes what a class computes.
    for name in ("_name_or_path", "name_or_path", "whole"):
        config.pop(name, None)
    first: dict[int, str] = {}  # of tied weights, which are one object
    weights = [[name, one.dtype, *one.shape, first.setdefault(id(one), name)] for name, one in held.items()]
    described = [
        fingerprint(_SOURCES, _PACKAGES),
        hashlib.sha256(Path(code).read_bytes()).hexdigest(),  # one version may have many states
        source.kind,
        source.task,
        source.length,
        None if source.rope_scaling is None else source.rope_scaling.text,
        config,
        weights,
        _factors(source),
    ]
    text = json.dumps(described, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _factors(source: ModelSource) -> list[Any]:
    """What a GGUF file says of rotary embeddings by tensors: the values are in the graph."""
    if source.gguf is None:
        return []
    names = sorted(name for name in source.stored if name.startswith("rope_"))
    return [[name, source.stored[name].read().tolist()] for name in names]


def _content(graph: Graph, source: ModelSource) -> bytes | None:
    """A graph as bytes; None where it holds what its source and some small tensors do not give, or depends on
    the values of weights.
    """
    if graph.facts.get("of_values"):
        return None
    names = {id(data): name for name, data in reversed(list(source.weights.items()))}
    taken: dict[str, str] = {}
    made: dict[str, np.ndarray[Any, Any]] = {}
    for name, value in graph.weights.items():
        data = value.weight
        if id(data) in names:
            taken[name] = names[id(data)]
        elif isinstance(data, ArrayTensor):
            made[name] = data.read()
        else:
            return None
    if sum(array.nbytes for array in made.values()) > _LARGEST:
        return None
    index = json.dumps({"graph": print_graph(graph), "taken": taken, "made": list(made)})
    written = io.BytesIO()
    np.savez(written, np.frombuffer(index.encode(), np.uint8), *made.values())
    return written.getvalue()


def _read(path: Path, source: ModelSource) -> Graph:
    """The graph of a file, with the weights of `source`."""
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
        first, *arrays = (file[name] for name in file.files)
    index = json.loads(first.tobytes())
    weights: dict[str, LazyTensor] = {graph: source.weights[name] for graph, name in index["taken"].items()}
    for name, array in zip(index["made"], arrays, strict=True):
        weights[name] = ArrayTensor(array, f"{source.name}:{name}")
    graph = parse(index["graph"], weights)
    graph.name = source.name
    os.utime(path)
    return graph

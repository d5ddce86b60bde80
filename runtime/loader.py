"""From an artifact on disk to an `LLM` that answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from ..codegen.artifact import Artifact
from ..ir.errors import ArtifactError, InputError
from .adapter_places import BaseWeights
from .adapters import check_places
from .chat_template import template_of
from .drafters import DraftModel
from .engine import Engine, EngineOptions, ModelFacts
from .executor import MakePlaces, open_executor
from .executor.rotation import read_rotary
from .late_scaling import LateScaling
from .llm import LLM
from .prefix_pages import attach
from .tokenizer import Tokenizer
from .verified import verify_once

Verify = Literal["once", "full", "size"]


def load(
    path: str | os.PathLike[str],
    *,
    target: str | None = None,
    isa: str | None = None,
    threads: int | None = None,
    context: int | None = None,
    kv_cache_bytes: int | None = None,
    kv_tokens: int | None = None,
    max_batch_tokens: int = 512,
    max_sequences: int = 64,
    prefix_cache: bool = True,
    prefix_cache_dir: str | os.PathLike[str] | None = None,
    prefix_cache_bytes: int | None = None,
    speculate: int = 0,
    draft: str | os.PathLike[str] | None = None,
    max_waiting: int | None = None,
    sinks: int | None = None,
    verify: Verify = "once",
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    adapter: str | os.PathLike[str] | None = None,
    places: MakePlaces | None = None,
    base: Callable[[Artifact], BaseWeights] | None = None,
) -> LLM:
    """Open an artifact, choose its target for this machine, and size the KV cache.

    Args:
        path: the NAME.llmc folder.
        target: name of a target; None takes the best that the artifact has.
        isa: ISA level of the kernels; None takes the best that this CPU runs.
        threads: to compute with; None takes one a physical core.
        context: tokens of a sequence at most; None takes the model's context length.
        kv_cache_bytes, kv_tokens: size of the KV cache; None takes it from the free memory.
        max_batch_tokens: tokens computed in a step at most.
        max_sequences: sequences that run at the same time at most.
        prefix_cache: keep pages for prompts that begin in the same way.
        prefix_cache_dir: a folder to keep them in beyond this process, of at most `prefix_cache_bytes`
            (10 GiB); several processes and models may use one.
        speculate: tokens guessed at a time at most, from what the text repeats, or from `draft`; answers do
            not depend on it, only their speed does.
        draft: an artifact of a smaller model with the same tokenizer, which then guesses.
        max_waiting: unfinished requests accepted at a time; None for any number.
        sinks: let answers go on beyond the context: whenever the cache of a sequence is full, the older half
            of its tokens is evicted but for this many at the beginning (rounded up to whole pages), and
            positions are those within the cache (docs/long-context.md). Texts that are scored (`logits`,
            `token_logprobs`) may be longer too; prompts may not. None: answers end there.
        verify: "once" checks the sha256 of every file where that was not done on this machine before, or a
            file has changed since; "full" checks it anyway, "size" only that they are there and complete.
        adapters: folders of LoRA adapters (PEFT), or their GGUF files, by the names that requests choose
            them by (`generate(…, adapter="name")`); {} for none yet (`LLM.load_adapter`).
        adapter: the folder or file of one with which everything is answered that names none.
        places: makes kernels that take adapters, where the artifact's own do not (it was compiled without
            --adapters). `llmc.load` gives it.
        base: reads the artifact's weights for adapters with magnitudes (DoRA) or trained biases. `llmc.load`
            gives it where TVM is installed.

    Raises ArtifactError where the artifact is damaged or does not suit this machine, InputError where an
    option is impossible.
    """
    artifact, tokenizer = _open(path, verify)
    adapted = adapters is not None or adapter is not None
    wanted = places if adapted else None
    executor = open_executor(artifact, target, threads=threads, isa=isa, adapters=wanted)
    if adapted:
        check_places(artifact, executor)
    if artifact.kind == "function":
        return LLM(executor, artifact=artifact)
    options = EngineOptions(
        max_batch_tokens=max_batch_tokens,
        max_sequences=max_sequences,
        context=context,
        kv_tokens=kv_tokens,
        kv_cache_bytes=kv_cache_bytes,
        prefix_cache=prefix_cache,
        speculate=speculate,
        sinks=sinks,
    )
    engine = Engine(executor, tokenizer, _facts(artifact, sinks), options)
    engine.adapters.gguf_rows = lambda: artifact.gguf_rows
    engine.adapters.stored_modules = lambda: artifact.stored_modules
    engine.adapters.base = None if base is None else base(artifact)
    if prefix_cache_dir is not None:
        if not prefix_cache:
            raise InputError("prefix_cache_dir without prefix_cache", remedy="leave one of both out")
        attach(engine, artifact, Path(prefix_cache_dir), prefix_cache_bytes)
    if draft is not None:
        guesser = load(draft, threads=threads, context=engine.context, max_sequences=max_sequences)
        engine.speculator.drafter = DraftModel(guesser.engine.engine, executor.vocab_size)
    for name, folder in (adapters or {}).items():
        engine.adapters.put(engine.adapters.read(name, folder))
    if adapter is not None:
        loaded = engine.adapters.put(engine.adapters.read(_adapter_name(adapter, adapters or {}), adapter))
        engine.adapters.default = loaded.name
    return LLM(
        executor,
        artifact=artifact,
        engine=engine,
        template=template_of(artifact),
        defaults=artifact.model.get("generation"),
        max_waiting=max_waiting,
    )


def _adapter_name(folder: str | os.PathLike[str], taken: Mapping[str, Any]) -> str:
    name = Path(folder).resolve().name
    return name if name not in taken else f"{name} (default)"


def _open(path: str | os.PathLike[str], verify: Verify) -> tuple[Artifact, Tokenizer | None]:
    """The artifact and its tokenizer, which is parsed while the hashes are computed; kernels wait for the
    hashes.
    """
    if verify not in ("once", "full", "size"):
        raise InputError(f"verify is {verify!r}", remedy='use "once", "full" or "size"')
    artifact = Artifact.open(path, "size")
    if verify == "size":
        return artifact, _tokenizer(artifact)
    with ThreadPoolExecutor(max_workers=1) as pool:
        verified = pool.submit(verify_once, artifact) if verify == "once" else pool.submit(artifact.verify)
        try:
            tokenizer = _tokenizer(artifact)
        finally:
            verified.result()  # a wrong hash explains whatever else went wrong
    return artifact, tokenizer


def _facts(artifact: Artifact, sinks: int | None) -> ModelFacts:
    model = artifact.model
    if sinks is not None and artifact.kind != "causal_lm":
        raise InputError(
            f"{artifact.root} is no language model that generates: nothing is evicted from its cache",
            remedy="leave sinks out",
        )
    moves_keys = sinks is None or any(rotary is not None for rotary in read_rotary(artifact))
    try:
        eos = tuple(int(token) for token in model.get("eos_token_ids") or ())
        late = LateScaling.read(model)
        return ModelFacts(int(model["vocab_size"]), int(model["context_length"]), eos, moves_keys, late)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{artifact.root}: the manifest's model facts are incomplete ({error})",
            remedy="compile the model again",
        ) from None


def _entry(artifact: Artifact) -> Mapping[str, Any]:
    return artifact.manifest.get("tokenizer") or {}


def _tokenizer(artifact: Artifact) -> Tokenizer | None:
    rel = _entry(artifact).get("path")
    return Tokenizer.from_file(artifact.path(rel)) if rel is not None else None

"""From an artifact on disk to an `LLM` that answers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from ..codegen.artifact import Artifact
from ..ir.errors import ArtifactError, InputError
from .chat_template import ChatTemplate
from .drafters import DraftModel
from .engine import Engine, EngineOptions, ModelFacts
from .executor import open_executor
from .llm import LLM
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
    speculate: int = 0,
    draft: str | os.PathLike[str] | None = None,
    max_waiting: int | None = None,
    verify: Verify = "once",
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
        speculate: tokens guessed at a time at most, from what the text repeats, or from `draft`; answers do
            not depend on it, only their speed does.
        draft: an artifact of a smaller model with the same tokenizer, which then guesses.
        max_waiting: unfinished requests accepted at a time; None for any number.
        verify: "once" checks the sha256 of every file where that was not done on this machine before, or a
            file has changed since; "full" checks it anyway, "size" only that they are there and complete.

    Raises ArtifactError where the artifact is damaged or does not suit this machine, InputError where an
    option is impossible.
    """
    artifact, tokenizer = _open(path, verify)
    executor = open_executor(artifact, target, threads=threads, isa=isa)
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
    )
    engine = Engine(executor, tokenizer, _facts(artifact), options)
    if draft is not None:
        guesser = load(draft, threads=threads, context=engine.context, max_sequences=max_sequences)
        engine.speculator.drafter = DraftModel(guesser.engine.engine, executor.vocab_size)
    return LLM(
        executor,
        artifact=artifact,
        engine=engine,
        template=_template(artifact),
        defaults=artifact.model.get("generation"),
        max_waiting=max_waiting,
    )


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


def _facts(artifact: Artifact) -> ModelFacts:
    model = artifact.model
    try:
        eos = tuple(int(token) for token in model.get("eos_token_ids") or ())
        return ModelFacts(int(model["vocab_size"]), int(model["context_length"]), eos)
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


def _template(artifact: Artifact) -> ChatTemplate | None:
    rel = _entry(artifact).get("chat_template")
    if rel is None:
        return None
    specials = _entry(artifact).get("special_tokens") or {}
    return ChatTemplate(artifact.read_text(rel), specials, name=rel)

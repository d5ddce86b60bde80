"""How well passages answer a question, by a model that reads both together.

    reranker = open_reranker("cross-encoder.llmc")     # or any language model's artifact
    order = np.argsort(-reranker.scores("…", passages), kind="stable")

Two ways. A cross-encoder was trained for this, and is the better choice for its size. Any language model
scores by likelihood: how probable it finds the question behind the passage (Sachan et al. 2022, "Improving
Passage Retrieval with Zero-Shot Question Generation"). It is slow on a processor: the whole model reads every
passage. A small one ranks no better than an embedder; mixed half and half with what ranked before, each
scaled to 0…1 over the candidates (`share`), it gains a little. Asked for yes or no, a small model ranks far
worse, so that is not offered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ...codegen.artifact import Artifact
from ...ir.errors import InputError
from ..continuations import ContinuationScorer, Request
from ..encoder import Rows, check_pairs, relevance, scored_row, token_types
from ..llm import LLM
from ..loader import load
from ..text_encoding import TextTokenizer, longest_text
from .embedder_source import Say, named_artifact, say_on_stderr
from .encoder import EncoderSteps, open_artifact
from .neutral import neutralise

_QUESTION_TOKENS = 256
"""Tokens of a question that a language model is asked for: what is behind them is left out."""

_PASSAGE_TOKENS = 512
"""Tokens of a passage that a language model reads."""

_KV_TOKENS = 8192
"""Cache of a language model that ranks: passages of a step, and what they begin with."""


class Reranker(Protocol):
    """Scores of passages for a question. Safe to use from several threads."""

    @property
    def name(self) -> str:
        """The model's."""
        ...

    @property
    def share(self) -> float:
        """How much its order counts beside that of the search, 0 … 1; both are scaled to 0…1 for it."""
        ...

    def scores(self, question: str, passages: Sequence[str]) -> np.ndarray:
        """[N] float32: higher is better; only scores of one question can be compared. A passage's score does
        not depend on the others. Any string will do; what is too long is cut.
        """
        ...

    def close(self) -> None: ...


class CrossEncoder:
    """A classifier of pairs of texts: its one score, or by how much its second label beats the first."""

    share = 1.0

    def __init__(self, artifact: Artifact, *, threads: int | None = None) -> None:
        check_pairs(artifact)
        longest = longest_text(artifact)
        self.name = str(artifact.model.get("name") or artifact.root.stem)
        self._types = token_types(artifact.model)
        self._row: Rows = scored_row(artifact.model)
        self._tokenizer = TextTokenizer(artifact, longest)
        self._steps = EncoderSteps(artifact, longest=longest, threads=threads)

    def scores(self, question: str, passages: Sequence[str]) -> np.ndarray:
        """[N] float32: logits, so that a sigmoid makes probabilities of them."""
        pairs = self._tokenizer.encode_pairs(question, passages) if passages else []
        ids, types = [ids for ids, _ in pairs], [kinds for _, kinds in pairs]
        found = self._steps.run(
            [len(one) for one in ids],
            lambda whole, part: relevance(
                whole.step(ids[part], self._row, types[part] if self._types else None)
            ),
        )
        return np.concatenate([scores for _, scores in found]) if found else np.zeros(0, np.float32)

    def close(self) -> None:
        """Give the kernels' memory back."""
        self._steps.close()


class LikelihoodReranker:
    """A language model as a reranker: log P(question | passage), the mean over the question's tokens.

    The passage stands in a message of the user where the model has a chat template; tokens that steer the
    model are broken up in it.
    """

    share = 0.5
    """Alone, a small model would replace an order that is better than its own; see above."""

    def __init__(self, llm: LLM, *, owned: bool = False) -> None:
        """`owned`: whether `close` closes the model too."""
        if llm.kind != "causal_lm":
            raise InputError(f"an artifact of kind {llm.kind!r} writes no questions", remedy="give another")
        self._llm, self._owned = llm, owned
        artifact = llm.artifact
        self.name = str(artifact.model.get("name") or "") if artifact is not None else ""

    def scores(self, question: str, passages: Sequence[str]) -> np.ndarray:
        """[N] float32 in nats a token, at most 0."""
        target = self._leading(question, min(_QUESTION_TOKENS, self._llm.context_length // 4))
        if not target or not passages:
            return np.zeros(len(passages), np.float32)
        requests = [Request(self._context(passage), [target]) for passage in passages]
        with self._llm.engine.paused() as engine:
            sums = ContinuationScorer(engine).score(requests)
        return np.array([total for (total,) in sums], np.float32) / np.float32(len(target))

    def _context(self, passage: str) -> list[int]:
        """Ids of the prompt that a question is to follow. What comes first in it is computed once for all."""
        llm = self._llm
        room = min(_PASSAGE_TOKENS, llm.context_length // 2)
        text = llm.decode(self._leading(passage, room), skip_special_tokens=False)
        asked = f"Passage: {text}\n\nPlease write a question based on this passage."
        if llm.template is not None:
            return llm.prompt_ids([{"role": "user", "content": asked}])
        return llm.encode(f"{asked}\nQuestion:")

    def _leading(self, text: str, count: int) -> list[int]:
        """The first ids of a text as it may stand in a prompt."""
        # 16 characters a token are more than any text has that is worth reading.
        whole = neutralise(text[: 16 * count], self._llm.tokenizer).strip()
        return self._llm.encode(whole, add_special_tokens=False)[:count]

    def close(self) -> None:
        """Close the model, where this opened it."""
        if self._owned:
            self._llm.close()


def open_reranker(
    spec: str | None, *, threads: int | None = None, say: Say = say_on_stderr
) -> Reranker | None:
    """The reranker that `spec` names; None for "none" or None.

    Args:
        spec: an artifact's folder, or a Hugging Face folder or hub id, which is compiled once (int8) into the
            user's cache: a cross-encoder, or a language model.
        threads: to compute with; None for one a physical core.
        say: gets what the user should know of a compilation, which takes a while.

    Raises InputError where what was named cannot be had, or ranks nothing.
    """
    if spec is None or spec in ("", "none"):
        return None
    artifact = open_artifact(named_artifact(spec, say))
    if artifact.kind == "classifier":
        return CrossEncoder(artifact, threads=threads)
    if artifact.kind == "causal_lm":
        return LikelihoodReranker(load(artifact.root, threads=threads, kv_tokens=_KV_TOKENS), owned=True)
    raise InputError(
        f"{artifact.root} is an artifact of kind {artifact.kind!r}, which reads no pairs",
        remedy="give a cross-encoder or a language model",
    )

"""A question and a passage as messages of the roles "query" and "document", which the chat template of a
reranker that was made of a language model puts into its prompt (sentence-transformers' CrossEncoder).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from ..codegen.artifact import Artifact
from ..ir.errors import ArtifactError, InputError
from .chat_template import ChatTemplate, template_of

_FILLERS = ("alpha", "beta 7")
"""Two texts that have no end in common: what prompts of them end with is the template's."""


def _read(facts: Any, artifact: Artifact) -> tuple[str | None, bool, dict[str, Any]]:
    """System message, whether contents are lists of parts, and the template's variables, of a manifest."""
    if isinstance(facts, dict):
        system, variables = facts.get("system"), facts.get("variables", {})
        texts = isinstance(variables, dict) and all(isinstance(name, str) for name in variables)
        if texts and isinstance(system, str | None):
            return system, facts.get("parts") is True, variables
    raise ArtifactError(f"{artifact.root} has other facts on pairs", remedy="compile the model again")


class PairPrompts:
    """Token ids of pairs by an artifact's chat template. Safe for several threads."""

    def __init__(self, artifact: Artifact, tokenizer: Tokenizer, longest: int) -> None:
        """`tokenizer` truncates at `longest`, the tokens of a prompt at most.

        Raises InputError where the template is missing, leaves one of the texts out, or leaves no room.
        """
        facts = artifact.model.get("pairs")
        template = template_of(artifact)
        if template is None:
            raise InputError(f"{artifact.root} has no chat template", remedy="compile the model again")
        self._template: ChatTemplate = template
        self._tokenizer = tokenizer
        self._whole = Tokenizer.from_str(tokenizer.to_str())
        self._whole.no_truncation()
        self._system, self._parts, self._variables = _read(facts, artifact)
        # Others than special ones are spaces as well as marks: those that look like marks are broken up.
        added = tokenizer.get_added_tokens_decoder().values()
        marks = {token.content for token in added if token.special or token.content[:1] in "<[|"}
        texts = sorted((one for one in marks if len(one) > 1), key=len, reverse=True)
        self._specials = re.compile("|".join(map(re.escape, texts))) if texts else None
        first, second = _FILLERS
        base, *others = (self._render(*pair) for pair in ((first, first), (second, first), (first, second)))
        if base in others:
            raise InputError(
                f"the chat template of {artifact.root} leaves out the question or the passage",
                remedy="give a model whose template has the roles query and document",
            )
        ends = [self._ids(self._render(text, text))[::-1] for text in _FILLERS]
        same = itertools.takewhile(lambda both: both[0] == both[1], zip(*ends, strict=False))
        self._suffix = [one for one, _ in same][::-1]
        bare = len(self._ids(self._render("", "")))
        if bare >= longest:
            raise InputError(
                f"the chat template of {artifact.root} takes {bare} tokens, and a prompt may have {longest}",
                remedy="give a model whose max_seq_length leaves room for a question and a passage",
            )

    def encode(self, first: str, second: Sequence[str]) -> list[list[int]]:
        """The ids of the prompts of one text with each of others. One that is too long loses what stands
        before the end of the template, where the model is asked.
        """
        first = self._broken(first)
        prompts = [self._render(first, self._broken(text)) for text in second]
        found: list[list[int]] = []
        for one in self._tokenizer.encode_batch(prompts, add_special_tokens=False):
            ids = list(one.ids)
            if one.overflowing and self._suffix:
                ids[-len(self._suffix) :] = self._suffix[-len(ids) :]
            found.append(ids)
        return found

    def _ids(self, text: str) -> list[int]:
        return self._whole.encode(text, add_special_tokens=False).ids

    def _render(self, query: str, document: str) -> str:
        said = [("query", query), ("document", document)]
        if self._system is not None:
            said.insert(0, ("system", self._system))
        messages = [{"role": role, "content": self._content(text)} for role, text in said]
        variables: dict[str, Any] = {"add_generation_prompt": False, **self._variables}
        return self._template.render(messages, **variables)

    def _content(self, text: str) -> Any:
        return [{"type": "text", "text": text}] if self._parts else text

    def _broken(self, text: str) -> str:
        """A text without the model's special tokens, which would be read as such: a space breaks them up."""
        return text if self._specials is None else self._specials.sub(lambda m: f"{m[0][0]} {m[0][1:]}", text)

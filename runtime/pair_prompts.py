"""A question and a passage as messages of the roles "query" and "document", which the chat template of a
reranker that was made of a language model puts into its prompt (sentence-transformers' CrossEncoder).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from ..codegen.artifact import Artifact
from ..ir.errors import InputError
from .chat_template import ChatTemplate, template_of

_FILLERS = ("alpha", "beta 7")
"""Two texts that have no end in common: what prompts of them end with is the template's."""


class PairPrompts:
    """Token ids of pairs by an artifact's chat template. Safe for several threads."""

    def __init__(self, artifact: Artifact, tokenizer: Tokenizer, facts: Mapping[str, Any]) -> None:
        """`tokenizer`: truncates at the longest prompt; `facts`: `pairs` of the manifest.

        Raises InputError where the template is missing, or leaves one of the texts out.
        """
        template = template_of(artifact)
        if template is None:
            raise InputError(f"{artifact.root} has no chat template", remedy="compile the model again")
        self._template: ChatTemplate = template
        self._tokenizer = tokenizer
        self._system: str | None = facts.get("system")
        self._parts: bool = facts.get("parts") is True
        self._variables: dict[str, Any] = dict(facts.get("variables") or {})
        added = (token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special)
        texts = sorted((one for one in added if len(one) > 1), key=len, reverse=True)
        self._specials = re.compile("|".join(map(re.escape, texts))) if texts else None
        first, second = _FILLERS
        base, *others = (self._render(*pair) for pair in ((first, first), (second, first), (first, second)))
        if base in others:
            raise InputError(
                f"the chat template of {artifact.root} leaves out the question or the passage",
                remedy="give a model whose template has the roles query and document",
            )
        ends = (self._ids(self._render(text, text))[::-1] for text in _FILLERS)
        same = itertools.takewhile(lambda both: both[0] == both[1], zip(*ends, strict=False))
        self._suffix = [one for one, _ in same][::-1]

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
        return self._tokenizer.encode(text, add_special_tokens=False).ids

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

"""Samplers that a request names: code of other packages between the model's logits and the choice of a token.

    @dataclass(frozen=True)
    class NoRepeat(Sampler):
        '''Never the same token twice in a row.'''
        name = "no-repeat"
        penalty: float = 5.0

        def adjust(self, logits, context):
            logits[context.tokens[-1]] -= self.penalty
            return logits

A package names the class under the entry-point group `llmc.samplers`; a request asks for it by
`"llmc_sampler": {"name": "no-repeat", "penalty": 2.0}`, the command line by `--sampler no-repeat{penalty=2}`.
It runs after penalties and `logit_bias` and before grammar, `min_tokens`, temperature, top_k, top_p and
min_p: a grammar holds whatever a sampler does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, ClassVar

import numpy as np

from ..ir.errors import CompileError, InputError, LlmcError
from ..plugins.entries import Registered, blaming, package_of, registered
from ..plugins.options import make_from_text, make_from_values, split_spec
from .sequence import Sequence
from .tokenizer import Tokenizer

GROUP = "llmc.samplers"


@dataclass(frozen=True, slots=True)
class SamplerContext:
    """What a sampler may look at."""

    tokens: np.ndarray
    """[n] int32: the sequence so far, prompt and generated tokens."""
    prompt_length: int
    """Of those, how many are the prompt."""
    choice: int = 0
    """Number of the choice, where a request wants several answers."""
    tokenizer: Tokenizer | None = None

    @property
    def generated(self) -> np.ndarray:
        """The tokens behind the prompt."""
        return self.tokens[self.prompt_length :]


@dataclass(frozen=True)
class Sampler(ABC):
    """Base of all: a frozen dataclass whose fields (str, int, float or bool, each with a default) are the
    options.

    It must be a function of its arguments alone: sequences are preempted, computed again and batched with
    others, and a seeded request gives the same tokens every time.
    """

    name: ClassVar[str] = ""

    @abstractmethod
    def adjust(self, logits: np.ndarray, context: SamplerContext) -> np.ndarray:
        """The logits to choose from.

        Args:
            logits: [vocab] float32, of one sequence; may be changed in place.
        Returns:
            [vocab] float32; -inf for tokens that are out of the question, NaN never.
        Raises:
            whatever it likes: that ends this request with an error that names the sampler, and no other one.
        """

    def __str__(self) -> str:
        options = ",".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))
        return self.name + (f"{{{options}}}" if options else "")


class SequenceSampler:
    """A sampler at work on one sequence."""

    __slots__ = ("_choice", "_sampler", "_sequence", "_tokenizer", "failure")

    def __init__(
        self, sampler: Sampler, sequence: Sequence, tokenizer: Tokenizer | None, choice: int = 0
    ) -> None:
        self._sampler, self._sequence, self._tokenizer = sampler, sequence, tokenizer
        self._choice = choice
        self.failure: LlmcError | None = None

    def for_choice(self, sequence: Sequence, choice: int) -> SequenceSampler:
        """The same for another choice of the request."""
        return SequenceSampler(self._sampler, sequence, self._tokenizer, choice)

    def apply(self, logits: np.ndarray) -> None:
        """Change one row [vocab] in place. Where the sampler fails, `failure` says how, and the row is NaN.

        A row that holds a NaN is left as it is: the model is broken, and that is what is said of it.
        """
        if np.isnan(logits.max()):
            return
        what = f"sampler {self._sampler.name}"
        tokens: array[int] = self._sequence.tokens
        context = SamplerContext(
            np.array(tokens, np.int32), self._sequence.num_prompt, self._choice, self._tokenizer
        )
        try:
            with blaming(what, self._sampler):
                found: Any = self._sampler.adjust(logits, context)
            self._check(found, logits)
        except Exception as error:  # noqa: BLE001  (one request's sampler must not end the others)
            self.failure = error if isinstance(error, LlmcError) else LlmcError(f"{what} failed: {error!r}")
            logits.fill(np.nan)
            return
        if found is not logits:
            logits[:] = found

    def _check(self, found: Any, logits: np.ndarray) -> None:
        shown = ""
        if not isinstance(found, np.ndarray) or found.dtype != np.float32 or found.shape != logits.shape:
            dtype, shape = getattr(found, "dtype", type(found).__name__), getattr(found, "shape", ())
            shown = f"gave {dtype}{list(shape)}, not float32{list(logits.shape)}"
        elif np.isnan(highest := found.max()):
            shown = "gave NaN among its logits"
        elif not np.isfinite(highest):
            shown = "left no token to choose from" if highest < 0 else "gave an infinite logit"
        if shown:
            package = package_of(self._sampler) or "llmc"
            raise CompileError(
                f"sampler {self._sampler.name} of package {package} {shown}",
                remedy=f"report it to the authors of {package}, or do without it",
            )


def make_sampler(text: str) -> Sampler | None:
    """A sampler from `NAME` or `NAME{option=value,…}`; "none" is None. InputError lists what exists."""
    name, options = split_spec(text, "sampler")
    if name == "none" and not options:
        return None
    return make_from_text(_find(name), f"sampler {name}", options)


def sampler_of_request(given: Mapping[str, Any]) -> Sampler | None:
    """A sampler from `{"name": …, option: value, …}`; the name "none" is None."""
    name = given.get("name")
    if not isinstance(name, str):
        raise InputError("llmc_sampler has no name", remedy='give {"name": "…", and its options}')
    options = {key: value for key, value in given.items() if key != "name"}
    if name == "none" and not options:
        return None
    return make_from_values(_find(name), f"sampler {name}", options)


def _find(name: str) -> type[Sampler]:
    known = registered(GROUP)
    if name not in known:
        listed = ", ".join(known) or "none is installed"
        raise InputError(f"no sampler is named {name[:80]!r}", remedy=f"known: {listed}")
    return load_sampler(known[name])


@cache
def load_sampler(item: Registered) -> type[Sampler]:
    """The class of an entry. Raises InputError, naming its package. Kept, for each request asks, and looking
    for the package's version reads its files.
    """
    kind: type[Sampler] = item.load_class(Sampler)
    if kind.name != item.name:
        raise item.wrong(f"is a sampler that calls itself {kind.name!r}")
    return kind

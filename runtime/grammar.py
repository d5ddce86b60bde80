"""Grammars that an answer must match: JSON schemas, regular expressions, and Lark.

The automata are llguidance's. What is ours: which schemas are refused because they would be obeyed by half
only (json_schema/), the bounds on what a stranger may ask to be compiled, and masks that are made while the
model computes. Nothing is imported from llguidance before the first grammar is compiled.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import blake2b
from math import prod
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..ir.errors import LlmcError
from .grammar_trial import STACK_BYTES, try_grammar
from .json_schema import CheckedSchema, GrammarError, check_schema
from .json_schema.patterns import PatternError, translated
from .lark import rewrite_json_blocks
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

__all__ = ["Grammar", "GrammarCompiler", "GrammarError", "MaskWorker", "Matcher"]

MAX_SOURCE_BYTES = 1 << 18
"""Length of a schema as compact JSON, of a regular expression, or of Lark source, at most."""

# A space, or a line break with its indentation: json.dumps writes both forms, and so do models. Never more,
# for a model that has lost its way writes spaces until its tokens are spent. Compact JSON has none and is
# allowed too.
_WHITESPACE = r" |\n[ \t]{0,40}"
# A key written with \u escapes is a second spelling of a name that the schema speaks of, and would pass as
# one that it does not. Where that may be, the price is that control characters other than \b \f \n \r \t
# cannot be written.
_ESCAPES = 'nrbtf\\"u'
_PLAIN_ESCAPES = 'nrbtf\\"'
# A state is a kilobyte or two, 14,000 units of lexer fuel are a millisecond; Unicode's classes over a large
# vocabulary need several. An object with 1,000 optional properties makes rows of 4,000 items.
_LIMITS = {"step_lexer_fuel": 200_000, "max_lexer_states": 20_000, "max_items_in_row": 5_000}

_CACHED = 64
_SLOWEST_MASK = 1.0
"""Seconds of work after which a grammar is given up, for all other requests wait for its mask."""
_PLAIN_LARK = 4096
"""Length of Lark source, without its schemas, that is compiled without a trial."""

T = TypeVar("T")


class Grammar:
    """A grammar that is checked and compiled. Immutable; may be shared by requests and threads."""

    def __init__(self, first: LLMatcher, vocab_size: int) -> None:
        self._first = first
        self._lock = threading.Lock()
        self.vocab_size = vocab_size

    def start(self) -> Matcher:
        """The state before the first token of an answer."""
        with self._lock:
            return Matcher(self._first.deep_copy())


class Matcher:
    """How far an answer has come in its grammar. Belongs to one answer and one thread at a time."""

    __slots__ = ("_is_slow", "_state")

    def __init__(self, state: LLMatcher) -> None:
        self._state = state
        self._is_slow = False

    def fork(self) -> Matcher:
        """The same state, to go on by itself."""
        return Matcher(self._state.deep_copy())

    def fill(self, row: np.ndarray) -> None:
        """Write which tokens may follow: [ceil(vocab / 32)] int32, a bit a token, lowest first.

        Python's lock is free meanwhile.
        """
        began = time.thread_time()
        self._state.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        self._is_slow |= time.thread_time() - began > _SLOWEST_MASK

    def accept(self, token: int) -> None:
        """Go on by a token. One that is not allowed sets `error`."""
        self._state.consume_token(token)

    def forced(self) -> list[int]:
        """Tokens that follow in any case, as the tokenizer would split their text; often none."""
        return self._state.compute_ff_tokens()

    @property
    def is_finished(self) -> bool:
        """Whether nothing but the end of the text may follow, or the end was accepted."""
        return self._state.is_stopped() and not self._state.is_error()

    @property
    def may_end(self) -> bool:
        """Whether what was accepted so far is a whole answer."""
        return self._state.is_accepting() and not self._state.is_error()

    @property
    def error(self) -> LlmcError | None:
        """Why it cannot go on: a token that was not allowed, or a bound on states or time was reached."""
        if self._is_slow:
            return LlmcError("the grammar failed: it takes too long to follow", remedy="simplify the grammar")
        if not self._state.is_error():
            return None
        return LlmcError(
            f"the grammar failed: {_first_line(self._state.get_error())}", remedy="simplify the grammar"
        )


class GrammarCompiler:
    """Compiles grammars for the tokens of one model. Safe to use from several threads.

    The last grammars are kept, for a server sees the same schema with every request.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """`vocab_size`: columns of the model's logits, which may be more than the tokenizer has ids.

        Takes no time: the tokenizer's table is made with the first grammar (about a second).
        """
        self._source = tokenizer
        self._vocab_size = vocab_size
        self._eos = [token for token in eos_token_ids if token < vocab_size]
        self._lock = threading.Lock()
        self._table_lock = threading.Lock()
        self._table: LLTokenizer | None = None
        self._cache: OrderedDict[bytes, Grammar] = OrderedDict()

    def json_schema(self, schema: Mapping[str, Any] | bool) -> Grammar:
        """JSON that is valid against a schema (draft 4 to 2020-12).

        Properties come in the schema's order; whitespace is a space or a line break with indentation. Raises
        GrammarError where the schema is wrong, too large, or cannot be honoured; its `keyword` says by what.
        """
        checked = check_schema(schema)
        text = _with_options(checked)
        _check_length("the schema", text)
        return self._compile("json", text, needs_trial=checked.is_large)

    def json_object(self) -> Grammar:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def regex(self, pattern: str) -> Grammar:
        """Text that a regular expression (ECMA-262, no look-around) matches from beginning to end."""
        try:
            text = translated(pattern, is_search=False)
        except PatternError as error:
            raise GrammarError(error.message, remedy=error.remedy, keyword="pattern") from None
        return self._compile("regex", text)

    def lark(self, source: str) -> Grammar:
        """Text of a grammar in llguidance's dialect of Lark.

        The schemas of its `%json` blocks are held to what `json_schema` takes. Raises GrammarError.
        """
        _check_length("the grammar", source)
        schemas: list[CheckedSchema] = []

        def rewrite(schema: Mapping[str, Any] | bool) -> str:
            checked = check_schema(schema)
            schemas.append(checked)
            return _with_options(checked)

        text = rewrite_json_blocks(source, rewrite)
        _check_length("the grammar", text)
        plain = rewrite_json_blocks(source, lambda schema: "")
        large = len(plain) > _PLAIN_LARK or len(schemas) > 100 or any(s.is_large for s in schemas)
        return self._compile("lark", text, needs_trial=large or _repeats(plain) > 1000)

    def _compile(self, kind: str, text: str, *, needs_trial: bool = False) -> Grammar:
        key = blake2b(f"{kind}:{text}".encode(), digest_size=16).digest()
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        grammar = _on_large_stack(lambda: self._build(kind, text, needs_trial))
        with self._lock:
            self._cache[key] = grammar
            while len(self._cache) > _CACHED:
                self._cache.popitem(last=False)
        return grammar

    def _build(self, kind: str, text: str, needs_trial: bool) -> Grammar:
        from llguidance import LLMatcher, LLParserLimits

        if kind == "json":
            source = LLMatcher.grammar_from_json_schema(text)
        elif kind == "regex":
            source = LLMatcher.grammar_from_regex(text)
        else:
            source = LLMatcher.grammar_from_lark(text)
        if needs_trial:
            try_grammar(source, self._source.special_tokens, _LIMITS)
        limits = LLParserLimits(
            step_lexer_fuel=_LIMITS["step_lexer_fuel"],
            max_lexer_states=_LIMITS["max_lexer_states"],
            max_items_in_row=_LIMITS["max_items_in_row"],
            verbose_errors=False,
        )
        first = LLMatcher(self._tokens(), source, log_level=0, limits=limits)
        if not first.is_error():
            probe = first.deep_copy()
            _follow_a_name(probe, self._tokens())
            if not probe.is_error():
                return Grammar(first, self._vocab_size)
            first = probe
        raise _refusal(kind, first.get_error())

    def _tokens(self) -> LLTokenizer:
        """llguidance's table of the vocabulary, made once."""
        from llguidance import LLTokenizer

        with self._table_lock:
            if self._table is None:
                try:
                    self._table = LLTokenizer(
                        self._source.to_json(), n_vocab=self._vocab_size, eos_token=self._eos or None
                    )
                except ValueError as error:
                    raise GrammarError(
                        f"no grammar can be made for this tokenizer ({_first_line(str(error))})",
                        remedy="ask for plain text",
                    ) from None
            return self._table


class MaskWorker:
    """Makes the masks of a step in a thread of its own, while the model computes."""

    def __init__(self, vocab_size: int) -> None:
        self._words = -(-vocab_size // 32)
        self._thread: ThreadPoolExecutor | None = None

    def begin(self, matchers: Sequence[Matcher]) -> Future[np.ndarray]:
        """Start on the masks of what may follow: [len(matchers), words] int32, as `Matcher.fill` has them.

        No matcher may be touched before the result is there.
        """
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="llmc-masks")
        return self._thread.submit(self._fill, matchers)

    def _fill(self, matchers: Sequence[Matcher]) -> np.ndarray:
        masks = np.zeros((len(matchers), self._words), np.int32)
        for matcher, row in zip(matchers, masks, strict=True):
            matcher.fill(row)
        return masks


def _with_options(checked: CheckedSchema) -> str:
    """The schema's text with the compiler's options, where it looks for them."""
    escapes = _PLAIN_ESCAPES if checked.plain_names else _ESCAPES
    options = {"whitespace_pattern": _WHITESPACE, "json_allowed_escapes": escapes}
    return json.dumps({**checked.schema, "x-guidance": options}, separators=(",", ":"))


def _check_length(name: str, text: str) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise GrammarError(f"{name} is not valid Unicode", remedy="give it as UTF-8") from None
    if size > MAX_SOURCE_BYTES:
        raise GrammarError(f"{name} has {size} bytes", remedy=f"allowed: up to {MAX_SOURCE_BYTES}")


def _repeats(source: str) -> int:
    """All counted repeats of a source multiplied, as if each stood inside of the one before."""
    return prod(max(1, int(count)) for count in re.findall(r"(\d{1,9})\s*\}", source)[:100])


def _first_line(message: str) -> str:
    return message.strip().split("\n")[0][:200]


_KEYWORDS = (
    ("oneOf", "oneOf constraints"),
    ("minProperties", "min/maxProperties"),
    ("patternProperties", "patternProperty"),
    ("$ref", "circular references"),
    ("$ref", "Resource"),
    ("pattern", "Unable to determine if regex"),
    ("pattern", "lookarounds"),
    ("pattern", "regex parse error"),
    ("multipleOf", "multipleOf"),
    ("minimum", "Failed to generate regex"),
)
"""Keywords by what the compiler says of them."""


def _refusal(kind: str, message: str) -> GrammarError:
    line = _first_line(message)
    if kind != "json":
        name = "the regular expression" if kind == "regex" else "the grammar"
        return GrammarError(f"{name} cannot be used: {line}", remedy="simplify it")
    keyword = next((keyword for keyword, part in _KEYWORDS if part in line), None)
    if keyword is None and (named := re.search(r'Unimplemented keys: \["([^"]+)"', line)) is not None:
        keyword = named[1]
    what = f"{keyword!r} of the schema" if keyword is not None else "the schema"
    return GrammarError(f"{what} cannot be used: {line}", remedy="simplify it", keyword=keyword)


def _follow_a_name(state: LLMatcher, table: LLTokenizer) -> None:
    """Make the first masks, to the name of a property where one may come: some grammars fail only there."""
    state.compute_bitmask()
    for token in table.greedy_tokenize('{"a"'):
        if state.is_error() or not state.validate_tokens([token]):
            return
        state.consume_token(token)
        state.compute_bitmask()


def _on_large_stack(make: Callable[[], T]) -> T:
    """Call in a thread whose stack holds whatever the compiler's recursion may need: an overflow would end
    the process.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(make())
        except BaseException as error:  # noqa: BLE001  (passed on to the caller)
            result.set_exception(error)

    with _stack_lock:
        before = threading.stack_size(STACK_BYTES)
        try:
            thread = threading.Thread(target=run, name="llmc-grammar", daemon=True)
            thread.start()
        finally:
            threading.stack_size(before)
    return result.result()


_stack_lock = threading.Lock()

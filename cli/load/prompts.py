"""What is asked: random but repeatable prompts of a wanted number of tokens, or messages from a file.

Random prompts are made of common English words. Before a run the server says how many tokens they take:
`/tokenize` names words that are one token each, and two short requests show, by their usage, what the chat
template adds. Where there is `/tokenize` and prompts may be token ids (`/v1/completions`), ids are sent.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from ...ir.errors import InputError, LlmcError
from .answers import PATHS, error_message
from .arrivals import BLOCK_TOKENS
from .connection import RequestFailed
from .http import Client
from .records import Arrival

_FEWEST_WORDS = 16  # of one token each; with fewer, prompts would repeat themselves
_MOST_LINE = 1 << 24

_TEXT = """
about after again air all along also always and animal answer around ask away back ball because before began
best better big bird black blue boat body book both box boy bring brown build call came can car carry change
city clean close cold come could country cut dark day deep did different does door down draw dry each early
earth east eat end enough even ever every example eye face fall family far farm fast father feel feet field
find fire first fish five fly follow food foot form found four friend from front full game gave girl give
gold good got great green ground group grow had hand hard has have head hear heat help here high hold home
horse hot hour house idea inch island just keep kind king know land language large last later laugh lead
learn leave left letter life light like line list little live long look lot love low made main make man many
map
"""
WORDS = tuple(_TEXT.split())


class Prompts(Protocol):
    """Gives request number `index` its prompt: `messages` or `prompt`, as the endpoint wants it."""

    def fields(self, index: int, arrival: Arrival) -> dict[str, Any]: ...

    def for_run(self, number: int) -> Prompts:
        """Other prompts of the same kind: those of the run before are in the server's prefix cache."""
        ...


@dataclass(frozen=True)
class RandomPrompts:
    """Words or token ids, drawn anew for each request from the seed and the request's number.

    Blocks of a trace are drawn from their own numbers, so that equal blocks are equal text. `overhead` is
    what the chat template adds to a prompt, `tokens_per_word` what an item of `items` takes.
    """

    items: Sequence[str] | Sequence[int]
    chat: bool
    seed: int | str = 0
    overhead: int = 0
    tokens_per_word: float = 1.0

    def fields(self, index: int, arrival: Arrival) -> dict[str, Any]:
        count = max(1, round((arrival.prompt_tokens - self.overhead) / self.tokens_per_word))
        drawn: list[Any] = []
        for block in arrival.blocks[: -(-count // BLOCK_TOKENS)]:
            drawn += self._block(block)
        if len(drawn) < count:
            source = random.Random(f"{self.seed}:request:{index}")
            drawn += source.choices(self.items, k=count - len(drawn))
        del drawn[count:]
        if isinstance(self.items[0], int):
            return {"prompt": drawn}
        text = " ".join(drawn)
        return {"messages": [{"role": "user", "content": text}]} if self.chat else {"prompt": text}

    def for_run(self, number: int) -> RandomPrompts:
        """The same lengths, drawn anew."""
        return replace(self, seed=f"{self.seed}:run:{number}")

    def _block(self, number: int) -> tuple[Any, ...]:
        return _block(tuple(self.items), self.seed, number)


@lru_cache(maxsize=1024)
def _block(items: tuple[Any, ...], seed: int | str, number: int) -> tuple[Any, ...]:
    return tuple(random.Random(f"{seed}:block:{number}").choices(items, k=BLOCK_TOKENS))


@dataclass(frozen=True)
class FilePrompts:
    """Prompts of a JSONL file, one after the other, and again from the first where there are not enough."""

    rows: Sequence[dict[str, Any]]

    def fields(self, index: int, arrival: Arrival) -> dict[str, Any]:
        return self.rows[index % len(self.rows)]

    def for_run(self, number: int) -> FilePrompts:
        """Itself: a file has no others."""
        return self


def read_prompts(path: Path, *, chat: bool, most: int) -> FilePrompts:
    """The first `most` prompts of a file of JSON lines: `{"messages": […]}` or `[…]` for chat, else
    `{"prompt": …}`. Other keys are left out.

    Raises InputError, naming the line, for anything else.
    """
    key = "messages" if chat else "prompt"
    rows: list[dict[str, Any]] = []
    with path.open("rb") as file:
        number = 0
        while len(rows) < most and (line := file.readline(_MOST_LINE)):
            number += 1
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path.name}, line {number} is no JSON: {error}") from error
            value = row.get(key) if isinstance(row, dict) else row
            if not value or not isinstance(value, list if chat else str | list):
                form = '{"messages": [{"role": …, "content": …}, …]}' if chat else '{"prompt": "…"}'
                raise InputError(f"{path.name}, line {number} has no {key}", remedy=f"write {form}")
            rows.append({key: value})
    if not rows:
        raise InputError(f"{path.name} has no prompts")
    return FilePrompts(rows)


async def random_prompts(client: Client, model: str, endpoint: str, seed: int) -> RandomPrompts:
    """Asks the server what words cost (see above), and returns prompts that are as long as wanted.

    Raises LlmcError where the server refuses even a short request: no run could follow.
    """
    chat = endpoint == "chat"
    words, ids = await _single_token_words(client, model)
    if ids and not chat:
        return RandomPrompts(ids, chat=False, seed=seed)
    one = await _prompt_tokens(client, model, endpoint, words[:1])
    all_of_them = await _prompt_tokens(client, model, endpoint, words)
    if one is None or all_of_them is None or all_of_them <= one:
        return RandomPrompts(words, chat=chat, seed=seed)
    cost = (all_of_them - one) / (len(words) - 1)
    overhead = max(0, round(one - cost))
    return RandomPrompts(words, chat=chat, seed=seed, overhead=overhead, tokens_per_word=cost)


async def _single_token_words(client: Client, model: str) -> tuple[Sequence[str], list[int]]:
    """(words that are one token each, their ids); all words and no ids where the server cannot say."""
    found = await tokenize(client, model, " ".join(WORDS))
    if found is None:
        return WORDS, []
    # The first word stands at the start of the text, where tokenizers may treat it in their own way.
    lead = len(await tokenize(client, model, WORDS[0]) or [])
    if len(found) - lead == len(WORDS) - 1:
        return WORDS, found[lead:]
    words: list[str] = []
    ids: list[int] = []
    for word in WORDS[1:]:
        tokens = await tokenize(client, model, f"{WORDS[0]} {word}") or []
        if len(tokens) == lead + 1:
            words.append(word)
            ids.append(tokens[-1])
    return (words, ids) if len(words) >= _FEWEST_WORDS else (WORDS, [])


async def tokenize(client: Client, model: str, text: str) -> list[int] | None:
    """Token ids of a text by the server's `/tokenize`; None where it has none.

    vLLM (and llmc) take `prompt`, llama.cpp's server takes `content`.
    """
    bodies: tuple[Mapping[str, Any], ...] = (
        {"model": model, "prompt": text, "add_special_tokens": False},
        {"content": text},
    )
    for body in bodies:
        try:
            status, answer = await client.fetch("POST", "/tokenize", json.dumps(body).encode())
            tokens = json.loads(answer).get("tokens") if status == 200 else None
        except (RequestFailed, ValueError, AttributeError, RecursionError):
            continue
        if isinstance(tokens, list) and tokens and all(type(token) is int for token in tokens):
            return tokens
    return None


async def _prompt_tokens(client: Client, model: str, endpoint: str, words: Sequence[str]) -> int | None:
    """Tokens that the server counts in a prompt of these words; None where it counts none."""
    text = " ".join(words)
    prompt = {"messages": [{"role": "user", "content": text}]} if endpoint == "chat" else {"prompt": text}
    body = {"model": model, **prompt, "max_tokens": 1, "temperature": 0}
    try:
        status, answer = await client.fetch("POST", PATHS[endpoint], json.dumps(body).encode())
    except RequestFailed as error:
        raise LlmcError(f"{PATHS[endpoint]}: {error.failure.kind}: {error.failure.detail}") from error
    if status != 200:
        said = error_message(answer)[:200]
        raise LlmcError(f"{PATHS[endpoint]} answers a short request with {status}: {said}")
    try:
        count = json.loads(answer)["usage"]["prompt_tokens"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return count if type(count) is int and count > 0 else None

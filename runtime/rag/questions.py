"""Files of questions with what should be found for them, in our layout and in those of public data sets.

Rows are JSON objects, one a line or in one array:

    ours: {"question", "id"?, "answer"? or "answers"?, and of "gold", "gold_documents", "gold_titles",
           "gold_passages" what there is}
    HotpotQA and 2WikiMultiHopQA: {"question", "_id", "answer", "supporting_facts": [[title, sentence]]}
    MuSiQue: {"question", "id", "answer", "answer_aliases",
              "paragraphs": [{"title", "paragraph_text", "is_supporting"}]}

`gold` is a list: a string is a document's id or title; an object has "document", "title" or "text" (more than
one: all must fit), and "grade", how good it is to find it (1 unless said).
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...ir.errors import InputError
from .types import Passage

_MAX_BYTES = 1 << 30
_MAX_QUESTION = 100_000  # characters
_SHORTEST_TEXT = 20  # characters of a passage's text that say which passage it is
_LAYOUTS = "see docs/rag.md, Evaluation, for what a row holds"


@dataclass(frozen=True)
class Gold:
    """Something that should be found. Empty fields do not matter; `name` is a document's id or its title.

    Names are compared as `plain` makes them. A text fits a passage where one holds the other, so that a chunk
    of a long text counts, and so does a chunk that holds it; `grade` > 0.
    """

    name: str = ""
    document: str = ""
    title: str = ""
    text: str = ""
    grade: float = 1.0

    def fits(self, passage: Passage) -> bool:
        """Whether finding this passage is finding this."""
        if self.name and plain(self.name) not in (plain(passage.title), *names_of(passage.document)):
            return False
        if self.document and plain(self.document) not in names_of(passage.document):
            return False
        if self.title and plain(self.title) != plain(passage.title):
            return False
        return not self.text or _overlap(plain(self.text), plain(passage.text))

    def missing_name(self, ids: Container[str], titles: Container[str]) -> str:
        """What it is called, where no document is called so; empty otherwise. All names `plain`."""
        if self.name and plain(self.name) not in titles and plain(self.name) not in ids:
            return self.name
        if self.document and plain(self.document) not in ids:
            return self.document
        return self.title if self.title and plain(self.title) not in titles else ""

    def __str__(self) -> str:
        return self.name or self.document or self.title or self.text


@dataclass(frozen=True)
class Question:
    """A question, the answers that count as right, and what holds them."""

    id: str
    question: str
    answers: tuple[str, ...] = ()
    gold: tuple[Gold, ...] = ()


def plain(text: str) -> str:
    """As names are compared: composed letters, without case, one space between words."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def names_of(document: str) -> tuple[str, str]:
    """What a document's id is called in gold: the id, and of a row of a file the row's own id; `plain`."""
    return plain(document), plain(document.rpartition("#")[2])


def _overlap(one: str, other: str) -> bool:
    short, long = sorted((one, other), key=len)
    return one == other or (len(short) >= _SHORTEST_TEXT and short in long)


# Files ---------------------------------------------------------------------------------------------------


def load_questions(path: Path, limit: int | None = None) -> list[Question]:
    """The questions of a file, in its order; the first `limit` of them.

    Raises InputError with the file's name and the row's number where a row is not what it should be, or two
    have the same id.
    """
    found: list[Question] = []
    seen: dict[str, int] = {}
    for number, row in enumerate(read_rows(path), 1):
        if limit is not None and len(found) >= limit:
            break
        where = f"{path}, row {number}"
        question = question_of(row, str(number), where)
        if question.id in seen:
            raise InputError(
                f"{where} has the id {question.id[:80]!r}, and so has row {seen[question.id]}",
                remedy="give each question an id of its own, or none any",
            )
        seen[question.id] = number
        found.append(question)
    if not found:
        raise InputError(f"{path} holds no question", remedy=_LAYOUTS)
    return found


def read_rows(path: Path) -> Iterator[Any]:
    """The values of a file of JSON lines, or the members of its array."""
    if not path.is_file():
        raise InputError(f"{path} is not a file", remedy="name a JSONL file of questions")
    if path.stat().st_size > _MAX_BYTES:
        raise InputError(f"{path} is larger than 1 GiB", remedy="split it")
    try:
        with path.open(encoding="utf-8-sig") as file:
            start = file.read(4096).lstrip()
            file.seek(0)
            if start.startswith("["):
                yield from _parse(file.read(), str(path))
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _parse(line, f"{path}, line {number}")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error.reason})", remedy="convert it") from None


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise InputError(f"{where} is nested too deeply", remedy=_LAYOUTS) from None
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {error}", remedy="one JSON object a line") from None


def question_of(row: Any, number: str, where: str) -> Question:
    """A row of any of the layouts; `number` is its id where it has none, `where` begins error messages."""
    if not isinstance(row, dict):
        raise InputError(f"{where} is no JSON object", remedy=_LAYOUTS)
    fields: Mapping[str, Any] = row
    question = fields.get("question")
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"{where} has no text in 'question'", remedy=_LAYOUTS)
    if len(question) > _MAX_QUESTION:
        raise InputError(
            f"{where}: the question has {len(question):,} characters, {_MAX_QUESTION:,} are allowed",
            remedy="shorten it",
        )
    id = fields.get("id", fields.get("_id", number))
    if not isinstance(id, str | int) or isinstance(id, bool):
        raise InputError(f"{where}: 'id' is neither text nor a number", remedy=_LAYOUTS)
    gold = dict.fromkeys(_gold(fields, where))  # distinct, in order: many supporting sentences share a title
    return Question(str(id), question, tuple(dict.fromkeys(_answers(fields, where))), tuple(gold))


def _answers(row: Mapping[str, Any], where: str) -> Iterator[str]:
    for name in ("answer", "answers", "answer_aliases"):
        value = row.get(name)
        values: Sequence[Any] = value if isinstance(value, list) else [] if value is None else [value]
        for answer in values:
            if not isinstance(answer, str | int | float):
                raise InputError(f"{where}: {name!r} is no text and no list of texts", remedy=_LAYOUTS)
            yield str(answer)


def _gold(row: Mapping[str, Any], where: str) -> Iterator[Gold]:
    for item in _list(row, "gold", where):
        yield _gold_item(item, where)
    for document in _list(row, "gold_documents", where):
        yield Gold(document=_text(document, "gold_documents", where))
    for title in _list(row, "gold_titles", where):
        yield Gold(title=_text(title, "gold_titles", where))
    for text in _list(row, "gold_passages", where):
        yield Gold(text=_text(text, "gold_passages", where))
    for fact in _list(row, "supporting_facts", where):
        title = fact[0] if isinstance(fact, list) and fact else fact
        yield Gold(title=_text(title, "supporting_facts", where))
    for paragraph in _list(row, "paragraphs", where):
        if not isinstance(paragraph, dict):
            raise InputError(f"{where}: 'paragraphs' holds something else than objects", remedy=_LAYOUTS)
        if paragraph.get("is_supporting") is True:
            title, text = paragraph.get("title") or "", paragraph.get("paragraph_text")
            yield Gold(title=str(title), text=_text(text, "paragraph_text", where))


def _gold_item(item: Any, where: str) -> Gold:
    if not isinstance(item, dict):
        return Gold(name=_text(item, "gold", where))
    unknown = set(item) - {"document", "title", "text", "grade"}
    grade = item.get("grade", 1)
    names = {name: _text(item[name], f"gold: {name}", where) for name in item if name != "grade"}
    if unknown or not names:
        raise InputError(
            f"{where}: an object in 'gold' has {', '.join(sorted(map(str, item))) or 'no fields'}",
            remedy='name "document", "title" or "text", and "grade" where it is not 1',
        )
    if isinstance(grade, bool) or not isinstance(grade, int | float) or not 0 < grade <= 1e6:
        raise InputError(f"{where}: the grade {grade!r} is no number above 0", remedy="use 1, 2, 3, …")
    return Gold(grade=float(grade), **names)


def _list(row: Mapping[str, Any], name: str, where: str) -> Sequence[Any]:
    value = row.get(name)
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise InputError(f"{where}: {name!r} is not a list", remedy=_LAYOUTS)
    return value


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: {name!r} holds something else than text", remedy=_LAYOUTS)
    return value

"""Multiple choice as lm-evaluation-harness scores it (its version 0.4.13 is the reference).

    context + " " + choice  →  log p(choice | context)  →  the best choice, plain and by length

A JSONL file has one question a line: `choices` (texts), `gold` (number of the right one), and either
`query`, which becomes the context `query + "\\nAnswer:"` (the prompt of the tasks arc_easy, arc_challenge and
piqa), or `context`, which is taken as it is.

An MMLU folder has test/SUBJECT_test.csv and dev/SUBJECT_dev.csv with the columns question, four choices,
answer (0 to 3, or A to D); its prompt is that of the task mmlu: a line that names the subject, examples, the
question with its lettered choices, and the letters are what is scored.

Tokens of a choice are those of context and choice together, after as many as the context has alone; spaces at
the context's end belong to the choice. A text too long for the model loses its beginning.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ir.errors import InputError
from ..runtime.continuations import ContinuationScorer, Request

if TYPE_CHECKING:
    from ..runtime.llm import LLM

LETTERS = ("A", "B", "C", "D")
_COLUMNS = ("question", "choice0", "choice1", "choice2", "choice3", "answer")


@dataclass(frozen=True, slots=True)
class Question:
    """`context` and `choices` are texts; `gold` counts choices from 0; `where` is "FILE:LINE" for errors."""

    context: str
    choices: tuple[str, ...]
    gold: int
    where: str


@dataclass(frozen=True, slots=True)
class Task:
    """Questions that are reported together; `subject` is None where a file is not of several."""

    name: str
    questions: list[Question]
    subject: str | None = None


# Reading -------------------------------------------------------------------------------------------------


def read_tasks(path: Path, *, shots: int = 0, limit: int | None = None) -> list[Task]:
    """The questions of a JSONL file, of one CSV file, or of every subject of an MMLU folder, at most `limit`
    of each.

    Raises InputError naming file and line where something is not as the module says, and where there is no
    question; OSError where a file cannot be read.
    """
    if path.is_dir() or path.suffix == ".csv":
        tasks = [_subject(file, shots=shots, limit=limit) for file in _subjects(path)]
    elif shots:
        raise InputError(f"--shots {shots}: {path} has no examples beside it", remedy="give an MMLU folder")
    else:
        tasks = [Task(str(path), list(_take(_jsonl(path), limit)))]
    for task in tasks:
        if not task.questions:
            raise InputError(f"{task.name} holds no question", remedy="give one JSON object a line")
    return tasks


def _take(questions: Iterable[Question], limit: int | None) -> Iterator[Question]:
    for number, question in enumerate(questions):
        if number == limit:
            return
        yield question


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise InputError(f"{path}:{number} is not UTF-8", remedy="convert it to UTF-8") from None


def _jsonl(path: Path) -> Iterator[Question]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise InputError(f"{where} is not JSON", remedy="give one JSON object a line") from None
        yield _question(row, where)


def _question(row: Any, where: str) -> Question:
    if not isinstance(row, dict):
        raise InputError(f"{where} is not a JSON object", remedy='give {"query", "choices", "gold"}')
    context = row["query"] + "\nAnswer:" if isinstance(row.get("query"), str) else row.get("context")
    choices, gold = row.get("choices"), row.get("gold")
    if not isinstance(context, str) or not context:
        raise InputError(f"{where} has no text 'query' or 'context'", remedy="give one of them")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(choice, str) and choice for choice in choices)
    ):
        raise InputError(
            f"{where}: 'choices' is no list of two or more texts", remedy="give them, none empty"
        )
    if type(gold) is not int or not 0 <= gold < len(choices):
        raise InputError(
            f"{where}: 'gold' is {json.dumps(gold)[:40]}", remedy=f"allowed: 0 to {len(choices) - 1}"
        )
    return Question(context, tuple(choices), gold, where)


def _subjects(path: Path) -> list[Path]:
    """The CSV files with the questions, sorted by name."""
    if path.is_file():
        return [path]
    folder = path / "test" if (path / "test").is_dir() else path
    files = sorted(folder.glob("*.csv"))
    if not files:
        raise InputError(f"{path} holds no test/SUBJECT_test.csv", remedy="give an MMLU folder")
    return files


def _subject(file: Path, *, shots: int, limit: int | None) -> Task:
    subject = file.stem.removesuffix("_test")
    about = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}."
    examples: list[tuple[str, int, str]] = []
    if shots:
        beside = file.parent.parent / "dev" / f"{subject}_dev.csv"
        if not beside.is_file():
            raise InputError(f"--shots {shots}: {beside} does not exist", remedy="leave --shots away")
        examples = list(_rows(beside))[:shots]
        if len(examples) < shots:
            raise InputError(
                f"--shots {shots}: {beside} has {len(examples)} examples", remedy=f"ask for {len(examples)}"
            )
    head = f"{about}\n\n" + "".join(f"{text} {LETTERS[gold]}\n\n" for text, gold, _ in examples)
    questions = (Question(head + text, LETTERS, gold, where) for text, gold, where in _rows(file))
    return Task(str(file), list(_take(questions, limit)), subject)


def _rows(path: Path) -> Iterator[tuple[str, int, str]]:
    """(question with its lettered choices, number of the right one, "FILE:LINE") of a CSV file."""
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if not row or (reader.line_num == 1 and tuple(row) == _COLUMNS):
                continue
            if len(row) != len(_COLUMNS):
                raise InputError(f"{where} has {len(row)} columns", remedy=f"give {', '.join(_COLUMNS)}")
            answer = row[-1].strip()
            if answer not in (*LETTERS, "0", "1", "2", "3"):
                raise InputError(f"{where}: answer {answer[:40]!r}", remedy="allowed: 0 to 3, or A to D")
            gold = LETTERS.index(answer) if answer in LETTERS else int(answer)
            lettered = "".join(
                f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, row[1:5], strict=True)
            )
            yield f"{row[0].strip()}{lettered}\nAnswer:", gold, where
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num} is not CSV: {error}", remedy="quote its texts") from None


# Tokens --------------------------------------------------------------------------------------------------


class Encoder:
    """Texts to the tokens that lm-evaluation-harness would score them with."""

    def __init__(self, llm: LLM) -> None:
        self._encode = llm.encode
        model: dict[str, Any] = llm.artifact.model if llm.artifact is not None else {}
        self._limit = int(model.get("context_length") or llm.context_length)
        # With its own special tokens, unless the text begins with BOS by itself.
        first = model.get("bos_token_id")
        first = next(iter(model.get("eos_token_ids") or ()), None) if first is None else first
        self._prefix = llm.decode([first], skip_special_tokens=False) if first is not None else ""

    def ids(self, text: str) -> list[int]:
        """Token ids of a text."""
        begins = bool(self._prefix) and text.startswith(self._prefix)
        return self._encode(text, add_special_tokens=not begins)

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of a context, and those that the continuation adds to it."""
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        before = self.ids(context)
        return before, self.ids(context + continuation)[len(before) :]

    def requests(self, question: Question) -> list[Request]:
        """A question's choices by common context: one request, or one a choice where the text is cut."""
        pairs = [self.pair(question.context, f" {choice}") for choice in question.choices]
        for before, after in pairs:
            if not before or not after or len(after) > self._limit:
                raise InputError(
                    f"{question.where}: context and choice have {len(before)} and {len(after)} tokens",
                    remedy=f"both need one, the choice has room for {self._limit}",
                )
        context = pairs[0][0]
        longest = max(len(after) for _, after in pairs)
        if len(context) + longest <= self._limit + 1:
            return [Request(context, [after for _, after in pairs])]
        return [Request(before[-(self._limit + 1 - len(after)) :], [after]) for before, after in pairs]


# Scoring -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prepared:
    """A task in tokens: for each question its requests, in the order of the choices."""

    task: Task
    requests: list[list[Request]]

    @property
    def kv_tokens(self) -> int:
        """Tokens of a cache that holds any one question with all of its choices, in pages of 16."""
        return max(
            len(request.context) + sum(len(c) + 32 for c in request.continuations)
            for group in self.requests
            for request in group
        )


def prepare(llm: LLM, tasks: Sequence[Task]) -> list[Prepared]:
    """The tasks in a model's tokens. Raises InputError where a text has no token, or cannot fit."""
    encoder = Encoder(llm)
    return [Prepared(task, [encoder.requests(question) for question in task.questions]) for task in tasks]


def log_likelihoods(
    llm: LLM, prepared: Prepared, progress: Callable[[float], None] | None = None
) -> list[list[float]]:
    """log p(choice | context) in nats: for each question one number a choice."""
    flat = [request for group in prepared.requests for request in group]
    with llm.engine.paused() as engine:
        scores = iter(ContinuationScorer(engine).score(flat, progress))
    return [[value for _ in group for value in next(scores)] for group in prepared.requests]


def picks(question: Question, sums: Sequence[float]) -> tuple[int, int, int]:
    """The best choice by log-likelihood; by log-likelihood a character; by log-likelihood a UTF-8 byte."""
    scores = np.asarray(sums, np.float64)
    characters = np.array([len(choice) for choice in question.choices], np.float64)
    octets = np.array([len(choice.encode()) for choice in question.choices], np.float64)
    return int(scores.argmax()), int((scores / characters).argmax()), int((scores / octets).argmax())


def accuracies(questions: Sequence[Question], sums: Sequence[Sequence[float]]) -> dict[str, Any]:
    """`questions`, `acc`, `acc_norm` (by characters, as lm-evaluation-harness's metric of that name),
    `acc_bytes`, and the standard error of each (null of a single question).
    """
    right = np.array(
        [
            [pick == question.gold for pick in picks(question, row)]
            for question, row in zip(questions, sums, strict=True)
        ],
        np.float64,
    )
    result: dict[str, Any] = {"questions": len(questions)}
    for name, column in zip(("acc", "acc_norm", "acc_bytes"), right.T, strict=True):
        result[name] = float(column.mean())
        result[f"{name}_stderr"] = _standard_error(column)
    return result


def _standard_error(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def pooled(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracies over the questions of all subjects, and the standard error pooled within subjects, as the
    harness aggregates a group weighted by size.
    """
    sizes = np.array([part["questions"] for part in parts], np.float64)
    total = sizes.sum()
    result: dict[str, Any] = {"questions": int(total)}
    for name in ("acc", "acc_norm", "acc_bytes"):
        result[name] = float((sizes * [part[name] for part in parts]).sum() / total)
        errors = [part[f"{name}_stderr"] for part in parts]
        result[f"{name}_stderr"] = None
        if total > len(parts) and None not in errors:
            variance = ((sizes - 1) * np.square(errors) * sizes).sum() / (total - len(parts))
            result[f"{name}_stderr"] = math.sqrt(variance / total)
    return result


def evaluate(
    llm: LLM, prepared: Sequence[Prepared], progress: Callable[[float], None] | None = None
) -> dict[str, Any]:
    """Accuracies of one FILE or folder; where it has several subjects, also those of each, as `subjects`."""
    parts: list[dict[str, Any]] = []
    for number, one in enumerate(prepared):
        step = None if progress is None else partial(_share, progress, number, len(prepared))
        found = accuracies(one.task.questions, log_likelihoods(llm, one, step))
        parts.append(({"subject": one.task.subject} if one.task.subject else {}) | found)
    return parts[0] if len(parts) == 1 else {**pooled(parts), "subjects": parts}


def _share(progress: Callable[[float], None], number: int, count: int, share: float) -> None:
    progress((number + share) / count)

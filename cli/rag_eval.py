"""`llmc rag eval`: how well a store of documents answers questions whose answers are known."""

from __future__ import annotations

import contextlib
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..ir.errors import InputError
from .output import emit, json_option, note, notes_from_logging, table
from .progress import Progress
from .rag_options import MODES, embedder_option, kb_argument, one_line, open_kb

if TYPE_CHECKING:
    from ..runtime.rag.evaluate import Evaluation, Record
    from ..runtime.rag.knowledge import KnowledgeBase
    from ..runtime.rag.questions import Question
    from ..runtime.rag.types import Passage

_MODES = tuple(
    mode for mode in MODES if mode != "global"
)  # which finds summaries, and no document of its own
_KS = (2, 5, 10)
_READ = 5  # passages that an answer is made from, as in llmc rag query
_CITATION = re.compile(r"\[\d+\]")
_MISSES = 50  # shown on the screen at most; -o writes all
_SHOWN = 160  # characters of a question or a name on the screen


@click.command("eval", short_help="Measure retrieval and answers on questions with known answers.")
@kb_argument
@click.argument("questions", type=click.Path(path_type=Path))
@click.option("--top", type=click.IntRange(min=1), default=10, show_default=True, help="Passages a question.")
@click.option(
    "--at",
    "ks",
    multiple=True,
    type=click.IntRange(min=1),
    metavar="K",
    help="Measure the first K passages; repeatable.  [default: 2, 5 and 10, up to --top]",
)
@click.option(
    "--mode", type=click.Choice(_MODES), default="auto", show_default=True, help="How passages are found."
)
@click.option(
    "--model", type=click.Path(path_type=Path), metavar="ARTIFACT", help="Answer, and score answers."
)
@click.option("--max-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Of an answer.")
@embedder_option
@click.option("--reranker", metavar="SPEC", help="As in llmc rag query.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first N questions.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the intervals.")
@click.option(
    "--compare",
    type=click.Path(path_type=Path),
    metavar="FILE.json",
    help="A run that -o wrote: what differs.",
)
@click.option("--show-misses", is_flag=True, help="List what was not among the passages.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Write everything, question by question."
)
@json_option
def command(
    kb: str,
    questions: Path,
    top: int,
    ks: tuple[int, ...],
    mode: str,
    model: Path | None,
    compare: Path | None,
    show_misses: bool,
    output: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Ask KB the questions of a file, and measure how much of what answers them is found.

    QUESTIONS is JSON lines (or an array): {"question": …, "answer": …, "gold": [ids or titles of documents]},
    or rows of HotpotQA, 2WikiMultiHopQA or MuSiQue; docs/rag.md says all that a row may hold.

    recall@K is the share of the gold among the first K passages, precision@K the share of these that hold
    some, mrr one over the rank of the first that does, ndcg@K weighs ranks and grades. With --model, exact
    match and F1 compare answers with the right ones as SQuAD's and HotpotQA's scripts do. Each is a mean over
    the questions that have gold (or answers), with a bootstrapped 95% interval; --compare gives the
    difference over the questions that both runs have, with its interval and a p-value.
    """
    notes_from_logging()
    ks = tuple(sorted(set(ks))) or tuple(sorted({k for k in _KS if k < top} | {min(top, max(_KS))}))
    if ks[-1] > top:
        raise click.UsageError(f"--at {ks[-1]} needs --top {ks[-1]} or more")
    from ..runtime.rag.questions import load_questions

    asked = load_questions(questions, options["limit"])
    _check_judgeable(questions, asked, answers=model is not None)
    other = None if compare is None else read_run(compare)
    began = time.perf_counter()
    with Progress() as progress, contextlib.ExitStack() as stack:
        knowledge = open_kb(stack, kb, embedder=options["embedder"], reranker=options["reranker"])
        unknown = unknown_gold(knowledge, asked)
        answer = None if model is None else _answerer(stack, knowledge, model, options["max_tokens"])
        run = _ask(knowledge, asked, ks, mode, top, answer, progress)
    result: dict[str, Any] = {
        "kb": kb,
        "questions": str(questions),
        "count": len(asked),
        "mode": mode,
        "top": top,
        "model": None if model is None else model.name,
        "seconds": round(time.perf_counter() - began, 3),
        "metrics": {name: vars(one) for name, one in run.intervals(seed=options["seed"]).items()},
        "unknown_gold": unknown,
    }
    if other is not None:
        result["compared"] = {"with": str(compare), "metrics": compared(run, other, options["seed"])}
    if output is not None:
        _write(output, {**result, "records": [record.as_json() for record in run.records]})
    misses = [_miss(record, ks[-1]) for record in run.records if record.missed(ks[-1])]
    shown = {**result, "misses": misses} if show_misses else result
    emit(shown, as_json=as_json, text=text_of(result, misses if show_misses else [], ks[-1]))


def _check_judgeable(path: Path, asked: Sequence[Question], *, answers: bool) -> None:
    """Raise InputError where no question says what is right."""
    if any(one.gold or (answers and one.answers) for one in asked):
        return
    raise InputError(
        f"{path} has no gold" + (" and no answers" if answers else ""),
        remedy='give rows "gold": a list of documents\' ids or titles'
        + ("" if answers else ', or pass --model and give them "answer"'),
    )


def _ask(
    kb: KnowledgeBase,
    questions: Sequence[Question],
    ks: Sequence[int],
    mode: str,
    top: int,
    answer: Callable[[Question, Sequence[Passage]], str] | None,
    progress: Progress,
) -> Evaluation:
    from ..runtime.rag.evaluate import evaluate

    def search(question: Question) -> Sequence[Passage]:
        return kb.search(question.question, top=top, mode=mode)

    return evaluate(questions, search, ks=ks, answer=answer, progress=progress)


def _answerer(
    stack: contextlib.ExitStack, kb: KnowledgeBase, model: Path, max_tokens: int
) -> Callable[[Question, Sequence[Passage]], str]:
    from ..runtime.loader import load
    from ..runtime.rag.answer import answer

    llm = stack.enter_context(load(model, max_sequences=1))

    def ask(question: Question, passages: Sequence[Passage]) -> str:
        found = answer(
            kb, llm, question.question, short=True, passages=passages[:_READ], max_tokens=max_tokens
        )
        return _CITATION.sub("", found.text).strip() if found.found else ""

    return ask


def unknown_gold(kb: KnowledgeBase, questions: Iterable[Question]) -> list[dict[str, Any]]:
    """Gold by name that no document of the store has: it can never be found, and is mostly a misspelling."""
    from ..runtime.rag.questions import names_of, plain

    ids: set[str] = set()
    titles: set[str] = set()
    for document in kb.store.documents():
        ids.update(names_of(document.id))
        titles.add(plain(document.title))
    found: list[dict[str, Any]] = []
    for question in questions:
        names = [gold.missing_name(ids, titles) for gold in question.gold]
        if missing := [name for name in names if name]:
            found.append({"id": question.id, "gold": missing})
    return found


# Other runs ------------------------------------------------------------------------------------------------


def read_run(path: Path) -> dict[str, dict[str, float]]:
    """The values of a run that `-o` wrote, by measure and question id."""
    remedy = "name a file that llmc rag eval -o wrote"
    try:
        run = json.loads(path.read_bytes())
        values: dict[str, dict[str, float]] = {}
        for record in run["records"]:
            for name, value in record["scores"].items():
                if not math.isfinite(value):
                    raise ValueError(value)
                values.setdefault(name, {})[str(record["id"])] = float(value)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{path} is not a run of llmc rag eval", remedy=remedy) from None
    return values


def compared(run: Evaluation, other: Mapping[str, Mapping[str, float]], seed: int) -> dict[str, Any]:
    """This run less the other, for measures that both have over questions that both have."""
    from ..runtime.rag.evaluate import compare

    found: dict[str, Any] = {}
    for name, values in run.values().items():
        difference = compare(values, other.get(name, {}), seed=seed)
        if difference is not None:
            found[name] = vars(difference)
    if not found:
        raise InputError(
            "the two runs have no question and measure in common",
            remedy="compare runs over the same questions, with --at for the same K",
        )
    return found


def _write(path: Path, record: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    note(f"wrote {path}")


# Text ------------------------------------------------------------------------------------------------------


def _miss(record: Record, k: int) -> dict[str, Any]:
    return {
        "id": record.id,
        "question": record.question,
        "missed": record.missed(k),
        "found": [passage.title or passage.document for passage in record.passages[:k]],
    }


def text_of(result: Mapping[str, Any], misses: Sequence[Mapping[str, Any]], k: int) -> str:
    """The tables, for a person."""
    metrics: Mapping[str, Mapping[str, float]] = result["metrics"]
    rows = [
        (name, f"{one['mean']:.3f}", f"{one['low']:.3f} to {one['high']:.3f}", one["count"])
        for name, one in metrics.items()
    ]
    parts = [
        f"{result['count']} questions, mode {result['mode']}, top {result['top']}, {result['seconds']:.1f} s",
        table(("measure", "mean", "95% interval", "questions"), rows),
    ]
    if result["unknown_gold"]:
        parts.append(_unknown_text(result["unknown_gold"]))
    if "compared" in result:
        differences = [
            (name, f"{d['mean']:+.3f}", f"{d['low']:+.3f} to {d['high']:+.3f}", f"{d['p']:.4f}", d["count"])
            for name, d in result["compared"]["metrics"].items()
        ]
        header = ("measure", "difference", "95% interval", "p", "questions")
        parts.append(f"less {result['compared']['with']}:\n{table(header, differences)}")
    parts += _misses_text(misses, k)
    return "\n\n".join(parts)


def _unknown_text(unknown: Sequence[Mapping[str, Any]]) -> str:
    names = [_short(name) for one in unknown for name in one["gold"]]
    few = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"note: gold of {len(unknown)} question(s) names no document of the store: {few}"


def _misses_text(misses: Sequence[Mapping[str, Any]], k: int) -> list[str]:
    parts = [
        f"{miss['id']}  {_short(miss['question'])}\n"
        f"  not among the first {k}: {'; '.join(map(_short, miss['missed']))}\n"
        f"  instead: {'; '.join(map(_short, miss['found'][:5])) or 'nothing'}"
        for miss in misses[:_MISSES]
    ]
    if len(misses) > _MISSES:
        parts.append(f"… and {len(misses) - _MISSES} more; --json or -o give all")
    return parts


def _short(text: str) -> str:
    return one_line(text, _SHOWN)

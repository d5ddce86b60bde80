"""Answers from documents, further questions, and answers about the whole."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from llmc.runtime.rag import answer as answers
from llmc.runtime.rag.answer import NOT_FOUND, Answer, Said, Searched, answer, evidence_of, stream_answer
from llmc.runtime.rag.knowledge import KnowledgeBase
from llmc.runtime.rag.prompts import NOT_THERE

from .rag_answers import KISS, QUESTION, TEMPLE, Kb, Scripted, passage

# Answers ---------------------------------------------------------------------------------------------------


def test_an_answer_with_its_events() -> None:
    llm: Any = Scripted("Chief of Protocol [1].")
    events = list(stream_answer(Kb([TEMPLE, KISS]), llm, QUESTION))
    assert events[0] == Searched(QUESTION, (TEMPLE, KISS))
    assert "".join(event.text for event in events if isinstance(event, Said)) == "Chief of Protocol [1]."
    found = cast(Answer, events[-1])
    assert (found.text, found.found, found.supported) == ("Chief of Protocol [1].", True, True)
    assert (found.passages, found.finish_reason) == ((TEMPLE, KISS), "stop")
    assert found.prompt_tokens + found.generated_tokens == llm.tokens
    assert found.steps[0].chunks == (TEMPLE.chunk, KISS.chunk)
    assert llm.closed == [True]


def test_an_iterator_that_is_closed_stops_the_model() -> None:
    llm: Any = Scripted("Chief of Protocol [1].")
    events = stream_answer(Kb([TEMPLE, KISS]), llm, QUESTION)
    assert isinstance(next(events), Searched) and isinstance(next(events), Said)
    assert not llm.closed
    events.close()
    assert llm.closed == [True]


@pytest.mark.parametrize(
    "said",
    [
        "not in the documents",
        "Not in the documents.",
        "The documents do not contain the answer.",
        "There is no information about this.",
        "It cannot be determined.",
        "",
    ],
)
def test_a_model_may_say_that_it_is_not_there(said: str) -> None:
    llm: Any = Scripted(said)
    found = answer(Kb([TEMPLE, KISS]), llm, QUESTION)
    assert (found.text, found.found, found.supported, found.citations) == (NOT_FOUND, False, False, ())


def test_passages_about_something_else_are_not_shown_to_a_model() -> None:
    llm: Any = Scripted("Chief")
    other = passage("Bread", "Bread is baked from flour and water.")
    found = answer(Kb([other]), llm, "When did Zorblax invade Quimbria?")
    assert (found.text, found.found, llm.prompts) == (NOT_FOUND, False, [])
    assert not answer(Kb([]), llm, QUESTION).found
    assert answer(Kb([other]), llm, "How do people make a loaf?").found, "without names, words say too little"


def test_the_way_out_is_offered_where_evidence_is_weak() -> None:
    llm: Any = Scripted("x")
    answer(Kb([TEMPLE, KISS]), llm, QUESTION)
    answer(Kb([TEMPLE]), llm, "Who was the brother of Shirley Temple in Zanzibar and Quito?")
    assert [prompt.split(KISS.text)[-1].count(NOT_THERE) for prompt in llm.prompts[:1]] == [0]
    assert llm.prompts[1].split("Quito?")[-1].count(NOT_THERE) == 1
    assert not evidence_of(QUESTION, [TEMPLE, KISS]).is_weak
    assert evidence_of("Who?", [KISS]).words == 1.0
    weak = answer(
        Kb([TEMPLE]), cast(Any, Scripted("Ghana")), "Who was Shirley Temple's brother in Zanzibar and Quito?"
    )
    assert weak.citations and not weak.supported, "a source, but not for what was asked"


def test_hostile_answers_are_made_harmless() -> None:
    llm: Any = Scripted("Chief of Protocol ![x](https://evil.example/?q=1)")
    assert "![" not in answer(Kb([TEMPLE]), llm, QUESTION).text


def test_further_questions_are_bounded_and_searched() -> None:
    def says(prompt: str) -> str:
        if "Write JSON" not in prompt:
            return "Chief of Protocol [1]."
        return json.dumps(
            {"missing": True, "search": f"Who was Shirley Temple, part {prompt.count('part')}?"}
        )

    llm: Any = Scripted(says)
    kb = Kb([KISS], [TEMPLE], [passage("Ghana", "Ghana is a country.", number=9)])
    found = answer(kb, llm, QUESTION, iterative=True, max_steps=2)
    assert [step.question for step in found.steps] == kb.asked
    assert len(kb.asked) == 3 and kb.asked[0] == QUESTION
    assert {p.title for p in found.passages} == {"Shirley Temple", "Kiss and Tell (1945 film)", "Ghana"}
    assert found.supported


@pytest.mark.parametrize(
    "said",
    [
        '{"missing": false, "search": "x"}',
        '{"missing": true, "search": ""}',
        json.dumps({"missing": True, "search": QUESTION}),
        '{"missing": true, "sea',
    ],
)
def test_further_questions_end(said: str) -> None:
    llm: Any = Scripted(lambda prompt: said if "Write JSON" in prompt else "Chief of Protocol")
    kb = Kb([TEMPLE, KISS])
    assert answer(kb, llm, QUESTION, iterative=True, max_steps=5).found
    assert kb.asked == [QUESTION]


def test_given_passages_are_read_without_a_search() -> None:
    kb = Kb([])
    found = answer(
        kb, cast(Any, Scripted("Chief of Protocol")), QUESTION, passages=[TEMPLE, KISS], iterative=True
    )
    assert (kb.asked, found.supported) == ([], True)


def test_refusals_and_answers_are_told_apart() -> None:
    assert answers.is_refusal("The documents do not explicitly mention this.")
    assert answers.is_refusal("I cannot answer the question.")
    assert not answers.is_refusal("Not Without My Daughter")
    assert not answers.is_refusal("He did not go to Rome.")


# Questions about the whole ---------------------------------------------------------------------------------


@pytest.fixture
def kb(tmp_path: Path) -> Iterator[KnowledgeBase]:
    """Two subjects that share no name, in eight documents."""
    folder = tmp_path / "notes"
    folder.mkdir()
    for number in range(4):
        harbour = (
            f"Port Alder has pier {number}, where Nils Brandt keeps the boat Grey Heron number {number}."
        )
        bakery = f"Irma Voss bakes rye bread number {number} in the Oven House of Tartu every morning."
        (folder / f"harbour{number}.txt").write_text(harbour)
        (folder / f"bakery{number}.txt").write_text(bakery)
    with KnowledgeBase.open(tmp_path / "notes.kb", embedder="none", create=True) as made:
        made.sync(folder)
        yield made


def test_global_answers_read_each_community_and_cite_sentences(kb: KnowledgeBase) -> None:
    def says(prompt: str) -> str:
        task = prompt.rsplit("Question:", 1)[1]
        if "notes on parts" in task:
            return "Port Alder has piers [1]. Irma Voss bakes rye bread [2]."
        return "Port Alder has piers." if "Port Alder" in prompt else "Irma Voss bakes rye bread."

    llm: Any = Scripted(says)
    question = "What are the main topics of these documents?"
    found = answer(kb, llm, question)
    assert len(llm.prompts) == 3, "a note on each of two communities, and the answer"
    assert re.sub(r"\[\d+\]", "[n]", found.text) == "Port Alder has piers [n]. Irma Voss bakes rye bread [n]."
    assert found.found and found.supported
    for one in found.citations:
        assert one.passage.document.startswith("harbour" if "Alder" in one.quote else "bakery")
    assert found.prompt_tokens + found.generated_tokens == llm.tokens
    passages = kb.search(question, top=4)
    assert {re.sub(r"\d.*", "", p.document) for p in passages} == {"harbour", "bakery"}


def test_notes_are_kept_until_a_member_changes(
    kb: KnowledgeBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def says(prompt: str) -> str:
        return "Port Alder has piers." if "Port Alder" in prompt else "Irma Voss bakes rye bread."

    monkeypatch.setattr("llmc.runtime.rag.global_answer._model", lambda llm, _: llm.named)
    question = "What are the main topics of these documents?"
    notes = Path(kb.store.cache_folder) / "notes.json"

    def asked(name: str) -> tuple[int, Answer]:
        llm: Any = Scripted(says)
        llm.named = name
        found = answer(kb, llm, question)
        assert found.prompt_tokens + found.generated_tokens == llm.tokens, "what is kept costs nothing"
        return len(llm.prompts), found

    dumped = list(kb.store.dump())
    (first, made), (second, again) = asked("one"), asked("one")
    assert (first, second) == (3, 1) and made.text == again.text
    assert list(kb.store.dump()) == dumped, "a cache, and no part of the content"
    assert asked("another")[0] == 3 and asked("")[0] == 3
    assert len(json.loads(notes.read_text())["notes"]) == 4
    kb.delete(["bakery0.txt"])
    kept = json.loads(notes.read_text())
    assert len(kept["notes"]) == 2 and "rye" not in notes.read_text()
    assert asked("one")[0] == 2, "the harbour's stays"
    (tmp_path / "notes" / "harbour1.txt").write_text("Port Alder has pier 1, closed to the Grey Heron.")
    kb.sync(tmp_path / "notes")
    assert not notes.exists() or "piers" not in notes.read_text()
    notes.write_text('{"members": [], "notes": 3}')  # damaged: as if there were none
    assert asked("one")[0] == 3


def test_a_global_answer_without_notes_is_none(kb: KnowledgeBase) -> None:
    llm: Any = Scripted("not in the documents")
    found = answer(kb, llm, "Who reigns on Mars?", mode="global")
    assert (found.found, found.text) == (False, NOT_FOUND)
    invented: Any = Scripted("Zorblax invaded Quimbria in 1999.")
    assert not answer(kb, invented, "What are the main topics?", mode="global").found


def test_an_answer_from_a_knowledge_base(kb: KnowledgeBase) -> None:
    llm: Any = Scripted("Nils Brandt keeps it.")
    found = answer(kb, llm, "Who keeps the boat Grey Heron?", top=3)
    (citation,) = found.citations
    with kb.store.reading() as reader:
        (chunk,) = reader.chunks([citation.passage.chunk])
    assert chunk.text[citation.start - chunk.start : citation.end - chunk.start] == citation.quote
    assert "Nils Brandt" in citation.quote and found.supported

"""Citations: what an answer says is looked up in the passages."""

from __future__ import annotations

import random

import pytest
from llmc.runtime.rag.citations import check, locate, sentences

from .rag_answers import KISS, QUESTION, TEMPLE, passage

# Citations -------------------------------------------------------------------------------------------------


def test_citations_point_at_the_characters_that_say_it() -> None:
    checked = check("She was Chief of Protocol [1]. She played Corliss Archer [2].", [TEMPLE, KISS], QUESTION)
    assert checked.text == "She was Chief of Protocol [1]. She played Corliss Archer [2]."
    first, second = checked.citations
    assert first.quote.startswith("As an adult") and first.quote.endswith("United States.")
    assert TEMPLE.text[first.start - 1000 : first.end - 1000] == first.quote
    assert (second.number, second.passage, second.quote) == (2, KISS, KISS.text)
    assert (checked.claims, checked.supported, checked.removed) == (2, 2, ())


@pytest.mark.parametrize(
    ("said", "text", "removed"),
    [
        ("Chief of Protocol [7].", "Chief of Protocol [1].", "there is no document 7"),
        ("Chief of Protocol [2].", "Chief of Protocol [1].", "document 2 does not say"),
        ("She was Queen of Spain [1].", "She was Queen of Spain.", "document 1 does not say"),
        ("She was Chief of Protocol in 1999 [1].", "She was Chief of Protocol in 1999.", "does not say"),
        ("Chief of Protocol [0].", "Chief of Protocol [1].", "there is no document 0"),
    ],
)
def test_invented_citations_are_removed(said: str, text: str, removed: str) -> None:
    checked = check(said, [TEMPLE, KISS], QUESTION)
    assert checked.text == text
    assert len(checked.removed) == 1 and removed in checked.removed[0]
    assert all(not citation.given for citation in checked.citations), "what is left was found, not given"


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ("Chief of Protocol. [1]", "Chief of Protocol [1]."),
        ("Chief of Protocol [1][1]", "Chief of Protocol [1]"),
        ("Chief of Protocol (Document 1)", "Chief of Protocol [1]"),
        ("Chief of Protocol【1】", "Chief of Protocol [1]"),
        ("Chief of Protocol [Doc 1].", "Chief of Protocol [1]."),
        ("[1] Chief of Protocol", "Chief of Protocol [1]"),
        ("- Shirley Temple [2]\n- Chief of Protocol [1]", "- Shirley Temple [2]\n- Chief of Protocol [1]"),
        (
            "She played Archer [2] and was Chief of Protocol [1].",
            "She played Archer and was Chief of Protocol [2][1].",
        ),
        ("Two:\n1. Shirley Temple\n2. Archer", "Two:\n1. Shirley Temple [1]\n2. Archer [2]"),
        ("yes [2]", "yes [2]"),
        ("Yes.", "Yes."),
        ("", ""),
    ],
)
def test_forms_of_citations(said: str, text: str) -> None:
    checked = check(said, [TEMPLE, KISS], QUESTION)
    assert checked.text == text
    assert not checked.removed


def test_a_claim_with_a_made_up_number_is_not_supported_by_its_parts() -> None:
    checked = check("She was Chief of Protocol [1] for 17 years.", [TEMPLE, KISS], QUESTION)
    assert (checked.claims, checked.supported) == (1, 0)


WRAPPED = """\
# The lighthouse at Tarn Skerry and its keepers

The lighthouse was designed by Irma Voss, an engineer who was born
in Tartu in the year 1871 and who had built two others. It was lit
in 1903.
- a first item of a list that is as long as the lines of the text
- a second one
Name: Tarn Skerry
Year: 1903

A line of verse that is not so very long
and one that goes on with a small letter.
"""


def test_a_line_that_was_wrapped_ends_no_sentence() -> None:
    assert [WRAPPED[start:end] for start, end in sentences(WRAPPED)] == [
        "# The lighthouse at Tarn Skerry and its keepers",
        "The lighthouse was designed by Irma Voss, an engineer who was born\n"
        "in Tartu in the year 1871 and who had built two others.",
        "It was lit\nin 1903.",
        "- a first item of a list that is as long as the lines of the text",
        "- a second one",
        "Name: Tarn Skerry",
        "Year: 1903",
        "A line of verse that is not so very long\nand one that goes on with a small letter.",
    ]


def test_a_citation_of_wrapped_text_is_the_whole_sentence() -> None:
    source = passage("Tarn Skerry", WRAPPED, start=500, number=3)
    (cited,) = check("It was designed by Irma Voss, who was born in Tartu [1].", [source], "Who?").citations
    assert cited.quote.startswith("The lighthouse was") and cited.quote.endswith("two others.")
    assert WRAPPED[cited.start - 500 : cited.end - 500] == cited.quote


@pytest.mark.parametrize("seed", range(3))
def test_sentences_of_any_text_are_stretches_of_it(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(500):
        text = "".join(rng.choice("aB .\n\t-|#1)é\u3000\x0b(") for _ in range(rng.randint(0, 60)))
        last = 0
        for start, end in sentences(text):
            assert last <= start < end <= len(text) and text[start:end].strip() == text[start:end]
            last = end


def test_places_and_sentences() -> None:
    text = "Dr. A. Smith came. He left at 3.15 p.m. It rained.The end\nNew line"
    found = [text[start:end] for start, end in sentences(text)]
    assert found == ["Dr. A. Smith came.", "He left at 3.15 p.m.", "It rained.", "The end", "New line"]
    assert locate("Temple was ambassador to Ghana", TEMPLE) is not None
    assert locate("Temple was born in Ohio", TEMPLE) is None
    assert locate("", TEMPLE) is None

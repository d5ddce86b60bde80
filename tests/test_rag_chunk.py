"""Chunking: pieces are the text at their place, within the limit, and together hold every section once."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from llmc.ir.errors import InputError
from llmc.runtime.rag.chunk import Piece, chunk_text
from llmc.runtime.rag.types import Section, Text


def words(text: str) -> int:
    return len(text.split())


def characters(text: str) -> int:
    return len(text)


def wordpieces(text: str) -> int:
    """Like the tokenizer of an encoder: two special tokens, words by four letters, long ones unknown."""
    parts = re.findall(r"\w+|[^\w\s]", text)
    return 2 + sum(1 if len(part) > 100 else -(-len(part) // 4) for part in parts)


def greedy(text: str) -> int:
    """One whose tokens do not add up: what stands together costs more than its parts."""
    return len(text.split()) + len(text) // 40


COUNTERS = (words, characters, wordpieces, greedy)


def document(text: str, *sections: Section, title: str = "") -> Text:
    return Text("doc", title, text, sections or (Section(0, len(text)),), "text/plain")


def laid_out(*parts: tuple[str, tuple[str, ...]], unbroken: bool = False) -> Text:
    """A text of these parts, a blank line between, each a section under its headings."""
    text, sections = "", []
    for part, heading in parts:
        text += "\n\n" if text else ""
        sections.append(Section(len(text), len(text) + len(part), heading, None, unbroken))
        text += part
    return document(text, *sections)


def check(text: Text, pieces: list[Piece], counter, limit: int) -> None:
    """What holds of every cut without overlap."""
    position = 0
    covered = []
    for ordinal, piece in enumerate(pieces):
        assert piece.ordinal == ordinal
        assert text.text[piece.start : piece.end] == piece.text
        assert piece.text.strip() == piece.text != ""
        assert piece.start >= position, "pieces are in order and do not meet"
        assert piece.tokens == counter(piece.text) <= limit or len(piece.text) == 1
        position = piece.end
        covered += [place for place in range(piece.start, piece.end) if not text.text[place].isspace()]
    wanted = [
        place
        for section in text.sections
        for place in range(section.start, section.end)
        if not text.text[place].isspace()
    ]
    assert covered == wanted


# Any text, and text of the marks that rules look at.
PLAIN = st.text(max_size=400) | st.text(alphabet="ab .!?\n\t-1)。中ก\u0301\u200d😀|", max_size=400)


@st.composite
def texts(draw: st.DrawFn) -> Text:
    text, sections = "", []
    for _ in range(draw(st.integers(0, 6))):
        text += draw(st.sampled_from(["", " ", "\n", "\n\n"]))
        part = draw(PLAIN)
        heading = draw(st.sampled_from([(), ("A",), ("A", "B"), ("A", "C"), ("D",)]))
        page = draw(st.sampled_from([None, 1, 2]))
        sections.append(Section(len(text), len(text) + len(part), heading, page, draw(st.booleans())))
        text += part
    return Text("doc", "Title", text, tuple(sections), "text/plain")


@settings(deadline=None, max_examples=400)
@given(texts(), st.sampled_from(COUNTERS), st.integers(10, 60))
@example(document("x" * 10_000), words, 10)
@example(document("é" * 300), characters, 10)
def test_pieces_hold_every_character_once_within_the_limit(text: Text, counter, limit: int) -> None:
    pieces = chunk_text(text, counter, limit)
    check(text, pieces, counter, limit)
    assert pieces == chunk_text(text, counter, limit)
    for piece in pieces:
        assert len(piece.text) <= 17 * limit + 8 or piece.text.count(" ") > limit or "\n" in piece.text


@settings(deadline=None, max_examples=150)
@given(texts(), st.sampled_from(COUNTERS), st.integers(12, 40), st.integers(0, 5))
def test_overlap_repeats_but_loses_nothing(text: Text, counter, limit: int, overlap: int) -> None:
    pieces = chunk_text(text, counter, limit, overlap)
    held = {place for piece in pieces for place in range(piece.start, piece.end)}
    for section in text.sections:
        for place in range(section.start, section.end):
            assert place in held or text.text[place].isspace()
    for piece in pieces:
        assert text.text[piece.start : piece.end] == piece.text
        assert counter(piece.text) <= limit or len(piece.text) == 1
    assert [piece.end for piece in pieces] == sorted(piece.end for piece in pieces)


def test_overlap_begins_with_the_end_of_the_piece_before() -> None:
    text = document(" ".join(f"This is the sentence with the number {n:04d} of many." for n in range(40)))
    pieces = chunk_text(text, words, 50, overlap=12)
    assert len(pieces) > 5
    for one, other in pairwise(pieces):
        shared = text.text[other.start : one.end]
        assert shared and words(shared) <= 12
        assert other.text.startswith("This is")


@pytest.mark.parametrize("counter", COUNTERS)
def test_short_document_is_one_piece(counter) -> None:
    text = laid_out(("One sentence. Another.", ("A",)), ("A list", ("A", "B")), ("And more.", ("C",)))
    (piece,) = chunk_text(text, counter, 200)
    assert (piece.start, piece.end, piece.heading) == (0, len(text.text), "")


def test_short_document_is_one_piece_up_to_the_limit_exactly() -> None:
    text = document(" ".join(f"extraordinary{n}" for n in range(64)))
    assert [piece.tokens for piece in chunk_text(text, words, 64)] == [64]
    assert len(chunk_text(text, words, 63)) == 2


def test_nothing_gives_no_piece() -> None:
    assert chunk_text(document(""), words, 10) == []
    assert chunk_text(document(" \n\t "), words, 10) == []
    assert chunk_text(Text("doc", "T", "text", (), "text/plain"), words, 10) == []


def test_text_outside_of_sections_is_in_no_piece() -> None:
    text = "The Title\n\nThe body of it."
    (piece,) = chunk_text(document(text, Section(11, len(text)), title="The Title"), words, 20)
    assert piece.text == "The body of it."
    assert piece.title == "The Title"
    between = document("one two SKIP three four", Section(0, 7), Section(13, 23))
    assert [piece.text for piece in chunk_text(between, words, 20)] == ["one two", "three four"]


def test_cuts_fall_between_sentences_and_paragraphs() -> None:
    sentences = [f"Sentence number {n} says something that is worth a line." for n in range(30)]
    pieces = chunk_text(document(" ".join(sentences)), words, 50)
    assert all(piece.text.endswith("line.") and piece.text.startswith("Sentence") for piece in pieces)
    paragraphs = "\n\n".join(" ".join(sentences[n : n + 3]) for n in range(0, 30, 3))
    pieces = chunk_text(document(paragraphs), words, 70)
    assert [piece.text.count("\n\n") for piece in pieces] == [1] * len(pieces)


def test_abbreviations_and_initials_end_no_sentence() -> None:
    text = "It was made by Dr. J. R. Smith of St. Louis, e.g. for Mr. Brown and others of that time. " * 8
    for piece in chunk_text(document(text), words, 40):
        assert piece.text.endswith("of that time.")


def test_pieces_of_a_long_text_are_of_about_one_size() -> None:
    text = document(" ".join(f"Here stands sentence {n}, of seven words." for n in range(38)))
    sizes = [piece.tokens for piece in chunk_text(text, words, 256)]
    assert len(sizes) == 2
    assert max(sizes) - min(sizes) <= 14, "no piece of 10 words behind one of 256"


def test_long_words_are_cut_hard() -> None:
    text = document(f"before {'w' * 10_000} after")
    for counter in (words, wordpieces):  # a token each: it is the number of characters that is too many
        pieces = chunk_text(text, counter, 64)
        check(text, pieces, counter, 64)
        assert len(pieces) >= 10
        assert max(len(piece.text) for piece in pieces) <= 16 * 64


def test_text_without_spaces_is_cut_behind_its_own_marks() -> None:
    chinese = "北京是中华人民共和国的首都，位于华北平原的北部，是全国的政治和文化中心。" * 30
    pieces = chunk_text(document(chinese), characters, 100)
    check(document(chinese), pieces, characters, 100)
    assert all(piece.text.endswith("。") for piece in pieces)
    thai = "กรุงเทพมหานครเป็นเมืองหลวงและนครที่มีประชากรมากที่สุดของประเทศไทย" * 20
    pieces = chunk_text(document(thai), characters, 100)
    check(document(thai), pieces, characters, 100)
    # A vowel or tone mark above its consonant is not torn off.
    assert not any(piece.text[0] in "ัิีึืุู็่้๊๋์" for piece in pieces)


def test_joined_emoji_stay_whole() -> None:
    family = "👨‍👩‍👧"
    for piece in chunk_text(document(family * 60), characters, 32):
        assert piece.text[0] not in "\u200d" and piece.text[-1] != "\u200d"


def test_sections_under_one_heading_share_a_piece_and_others_do_not() -> None:
    body = "word " * 29 + "end."
    text = laid_out((body, ("A", "B")), (body, ("A", "B")), (body, ("C", "D")), (body, ("C", "E")))
    pieces = chunk_text(text, words, 80)
    assert [(piece.heading, piece.tokens) for piece in pieces] == [
        ("A › B", 60),
        ("C › D", 30),
        ("C › E", 30),
    ]


def test_small_sections_are_joined_under_what_is_above_both() -> None:
    text = laid_out(*((f"Term {n}\nWhat it means.", ("Glossary", f"Term {n}")) for n in range(40)))
    pieces = chunk_text(text, words, 50)
    assert all(piece.heading == "Glossary" and piece.tokens >= 40 for piece in pieces)
    assert sum(piece.tokens for piece in pieces) == 200


def test_tables_and_code_are_whole_where_they_fit() -> None:
    table = "\n".join(f"row {n} | {n * n}" for n in range(10))
    prose = "This sentence is here to fill the page with words. " * 6
    start = len(prose) + 1
    text = f"{prose}\n{table}\n{prose}"
    sections = (
        Section(0, start, ("A",)),
        Section(start, start + len(table), ("A",), None, True),
        Section(start + len(table), len(text), ("A",)),
    )
    pieces = chunk_text(document(text, *sections), words, 70)
    assert sum(table in piece.text for piece in pieces) == 1


def test_long_tables_are_cut_between_rows_under_their_header() -> None:
    rows = ["name | born | died", *(f"Person {n} | {1800 + n} | {1870 + n}" for n in range(60))]
    pieces = chunk_text(laid_out(("\n".join(rows), ("People",)), unbroken=True), words, 60)
    assert len(pieces) > 3
    assert [line for piece in pieces for line in piece.text.split("\n")] == rows
    assert pieces[0].heading == "People"
    assert {piece.heading for piece in pieces[1:]} == {"People › name | born | died"}


def test_pages_are_where_pieces_begin() -> None:
    page = "Some words stand on this page of the book. " * 10
    text = page * 3
    sections = [Section(n * len(page), (n + 1) * len(page), (), n + 1) for n in range(3)]
    pieces = chunk_text(document(text, *sections), words, 90)
    assert [piece.page for piece in pieces] == [1, 2, 3]
    (piece,) = chunk_text(document(text, *sections), words, 1000)
    assert piece.page == 1


def test_special_tokens_are_not_counted_for_each_sentence() -> None:
    sentence = "These are just four words in here now. "
    text = document(sentence * 20)
    pieces = chunk_text(text, lambda text: len(text.split()) + 2, 82)
    assert [piece.tokens for piece in pieces] == [82, 82]


def test_the_counter_is_called_little() -> None:
    calls = [0, 0]

    def counted(text: str) -> int:
        calls[0] += 1
        calls[1] += len(text)
        return len(text.split())

    text = document("A sentence of some words stands here, and another follows it. " * 20_000)
    pieces = chunk_text(text, counted, 256)
    assert calls[0] <= 20_000 + 3 * len(pieces)
    assert calls[1] <= 2.5 * len(text.text), "each sentence once, and each piece once to verify it"


@pytest.mark.parametrize(
    "unit", ["x", "x ", ".", ". ", "\n", "x\n\n", "中文。", "中", "ก", "- a\n", "a | b\n", "e\u0301"]
)
def test_work_grows_with_the_length_alone(unit: str) -> None:
    counted = [0]

    def counter(text: str) -> int:
        counted[0] += len(text) + 1
        return len(text.encode())

    text = unit * (200_000 // len(unit))
    chunk_text(document(text), counter, 256)
    assert counted[0] <= 8 * len(text) + 10_000


@pytest.mark.parametrize(("limit", "overlap"), [(7, 0), (0, 0), (-5, 0), (20, 11), (20, -1)])
def test_sizes_that_cannot_be_are_refused(limit: int, overlap: int) -> None:
    with pytest.raises(InputError):
        chunk_text(document("some text"), words, limit, overlap)

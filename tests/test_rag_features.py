"""What is worked out of one chunk: terms, names, entities, and what could be another document's title."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmc.runtime.rag.features import features_of
from llmc.runtime.rag.features.demonyms import PLACE_OF
from llmc.runtime.rag.features.names import name_key, title_keys
from llmc.runtime.rag.features.terms import entity_hash, fold, hash_of, term_of, words_of


def entities(text: str) -> list[str]:
    return [mention.key for mention in features_of("", text).mentions]


def could_be(title: str, text: str) -> bool:
    spans = set(features_of("", text).spans.tolist())
    return any(hash_of(key) in spans for key in title_keys(title))


# Terms -----------------------------------------------------------------------------------------------------


def test_words_are_folded() -> None:
    assert words_of("Håkan ŠIMIĆ's straße, Łódź’s Æsir") == ["hakan", "simic", "strasse", "lodz", "aesir"]
    assert words_of("O'Brien's U.S.-made co-op") == ["obrien", "u", "s", "made", "co", "op"]
    assert words_of("a film.The next snake_case") == ["a", "film", "the", "next", "snake", "case"]
    assert words_of("") == words_of(" \n\t… — !") == []


def test_scripts_without_spaces_give_pairs() -> None:
    assert words_of("機械学習 in 東京") == ["機械", "械学", "学習", "in", "東京"]
    assert words_of("猫") == ["猫"]
    assert words_of("Москва и Київ") == ["москва", "и", "киів"]


def test_forms_of_one_word_are_one_term() -> None:
    assert term_of("directed") == term_of("directing") == term_of("directs")
    assert term_of("director") != term_of("direct")
    # The same on every machine, in every process: a store keeps these numbers.
    assert hash_of("ed wood") == 0xBA9D22E11910E12E
    assert hash_of("") != hash_of(" ")


def test_a_people_is_its_place() -> None:
    for people, place in (("Mexican", "Mexico"), ("Austrians", "Austria"), ("Dutch", "Netherlands")):
        assert term_of(fold(people)) == term_of(fold(place))
        assert entity_hash(hash_of(fold(people))) == entity_hash(hash_of(fold(place))) == hash_of(fold(place))
        assert entities(f"She became a {people} painter.") == [fold(people)]  # the name is what stands there
    assert entity_hash(hash_of("mexican hat dance")) == hash_of("mexican hat dance")
    assert term_of("polish") == term_of("polishing") != term_of("poland")
    places = set(PLACE_OF.values())
    assert not places & PLACE_OF.keys()  # a place is nobody's people: one step, whatever the order
    assert all(word == fold(word) and word.isalpha() for word in places | PLACE_OF.keys())


def test_counts_of_title_and_text() -> None:
    found = features_of("Ed Wood (film)", "Ed Wood is a film. The films of Wood.")
    counts = {
        int(t): (int(a), int(b))
        for t, a, b in zip(found.terms, found.title_counts, found.text_counts, strict=True)
    }
    assert counts[term_of("wood")] == (1, 2)
    assert counts[term_of("film")] == (1, 2)
    assert counts[term_of("ed")] == (1, 1)
    assert counts[term_of("the")] == (0, 1)
    assert sum(a for a, _ in counts.values()) == 3 and sum(b for _, b in counts.values()) == 9


def test_a_word_of_ten_thousand_characters_is_one_bounded_term() -> None:
    assert words_of("x" * 10_000) == ["x" * 64]
    assert len(words_of("猫" * 10_000)) < 5000
    assert len(features_of("", "A" * 10_000 + " Paris").terms) == 2


# Entities --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It was directed by Tim Burton, in Los Angeles.", ["tim burton", "los angeles"]),
        ("Ed Wood in Los Angeles", ["ed wood in los angeles", "ed wood", "los angeles"]),
        ("He met Ludwig van Beethoven.", ["ludwig van beethoven"]),
        ("The University of Oxford is old.", ["university of oxford"]),
        ("a cult film.The Sopranos followed", ["sopranos"]),  # glued sentences
        ("In July 1994 Ed Wood died on Monday.", ["1994 ed wood", "ed wood"]),
        ("Burton's Ed Wood", ["burton", "ed wood"]),
        ("by J. K. Rowling and by J.K. Rowling", ["jk rowling", "jk rowling"]),
        ("the 2018 Winter Olympics", ["2018 winter olympics", "winter olympics"]),
        ("However, she was born on July 16, 1966.", []),
        ("Apollo 11 landed", ["apollo 11"]),
        ("“Sinister” and «Doctor Strange»", ["sinister", "doctor strange"]),
        ("São Tomé, Håkan and Łódź", ["sao tome", "hakan and lodz", "hakan", "lodz"]),
        ("the Hork-Bajir Chronicles", ["hork bajir chronicles"]),
        ("nothing here is a name", []),
        ("1984 was a year, 12 of them", []),
    ],
)
def test_entities_by_rules(text: str, expected: list[str]) -> None:
    assert entities(text) == expected


def test_a_span_with_and_is_read_both_ways() -> None:
    assert entities("with Ed Wood and Tim Burton") == ["ed wood and tim burton", "ed wood", "tim burton"]


def test_mentions_point_at_the_text() -> None:
    text = "Directed by Tim Burton’s friend Håkan Nesser, in U.S. cities."
    for mention in features_of("", text).mentions:
        assert text[mention.start : mention.end] == mention.surface
        assert name_key(mention.surface) == mention.key


# Titles ----------------------------------------------------------------------------------------------------


def test_titles_by_which_a_document_is_mentioned() -> None:
    assert title_keys("Ed Wood (film)") == ["ed wood film", "ed wood"]
    assert title_keys("The Hork-Bajir Chronicles") == ["hork bajir chronicles"]
    assert title_keys("J. K. Rowling") == ["jk rowling"]
    assert title_keys("") == title_keys("…") == []
    assert title_keys("The") == ["the"]


@pytest.mark.parametrize(
    ("title", "text"),
    [
        ("Ed Wood (film)", "He starred in Ed Wood."),
        ("Ed Wood", "in Wood's days, Ed Wood’s films"),
        ("The Hork-Bajir Chronicles", "such as The Hork-Bajir Chronicles and others"),
        ("Woodson, Arkansas", "born in Woodson, Arkansas, to"),
        ("Dance with a Vampire", "the song Dance with a Vampire was"),
        ("2018 Winter Olympics", "at the 2018 Winter Olympics"),
        ("J. K. Rowling", "by J.K. Rowling"),
        ("The Sopranos", "a cult film.The Sopranos followed"),
        ("Łódź", "lived in Lodz"),
    ],
)
def test_a_mention_of_a_title_is_found(title: str, text: str) -> None:
    assert could_be(title, text)


def test_what_cannot_be_a_title_is_not_kept() -> None:
    assert not could_be("Ed Wood", "he likes ed wood")
    assert not could_be("The", "The film")
    assert not could_be("Wood. Tim", "He is Ed Wood. Tim left.")  # no name goes over a full stop
    assert len(features_of("", "nothing here is capitalised").spans) == 0


# Whatever comes --------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40), st.text(max_size=400))
def test_any_text_has_features(title: str, text: str) -> None:
    found = features_of(title, text)
    assert found.terms.dtype == found.spans.dtype == np.uint64
    assert np.all(np.diff(found.terms.astype(object)) > 0) and np.all(np.diff(found.spans.astype(object)) > 0)
    assert len(found.terms) == len(found.title_counts) == len(found.text_counts)
    assert np.all(found.title_counts.astype(int) + found.text_counts > 0)
    for mention in found.mentions:
        assert mention.key and text[mention.start : mention.end] == mention.surface
    again = features_of(title, text)
    assert all(
        np.array_equal(getattr(found, f.name), getattr(again, f.name)) for f in dataclasses.fields(found)
    )


@settings(max_examples=100, deadline=None)
@given(st.lists(st.from_regex(r"[A-Z][a-z]{2,8}", fullmatch=True), min_size=1, max_size=8))
def test_every_capitalised_title_is_found_inside_a_sentence(words: list[str]) -> None:
    title = " ".join(words)
    if len(title_keys(title)[0].split()) == len(words):  # no leading article among them
        assert could_be(title, f"and then {title} was there") or fold(words[0]) in ("the", "a", "an")


def test_a_table_of_names_is_bounded() -> None:
    text = ", ".join(f"Name{i} Surname{i}" for i in range(5000))
    found = features_of("", text)
    assert len(found.mentions) == 400 and len(found.spans) < 4100

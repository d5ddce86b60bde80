"""Readers: titles, encodings, limits, and the corpora that lie beside the checkout."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmc.ir.errors import InputError
from llmc.runtime.rag.readers import (
    FORMATS,
    ReadLimits,
    is_supported,
    read_documents,
    suffixes,
    title_from_name,
)
from llmc.runtime.rag.readers.characters import clean
from llmc.runtime.rag.readers.titles import sensible, split_title

from .reading import Read, body, parts


@pytest.fixture
def read(tmp_path: Path) -> Read:
    return Read(tmp_path)


# Titles of plain text.

PROSE = "Edward Davis Wood Jr. was an American filmmaker who made several science fiction films in the 1950s."


@pytest.mark.parametrize(
    ("text", "title", "rest"),
    [
        (f"Ed Wood (film)\n{PROSE}", "Ed Wood (film)", PROSE),
        (f"Ed Wood (film)\n\n{PROSE}", "Ed Wood (film)", PROSE),
        (f"\n\n  Ed Wood  \r\n\r\n\r\n{PROSE}", "Ed Wood", PROSE),
        (f"# Ed Wood\n{PROSE}", "Ed Wood", PROSE),
        (f"Title: Ed Wood: A Life\nText: {PROSE}", "Ed Wood: A Life", f"Text: {PROSE}"),
        ("Ed Wood\nHe made films.", "Ed Wood", "He made films."),
        (f"Who Framed Roger Rabbit?\n\n{PROSE}", "Who Framed Roger Rabbit?", PROSE),
        (f"Sammy Davis Jr.\n{PROSE}", "Sammy Davis Jr.", PROSE),
        (f"M*A*S*H\n{PROSE}", "M*A*S*H", PROSE),
        ("东京\n\n东京是日本的首都。", "东京", "东京是日本的首都。"),
    ],
)
def test_a_first_line_that_is_a_title(read: Read, text: str, title: str, rest: str) -> None:
    document = read.one("a/b.txt", text)
    assert (document.id, document.title, body(document)) == ("a/b.txt", title, rest)
    assert title in document.text.split("\n", 4)[0 if not text.startswith("\n") else 2] or "itle" in text[:6]


@pytest.mark.parametrize(
    "text",
    [
        PROSE,
        "It was the best of times, it was the worst of times, it was the age of\nwisdom, and of folly.",
        "This is a sentence.\n\nAnd another paragraph of the same text.",
        "- one\n- two\n- three",
        "The report that we wrote was about the\n\nthings that came after.",
        "12:30\n\nA time is no title.",
        f"{'many words ' * 30}\n\n{PROSE}",
        "alpha\nbeta\ngamma\ndelta",
        "Dear Sir or Madam,\n\nI write to you.",
    ],
)
def test_a_first_line_that_is_none(read: Read, text: str) -> None:
    document = read.one("b.txt", text)
    assert document.title == ""
    assert body(document) == text


def test_a_title_alone_is_text(read: Read) -> None:
    assert parts(read.one("b.txt", "Ed Wood\n")) == [((), "Ed Wood")]
    document = read.one("b.md", "# Ed Wood\n")
    assert (document.title, body(document)) == ("Ed Wood", "Ed Wood")


@settings(deadline=None)
@given(st.text(max_size=300))
def test_split_title_divides_any_text(text: str) -> None:
    title, start = split_title(clean(text))
    assert bool(title) == bool(start)
    if title:
        assert clean(text)[start:].strip()
        assert title in clean(text)[:start]


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("films/Ed_Wood_(film).txt", "Ed Wood (film)"),
        ("The%20Thing.pdf", "The Thing"),
        ("machine-learning-basics.md", "machine learning basics"),
        ("Spider-Man.txt", "Spider-Man"),
        ("X-Men_(film).txt", "X-Men (film)"),
        ("2001_A_Space_Odyssey.txt", "2001 A Space Odyssey"),
        ("01 - Introduction.md", "Introduction"),
        ("0042_Mr._Robot.txt", "Mr. Robot"),
        ("St._Louis.txt", "St. Louis"),
        ("page.en.html", ""),
        ("日本.txt", "日本"),
        ("sqlite_store.py", "sqlite store"),
        ("00017.txt", ""),
        ("doc_12.txt", ""),
        ("passage-00012.txt", ""),
        ("page_3_of_9.txt", ""),
        ("index.html", ""),
        ("README", ""),
        ("1984.txt", ""),
        (".txt", ""),
        ("", ""),
        ("d41d8cd98f00b204e9800998ecf8427e.txt", ""),
        ("123e4567-e89b-12d3-a456-426614174000.json", ""),
        ("5a8b57f25542995d1e6f1371.txt", ""),
        ("notes" * 40 + "x.txt", "notes" * 40 + "x" if len("notes" * 40 + "x") <= 200 else ""),
    ],
)
def test_titles_from_names(name: str, title: str) -> None:
    assert title_from_name(name) == title


@pytest.mark.parametrize(
    "title",
    [
        "Microsoft Word - report.doc",
        "untitled",
        "Untitled 3",
        "report.pdf",
        "1234",
        "",
        " ",
        "C:\\a\\b.docx",
        "…",
    ],
)
def test_placeholders_are_no_titles(title: str) -> None:
    assert sensible(title) == ""


def test_sensible_titles_stay() -> None:
    assert sensible("  Attention Is\nAll You Need ") == "Attention Is All You Need"


# Characters.

STREAMED = "csv tsv tab jsonl ndjson jsonlines"
"""Suffixes of files that are read row by row: the limit is a row's."""


def test_encodings(read: Read) -> None:
    text = "Grüße aus “Köln” – naïve"
    assert read.one("a.txt", text.encode()).text == text
    assert "encoding" not in read.one("a.txt", text.encode()).metadata
    assert read.one("a.txt", b"\xef\xbb\xbf" + text.encode()).text == text
    for encoding, said in (("utf-16", "utf-16"), ("cp1252", "cp1252"), ("utf-32", "utf-32")):
        document = read.one("a.txt", text.encode(encoding))
        assert (document.text, document.metadata["encoding"]) == (text, said)


def test_mixed_encodings_in_one_file(read: Read) -> None:
    document = read.one("a.txt", "Köln\n".encode() + "Köln \x81".encode("latin-1"))
    assert document.text == "Köln\nKöln"  # a control character at the end is white space
    assert document.metadata["encoding"] == "utf-8+cp1252"


def test_text_is_normalised_and_spans_count_it(read: Read) -> None:
    document = read.one(
        "a.txt", "Cafe\u0301 life\n\nBe\u0301la came to the cafe\u0301.\r\nHe\u00ad llo\u2028there\x07."
    )
    assert document.title == "Café life"
    assert body(document) == "Béla came to the café.\nHe llo\nthere ."


@settings(deadline=None, max_examples=200)
@given(
    st.text(
        alphabet=st.characters() | st.sampled_from("\r\n\x0b\x85\u2028e\u0301\u0316\u1100\u1161"),
        max_size=200,
    )
)
def test_clean_is_stable_and_storable(text: str) -> None:
    cleaned = clean(text)
    assert clean(cleaned) == cleaned
    cleaned.encode("utf-8")
    assert not re.search("[\r\x00\x0b\x0c\x85\u2028]", cleaned)


def test_thousands_of_accents_on_one_letter_cost_no_square_time(read: Read) -> None:
    document = read.one("a.txt", "a" + "\u0301\u0316" * 1_000_000 + " b")
    assert len(document.text) < 100
    assert document.text.endswith(" b")


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.html", "a.csv", "a.jsonl", "a.json", "a.py", "a"])
def test_binary_data_posing_as_text_is_refused(read: Read, name: str) -> None:
    assert "binary" in read.error(name, bytes(range(256)) * 20)
    assert "binary" in read.error(name, b"\x7fELF\x02\x01\x01" + b"\x03\x04\x05" * 1000)


@pytest.mark.parametrize("suffix", suffixes())
@pytest.mark.parametrize("data", [b"", b" \n\t \r\n", b"\xef\xbb\xbf \n"])
def test_nothing_and_white_space_hold_no_text(read: Read, suffix: str, data: bytes) -> None:
    message = read.error(f"x/a.{suffix}", data)
    assert "holds no text" in message or "no readable" in message


@pytest.mark.parametrize("suffix", sorted(set(suffixes()) - {*STREAMED.split()}))
def test_a_file_over_the_limit_is_refused_by_its_name(read: Read, suffix: str) -> None:
    path = read.folder / f"big.{suffix}"
    with open(path, "wb") as file:
        file.truncate(200_000_000)  # sparse
    with pytest.raises(InputError, match=r"has 200\.0 MB; at most 100 MB .*--max-file-mb"):
        list(read_documents(path, path.name))
    with pytest.raises(InputError, match="at most 150 MB"):
        list(read_documents(path, path.name, ReadLimits.of_megabytes(150)))


def test_the_limit_is_at_least_one_megabyte() -> None:
    with pytest.raises(InputError, match="--max-file-mb 0"):
        ReadLimits.of_megabytes(0)


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(InputError, match=r"pipe\.txt: is not a regular file"):
        list(read_documents(tmp_path / "pipe.txt", "pipe.txt"))
    with pytest.raises(InputError, match=r"^x: "):
        list(read_documents(tmp_path, "x"))
    with pytest.raises(InputError, match=r"gone\.txt: cannot be opened: No such file"):
        list(read_documents(tmp_path / "gone.txt", "gone.txt"))
    with pytest.raises(InputError, match="cannot be opened"):
        list(read_documents(tmp_path / "a\0b.txt", "a.txt"))


def test_supported_files(tmp_path: Path) -> None:
    assert all(is_supported(Path(f"x/A.{suffix.upper()}")) for suffix in suffixes())
    for name in ("a.exe", "a.png", "a.zip", "a.safetensors", "no_such_file", "a."):
        assert not is_supported(tmp_path / name)
    (tmp_path / "LICENSE").write_text("Permission is granted.")
    (tmp_path / "program").write_bytes(b"\x7fELF\0\0")
    assert is_supported(tmp_path / "LICENSE")
    assert not is_supported(tmp_path / "program")
    assert not is_supported(tmp_path)
    assert is_supported(Path("Makefile"))


def test_unknown_formats_say_what_is_read(read: Read) -> None:
    assert "convert it to one of" in read.error("a.xyz", b"\0\1\2")
    assert read.one("notes", "Some notes.").text == "Some notes."


def test_names_are_kept_as_they_are(read: Read) -> None:
    for name in ("ümläut/🙂 x.txt", "a#b.txt", "..txt", "  spaces .md"):
        assert read.one(name, "Words.").id == name


def test_each_format_has_a_reader() -> None:
    listed = [suffix for line, _, _ in FORMATS for suffix in line.split()]
    assert len(listed) == len(set(listed))


# Real data.


@pytest.mark.parametrize("name", ["hotpotqa500/corpus.jsonl", "musique_train/musique_train_corpus.json"])
def test_every_row_of_the_corpora_is_one_document(shared_data: Path, name: str) -> None:
    path = shared_data / name
    text = path.read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()] if name.endswith("l") else json.loads(text)
    problems: list[tuple[str, str]] = []
    documents = list(read_documents(path, name, None, lambda id, why: problems.append((id, why))))
    assert not problems
    assert [document.id for document in documents] == [f"{name}#{number}" for number in range(len(rows))]
    for document, row in zip(documents, rows, strict=True):
        assert document.title == clean(row["title"])
        assert body(document) == clean(row["text"]).strip()


def test_a_corpus_of_titles_and_sentences(shared_data: Path, read: Read) -> None:
    rows = json.loads(
        (shared_data / "twowiki_train" / "wikihop_train_preprocess.json").read_text(encoding="utf-8")
    )
    corpus = {title: sentences for row in rows for title, sentences in row["context"]}
    documents = read.all("corpus.json", json.dumps(corpus))
    assert [document.title for document in documents] == [" ".join(clean(title).split()) for title in corpus]
    for document, sentences in zip(documents, corpus.values(), strict=True):
        assert "".join(document.text.split()) == "".join(clean("".join(sentences)).split())


def test_passages_without_titles_get_none(shared_data: Path) -> None:
    path = shared_data / "hotpotqa500" / "corpus.jsonl"
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert sum(bool(split_title(text)[0]) for text in texts) == 0


def test_passages_as_files_keep_their_titles(shared_data: Path) -> None:
    path = shared_data / "hotpotqa500" / "corpus.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for join in ("\n", "\n\n"):
        found = [split_title(f"{row['title']}{join}{row['text']}")[0] == row["title"] for row in rows]
        assert sum(found) >= 0.99 * len(rows)

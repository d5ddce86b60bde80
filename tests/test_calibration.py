"""Calibration text: what is read, what is refused, which tokens come out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llmc.codegen.calibrate import (
    CalibrationOptions,
    TextSource,
    open_work,
    prepare_calibration,
    source_digest,
    work_path,
)
from llmc.frontend.calibration import (
    MIN_TOKENS,
    CalibrationText,
    Sequences,
    TextEncoder,
    make_sequences,
    parse_text,
    read_text_file,
)
from llmc.frontend.source import open_source
from llmc.frontend.tokenizer import export_tokenizer
from llmc.ir.errors import CompileError, InputError
from llmc.passes import calibration as shipped
from llmc.passes.calibration import default_text, too_few_tokens
from llmc.runtime.chat_template import render_once

from .models import BOS, CHAT_TEMPLATE, TURN, save_tokenizer

WORDS = [
    *("river", "boat", "grain", "cloth", "letter", "town", "water", "stone"),
    *("bridge", "market", "road", "field", "house", "horse", "ship", "rain"),
]


def prose(count: int, *, seed: int = 0) -> str:
    """`count` words, of more than a hundred kinds."""
    draw = np.random.default_rng(seed).integers(0, len(WORDS), (count, 2))
    return " ".join(f"{WORDS[a]}{WORDS[b]}" + ("\n" if i % 9 == 0 else "") for i, (a, b) in enumerate(draw))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return folder / "tokenizer.json"


def sequences(text: CalibrationText, tokenizer: Path, **changes: Any) -> Sequences:
    numbers = {"tokens": 4096, "held_tokens": 1024, "length": 128, **changes}
    return make_sequences(text, TextEncoder(tokenizer), **numbers)


def own(sequence: np.ndarray) -> list[int]:
    """Without the BOS that the tokenizer puts before a text."""
    return sequence[1:].tolist()


def test_sequences_cover_the_text_and_the_held_ones_are_its_end(tokenizer: Path) -> None:
    encoder = TextEncoder(tokenizer)
    text = parse_text(prose(4000).encode(), "a.txt")
    stream = [i for piece in _pieces(text) for i in encoder.ids(piece)]
    made = sequences(text, tokenizer)
    assert len(made.sequences) == 32 and len(made.held) == 8 and made.notes == ()
    assert {one.dtype for one in (*made.sequences, *made.held)} == {np.dtype(np.int64)}
    assert {one.shape for one in (*made.sequences, *made.held)} == {(128,)}
    assert encoder.before and all(one[:1].tolist() == encoder.before for one in (*made.sequences, *made.held))
    assert [i for one in made.held for i in own(one)] == stream[-8 * 127 :]
    free = stream[: -8 * 127]
    places = [_find(free, own(one)) for one in made.sequences]
    assert places[0] == 0 and places[-1] == len(free) - 127  # from the beginning to where the held ones begin
    steps = np.diff(places)
    assert steps.min() >= 127 and steps.max() - steps.min() <= 1  # evenly, and no token twice
    again = sequences(parse_text(prose(4000).encode(), "a.txt"), tokenizer)
    assert all(np.array_equal(a, b) for a, b in zip(made.sequences, again.sequences, strict=True))


def _pieces(text: CalibrationText) -> list[Any]:
    from llmc.frontend.calibration import _split

    return [piece for row in text.rows for piece in _split(row)]


def _find(stream: list[int], part: list[int]) -> int:
    return next(i for i in range(len(stream)) if stream[i : i + len(part)] == part)


def test_of_a_long_text_pieces_from_all_over_are_encoded(tokenizer: Path) -> None:
    marked = "".join(f"{prose(400, seed=i)} {chr(0x4E00 + i)}\n" for i in range(300))
    encoder = TextEncoder(tokenizer)
    asked: list[int] = []
    encode = encoder.ids
    encoder.ids = lambda row: asked.append(len(row)) or encode(row)  # type: ignore[method-assign]
    made = make_sequences(
        parse_text(marked.encode(), "a.txt"), encoder, tokens=2048, held_tokens=256, length=128
    )
    assert len(made.sequences) == 16
    assert sum(asked) < len(marked) / 10  # and yet from everywhere:
    thirds = [encode(marked[i * len(marked) // 3 :][:100_000]) for i in range(3)]
    for third, one in zip(thirds, (made.sequences[1], made.sequences[8], made.held[-1]), strict=True):
        grams = {tuple(third[i : i + 12]) for i in range(len(third))}
        assert any(tuple(own(one)[i : i + 12]) in grams for i in range(100))


@pytest.mark.parametrize("length", [16, 100, 256])
def test_short_contexts_get_short_sequences_of_as_many_tokens(tokenizer: Path, length: int) -> None:
    made = sequences(parse_text(prose(4000).encode(), "a.txt"), tokenizer, length=length)
    assert sum(len(one) for one in made.sequences) in range(4096, 4096 + length)
    assert {len(one) for one in made.held} == {length}


def test_a_text_shorter_than_asked_is_used_with_a_note_or_refused_with_both_counts(tokenizer: Path) -> None:
    made = sequences(parse_text(prose(1200).encode(), "a.txt"), tokenizer, tokens=16384, held_tokens=4096)
    used = sum(len(one) for one in made.sequences)
    assert MIN_TOKENS <= used < 16384 and made.held
    assert made.notes[0].startswith(
        f"calibration file a.txt is shorter than asked: {used:,} of 16,384 tokens"
    )
    with pytest.raises(
        InputError, match=r"a\.txt has [\d,]+ tokens, 16,384 to calibrate on and 4,096 to hold"
    ):
        sequences(parse_text(prose(200).encode(), "a.txt"), tokenizer, tokens=16384, held_tokens=4096)
    with pytest.raises(InputError, match=r"500 calibration tokens are too few; at least 2,048"):
        sequences(parse_text(prose(1200).encode(), "a.txt"), tokenizer, tokens=500)


@pytest.mark.parametrize(
    ("data", "name", "said"),
    [
        (b"", "a.txt", r"a\.txt is empty"),
        (b" \n\t\n", "a.txt", r"a\.txt is empty"),
        (b"\xef\xbb\xbf", "a.txt", r"a\.txt is empty"),
        (b"text \xff\xfe", "a.txt", r"a\.txt is not text: byte 0xff at offset 5 is no UTF-8"),
        (b"GGUF\0\0\0", "a.txt", r"a\.txt is not text: it holds a zero byte"),
        (b'{"text": "a"}\n{"text": \n', "a.jsonl", r"a\.jsonl, line 2: no valid JSON"),
        (b"\n[1, 2]\n", "a.jsonl", r"a\.jsonl, line 2: no text and no chat"),
        (b'{"title": "x"}', "a.jsonl", r"line 1: no text and no chat; write"),
        (b'{"messages": []}', "a.jsonl", r"line 1: no text and no chat"),
        (b'{"messages": [{"role": "user"}]}', "a.jsonl", r"line 1: no text and no chat"),
        (b'{"messages": [{"role": 3, "content": "x"}]}', "a.jsonl", r"line 1: no text and no chat"),
        (b'{"text": "a"}\n' + b"[" * 100_000, "a.jsonl", r"line 2: no valid JSON"),
    ],
    ids=str,
)
def test_files_that_are_no_calibration_text(data: bytes, name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=said):
        read_text_file(tmp_path / name)


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"cannot read calibration file .*none\.txt: No such file"):
        read_text_file(tmp_path / "none.txt")
    with pytest.raises(InputError, match=r"cannot read calibration file .*: Is a directory"):
        read_text_file(tmp_path)
    monkeypatch.setattr("llmc.frontend.calibration.MAX_BYTES", 10)
    (tmp_path / "a.txt").write_text("twenty characters ok")
    with pytest.raises(InputError, match=r"more than the .* read; give a part of it"):
        read_text_file(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a" * 60_000, r"has \d+ distinct tokens"),
        (" \n" * 40_000, r"has \d+ distinct tokens"),
        ("the same words again. " * 4000, r"has [5-9] distinct tokens|has \d\d distinct tokens"),
        (prose(200) + "\n" * 60_000, r"and one is (9\d|100)% of all"),
    ],
    ids=["letter", "blanks", "sentence", "mostly blank"],
)
def test_text_of_too_few_distinct_tokens_is_refused_with_their_number(
    text: str, said: str, tokenizer: Path
) -> None:
    with pytest.raises(InputError, match=said):
        sequences(parse_text(text.encode() + b".", "a.txt"), tokenizer)


CHATS: dict[str, Any] = {
    "messages": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]},
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {"role": "assistant", "content": "Yes?"},
        ]
    },
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}]},
    "pair": {"prompt": "Hi", "completion": "Yes?"},
    "lists": {
        "prompt": [{"role": "user", "content": "Hi"}],
        "completion": [{"role": "assistant", "content": "Yes?"}],
    },
}


@pytest.mark.parametrize("form", CHATS)
def test_chats_are_written_by_the_models_template(form: str, tokenizer: Path) -> None:
    row = parse_text(json.dumps(CHATS[form]).encode(), "a.jsonl").rows[0]
    encoder = TextEncoder(tokenizer, CHAT_TEMPLATE, {"bos_token": BOS, "eos_token": "<|eos|>"}, render_once)
    ids = encoder.ids(row)
    wanted = f"{TURN}user\nHi<|eos|>{TURN}assistant\nYes?<|eos|>"
    assert ids == encoder.ids(wanted)
    assert TextEncoder(tokenizer).ids(row) == encoder.ids("Hi\n\nYes?\n\n")  # no template: the turns' text


def test_a_template_that_knows_no_system_role_gets_it_with_the_first_turn(tokenizer: Path) -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'system' or (m['role'] != 'user' and loop.first) %}"
        "{{ raise_exception('no such role') }}{% endif %}{{ m['content'] }}|{% endfor %}"
    )
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    encoder = TextEncoder(tokenizer, template, {}, render_once)
    row = parse_text(json.dumps({"messages": chat}).encode(), "a.jsonl").rows[0]
    assert encoder.ids(row) == encoder.ids("Be brief.\n\nHi|") and encoder.refused == 0
    refused = parse_text(json.dumps({"messages": [{"role": "tool", "content": "x"}]}).encode(), "a.jsonl")
    assert encoder.ids(refused.rows[0]) == encoder.ids("x\n\n") and encoder.refused == 1
    rows = (*refused.rows, *parse_text(prose(4000).encode(), "a.txt").rows)
    text = CalibrationText("a.jsonl", "", rows)
    made = make_sequences(text, encoder, tokens=2048, held_tokens=256, length=128)
    assert "chats that the model's template refuses were taken as plain text" in made.notes[-1]


def test_the_shipped_text_is_mixed_and_pinned(tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = parse_text(default_text(), "calibration.jsonl")
    assert any(not isinstance(row, str) for row in text.rows) and any(
        isinstance(row, str) for row in text.rows
    )
    whole = " ".join(row if isinstance(row, str) else row[-1]["content"] for row in text.rows)
    scripts = {"Latin": "the", "Cyrillic": "и", "Han": "的", "Kana": "の", "Hangul": "다", "Arabic": "ال"}
    assert [name for name, sign in scripts.items() if sign not in whole] == []
    monkeypatch.setattr(shipped, "DEFAULT_SHA256", "0" * 64)
    with pytest.raises(
        CompileError, match=r"calibration text is damaged: its sha256 is .*install llmc again"
    ):
        default_text()


def test_a_model_gets_the_shipped_text_by_its_own_tokenizer(tiny_folder: Any, tmp_path: Path) -> None:
    source = open_source(tiny_folder("llama"))
    facts = export_tokenizer(source, tmp_path, render_once)
    options = CalibrationOptions()
    found, notes = prepare_calibration(TextSource(source, tmp_path, facts, options, render_once), 256)
    assert found.name == "built-in" and found.sha256 == shipped.DEFAULT_SHA256 and notes == []
    assert found.tokens == 16384 and {len(one) for one in found.sequences} == {256}
    assert sum(len(one) for one in found.held) == 4096
    firsts = {tuple(one[1:40].tolist()) for one in found.sequences}
    assert firsts.isdisjoint({tuple(one[1:40].tolist()) for one in found.held})
    with pytest.raises(InputError, match=r"has no tokenizer.*without calibration"):
        prepare_calibration(TextSource(source, tmp_path, None, options, render_once), 256)


def test_work_of_another_model_or_text_is_told_apart(tiny_folder: Any, tmp_path: Path) -> None:
    sources = {name: open_source(tiny_folder(name)) for name in ("llama", "qwen2")}
    assert source_digest(sources["llama"]) == source_digest(open_source(tiny_folder("llama")))
    assert source_digest(sources["llama"]) != source_digest(sources["qwen2"])
    facts = export_tokenizer(sources["llama"], tmp_path, render_once)
    (tmp_path / "a.txt").write_text(prose(9000))
    made = {
        calib: prepare_calibration(
            TextSource(sources["llama"], tmp_path, facts, CalibrationOptions(calib), render_once), 256
        )[0]
        for calib in (None, tmp_path / "a.txt")
    }
    out = tmp_path / "o.llmc"
    scheme = {"scheme": "x"}
    open_work(out, sources["llama"], made[None], scheme, resume=False).save("p", {})
    assert work_path(out).name == "o.llmc.work"
    assert open_work(out, sources["llama"], made[None], scheme, resume=True).resumed == 1
    for source, calib, what in (("qwen2", None, "model"), ("llama", tmp_path / "a.txt", "calibration")):
        with pytest.raises(InputError, match=rf"another compilation: {what}"):
            open_work(out, sources[source], made[calib], scheme, resume=True)


def test_weights_that_saw_too_few_tokens_are_named() -> None:
    assert too_few_tokens("experts.3.up", 4000, 1024) is None
    assert too_few_tokens("experts.3.up", 128, 1024) is None
    note = too_few_tokens("experts.3.up", 127, 1024)
    assert note == "experts.3.up saw 127 calibration tokens, fewer than 128: rounded to nearest instead"
    assert too_few_tokens("w", 31, 16) is not None and too_few_tokens("w", 32, 16) is None

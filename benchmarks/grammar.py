"""What grammars of JSON schemas take and refuse, and how long their masks take.

    python -m benchmarks.grammar [--model qwen2.5-coder] [--limit N] [-o FILE]

Over the development half of MaskBench's schemas and the JSON Schema Test Suite, with a published model's
tokenizer. A schema is accepted or refused with a keyword. Of those accepted, every valid instance must be
writable, in each of json.dumps' three forms, and no invalid one. The answer's text is ours to choose where
JSON leaves a choice: an instance counts in any order of its keys (a grammar has the schema's), and 1.0 may be
written as 1.

Bars: no mismatch; masks p50 < 100 µs and p99 < 2 ms of a core's time. The exit code says whether they hold.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .commands import SCRATCH, machine, report, shared_data
from .published_models import fetch

FILES = {
    "maskbench": "maskbench_dev.jsonl",
    "suite draft 2020-12": "json_schema_test_suite_draft2020-12.jsonl",
    "suite draft 7": "json_schema_test_suite_draft7.jsonl",
}
FORMS: dict[str, dict[str, Any]] = {
    "spaced": {},
    "compact": {"separators": (",", ":")},
    "indented": {"indent": 2},
}
P50, P99 = 100e-6, 2e-3
_TRIES = {True: 3000, False: 100}  # values looked at in search of an order of keys, if valid and if not


@dataclass(frozen=True)
class Row:
    """A schema with its instances: (is valid, value, description)."""

    name: str
    schema: Any
    tests: list[tuple[bool, Any, str]]


def rows_of(file: Path) -> list[Row]:
    """The schemas of one file; those of draft 7 name their draft, as the suite's folder does.

    Tests of the suite that say that a format is only an annotation are left out: ours are held to, which the
    specification leaves to the implementation.
    """
    found: list[Row] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        schema = entry["schema"]
        if "draft7" in file.name and isinstance(schema, dict):
            schema = {"$schema": "http://json-schema.org/draft-07/schema#", **schema}
        tests = [
            (test["valid"], test["data"], test.get("description", ""))
            for test in entry["tests"]
            if "only an annotation" not in test.get("description", "")
        ]
        found.append(Row(entry.get("id") or f"{entry['file']}: {entry['description']}", schema, tests))
    return found


class Writer:
    """Writes values under a grammar, as a model would that knows what it wants to say."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._row = np.zeros(-(-vocab_size // 32), np.int32)
        self._tries = 0
        self.seconds: list[float] = []
        """Of this thread's time, for each mask made in `write`."""

    def write(self, grammar: Any, text: str) -> bool:
        """Whether the grammar lets the text pass, in the tokenizer's own tokens, and may end after it."""
        matcher = grammar.start()
        for token in self._tokenizer.encode(text, add_special_tokens=False):
            began = time.thread_time_ns()
            matcher.fill(self._row)
            self.seconds.append((time.thread_time_ns() - began) * 1e-9)
            if not self._row[token // 32] >> token % 32 & 1:
                return False
            matcher.accept(token)
        return matcher.error is None and matcher.may_end

    def write_in_some_order(self, grammar: Any, value: Any, tries: int) -> bool:
        """Whether any order of keys passes, with whole numbers written with a point or without."""
        self._tries = tries
        return any(end.may_end for end in self._values(grammar.start(), value))

    def _push(self, matcher: Any, text: str) -> Any:
        """The state after a text; None where it does not pass."""
        after = matcher.fork()
        for token in self._tokenizer.encode(text, add_special_tokens=False):
            after.fill(self._row)
            if not self._row[token // 32] >> token % 32 & 1:
                return None
            after.accept(token)
        return after if after.error is None else None

    def _values(self, matcher: Any, value: Any) -> Iterator[Any]:
        """States after the value, one for each way to write it."""
        self._tries -= 1
        if self._tries < 0:
            return
        if isinstance(value, dict):
            opened = self._push(matcher, "{")
            if opened is not None:
                yield from self._members(opened, value, list(value))
        elif isinstance(value, list):
            opened = self._push(matcher, "[")
            if opened is not None:
                yield from self._elements(opened, value, 0)
        else:
            texts = [json.dumps(value, ensure_ascii=False)]
            if isinstance(value, float) and value.is_integer():
                texts.append(str(int(value)))
            yield from (after for text in texts if (after := self._push(matcher, text)) is not None)

    def _members(self, matcher: Any, value: dict[str, Any], left: list[str]) -> Iterator[Any]:
        if not left:
            closed = self._push(matcher, "}")
            if closed is not None:
                yield closed
        for name in left:
            separator = "" if len(left) == len(value) else ", "
            named = self._push(matcher, f"{separator}{json.dumps(name, ensure_ascii=False)}: ")
            if named is not None:
                for after in self._values(named, value[name]):
                    yield from self._members(after, value, [other for other in left if other != name])

    def _elements(self, matcher: Any, value: list[Any], index: int) -> Iterator[Any]:
        ended = self._push(matcher, "]" if index == len(value) else ", " if index else "")
        if ended is None:
            return
        if index == len(value):
            yield ended
            return
        for after in self._values(ended, value[index]):
            yield from self._elements(after, value, index + 1)


@dataclass
class Found:
    """What came of one file's schemas."""

    schemas: int = 0
    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter[str])
    refusals: list[list[str]] = field(default_factory=list[list[str]])
    valid: int = 0
    valid_accepted: int = 0
    reordered: int = 0
    invalid: int = 0
    invalid_refused: int = 0
    mismatches: list[list[str]] = field(default_factory=list[list[str]])
    compile_seconds: list[float] = field(default_factory=list[float])


def check_row(row: Row, grammar: Any, writer: Writer, found: Found) -> None:
    """Hold the grammar against the row's instances."""
    for is_valid, value, description in row.tests:
        as_it_is = [
            writer.write(grammar, json.dumps(value, ensure_ascii=False, **form)) for form in FORMS.values()
        ]
        passes = all(as_it_is) if is_valid else any(as_it_is)
        if not passes and not (is_valid and any(as_it_is)):
            passes = writer.write_in_some_order(grammar, value, _TRIES[is_valid])
            found.reordered += passes and is_valid
        found.valid += is_valid
        found.invalid += not is_valid
        found.valid_accepted += is_valid and passes
        found.invalid_refused += not is_valid and not passes
        if passes != is_valid:
            shown = json.dumps(value, ensure_ascii=False)[:200]
            found.mismatches.append([row.name, description, "refused" if is_valid else "accepted", shown])


def check_file(rows: list[Row], compiler: Any, writer: Writer) -> Found:
    """Compile every schema, and check those that are accepted."""
    from llmc.runtime.grammar import GrammarError

    found = Found(schemas=len(rows))
    for row in rows:
        began = time.perf_counter()
        try:
            grammar = compiler.json_schema(row.schema)
        except GrammarError as error:
            keyword = error.keyword or "(the schema as a whole)"
            found.refused[keyword] += 1
            found.refusals.append([row.name, keyword, error.message[:200]])
            continue
        found.compile_seconds.append(time.perf_counter() - began)
        found.accepted += 1
        check_row(row, grammar, writer, found)
    return found


def compiler_for(model: str) -> tuple[Any, Any, int]:
    """(compiler, tokenizer, vocabulary) of a published model."""
    from llmc.frontend.source import open_source
    from llmc.frontend.tokenizer import export_tokenizer
    from llmc.runtime.grammar import GrammarCompiler
    from llmc.runtime.tokenizer import Tokenizer

    folder = SCRATCH / f"tokenizer-{model}"
    folder.mkdir(parents=True, exist_ok=True)
    facts = export_tokenizer(open_source(fetch(model)), folder)
    assert facts is not None, f"{model} has no tokenizer"
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
    vocab_size = max(facts.vocab_size, tokenizer.vocab_size)
    eos = facts.special_token_ids["eos_token"]
    return GrammarCompiler(tokenizer, vocab_size, [eos]), tokenizer, vocab_size


def record_of(found: Found) -> dict[str, Any]:
    """The part of the record that is about one file."""
    times = np.array(found.compile_seconds or [0.0]) * 1e3
    return {
        "schemas": found.schemas,
        "accepted": found.accepted,
        "refused_by_keyword": dict(found.refused.most_common()),
        "valid": found.valid,
        "valid_accepted": found.valid_accepted,
        "valid_in_another_order": found.reordered,
        "invalid": found.invalid,
        "invalid_refused": found.invalid_refused,
        "mismatches": found.mismatches,
        "compile_ms": {"p50": float(np.median(times)), "max": float(times.max())},
        "refusals": found.refusals,
    }


def show(name: str, found: Found) -> None:
    """A few lines about one file."""
    share = found.accepted / max(1, found.schemas)
    print(
        f"{name}: {found.accepted} of {found.schemas} schemas accepted ({share:.1%}); valid accepted "
        f"{found.valid_accepted} of {found.valid}, invalid refused {found.invalid_refused} of {found.invalid}"
    )
    print("  refused:", ", ".join(f"{keyword} {count}" for keyword, count in found.refused.most_common()))
    for mismatch in found.mismatches:
        print("  MISMATCH:", " | ".join(mismatch))


def main() -> int:
    """Print what was found, write the record, and say by the exit code whether the bars hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="qwen2.5-coder", help="whose tokenizer to use")
    parser.add_argument("--limit", type=int, help="schemas of each file at most")
    parser.add_argument("-o", "--output", type=Path, help="write the record as JSON")
    arguments = parser.parse_args()
    compiler, tokenizer, vocab_size = compiler_for(arguments.model)
    compiler.json_object()  # makes the tokenizer's table
    writer = Writer(tokenizer, vocab_size)
    files: dict[str, Any] = {}
    clean = True
    for name, file in FILES.items():
        rows = rows_of(shared_data() / "jsonschema" / file)[: arguments.limit]
        found = check_file(rows, compiler, writer)
        show(name, found)
        files[name] = record_of(found)
        clean = clean and not found.mismatches
    times = np.array(writer.seconds)
    p50, p99 = float(np.percentile(times, 50)), float(np.percentile(times, 99))
    print(f"{len(times)} masks over {vocab_size} tokens: p50 {p50 * 1e6:.0f} µs, p99 {p99 * 1e3:.2f} ms")
    passed = clean and p50 < P50 and p99 < P99
    record = {
        "machine": machine(),
        "model": arguments.model,
        "vocabulary": vocab_size,
        "masks": {
            "count": len(times),
            "p50_us": p50 * 1e6,
            "p99_us": p99 * 1e6,
            "max_us": float(times.max()) * 1e6,
        },
        "bars": {"mask_p50_us": P50 * 1e6, "mask_p99_us": P99 * 1e6, "mismatches": 0},
        "passed": passed,
        "files": files,
    }
    report(record, arguments.output)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

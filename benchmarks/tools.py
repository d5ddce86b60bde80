"""Tool calls on BFCL (simple_python, multiple, irrelevance), beside llama.cpp's server with the same file.

    python -m benchmarks.tools [--limit N] [--ours qwen.llmc] [--gguf FILE] [-o FILE]

Both servers get the same messages and tools, in the form of OpenAI's API, at temperature 0 with `tool_choice`
auto. Counted are: answers that call, calls whose arguments are valid JSON by their tool's schema, calls that
match the reference (BFCL's AST check: the function, no argument that it lacks, every required one, each value
among those listed), and for irrelevance answers that do not call. BFCL: Patil et al., "The Berkeley Function
Calling Leaderboard", ICML 2025.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import openai

from .commands import SCRATCH, machine, report, shared_data
from .commands import llmc as command
from .llama_server import llama_server
from .published_models import fetch

CATEGORIES = ("simple_python", "multiple", "irrelevance")
_MAX_TOKENS = 256
_COUNTS = ("called", "calls", "valid_calls", "invalid_calls", "cut_calls", "right")
_TYPES = {"dict": "object", "float": "number", "tuple": "array", "int": "integer", "list": "array"}


# The data ------------------------------------------------------------------------------------------------


def schema_of(given: Any) -> Any:
    """A parameter description of BFCL, whose types are Python's, as JSON schema."""
    if isinstance(given, list):
        return [schema_of(one) for one in given]
    if not isinstance(given, dict):
        return given
    if isinstance(given.get("type"), str):
        given = {**given, "type": _TYPES.get(given["type"], given["type"])}
        if given["type"] == "any":
            given.pop("type")
    # BFCL's own marks, which are no keywords, and defaults, which do not bind.
    kept = {name: value for name, value in given.items() if name not in ("optional", "default")}
    return {
        name: {n: schema_of(v) for n, v in value.items()} if name == "properties" else schema_of(value)
        for name, value in kept.items()
    }


def name_of(function: str) -> str:
    """OpenAI's API allows no dots in names."""
    return re.sub(r"[^a-zA-Z0-9_-]", "_", function)[:64]


def tools_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tools of a question, as a request has them."""
    return [
        {
            "type": "function",
            "function": {
                "name": name_of(function["name"]),
                "description": function.get("description", ""),
                "parameters": schema_of(function["parameters"]),
            },
        }
        for function in row["function"]
    ]


def rows_of(folder: Path, category: str, limit: int | None) -> list[dict[str, Any]]:
    """Questions, each with "answer" where the category has answers."""
    rows = _lines(folder / f"BFCL_v4_{category}.json")
    answers = folder / "possible_answer" / f"BFCL_v4_{category}.json"
    if answers.exists():
        known = {row["id"]: row["ground_truth"] for row in _lines(answers)}
        for row in rows:
            row["answer"] = known[row["id"]]
    return rows[:limit]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


# The AST check -------------------------------------------------------------------------------------------


def matches(call: tuple[str, Any], truth: Mapping[str, Any], tools: list[dict[str, Any]]) -> bool:
    """Whether a call is the one that BFCL wants: {function: {argument: [values that count]}}."""
    name, arguments = call
    ((wanted, values),) = truth.items()
    if name != name_of(wanted) or not isinstance(arguments, dict):
        return False
    function = next(tool["function"] for tool in tools if tool["function"]["name"] == name)
    required = function["parameters"].get("required", [])
    if any(argument not in arguments for argument in required):
        return False
    if any(argument not in values for argument in arguments):
        return False
    if any("" not in allowed and argument not in arguments for argument, allowed in values.items()):
        return False
    return all(_among(value, values[argument]) for argument, value in arguments.items())


def _among(value: Any, allowed: list[Any]) -> bool:
    return any(_same(value, one) for one in allowed)


def _same(value: Any, wanted: Any) -> bool:
    """Equality as BFCL has it: texts without case, spaces and most punctuation, integers for floats, lists in
    order, members of objects each among their own values.
    """
    if isinstance(value, str) and isinstance(wanted, str):
        return _plain(value) == _plain(wanted)
    if isinstance(value, bool) or isinstance(wanted, bool):
        return value is wanted
    if isinstance(value, int | float) and isinstance(wanted, int | float):
        return float(value) == float(wanted)
    if isinstance(value, list) and isinstance(wanted, list):
        return len(value) == len(wanted) and all(map(_same, value, wanted))
    if isinstance(value, dict) and isinstance(wanted, dict):
        known = all(name in wanted and _among(one, _list(wanted[name])) for name, one in value.items())
        return known and all("" in _list(allowed) or name in value for name, allowed in wanted.items())
    return value == wanted


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _plain(text: str) -> str:
    return re.sub(r"[ ,./\-_*^']", "", text).lower().replace('"', "")


# Asking --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    calls: list[tuple[str, str]]
    """Name, arguments as text."""
    error: str | None = None
    cut: bool = False
    """Whether it came to an end by `max_tokens`: the last call may be half of one."""


async def ask(
    client: openai.AsyncOpenAI, model: str, rows: list[dict[str, Any]], concurrency: int
) -> list[Answer]:
    """The answer to each question."""
    gate = asyncio.Semaphore(concurrency)
    done = 0

    async def one(row: dict[str, Any]) -> Answer:
        nonlocal done
        async with gate:
            try:
                answer = await client.chat.completions.create(
                    model=model,
                    messages=row["question"][0],
                    tools=tools_of(row),
                    temperature=0,
                    max_tokens=_MAX_TOKENS,
                )
            except openai.APIError as error:
                return Answer([], str(error)[:200])
        done += 1
        if done % 50 == 0:
            print(f"{done} of {len(rows)}", file=sys.stderr, flush=True)
        (choice,) = answer.choices
        calls = [one.function for one in choice.message.tool_calls or [] if one.type == "function"]
        cut = choice.finish_reason == "length"
        return Answer([(call.name, call.arguments) for call in calls], cut=cut)

    return await asyncio.gather(*(one(row) for row in rows))


def grade(rows: list[dict[str, Any]], answers: list[Answer]) -> dict[str, Any]:
    """The numbers of one category. Calls that `max_tokens` cut are counted by themselves, neither valid nor
    invalid.
    """
    count: Counter[str] = Counter()
    errors: list[str] = []
    invalid: list[str] = []
    for row, answer in zip(rows, answers, strict=True):
        calls, error = answer.calls, answer.error
        if error is not None:
            errors.append(f"{row['id']}: {error}")
        tools = tools_of(row)
        parsed = [(name, _valid(name, arguments, tools)) for name, arguments in calls]
        count["called"] += bool(calls)
        count["calls"] += len(calls)
        count["valid_calls"] += sum(arguments is not None for _, arguments in parsed)
        count["cut_calls"] += answer.cut and bool(parsed) and parsed[-1][1] is None
        judged = calls[:-1] if answer.cut else calls
        wrong = [call for call, (_, value) in zip(judged, parsed, strict=False) if value is None]
        count["invalid_calls"] += len(wrong)
        invalid += [f"{row['id']}: {name} {arguments}" for name, arguments in wrong]
        if "answer" in row:
            right = len(parsed) == 1 and matches(parsed[0], row["answer"][0], tools)
        else:
            right = not calls and error is None
        count["right"] += right
    return {
        "questions": len(rows),
        **{name: count[name] for name in _COUNTS},
        "accuracy": round(count["right"] / max(1, len(rows)), 4),
        "invalid": invalid[:5],
        "errors": errors[:5],
        "error_count": len(errors),
    }


def _valid(name: str, arguments: str, tools: list[dict[str, Any]]) -> Any:
    """The arguments, where they are JSON by the schema of a tool of this name; None otherwise."""
    schemas = [tool["function"]["parameters"] for tool in tools if tool["function"]["name"] == name]
    try:
        value = json.loads(arguments)
        jsonschema.validate(value, schemas[0])
    except (ValueError, IndexError, jsonschema.ValidationError):
        return None
    return value


# Servers -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def our_server(artifact: Path, context: int, *options: str) -> Iterator[str]:
    """The address of `llmc serve ARTIFACT`, with these further options."""
    words = [sys.executable, "-m", "llmc.cli.main", "serve", f"model={artifact}", "--port", "0", "--json"]
    words += ["--context", str(context), *options]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        started: dict[str, Any] = json.loads(line or "{}")
        if "url" not in started:
            raise RuntimeError(f"llmc serve did not start: {started.get('error', process.wait())}")
        yield started["url"]
    finally:
        process.terminate()
        process.wait()


def measure(
    url: str,
    rows: Mapping[str, list[dict[str, Any]]],
    concurrency: int,
    result: dict[str, Any],
    keep: Callable[[], None],
) -> None:
    """All categories against one server, but those that `result` holds; `keep` is called after each."""

    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=600) as client:
            for category, questions in rows.items():
                if category in result:
                    continue
                began = time.perf_counter()
                answers = await ask(client, "model", questions, concurrency)
                result[category] = grade(questions, answers)
                result[category]["seconds"] = round(time.perf_counter() - began, 1)
                print(f"{category}: {result[category]}", file=sys.stderr, flush=True)
                keep()

    asyncio.run(run())


def earlier(path: Path | None, model: str, limit: int | None) -> dict[str, Any]:
    """The results of a run that was interrupted: llama.cpp's server takes an hour and more for all."""
    if path is None or not path.is_file():
        return {}
    record = json.loads(path.read_text(encoding="utf-8"))
    same = record.get("model") == model and record.get("limit") == limit
    return record["results"] if same else {}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--gguf", type=Path, help="weights of both servers; Qwen2.5-Coder-0.5B Q4_K_M by default"
    )
    parser.add_argument(
        "--ours", type=Path, help="an artifact of them; compiled with --quant keep by default"
    )
    parser.add_argument("--limit", type=int, help="questions of each category")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--categories", default=",".join(CATEGORIES))
    parser.add_argument("--no-peer", action="store_true", help="leave llama.cpp out")
    parser.add_argument(
        "-o", "--output", type=Path, help="kept after each category; what it has is not asked again"
    )
    arguments = parser.parse_args()
    gguf = arguments.gguf or fetch("qwen2.5-coder")
    artifact = arguments.ours or SCRATCH / f"{gguf.stem}-keep.llmc"
    if not artifact.exists():
        command("compile", gguf, "-o", artifact, "--quant", "keep")
    folder = shared_data() / "bfcl"
    rows = {name: rows_of(folder, name, arguments.limit) for name in arguments.categories.split(",")}
    context, slots = 4096, arguments.concurrency
    results = earlier(arguments.output, gguf.name, arguments.limit)
    record = {"machine": machine(), "model": gguf.name, "limit": arguments.limit, "results": results}
    servers = {"llmc": lambda: our_server(artifact, context)}
    if not arguments.no_peer:
        servers["llama.cpp"] = lambda: llama_server(gguf, context=context, slots=slots)
    for name, server in servers.items():
        found = results.setdefault(name, {})
        if rows.keys() - found.keys():
            with server() as url:
                measure(url, rows, slots, found, lambda: report(record, arguments.output))
    report(record, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Clients that people have, unchanged, against `llmc serve`: LangChain's, LlamaIndex's, lm-eval's.

    python -m benchmarks.clients --model ARTIFACT [--limit 100] [--cache .bench] [-o FILE]

Each runs in an environment of its own (made in the cache from requirements-clients.txt). Checked are: the
text that LangChain and LlamaIndex get, whole and streamed, is the engine's own; a structured answer and a
named tool's call parse; the accuracy that lm-eval's `local-completions` finds is the one that `llmc eval
--mcq` finds on the same questions.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .commands import SCRATCH, machine, report, shared_data
from .commands import llmc as command
from .environments import CLIENTS
from .tools import our_server

QUESTION = "What is the capital of France?"


def ask(python: Path, client: str, *arguments: str) -> dict[str, Any]:
    """What a client's program prints last."""
    # The hub is not needed: a client that asks for it waits for a network that may not be there.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(python), str(CLIENTS.program(client)), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    if done.returncode:
        sys.exit(f"error: {client} failed")
    return json.loads(done.stdout.strip().splitlines()[-1])


def own_answer(artifact: Path) -> str:
    """What the engine itself answers."""
    import llmc

    with llmc.load(artifact, max_sequences=1, context=2048) as llm:
        messages = [{"role": "user", "content": QUESTION}]
        return llm.generate(messages, max_tokens=60, temperature=0.0).text


def tokenizer_folder(artifact: Path, folder: Path) -> Path:
    """The artifact's tokenizer as transformers reads it, for a client that counts tokens itself."""
    (folder / "tokenizer.json").write_bytes((artifact / "tokenizer.json").read_bytes())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="an artifact with a chat template")
    parser.add_argument("--limit", type=int, default=100, help="questions for lm-eval")
    parser.add_argument("--cache", type=Path, default=SCRATCH, help="where environments are kept")
    CLIENTS.add_option(parser)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    given = dict(CLIENTS.named(text) for text in arguments.peer_python)
    python = {name: CLIENTS.python_of(name, given, arguments.cache.absolute()) for name in CLIENTS.programs}
    questions = shared_data() / "multiple_choice" / "arc_easy.jsonl"
    limit = str(arguments.limit)
    results: dict[str, Any] = {"own": own_answer(arguments.model)}
    with our_server(arguments.model, 2048) as url, tempfile.TemporaryDirectory() as folder:
        for name in ("langchain", "llama-index"):
            results[name] = ask(python[name], name, url, "model", QUESTION)
        tokenizer = tokenizer_folder(arguments.model, Path(folder))
        results["lm-eval"] = ask(
            python["lm-eval"], "lm-eval", url, "model", str(tokenizer), str(questions), limit
        )
    (own,) = command("eval", arguments.model, "--mcq", questions, "--limit", limit)["mcq"]
    results["llmc eval"] = {"acc": own["acc"], "acc_norm": own["acc_norm"]}
    problems = differences(results)
    report({"machine": machine(), "results": results, "problems": problems}, arguments.output)
    return 1 if problems else 0


def differences(results: dict[str, Any]) -> list[str]:
    """What is not as it should be."""
    problems = [
        f"{name}: {key} is {results[name][key]!r}, the engine says {results['own']!r}"
        for name in ("langchain", "llama-index")
        for key in ("text", "streamed")
        if results[name][key] != results["own"]
    ]
    person = results["langchain"]["structured"]
    if not isinstance(person.get("name"), str) or not isinstance(person.get("age"), int):
        problems.append(f"langchain: structured is {person!r}")
    called = results["langchain"]["called"]
    if [call["name"] for call in called] != ["Person"] or set(called[0]["args"]) != {"name", "age"}:
        problems.append(f"langchain: called is {called!r}")
    for name, value in results["llmc eval"].items():
        if abs(results["lm-eval"][name] - value) > 1e-9:
            problems.append(f"lm-eval: {name} is {results['lm-eval'][name]}, llmc eval says {value}")
    return problems


if __name__ == "__main__":
    sys.exit(main())

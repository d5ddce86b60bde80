"""Commands that generate, on an artifact whose logits are all zero: every token is as likely as any other."""

from __future__ import annotations

import io
import json
import shutil
import time
from pathlib import Path

import pytest
from llmc.cli.bench import gathered_tables

from .command_line import Capture, run, run_json
from .models import BOS, CHAT_TEMPLATE, CONTEXT, EOS, VOCAB_SIZE, tiny_tokenizer


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from llmc.codegen.artifact import ArtifactWriter

    path = tmp_path_factory.mktemp("null") / "null.llmc"
    manifest = {
        "kind": "causal_lm",
        "model": {
            "name": "zeros",
            "architecture": "null",
            "num_layers": 1,
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 8,
            "context_length": CONTEXT,
            "eos_token_ids": [2],
            "bos_token_id": 1,
            "kv": [{"heads": 1, "head_dim": 8, "window": None}],
            "generation": {},
        },
        "quantization": {"scheme": "none", "bits_per_weight": 32.0, "weight_bytes": 0},
        "inputs": [],
        "outputs": [],
        "page_size": 16,
        "kv_dtype": "float32",
        "targets": {"null": {"options": {}, "batch_invariant": True, "arguments": []}},
        "tokenizer": {
            "path": "tokenizer.json",
            "chat_template": "chat_template.jinja",
            "special_tokens": {"bos_token": BOS, "eos_token": EOS},
        },
    }
    with ArtifactWriter(path) as writer:
        tiny_tokenizer().save(str(writer.path("tokenizer.json")))
        writer.path("chat_template.jinja").write_text(CHAT_TEMPLATE)
        writer.path("ir.txt").write_text('graph "zeros" stage="paged"\n')
        writer.finish(manifest)
    return path


def test_run_streams_text_and_says_its_speed(capsys: Capture, artifact: Path) -> None:
    sampling = ["--temperature", "1", "--seed", "3", "--max-tokens", "20", "--ignore-eos"]
    words = ["run", str(artifact), "Hi", *sampling]
    code, out, err = run(capsys, *words)
    assert code == 0
    assert out.strip()
    assert out.endswith("\n")
    assert "kv cache:" in err
    assert "answer 20 tokens" in err
    answer = run_json(capsys, *words)
    assert answer["text"].rstrip("\n") == out.rstrip("\n")
    assert answer["generated_tokens"] == 20
    assert answer["finish_reason"] == "length"
    # <|bos|> <|turn|> "user\n" "Hi" <|eos|> <|turn|> "assistant\n", as the template writes it.
    chat = CHAT_TEMPLATE.count("<|turn|>")
    prompt = f"{BOS}<|turn|>user\nHi{EOS}<|turn|>assistant\n"
    assert chat == 2
    assert answer["prompt_tokens"] == len(tiny_tokenizer().encode(prompt, add_special_tokens=False).ids)
    plain = run_json(capsys, *words, "--no-chat-template")
    assert plain["prompt_tokens"] == len(tiny_tokenizer().encode("Hi").ids)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--top-p", "0"], "top_p"),
        (["--temperature", "-1"], "temperature"),
        (["--temperature", "nan"], "temperature"),
        (["--max-tokens", "0"], "max_tokens"),
        (["--min-p", "2"], "min_p"),
        (["--stop", ""], "stop"),
        (["--target", "onnx-cpu"], "not compiled for target 'onnx-cpu'"),
        (["--context", "100000"], "context is 100000"),
        (["--threads", "1000000"], "threads is 1000000; allowed: 1 to"),
        (["--temperature", "warm"], "'warm' is not a valid float"),
    ],
)
def test_run_refuses_impossible_values(
    options: list[str], said: str, capsys: Capture, artifact: Path
) -> None:
    code, out, err = run(capsys, "run", str(artifact), "Hi", *options)
    assert (code, out) == (2, "")
    assert said in err.splitlines()[-1]


def test_run_refuses_prompts_that_do_not_fit_or_are_empty(capsys: Capture, artifact: Path) -> None:
    code, _, err = run(capsys, "run", str(artifact), "word " * 500)
    assert code == 2
    assert "context_length_exceeded" in err
    assert str(CONTEXT) in err
    tokenizer_adds_bos = run(capsys, "run", str(artifact), "", "--no-chat-template", "--max-tokens", "1")
    assert tokenizer_adds_bos[0] == 0


def test_chat_keeps_the_conversation(
    capsys: Capture, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n\n/nonsense\nAgain\n/exit\nnever read\n"))
    sampling = ["--max-tokens", "4", "--temperature", "1", "--seed", "1", "--ignore-eos"]
    found = run_json(capsys, "chat", str(artifact), "--system", "Be brief", *sampling)
    roles = [message["role"] for message in found["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in found["messages"] if m["role"] == "user"] == ["Hi", "Again"]
    first, second = found["answers"]
    assert first["generated_tokens"] == second["generated_tokens"] == 4
    assert second["prompt_tokens"] > first["prompt_tokens"] + 4


def test_chat_clear_forgets(capsys: Capture, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n/clear\nHi\n"))
    found = run_json(capsys, "chat", str(artifact), "--max-tokens", "4")
    assert len(found["messages"]) == 2
    assert found["answers"][0]["prompt_tokens"] == found["answers"][1]["prompt_tokens"]


def test_chat_goes_on_after_a_message_that_does_not_fit(
    capsys: Capture, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("word " * 500 + "\nHi\n"))
    code, out, err = run(capsys, "chat", str(artifact), "--max-tokens", "4", "--json")
    assert code == 0
    assert "context_length_exceeded" in err
    found = json.loads(out)
    assert [message["content"] for message in found["messages"]][:1] == ["Hi"]
    assert "context_length_exceeded" in found["answers"][0]["error"]
    assert found["answers"][1]["generated_tokens"] == 4


def test_chat_that_fills_the_context_says_how_to_go_on(
    capsys: Capture, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n" + "word " * 500 + "\n"))
    code, _, err = run(capsys, "chat", str(artifact), "--max-tokens", "4")
    assert code == 0
    assert "context_length_exceeded" in err
    assert err.splitlines()[-1].endswith("; /clear begins anew")


def test_bytes_that_are_no_text_are_named(
    capsys: Capture, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = run(capsys, "run", str(artifact), b"a\xff".decode(errors="surrogateescape"))
    assert (code, out) == (2, "")
    assert "not valid Unicode" in err.splitlines()[-1]
    monkeypatch.setattr("sys.stdin", io.StringIO("\udcff\nHi\n"))
    found = run_json(capsys, "chat", str(artifact), "--max-tokens", "2")
    assert "not valid Unicode" in found["answers"][0]["error"]
    assert found["messages"][0]["content"] == "Hi"


def test_stopping_an_answer_keeps_what_was_said(artifact: Path) -> None:
    import llmc
    from llmc.cli.answer import stream_answer

    pieces: list[str] = []

    def write(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    with llmc.load(artifact, kv_tokens=512) as llm:
        params = llm.sampling(temperature=1.0, seed=5, max_tokens=100, ignore_eos=True)
        answer = stream_answer(llm, "Hi", params, write)
        assert answer.finish_reason == "cancelled"
        assert answer.text == "".join(pieces)
        deadline = time.monotonic() + 30
        while llm.stats.running and time.monotonic() < deadline:
            time.sleep(0.01)  # the engine's thread takes the cancellation up between two steps
        assert llm.stats.running == 0


def test_eval_of_uniform_logits_is_the_vocabulary(capsys: Capture, artifact: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The river was wide and slow. " * 40)
    words = ["eval", str(artifact), "--ppl", str(text), "--window", "64", "--windows", "2"]
    found = run_json(capsys, *words, "--against", str(artifact))
    assert found["ppl"] == pytest.approx(VOCAB_SIZE, rel=1e-4)
    assert (found["kl"], found["top1_agreement"], found["tokens"]) == (0, 1, 2 * 63)
    code, _, err = run(capsys, *words[:-2], "--window", str(CONTEXT + 1))
    assert code == 2
    assert f"pass --window {CONTEXT}" in err
    text.write_text("Too short.")
    code, _, err = run(capsys, *words)
    assert code == 2
    assert "--window" in err
    text.write_bytes(b"abc\xff")
    assert "not UTF-8 (byte 3)" in run(capsys, *words)[2]


def test_bench_counts_tables_that_are_only_looked_up() -> None:
    text = """
weight @"tied.q" : uint8[8, 4]
%0 : float32[T, 4] = quantized_embedding(%ids, @"tied.q", @"tied.scale", _) loc "embed"
%1 : float32[T, 4] = embedding(%positions, @wpe.weight) loc "@nonsense"
%2 : float32[T, 4] = add(%0, %1)
%3 : float32[T, 8] = quantized_linear(%2, @"tied.q", @"tied.scale", _, _) loc "lm_head"
"""
    assert gathered_tables(text) == {"wpe.weight"}


@pytest.mark.slow
def test_bench_has_every_key(capsys: Capture, artifact: Path) -> None:
    sizes = ["--prompt-tokens", "100", "--output-tokens", "8", "--concurrency", "2", "--repeat", "1"]
    assert "can be profiled" in run(capsys, "bench", str(artifact), *sizes, "--profile")[2]
    found = run_json(capsys, "bench", str(artifact), *sizes)
    keys = {"prefill_tok_s", "decode_tok_s", "batch", "load_ms", "first_token_ms", "weight_bytes_per_token"}
    keys.add("load_to_token_ms")
    assert keys <= set(found)
    assert [set(row) for row in found["batch"]] == [{"concurrency", "output_tok_s", "total_tok_s"}]
    assert 0 < found["load_ms"] < found["load_to_token_ms"] < found["first_token_ms"]


def test_inspect_verifies_an_artifact(capsys: Capture, artifact: Path, tmp_path: Path) -> None:
    report = run_json(capsys, "inspect", str(artifact))
    assert report["kind"] == "artifact"
    assert report["kv_bytes_per_token"] == 2 * 8 * 4
    assert report["targets"]["null"]["weight_bytes"] == 0
    damaged = tmp_path / "damaged.llmc"
    shutil.copytree(artifact, damaged)
    (damaged / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace("assistant", "assassin_"))
    code, _, err = run(capsys, "inspect", str(damaged))
    assert code == 2
    assert "chat_template.jinja is damaged" in err
    assert run(capsys, "inspect", "--no-verify", str(damaged))[0] == 0

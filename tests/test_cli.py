"""The command line: one JSON object, one line for an error, the right exit code, never a bare traceback."""

from __future__ import annotations

import errno
import importlib.metadata
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from llmc.cli import main as cli_main
from llmc.cli import reference
from llmc.cli.bench import gathered_tables
from llmc.cli.main import COMMANDS, explain, main
from llmc.ir.errors import ArtifactError, CompileError, InputError

from .conftest import ROOT
from .models import BOS, CHAT_TEMPLATE, CONTEXT, EOS, VOCAB_SIZE, tiny_tokenizer

Capture = pytest.CaptureFixture[str]


def run(capsys: Capture, *words: str) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_json(capsys: Capture, *words: str) -> dict[str, Any]:
    code, out, err = run(capsys, *words, "--json")
    assert code == 0, err
    return json.loads(out)


def test_help_lists_every_command(capsys: Capture) -> None:
    code, out, err = run(capsys, "--help")
    assert (code, err) == (0, "")
    listed = [line.split()[0] for line in out[out.index("Commands:") :].splitlines()[1:] if line.strip()]
    assert listed == list(COMMANDS)
    summaries = out[out.index("Commands:") :].splitlines()
    assert not [line for line in summaries if line.endswith("...")], "a summary is cut off"


def test_no_words_is_help_and_a_wrong_call(capsys: Capture) -> None:
    code, out, _ = run(capsys)
    assert code == 2
    assert "Commands:" in out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_json(name: str, capsys: Capture) -> None:
    code, out, _ = run(capsys, name, "--help")
    assert code == 0
    assert "--json" in out


def test_reference_page_is_up_to_date() -> None:
    assert (ROOT / "docs/cli.md").read_text() == reference.text(), "make docs"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["inspect"], "Missing argument 'PATH'"),
        (["inspect", "--nonsense", "x"], "No such option"),
        (["inspect", "/nowhere/at/all"], "/nowhere/at/all does not exist"),
        (["compile", "x"], "Missing option '-o'"),
        (["eval", "x.llmc"], "nothing to measure: pass --ppl FILE, --mcq FILE or --moe FILE"),
        (["eval", "x.llmc", "--ppl", "x", "--rolling", "--windows", "2"], "--rolling scores the whole text"),
        (["run", "/nowhere.llmc", "hi"], "/nowhere.llmc does not exist"),
    ],
)
def test_wrong_calls_are_one_line_and_exit_2(words: list[str], said: str, capsys: Capture) -> None:
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err


def test_errors_are_json_too(capsys: Capture) -> None:
    code, out, err = run(capsys, "inspect", "/nowhere", "--json")
    assert code == 2
    assert json.loads(out) == {"error": err.removeprefix("error: ").strip(), "exit_code": 2}


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            InputError("a.gguf is cut short", remedy="download it again"),
            2,
            "a.gguf is cut short; download it again",
        ),
        (ArtifactError("x"), 2, "x"),
        (CompileError("pass fuse failed"), 1, "pass fuse failed"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "a.txt"),
            2,
            "a.txt: no such file or directory",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "w.bin"), 1, "w.bin: no space left on device"),
        (MemoryError(), 1, "out of memory"),
        (KeyboardInterrupt(), 1, "interrupted"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 1, "pip install 'llmc[compile]'"),
        (click.UsageError("bad."), 2, "bad; see llmc --help"),
        (KeyError("x"), 1, "KeyError: 'x'; this is a bug in llmc, LLMC_DEBUG=1"),
    ],
)
def test_every_kind_of_error_becomes_a_line(error: BaseException, code: int, said: str) -> None:
    message, found = explain(error)
    assert found == code
    assert said in message


def test_a_bug_names_its_place_and_hides_its_traceback(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr(cli_main.llmc, "main", broken)
    code, out, err = run(capsys, "doctor")
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert "ZeroDivisionError: two lines at test_cli.py:" in err
    monkeypatch.setenv("LLMC_DEBUG", "1")
    assert "Traceback (most recent call last)" in run(capsys, "doctor")[2]


def test_a_closed_pipe_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "llmc.cli.main", "doctor"], stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("json_flag", [[], ["--json"]])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_stdout_is_one_line(json_flag: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "llmc.cli.main", "targets", *json_flag],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (done.returncode, done.stderr) == (1, "error: no space left on device\n")


@pytest.mark.parametrize("thread", [False, True])
def test_the_program_ends_with_its_code_and_does_what_was_to_be_done_at_exit(
    thread: bool, tmp_path: Path
) -> None:
    """A thread that goes on is waited for, as Python does."""
    code = f"""
import atexit, sys, threading, time
from llmc.cli.main import script
atexit.register(lambda: print("at exit"))
if {thread}:
    threading.Thread(target=lambda: (time.sleep(0.5), print("thread"))).start()
sys.argv = ["llmc", "inspect", {str(tmp_path / "none.llmc")!r}]
script()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout.split("\n") == [*(["thread"] if thread else []), "at exit", ""]


def test_streams_closed_from_the_start_are_no_error() -> None:
    words = f"{shlex.quote(sys.executable)} -m llmc.cli.main targets"
    done = subprocess.run(f"{words} <&- >&-", shell=True, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_doctor_reports_this_machine(capsys: Capture) -> None:
    report = run_json(capsys, "doctor")
    assert report["ok"] is True
    assert report["cpu"]["isa"] == report["cpu"]["isa_levels"][-1]
    by_name = {package["name"]: package for package in report["packages"]}
    assert by_name["apache-tvm-ffi"]["required"].startswith("==")
    assert by_name["apache-tvm-ffi"]["extra"] == "compile"
    assert by_name["numpy"]["extra"] == ""
    assert by_name["torch"]["extra"] == "compile"
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert "apache-tvm-ffi" in out


@pytest.mark.parametrize(
    ("name", "version", "code", "can_run"),
    [("apache-tvm-ffi", "0.1.15", 0, True), ("numpy", "1.26.4", 1, False)],
)
def test_doctor_names_a_wrong_version(
    name: str, version: str, code: int, can_run: bool, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda asked: version if asked == name else real(asked)
    )
    found, out, _ = run(capsys, "doctor", "--json")
    can = json.loads(out)["can"]
    assert found == code
    assert can == {"run": can_run, "compile": False, "wrong_packages": [f"{name} {version}"]}


def test_targets_lists_ours_with_their_origin(capsys: Capture) -> None:
    rows = {row["name"]: row for row in run_json(capsys, "targets")["targets"]}
    assert {"null", "tvm-cpu", "onnx-cpu"} <= set(rows)
    assert {row["package"] for row in rows.values()} == {"llmc"}
    assert not [row for row in rows.values() if "error" in row]


def test_passes_lists_ours_with_their_options(capsys: Capture) -> None:
    rows = run_json(capsys, "passes")["passes"]
    assert rows
    assert {row["package"] for row in rows} == {"llmc"}
    assert all(row["summary"] for row in rows)


def test_inspect_reads_a_folder(capsys: Capture, tiny_folder: Any) -> None:
    folder: Path = tiny_folder("llama")
    report = run_json(capsys, "inspect", str(folder), "--tensors")
    assert report["kind"] == "folder"
    assert report["model"]["architecture"] == "LlamaForCausalLM"
    assert report["model"]["hidden_size"] == 64
    assert (
        report["weight_bytes"] == 4 * report["parameters"] == sum(row["bytes"] for row in report["tensors"])
    )
    code, out, _ = run(capsys, "inspect", str(folder))
    assert code == 0
    assert "LlamaForCausalLM" in out


def test_inspect_reads_gguf_headers(capsys: Capture, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_name("a name")
    writer.add_context_length(77)
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    report = run_json(capsys, "inspect", str(tmp_path / "a.gguf"), "--tensors")
    assert report["kind"] == "gguf"
    assert report["model"]["name"] == "a name"
    assert report["model"]["context_length"] == 77
    assert report["tensors"] == [
        {"name": "token_embd.weight", "shape": [8, 32], "type": "F32", "bytes": 1024}
    ]
    assert report["bits_per_weight"] == 32


def test_inspect_refuses_damage(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03")
    code, _, err = run(capsys, "inspect", str(tmp_path / "cut.gguf"))
    assert code == 2
    assert "cut.gguf" in err
    (tmp_path / "config.json").write_text("{")
    code, _, err = run(capsys, "inspect", str(tmp_path))
    assert code == 2
    assert "config.json is not JSON" in err


# ---------------------------------------------------------------------------------------------------------
# Commands that generate, on an artifact whose logits are all zero: every token is as likely as any other.


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

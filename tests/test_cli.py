"""The command line: one JSON object, one line for an error, the right exit code, never a bare traceback."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from llmc.cli import main as cli_main
from llmc.cli import reference
from llmc.cli.main import COMMANDS, explain
from llmc.ir.errors import ArtifactError, CompileError, InputError

from .command_line import Capture, run, run_json
from .conftest import ROOT


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

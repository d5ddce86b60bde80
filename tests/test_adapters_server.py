"""Adapters behind the server: the names of models, and loading and unloading while it runs. The model is a
fake that turns its answer by a number that the adapter holds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llmc
import numpy as np
import pytest
from llmc.cli.serve import _adapters, _named_adapters
from llmc.ir.errors import InputError
from llmc.ir.gguf_rows import GGUFRows
from llmc.runtime import adapters
from llmc.runtime.adapter_places import AdapterPlaces, Factors, Place
from llmc.runtime.chat_template import ChatTemplate
from llmc.runtime.engine import Engine, EngineOptions, ModelFacts
from llmc.runtime.llm import LLM
from llmc.runtime.server import ServerSettings
from llmc.runtime.server.service import ServedModel

from .lora_files import write_adapter, write_lora
from .models import save_tiny
from .server_harness import TEMPLATE, GatedExecutor, RunningServer, wait_until
from .test_runtime_detokenizer import byte_level

MODULE = "model.layer"


class TurningExecutor(GatedExecutor):
    """Each row of logits is rolled by the number in its adapter's slot."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.adapter_places = AdapterPlaces(64, (Place(2, ((MODULE, 3),)),))
        self.turns: dict[int, int] = {}
        self.engine: Any = None
        self.packed_while: list[bool] = []

    def packed_adapter(self, factors: Factors) -> int:
        if self.engine is not None:
            self.packed_while.append(self.engine._pauser is not None)
        a, b = factors[0][0] or (np.zeros((1, 1)), np.zeros((1, 1)))
        return int(b[0] @ a[:, 0])

    def set_adapter(self, slot: int, packed: int) -> None:
        self.turns[slot] = packed

    def clear_adapter(self, slot: int) -> None:
        del self.turns[slot]

    def step(self, inputs: Any) -> Any:
        logits = super().step(inputs)
        if inputs.adapter is not None:
            for row, slot in zip(logits, inputs.adapter[inputs.output_index], strict=True):
                row[:] = np.roll(row, self.turns[int(slot)]) if slot >= 0 else row
        return logits


def turning_llm() -> LLM:
    tokenizer = byte_level()
    executor = TurningExecutor(tokenizer.vocab_size)
    facts = ModelFacts(tokenizer.vocab_size, 400, ())
    engine = Engine(executor, tokenizer, facts, EngineOptions(kv_tokens=2000))
    return LLM(executor, engine=engine, template=ChatTemplate(TEMPLATE))


def adapter(folder: Path, turn: int, module: str = MODULE, rows: int = 3) -> Path:
    a = np.zeros((2, 2), np.float32)
    b = np.zeros((rows, 2), np.float32)
    a[0, 0], b[0, 0] = 1, turn
    return write_adapter(folder, {module: (a, b)})


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    llm = turning_llm()
    llm.load_adapter("one", adapter(tmp_path / "elsewhere", 1))
    (tmp_path / "adapters").mkdir()
    for turn in (2, 3):
        adapter(tmp_path / "adapters" / f"turn{turn}", turn)
    settings = ServerSettings(adapter_folder=tmp_path / "adapters")
    with RunningServer({"base": llm}, settings) as running:
        yield running


def answer(server: RunningServer, model: str | None, path: str = "/v1/completions", **body: Any) -> Any:
    given = {"prompt": "Hello", "max_tokens": 6, "temperature": 0, **body}
    status, content, _ = server.request("POST", path, given if model is None else {"model": model, **given})
    assert status == 200, content
    return content


def load(server: RunningServer, name: str, path: str, **body: Any) -> tuple[int, Any]:
    status, content, _ = server.request(
        "POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path, **body}
    )
    return status, content


def unload(server: RunningServer, name: str) -> tuple[int, Any]:
    status, content, _ = server.request("POST", "/v1/unload_lora_adapter", {"lora_name": name})
    return status, content


def test_an_adapter_is_a_model_of_its_own_name(server: RunningServer) -> None:
    _, listed, _ = server.request("GET", "/v1/models")
    assert [(one["id"], one.get("parent")) for one in listed["data"]] == [("base", None), ("one", "base")]
    base, one = answer(server, "base"), answer(server, "one")
    assert answer(server, None)["choices"] == base["choices"]
    assert one["model"] == "one" and one["choices"][0]["text"] != base["choices"][0]["text"]
    assert server.request("GET", "/v1/models/one")[1]["root"] == "base"


def test_chat_and_responses_take_it_too(server: RunningServer) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    chats = [
        server.request(
            "POST",
            "/v1/chat/completions",
            {"model": m, "messages": messages, "max_tokens": 6, "temperature": 0},
        )[1]["choices"][0]["message"]["content"]
        for m in ("base", "one", "one")
    ]
    assert chats[0] != chats[1] == chats[2]
    made = [
        server.request(
            "POST", "/v1/responses", {"model": m, "input": "Hello", "max_output_tokens": 6, "temperature": 0}
        )[1]["output"]
        for m in ("base", "one")
    ]
    assert made[0] != made[1]


def test_adapters_come_and_go(server: RunningServer) -> None:
    status, entry = load(server, "two", "turn2")
    assert (status, entry["id"], entry["parent"]) == (200, "two", "base")
    two = answer(server, "two")["choices"]
    assert two not in (answer(server, "base")["choices"], answer(server, "one")["choices"])
    assert unload(server, "two") == (200, {"id": "two", "object": "model", "deleted": True})
    status, gone, _ = server.request("POST", "/v1/completions", {"model": "two", "prompt": "Hello"})
    assert (status, gone["error"]["code"]) == (404, "model_not_found")
    assert load(server, "two", "turn3", base_model_name="base")[0] == 200  # the same name and prompt
    assert answer(server, "two")["choices"] != two


def test_a_gguf_file_and_a_link_to_one(server: RunningServer, tmp_path: Path) -> None:
    """As caches of downloads have them: a link with the name, a file without."""
    pytest.importorskip("gguf")
    factors = {"blk.0.x.weight.lora_a": np.eye(2, dtype="f"), "blk.0.x.weight.lora_b": np.zeros((3, 2), "f")}
    factors["blk.0.x.weight.lora_b"][0, 0] = 2
    folder = tmp_path / "adapters"
    write_lora(folder / "blob", factors, alpha=0.0)
    (folder / "link.gguf").symlink_to("blob")
    status, refused = load(server, "three", "link.gguf")
    assert status == 400 and "compiled of another" in refused["error"]["message"]
    registry = server.models["base"].engine.engine.adapters
    registry.gguf_rows = lambda: GGUFRows("llama", {MODULE: ("blk.0.x.weight", None)})
    assert load(server, "two", "turn2")[0] == load(server, "three", "link.gguf")[0] == 200
    assert answer(server, "three")["choices"] == answer(server, "two")["choices"]


def test_an_adapter_is_read_and_packed_while_steps_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is paused for the swap alone."""
    llm = turning_llm()
    executor: Any = llm.executor
    executor.engine = llm.engine
    hashed: list[bool] = []
    digest = adapters._digest

    def watched(factors: Factors) -> bytes:
        hashed.append(llm.engine._pauser is not None)
        return digest(factors)

    monkeypatch.setattr(adapters, "_digest", watched)
    llm.load_adapter("one", adapter(tmp_path / "one", 1))
    assert executor.packed_while == hashed == [False]
    assert executor.turns == {0: 1}
    llm.unload_adapter("one")
    assert executor.turns == {}
    llm.close()


def test_one_that_answers_is_not_unloaded(server: RunningServer) -> None:
    llm = server.models["base"]
    executor: Any = llm.executor
    executor.gate.clear()
    with llm.with_adapter("one").stream("Hello", max_tokens=200):
        wait_until(lambda: llm.engine.engine.has_work)  # its first step waits at the gate
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(unload, server, "one")
            wait_until(lambda: llm.engine._pausing > 0)  # it comes before the next step
            executor.gate.set()
            status, content = asked.result()
        assert (status, content["error"]["code"]) == (409, "adapter_in_use")
    wait_until(lambda: not llm.engine.engine.has_work)
    assert unload(server, "one")[0] == 200


@pytest.mark.parametrize(
    ("name", "path", "status", "message"),
    [
        ("x", "../elsewhere", 400, "outside of the server's folder"),
        ("x", "/etc", 400, "outside of the server's folder"),
        ("x", ".", 400, "outside of the server's folder"),
        ("x", "link", 400, "outside of the server's folder"),
        ("x", "a\0b", 400, "outside of the server's folder"),
        ("x", "nothing", 400, "^adapter nothing: no adapter_config.json there"),
        ("x", "stranger", 400, "changes other.layer, which this model has no place for; it has layer"),
        ("x", "wide", 400, r"model.layer \[5, 2\] where the model has \[3, 2\]"),
        ("x", "dora", 400, "of kind 'IA3'"),
        ("x", "damaged", 400, "adapter_config.json is no valid JSON"),
        ("one", "turn2", 409, "served here already"),
        ("base", "turn2", 409, "served here already"),
        ("a/b", "turn2", 400, "lora_name: letters"),
        ("", "turn2", 400, "lora_name: letters"),
    ],
)
def test_what_is_not_loaded(
    server: RunningServer, tmp_path: Path, name: str, path: str, status: int, message: str
) -> None:
    root = tmp_path / "adapters"
    (root / "link").symlink_to(tmp_path / "elsewhere")
    adapter(root / "stranger", 1, "other.layer")
    adapter(root / "wide", 1, rows=5)
    ones = np.ones((2, 2), np.float32), np.ones((3, 2), np.float32)
    write_adapter(root / "dora", {MODULE: ones}, peft_type="IA3")
    (write_adapter(root / "damaged", {MODULE: ones}) / "adapter_config.json").write_text("{")
    found, content = load(server, name, path)
    assert found == status
    assert str(tmp_path) not in json.dumps(content)  # where adapters lie is the machine's owner's business
    assert re.search(message, content["error"]["message"]), content
    assert list(server.service.models) == ["base", "one"]


def test_so_many_and_no_more(tmp_path: Path) -> None:
    adapter(tmp_path / "turn", 1)
    settings = ServerSettings(adapter_folder=tmp_path, max_adapters=2)
    with RunningServer({"base": turning_llm()}, settings) as running:
        assert [load(running, name, "turn")[0] for name in ("a", "b")] == [200, 200]
        status, content = load(running, "c", "turn")
        assert (status, content["error"]["code"]) == (409, "too_many_adapters")
        assert "2 adapters are loaded" in content["error"]["message"]
        assert unload(running, "a")[0] == load(running, "c", "turn")[0] == 200


def test_what_is_not_unloaded(server: RunningServer) -> None:
    assert unload(server, "base")[1]["error"]["code"] == "adapter_not_found"
    assert unload(server, "two")[0] == 404
    assert load(server, "two", "turn2", base_model_name="one")[1]["error"]["message"] == "'one' is an adapter"


def test_without_a_folder_nothing_is_loaded() -> None:
    with RunningServer({"base": turning_llm()}) as running:
        assert load(running, "x", "turn2")[0] == 404


def test_names_on_the_command_line() -> None:
    assert _named_adapters(("a=x", "b=y=z"), ["m"]) == {"m": {"a": Path("x"), "b": Path("y=z")}}
    assert _named_adapters(("m:a=x", "n:b=y"), ["m", "n"]) == {"m": {"a": Path("x")}, "n": {"b": Path("y")}}
    for given, models, reason in (
        (("a=x",), ["m", "n"], "does not say of which model"),
        (("a",), ["m"], "is no NAME=PATH"),
        (("a=x", "a=y"), ["m"], "two models or adapters are called 'a'"),
        (("m=x",), ["m"], "two models or adapters are called 'm'"),
    ):
        with pytest.raises(InputError, match=reason):
            _named_adapters(given, models)


def test_only_language_models_are_opened_for_updates(tmp_path: Path) -> None:
    for name, family in (("chat", "qwen2"), ("encoder", "bert")):
        llmc.compile(save_tiny(family, tmp_path / name), tmp_path / f"{name}.llmc", targets=["null"])
    named = {name: tmp_path / f"{name}.llmc" for name in ("chat", "encoder")}
    options: dict[str, Any] = {"adapters": (), "allow_adapter_updates": tmp_path}
    assert _adapters(named, options) == {"chat": {}}
    assert _adapters(named, {**options, "adapters": ("chat:a=x",)}) == {"chat": {"a": Path("x")}}
    assert _adapters(named, {**options, "allow_adapter_updates": None}) == {}
    del named["chat"]
    with pytest.raises(InputError, match="--allow-adapter-updates: no language model is served, only enc"):
        _adapters(named, options)


def test_an_encoder_beside_it_takes_none(server: RunningServer) -> None:
    encoder = turning_llm()
    encoder.artifact = SimpleNamespace(kind="encoder")  # type: ignore[assignment]
    server.service.models["encoder"] = ServedModel("encoder", encoder)
    status, content = load(server, "x", "turn2", base_model_name="encoder")
    assert (status, content["error"]["code"]) == (400, "unsupported_model")
    assert "it is an encoder" in content["error"]["message"]
    encoder.close()

"""`--rope-scaling …,when=needed`: two kinds of frequencies in one artifact. What the model says of a text is
what an artifact without scaling says where the text fits, and what one that is scaled says elsewhere.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import llmc
import numpy as np
import pytest
from llmc.cli.main import main
from llmc.codegen.artifact import Artifact
from llmc.codegen.driver import check_model
from llmc.frontend.rope import RopeScaling
from llmc.frontend.source import open_source
from llmc.ir.errors import InputError, LlmcError, UnsupportedError
from llmc.ir.ops.math import Add
from llmc.ir.ops.nn import Embedding
from llmc.ir.ops.shape import Arange
from llmc.passes.base import PassContext
from llmc.passes.cache.positions import CheckPositions
from llmc.runtime.sampling_params import SamplingParams

from .graphs import worst
from .models import CONTEXT, ids_of, save_tiny, tiny_config, tiny_model
from .test_rope_tables import (
    assert_same_tables,
    lowered,
    rotary_of,
    scaled,
    tables,
    torch,
    trace_source,
)
from .tvm_graphs import ISA

ORIGINAL, LONGEST = 64, 256
SCALING = f"yarn:4,original={ORIGINAL}"


# Tables ----------------------------------------------------------------------------------------------------


def both(family: str, name: str, folder: Path) -> tuple[Any, Any, Any, int]:
    """Our source, transformers' model unscaled and scaled, the context."""
    _, theirs, length = scaled(family, name, folder / "always")
    source = open_source(folder / "always")
    option = {"longrope": f"longrope:4,factors={folder / 'always' / 'factors.json'}"}.get(name, f"{name}:4")
    source.scale_rope(RopeScaling.parse(f"{option},when=needed"))
    source.length = length
    return source, tiny_model(family), theirs, length


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "yarn"),
        ("llama", "longrope"),
        *(pytest.param("llama", name, marks=pytest.mark.slow) for name in ("linear", "dynamic")),
        pytest.param("gpt_neox", "yarn", marks=pytest.mark.slow),
    ],
)
def test_positions_say_which_table_they_mean(family: str, name: str, tmp_path: Path) -> None:
    """To the bit those of transformers for each."""
    source, plain, theirs, length = both(family, name, tmp_path)
    places = [0, 1, 17, CONTEXT - 1, CONTEXT, length - 1]
    graph, _ = lowered(trace_source(source), "paged")
    found = tables(graph, [*places, *(length + p for p in places)])
    assert len(found) == 4
    everywhere = torch.arange(length)[None]
    for rows, model in ((slice(0, 6), plain), (slice(6, 12), theirs)):
        wanted = rotary_of(model)(torch.zeros(1, length, 1), everywhere)
        for _, *ours in found:
            for mine, table in zip(ours, wanted, strict=True):
                assert np.array_equal(mine.reshape(12, -1)[rows], table[0, places].numpy())


def test_layers_with_a_window_have_one_kind(tmp_path: Path) -> None:
    source, plain, theirs, length = both("gemma3", "yarn", tmp_path)
    graph, _ = lowered(trace_source(source), "paged")
    places = [0, 3, 200]
    found = tables(graph, [*places, *(length + p for p in places)])
    kinds = theirs.config.layer_types
    assert set(kinds) == {"sliding_attention", "full_attention"}
    for layer, kind in enumerate(kinds):
        (cos, *_) = [c.reshape(6, -1) for loc, c, _ in found if f"layers.{layer}." in loc]
        for rows, model in ((cos[:3], plain), (cos[3:], theirs)):
            wanted, _ = rotary_of(model)(torch.zeros(1, length, 1), torch.arange(length)[None], kind)
            assert np.array_equal(rows, wanted[0, places].numpy())
        assert np.array_equal(cos[:3], cos[3:]) == (kind == "sliding_attention")


def test_without_it_nothing_changes(tmp_path: Path) -> None:
    source, theirs, length = scaled("llama", "yarn", tmp_path)
    assert RopeScaling.parse("yarn:4,when=always") == RopeScaling("yarn:4,when=always", "yarn", 4.0, None, {})
    assert_same_tables(source, theirs, length)


# Artifacts -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(option, target) → artifact, made once."""
    folder = tmp_path_factory.mktemp("by-length")
    source = save_tiny("llama", folder / "model")

    @cache
    def make(option: str | None, target: str = "tvm-cpu") -> Path:
        out = folder / f"{len(list(folder.iterdir()))}.llmc"
        chosen = f"{target}:isa={ISA}" if target == "tvm-cpu" else target
        llmc.compile(source, out, targets=[chosen], rope_scaling=option, context=LONGEST)
        return out

    return make


@pytest.mark.parametrize(("target", "bar"), [("tvm-cpu", 0.0), ("onnx-cpu", 1e-5)])
def test_logits_are_those_of_the_artifact_that_a_text_needs(target: str, bar: float, compiled: Any) -> None:
    """To the bit with our kernels; onnxruntime chooses others for another graph (largest difference of the
    largest logit).
    """
    paths = [compiled(option, target) for option in (f"{SCALING},when=needed", None, SCALING)]
    needed, plain, always = (llmc.load(path) for path in paths)
    short, long = ids_of(ORIGINAL), ids_of(ORIGINAL + 1)
    assert worst(needed.logits(short), plain.logits(short)) <= bar
    assert worst(needed.logits(long), always.logits(long)) <= bar
    for ids in (short, long):
        assert worst(plain.logits(ids), always.logits(ids)) > 0.01


def test_an_answer_goes_on_scaled(compiled: Any) -> None:
    """Every token is the largest logit of the text before it, alone, among others, in a cache that overflows,
    with guesses, several choices, and a prefix that is known.
    """
    path = compiled(f"{SCALING},when=needed")
    prompts = [ids_of(length) for length in (10, ORIGINAL - 1, ORIGINAL, 100)]
    params = SamplingParams(max_tokens=100, ignore_eos=True)

    def generated(**options: Any) -> list[list[int]]:
        with llmc.load(path, **options) as llm:
            return [found.token_ids for found in llm.generate_batch(prompts, params)]

    first = generated()
    with llmc.load(path) as llm:
        for prompt, answer in zip(prompts, first, strict=True):
            for count in (0, ORIGINAL - len(prompt), ORIGINAL + 1 - len(prompt), 99):
                if count >= 0:
                    row = llm.logits([*prompt, *answer[:count]])[-1]
                    assert int(row.argmax()) == answer[count], count
        twice = llm.generate(prompts[1], SamplingParams(max_tokens=100, ignore_eos=True, n=2))
        assert [choice.token_ids for choice in twice.choices] == [first[1], first[1]]
        assert [llm.generate(prompt, params).token_ids for prompt in prompts] == first
    for options in (
        {"speculate": 4},
        {"kv_tokens": 256, "max_batch_tokens": 24, "max_sequences": 4},
        {"prefix_cache": False},
    ):
        assert generated(**options) == first, options


def test_prefixes_on_disk_are_of_both_kinds(compiled: Any, tmp_path: Path) -> None:
    path, params = compiled(f"{SCALING},when=needed"), SamplingParams(max_tokens=8, ignore_eos=True)
    prompts = [ids_of(ORIGINAL), ids_of(120)]
    for cached in (0, 1):
        with llmc.load(path, prefix_cache_dir=tmp_path / "kept") as llm:
            found = [llm.generate(prompt, params) for prompt in prompts]
            # The first answer outgrows what was published, so its prompt is known scaled to the second.
            assert [one.cached_tokens for one in found] == ([48, 112] if cached else [0, 64])
            with llmc.load(path, prefix_cache=False) as other:
                assert [other.generate(prompt, params).token_ids for prompt in prompts] == [
                    one.token_ids for one in found
                ]


def test_the_manifest_and_inspect_say_it(compiled: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = compiled(f"{SCALING},when=needed")
    facts = Artifact.open(path).model["rope_scaling"]
    assert facts == {
        "type": "yarn", "factor": 4.0, "original": ORIGINAL, "when": "needed", "offset": LONGEST,
    }  # fmt: skip
    assert main(["inspect", str(path)]) == 0
    assert "yarn × 4, trained on 64 tokens, longer sequences only" in capsys.readouterr().out


def test_sinks_within_what_the_model_was_made_for(compiled: Any) -> None:
    path = compiled(f"{SCALING},when=needed")
    with pytest.raises(InputError, match="turn by two kinds of frequencies"):
        llmc.load(path, sinks=4)
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    found = [
        llmc.load(one, sinks=4, context=ORIGINAL).generate(ids_of(20), params).token_ids
        for one in (path, compiled(None))
    ]
    assert found[0] == found[1] and len(found[0]) == 200


# Refusals --------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="when=short"):
        RopeScaling.parse("yarn:4,when=short")
    parameters = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    published = tiny_config("llama", rope_parameters=parameters)
    with pytest.raises(InputError, match="published with a scaling of all sequences") as raised:
        RopeScaling.parse("linear:4,when=needed").apply(published, "m")
    assert raised.value.remedy == "leave when=needed away"
    source = save_tiny("llama", tmp_path / "model")
    with pytest.raises(LlmcError, match="GGUF can say that of all or of none"):
        llmc.compile(source, tmp_path / "m.llmc", targets=["gguf"], rope_scaling="yarn:4,when=needed")


def test_positions_that_go_elsewhere_are_refused(tmp_path: Path) -> None:
    """Before anything long begins. No model at hand has learned positions beside rotary embeddings, so one is
    made of two.
    """
    source = open_source(save_tiny("llama", tmp_path / "model"))
    source.scale_rope(RopeScaling.parse("yarn:4,when=needed"))
    graph, _ = lowered(trace_source(source), "fused")
    assert not CheckPositions().run(graph, PassContext()).changed
    table = next(op for op in graph if isinstance(op, Embedding))
    counted = next(op for op in graph if isinstance(op, Arange))
    learned, end = Embedding(counted.result, table.weight), table.next
    graph.insert(learned, before=end)
    added = graph.insert(Add(table.result, learned.result), before=end)
    graph.replace_uses(table.result, added.results[0])
    graph.set_operand(added, 0, table.result)
    with pytest.raises(UnsupportedError, match="absolute positions, learned ones, enter add"):
        CheckPositions().run(graph, PassContext())


def test_check_says_what_compile_would(tmp_path: Path) -> None:
    report = check_model(save_tiny("llama", tmp_path / "m"), rope_scaling="yarn:4,when=needed")
    assert report.facts["rope_scaling"]["when"] == "needed"

"""Models that take more than text: their text model is compiled, and says what the whole one says of text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llmc
import numpy as np
import pytest
import torch
import transformers
from llmc.codegen import trace_cache
from llmc.codegen.driver import check_model, compile_model
from llmc.frontend import source as source_module
from llmc.frontend.source import open_source
from llmc.frontend.text_part import text_part, text_tensors
from llmc.frontend.trace import trace_source
from llmc.ir.errors import InputError, UnsupportedError
from llmc.ir.weights import ArrayTensor
from safetensors.numpy import load_file, save_file

from .graphs import logits_of, lowered, worst
from .lora_files import adapter
from .models import DECODER, ids_of, save_tokenizer, tiny_model
from .quantized_files import Values, save_fp8
from .quantized_formats import save_mlx, save_rows
from .state_models import MODELS as STATES
from .tvm_graphs import ISA

SAVES: dict[str, Callable[[Path], Values]] = {
    "fp8": save_fp8,
    "gemma": lambda f: save_rows(f, embeddings=1),
    "mlx 4-bit g16": lambda f: save_mlx(f, group=16),
}
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
TOWER = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
_DELTA = {name: value for name, value in STATES["delta"][1].items() if name != "mlp_only_layers"}

WHOLE: dict[str, tuple[str, Any, Any, dict[str, Any]]] = {
    "gemma3": (
        "Gemma3",
        ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 12}),
        ("SiglipVisionConfig", VISION),
        {"mm_tokens_per_image": 4, "image_token_index": 380, "boi_token_index": 381, "eoi_token_index": 382},
    ),
    "llava": ("Llava", ("LlamaConfig", {}), ("CLIPVisionConfig", VISION), {"image_token_index": 380}),
    "mistral3": (
        "Mistral3",
        ("MistralConfig", {}),
        ("PixtralVisionConfig", VISION),
        {"image_token_index": 380},
    ),
    "idefics3": ("Idefics3", ("LlamaConfig", {}), ("Idefics3VisionConfig", VISION), {"image_token_id": 380}),
    "qwen3_5": (
        "Qwen3_5",
        ("Qwen3_5TextConfig", _DELTA),
        ("Qwen3_5VisionConfig", TOWER),
        {},
    ),
    "qwen3_vl": (
        "Qwen3VL",
        ("Qwen3VLTextConfig", {"head_dim": 16, "rope_parameters": {**ROPE, "mrope_section": [4, 2, 2]}}),
        ("Qwen3VLVisionConfig", {**TOWER, "deepstack_visual_indexes": [0]}),
        {"tie_word_embeddings": True},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        ("Qwen2_5_VLTextConfig", {"rope_parameters": {**ROPE, "mrope_section": [4, 2, 2]}}),
        ("Qwen2_5_VLVisionConfig", TOWER),
        {"tie_word_embeddings": False},
    ),
    "muse_glimmer": (
        "MuseGlimmer",
        ("MuseGlimmerTextConfig", {"head_dim": 16, "sliding_window": 12}),
        (
            "MuseGlimmerVisionConfig",
            {**VISION, "out_hidden_size": 32, "pos_emb_height": 2, "pos_emb_width": 2},
        ),
        {"out_hidden_size": 128, "projector_hidden_size": 32},
    ),
    "granite_docling": (
        "GraniteDocling",
        ("GraniteDoclingTextConfig", {"tie_word_embeddings": True}),
        ("GraniteDoclingVisionConfig", {**VISION, "out_hidden_size": 64}),
        {"image_token_id": 380},
    ),
    "molmo2": (
        "Molmo2",
        ("Molmo2TextConfig", {"head_dim": 16, "additional_vocab_size": 8}),
        ("Molmo2VisionConfig", {**VISION, "image_size": [28, 28], "head_dim": 16, "num_key_value_heads": 2}),
        {
            "adapter_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "vision_feature_layer": [0, 0],
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
            }
        },
    ),
    "glm4v_moe": (
        "Glm4vMoe",
        (
            "Glm4vMoeTextConfig",
            {
                "head_dim": 16,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 24,
                "first_k_dense_replace": 1,
                "rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]},
            },
        ),
        ("Glm4vMoeVisionConfig", TOWER),
        {},
    ),
}
"""Where tensors stand (`language_model.model.`, `model.language_model.`, `model.text_model.`), heads that are
tied or not, windows, recurrences; text models that transformers has without a head; logits that are scaled
and capped by the whole model alone; names and stacks of experts that only its conversions know.
"""


def whole_model(name: str, folder: Path) -> Any:
    """A small model with its tower for pictures, saved as a folder."""
    kind, *parts, fields = WHOLE[name]
    text, vision = (
        getattr(transformers, config)(**({**DECODER, **options} if number == 0 else options))
        for number, (config, options) in enumerate(parts)
    )
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision, **fields)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval().float()
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def said(model: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].numpy()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow if n in ("mistral3", "llava", "qwen2_5_vl") else ())
        for n in WHOLE
    ],
)
def test_the_text_model_says_of_text_what_the_whole_one_says(name: str, tmp_path: Path) -> None:
    """Largest difference ≤ 1e-5 of the largest logit."""
    model = whole_model(name, tmp_path)
    source = open_source(tmp_path)
    assert source.whole == model.config.model_type and source.task == "causal_lm"
    graph, _ = lowered(trace_source(source), "fused")
    assert worst(logits_of(graph, ids_of(40)), said(model, ids_of(40))) <= 1e-5
    assert not any("vision" in unused for unused in source.unused_tensors)


@pytest.mark.parametrize(
    ("name", "method"),
    [("mistral3", "fp8"), ("glm4v_moe", "fp8"), ("mistral3", "gemma"), ("gemma3", "mlx 4-bit g16")],
)
def test_the_text_part_of_a_quantized_model(name: str, method: str, tmp_path: Path) -> None:
    """In floats of eight bits, as Ministral is published, also where only the whole one's conversions know
    the names of tensors; in rows, whose columns the text model says; with sizes of single modules by the
    whole one's names. The text model that stands for it has the same values.
    """
    whole_model(name, tmp_path)
    read = load_file(tmp_path / "model.safetensors")
    values = SAVES[method](tmp_path)
    source = open_source(tmp_path)
    assert values and source.quantization_of_source == method and source.whole is not None
    read |= {stored: wanted.astype(np.float32) for stored, wanted in values.items()}
    (tmp_path / "plain").mkdir()
    save_file(read, tmp_path / "plain" / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    plain = open_source(tmp_path / "plain").weights
    assert source.weights.keys() == plain.keys()
    for label, weight in source.weights.items():
        np.testing.assert_allclose(weight.read(), plain[label].read(), rtol=1e-6, atol=0)


def test_an_artifact_and_what_is_said_of_it(tmp_path: Path) -> None:
    model = whole_model("gemma3", tmp_path / "model")
    report = compile_model(tmp_path / "model", tmp_path / "m.llmc", targets=[f"tvm-cpu:isa={ISA}"])
    sentence = "model (gemma3) takes more than text: its text model is what is compiled"
    assert sentence in report.notes
    assert sentence in check_model(tmp_path / "model").notes
    with llmc.load(tmp_path / "m.llmc") as llm:
        assert worst(llm.logits(ids_of(40)), said(model, ids_of(40))) <= 1e-5
        assert llm.artifact is not None and llm.artifact.model["architecture"] == "gemma3_text"


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["qwen3_vl", pytest.param("llava", marks=pytest.mark.slow)])
def test_adapters_of_the_whole_model(name: str, tmp_path: Path) -> None:
    """Trained on the text part of the whole one, whose names they have. Largest difference ≤ 1e-5 of the
    largest logit.
    """
    pytest.importorskip("peft")
    model = whole_model(name, tmp_path / "model")
    adapted = adapter(model, tmp_path / "adapter", target_modules=r".*language_model.*\.[qv]_proj")
    wanted = said(adapted, ids_of(40))
    assert worst(wanted, said(whole_model(name, tmp_path / "again"), ids_of(40))) > 0.01
    lora = [str(tmp_path / "adapter")]
    compile_model(tmp_path / "model", tmp_path / "m.llmc", targets=["onnx-cpu"], lora=lora)
    with llmc.load(tmp_path / "m.llmc") as llm:
        assert worst(llm.logits(ids_of(40)), wanted) <= 1e-5


def test_what_is_lacking_is_said_of_the_text_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the whole one, whose names might differ, cannot be built."""
    whole_model("gemma3", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    save_file(
        {name: x for name, x in stored.items() if "layers.1.mlp" not in name}, tmp_path / "model.safetensors"
    )
    for step in ("built", "not built"):
        with pytest.raises(
            InputError, match=r"lacks 3 of the tensors of Gemma3ForCausalLM: model\.layers\.1\.mlp"
        ):
            _ = open_source(tmp_path).weights
        if step == "built":
            monkeypatch.setattr(source_module, "instantiate_whole", lambda config: 1 / 0)


def test_traced_text_parts_are_found_again_in_another_folder(tmp_path: Path) -> None:
    keys = []
    for name in ("a", "b"):
        whole_model("gemma3", tmp_path / name)
        keys.append(trace_cache._key(open_source(tmp_path / name)))  # pyright: ignore[reportPrivateUsage]
    assert keys[0] == keys[1] and keys[0] is not None


def test_text_that_sees_later_tokens_is_refused(tmp_path: Path) -> None:
    config = transformers.PaliGemmaConfig(text_config=transformers.GemmaConfig(**DECODER))
    config.architectures = ["PaliGemmaForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=r"gemma .* lets tokens attend to later ones"):
        check_model(tmp_path)


def test_other_models_are_what_they_were() -> None:
    assert text_part(tiny_model("llama").config) is None
    assert text_part(transformers.BartConfig()) is None
    gemma = transformers.Gemma3Config(architectures=["Gemma3ForSequenceClassification"])
    assert text_part(gemma) is None
    assert text_part(transformers.LlavaConfig()) is None  # it does not say what it was published for


def test_every_configuration_has_an_answer() -> None:
    """Of what transformers has: several texts in one, classes that are missing, no word about ties."""
    answers = {}
    for name, kind in transformers.CONFIG_MAPPING.items():
        try:
            config = kind()
        except Exception:  # noqa: BLE001, S112  (some need arguments)
            continue
        config.architectures = [f"{kind.__name__.removesuffix('Config')}ForConditionalGeneration"]
        part = text_part(config)
        answers[name] = None if part is None else part.architectures[0]
    assert answers["musicgen"] is answers["t5"] is answers["llama"] is None
    assert answers["qwen2_audio"] == "Qwen2ForCausalLM" and answers["qwen3_vl"] == "Qwen3VLTextModelWithHead"


def test_names_of_tensors() -> None:
    one = ArrayTensor(np.zeros(1, np.float32), "t")
    names = {
        "language_model.model.norm.weight": "model.norm.weight",
        "model.language_model.layers.0.q.weight": "model.layers.0.q.weight",
        "language_model.lm_head.weight": "lm_head.weight",
        "model.vision_tower.layers.0.q.weight": None,
        "multi_modal_projector.weight": None,
    }
    assert set(text_tensors(dict.fromkeys(names, one))) == {name for name in names.values() if name}
    assert set(text_tensors({"lm_head.weight": one, "model.text_model.norm.weight": one})) == {
        "lm_head.weight",
        "model.norm.weight",
    }
    assert set(text_tensors({"model.norm.weight": one})) == {"model.norm.weight"}

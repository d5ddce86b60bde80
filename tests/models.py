"""Models for tests: real ones from the cache, and tiny random-weight ones of every family.

    from tests.models import real_model, tiny_model, save_tiny, TINY

`real_model("smollm2")` is a path; `tiny_model("gemma2")` is a transformers model in float32 with seeded
weights; `save_tiny("gemma2", folder)` writes it as a Hugging Face folder (config, safetensors, tokenizer,
chat template).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from benchmarks.published_models import MODELS, FetchError, fetch

VOCAB_SIZE = 384
CONTEXT = 256
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
TURN = "<|turn|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, TURN)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|turn|>{{ message['role'] }}\n{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


def real_model(name: str) -> Path:
    """Path of a published model; skips the test where it is neither cached nor to be downloaded."""
    assert name in MODELS, f"unknown real model {name!r}"
    try:
        return fetch(name)
    except FetchError as error:
        pytest.skip(f"real model {name}: {error}")


def first_layers(source: Path, count: int, folder: Path) -> Path:
    """The first layers of a published model as a Hugging Face folder: real weights of its real sizes, in less
    time. The whole model where LLMC_WHOLE_MODELS is set.
    """
    if os.environ.get("LLMC_WHOLE_MODELS"):
        return source
    import torch
    from llmc.frontend.skeleton import model_class
    from llmc.frontend.source import open_source
    from llmc.frontend.tokenizer import export_tokenizer
    from safetensors.torch import save_file

    opened = open_source(source)
    weights, config = opened.weights, opened.config
    config.architectures = [model_class(config)[0].__name__]
    config.num_hidden_layers, config.dtype = count, "bfloat16"
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:count]
    kept: dict[str, Any] = {}
    for name, tensor in weights.items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        tied = config.tie_word_embeddings and name == "lm_head.weight"
        if not tied and (layer is None or int(layer[1]) < count):
            kept[name] = torch.from_numpy(tensor.read()).to(torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    config.save_pretrained(folder)
    assert export_tokenizer(opened, folder) is not None
    return folder


@dataclass(frozen=True)
class Tiny:
    """A family's smallest interesting configuration: `config` and `model` name classes in transformers."""

    config: str
    model: str
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    causal: bool = True


DECODER: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _decoder(**changes: Any) -> dict[str, Any]:
    return {**DECODER, **changes}


TINY: dict[str, Tiny] = {
    "llama": Tiny("LlamaConfig", "LlamaForCausalLM", _decoder(tie_word_embeddings=True)),
    "mistral": Tiny("MistralConfig", "MistralForCausalLM", _decoder(sliding_window=12)),
    "qwen2": Tiny("Qwen2Config", "Qwen2ForCausalLM", _decoder()),
    "qwen3": Tiny("Qwen3Config", "Qwen3ForCausalLM", _decoder(head_dim=32)),
    "gemma2": Tiny(
        "Gemma2Config",
        "Gemma2ForCausalLM",
        _decoder(
            head_dim=32,
            query_pre_attn_scalar=24,
            sliding_window=12,
            attn_logit_softcapping=20.0,
            final_logit_softcapping=15.0,
            layer_types=["sliding_attention", "full_attention"],
        ),
    ),
    "gemma3": Tiny(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        _decoder(
            head_dim=32,
            query_pre_attn_scalar=24,
            sliding_window=12,
            layer_types=["sliding_attention", "full_attention"],
        ),
    ),
    "phi3": Tiny("Phi3Config", "Phi3ForCausalLM", _decoder(sliding_window=None)),
    "gpt2": Tiny(
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCAB_SIZE,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": CONTEXT,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_neox": Tiny(
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": CONTEXT,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "olmo2": Tiny("Olmo2Config", "Olmo2ForCausalLM", _decoder()),
    "granite": Tiny(
        "GraniteConfig",
        "GraniteForCausalLM",
        _decoder(
            embedding_multiplier=6.0, attention_multiplier=0.08, residual_multiplier=0.4, logits_scaling=3.0
        ),
    ),
    "bert": Tiny(
        "BertConfig",
        "BertModel",
        {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": CONTEXT,
            "pad_token_id": 0,
        },
        causal=False,
    ),
}


def tiny_config(name: str, **changes: Any) -> Any:
    """The transformers config of a family; `changes` overrides fields of it."""
    import transformers

    tiny = TINY[name]
    return getattr(transformers, tiny.config)(**{**tiny.options, **changes})


def tiny_model(name: str, *, seed: int = 0, **changes: Any) -> Any:
    """A float32 transformers model in eval mode with seeded random weights.

    The default initialisation would leave norms at one and biases at zero, where a compiler that forgets
    them stays right by luck: every parameter is drawn, norms around one. The scale keeps logits of a few
    units, so that a tolerance in absolute terms means something.
    """
    import torch
    import transformers

    tiny = TINY[name]
    config = tiny_config(name, **changes)
    extra = {} if tiny.causal else {"add_pooling_layer": False}
    model = getattr(transformers, tiny.model)(config, **extra).to(torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for label, parameter in sorted(dict(model.named_parameters()).items()):
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(drawn * (1.4 / parameter.shape[-1] ** 0.5))
            elif label.endswith("weight") and not name.startswith("gemma"):
                parameter.copy_(1 + 0.2 * drawn)
            else:
                parameter.copy_(0.2 * drawn)
    return model


def save_tiny(name: str, folder: Path, *, seed: int = 0, shards: bool = False, **changes: Any) -> Path:
    """Writes the tiny model as a Hugging Face folder with a tokenizer; returns the folder.

    Args:
        shards: split the weights over several safetensors files with an index, as large models are published.
    """
    model = tiny_model(name, seed=seed, **changes)
    # A fifth of the model a shard: enough for an index file and a shard that lacks any one layer.
    model.save_pretrained(folder, **({"max_shard_size": "100KB"} if shards else {}))
    save_tokenizer(folder)
    return folder


_TEXT = (
    "The river was wide and slow, and the boats that went down it carried grain, cloth and letters. "
    "def main(arguments):\n    return sum(number * 2 for number in arguments)\n"
    "Der Fluß war breit; les bateaux étaient chargés; 河は広かった。 Была зима, 3.14159 и 2,718. "
    "What is the capital of France? The capital of France is Paris. One, two, three, four, five.\n\n"
)


def tiny_tokenizer() -> Any:
    """A byte-level BPE of VOCAB_SIZE tokens trained on a fixed text: the same bytes every time."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT * 4], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


def save_tokenizer(folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja into a model folder."""
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def ids_of(length: int, *, seed: int = 0) -> list[int]:
    """`length` token ids, none of them special, the same for a seed everywhere."""
    state, out = seed * 2654435761 + 12345, list[int]()
    for _ in range(length):
        state = (state * 1103515245 + 12345) % (1 << 31)
        out.append(len(SPECIAL_TOKENS) + (state >> 8) % (VOCAB_SIZE - len(SPECIAL_TOKENS)))
    return out


def reference_logits(model: Any, ids: list[int]) -> Any:
    """What transformers says: float32 [T, vocab] (hidden states [T, hidden] of an encoder), as numpy."""
    import torch

    with torch.no_grad():
        if hasattr(model, "lm_head") or hasattr(model, "embed_out"):
            rows = model(input_ids=torch.tensor([ids]), use_cache=False).logits
        else:
            rows = model(input_ids=torch.tensor([ids])).last_hidden_state
    return rows[0].float().numpy()


ModelFactory = Callable[[], Any]


def tiny(name: str) -> tuple[Any, ModelFactory]:
    """(config, factory of the seeded model) of a family."""
    return tiny_config(name), lambda: tiny_model(name)

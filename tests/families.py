"""Which of transformers' families compile, tried on tiny random configurations.

    python -m tests.families                 prints the table
    python -m tests.families --write         writes it into docs/models.md
    python -m tests.families gemma opt       tries some

For each family: trace, fuse, page, run the paged graph by the interpreter over two sequences in one batch,
one of them in two chunks, and compare its rows with those of transformers in float32. Nothing here knows how
a family works; the options only make it small.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmc.ir.errors import LlmcError

from .graphs import PagedRun, lowered, traced, worst

VOCAB_SIZE = 384
TOLERANCE = 1e-4
DOCS = Path(__file__).resolve().parent.parent / "docs" / "models.md"

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HYBRID = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 12}


@dataclass(frozen=True)
class Family:
    """`name`Config and `name`ForCausalLM (or `name`Model, an encoder) of transformers, made small."""

    name: str
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    base: str = "common"
    encoder: bool = False
    config: str = ""
    model: str = ""

    def build(self) -> Any:
        """A float32 model with seeded random weights, every parameter drawn."""
        import torch
        import transformers

        base = {"common": _COMMON, "gpt": _GPT, "none": {}}[self.base]
        config = getattr(transformers, self.config or f"{self.name}Config")(**{**base, **self.options})
        named = self.model or self.name + ("Model" if self.encoder else "ForCausalLM")
        kind = getattr(transformers, named)
        torch.manual_seed(0)
        model = kind(config).to(torch.float32).eval()
        with torch.no_grad():
            for label, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=1.4 / parameter.shape[-1] ** 0.5)
                else:
                    parameter.normal_(mean=float("norm" in label and "weight" in label), std=0.2)
        return model


FAMILIES: dict[str, Family] = {
    "llama": Family("Llama"),
    "mistral": Family("Mistral", {"sliding_window": 12}),
    "ministral": Family("Ministral", {"head_dim": 16, **_HYBRID}),
    "ministral3": Family("Ministral3"),
    "qwen2": Family("Qwen2"),
    "qwen3": Family("Qwen3", {"head_dim": 32}),
    "gemma": Family("Gemma", {"head_dim": 32}),
    "gemma2": Family("Gemma2", {"head_dim": 32, "query_pre_attn_scalar": 24, **_HYBRID}),
    "gemma3": Family(
        "Gemma3", {"head_dim": 32, "query_pre_attn_scalar": 24, **_HYBRID}, config="Gemma3TextConfig"
    ),
    "vaultgemma": Family("VaultGemma", {"head_dim": 32, "query_pre_attn_scalar": 24, **_HYBRID}),
    "cohere": Family("Cohere"),
    "cohere2": Family("Cohere2", {**_HYBRID}),
    "starcoder2": Family("Starcoder2", {"sliding_window": 12}),
    "stablelm": Family("StableLm", {"partial_rotary_factor": 0.5}),
    "falcon": Family("Falcon", {"num_kv_heads": 2, "new_decoder_architecture": True, "alibi": False}),
    "falcon (alibi)": Family("Falcon", {"alibi": True, "new_decoder_architecture": False}),
    "opt": Family("OPT", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "bloom": Family("Bloom", {"n_layer": 2, "n_head": 4}),
    "mpt": Family("Mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256}),
    "gpt2": Family("GPT2", base="gpt", model="GPT2LMHeadModel"),
    "gpt_bigcode": Family("GPTBigCode", base="gpt"),
    "gptj": Family("GPTJ", {"rotary_dim": 8}, base="gpt"),
    "codegen": Family("CodeGen", {"rotary_dim": 8}, base="gpt"),
    "gpt_neo": Family(
        "GPTNeo",
        {
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 12,
            "vocab_size": VOCAB_SIZE,
            "max_position_embeddings": 256,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        base="none",
    ),
    "gpt_neox": Family("GPTNeoX"),
    "gpt_oss": Family(
        "GptOss", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, **_HYBRID}
    ),
    "phi": Family("Phi", {"partial_rotary_factor": 0.5}),
    "phi3": Family("Phi3", {"sliding_window": 12}),
    "olmo": Family("Olmo", {"clip_qkv": 8.0}),
    "olmo2": Family("Olmo2"),
    "olmo3": Family("Olmo3", {**_HYBRID}),
    "exaone4": Family("Exaone4", {**_HYBRID}),
    "smollm3": Family("SmolLM3"),
    "glm": Family("Glm", {"head_dim": 16}),
    "glm4": Family("Glm4", {"head_dim": 16}),
    "nemotron": Family("Nemotron"),
    "helium": Family("Helium", {"head_dim": 16}),
    "granite": Family("Granite"),
    "seed_oss": Family("SeedOss", {"head_dim": 16}),
    "hunyuan_v1_dense": Family("HunYuanDenseV1", {"head_dim": 16}),
    "ernie4_5": Family("Ernie4_5"),
    "arcee": Family("Arcee"),
    "apertus": Family("Apertus"),
    "bitnet": Family("BitNet"),
    "persimmon": Family("Persimmon"),
    "diffllama": Family("DiffLlama"),
    "nanochat": Family("NanoChat"),
    "xglm": Family("XGLM", {"d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4}),
    "biogpt": Family("BioGpt"),
    "mixtral": Family("Mixtral", {"num_local_experts": 4}),
    "qwen3_moe": Family("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 48}),
    "deepseek_v3": Family(
        "DeepseekV3",
        {
            "n_routed_experts": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "first_k_dense_replace": 2,
            "num_key_value_heads": 4,
        },
    ),
    "mamba": Family("Mamba"),
    "bert": Family("Bert", encoder=True),
    "distilbert": Family(
        "DistilBert", {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4}, encoder=True
    ),
    "roberta": Family("Roberta", {"pad_token_id": 1}, encoder=True),
    "xlm_roberta": Family("XLMRoberta", {"pad_token_id": 1}, encoder=True),
    "electra": Family("Electra", {"embedding_size": 64}, encoder=True),
    "mpnet": Family("MPNet", encoder=True),
    "albert": Family("Albert", {"embedding_size": 32}, encoder=True),
    "modernbert": Family("ModernBert", {"local_attention": 24}, encoder=True),
    "nomic_bert": Family("NomicBert", encoder=True),
    "eurobert": Family("EuroBert", encoder=True),
}


def token_ids(length: int, seed: int = 0) -> list[int]:
    """Ids that are no special token of any configuration above."""
    return [10 + (seed * 7919 + i * 104729 + i * i * 31) % (VOCAB_SIZE - 10) for i in range(length)]


def reference(model: Any, ids: list[int], encoder: bool) -> Any:
    import torch

    with torch.no_grad():
        options = {} if encoder else {"use_cache": False}
        out = model(input_ids=torch.tensor([ids]), **options)
    return (out.last_hidden_state if encoder else out.logits)[0].float()


def try_family(family: Family, attention: str) -> float:
    """The worst difference of the paged graph from transformers, in units of the largest value."""
    model = family.build()
    graph, _ = lowered(traced(model, attention=attention, encoder=family.encoder), "paged")
    first, second = token_ids(40), token_ids(21, seed=3)
    wanted = [reference(model, ids, family.encoder) for ids in (first, second)]
    paged = PagedRun(graph)
    if family.encoder:
        rows = paged.step([("b", second), ("a", first)])
        return max(worst(rows[0], wanted[1]), worst(rows[1], wanted[0]))
    head = paged.step([("a", first[:17])])[0]
    tail, whole = paged.step([("a", first[17:]), ("b", second)])
    return max(worst(head, wanted[0][:17]), worst(tail, wanted[0][17:]), worst(whole, wanted[1]))


def outcome(family: Family) -> str:
    """One cell of the table: "equal" with the attention that was traced, or the sentence of the refusal."""
    refused: list[str] = []
    failed: list[str] = []
    for attention in ("sdpa", "eager"):
        try:
            difference = try_family(family, attention)
        except LlmcError as error:
            refused.append(error.message)
        except (ValueError, ImportError, TypeError, AttributeError, KeyError, RuntimeError) as error:
            failed.append(f"not tried: {str(error).splitlines()[0][:120]}")
        else:
            if difference <= TOLERANCE:
                return f"compiles; differs by {difference:.0e} ({attention})"
            refused.insert(0, f"WRONG by {difference:.1e} ({attention})")
    return (refused + failed)[0]


def table(names: list[str]) -> str:
    """The Markdown table; a line for each family as soon as it was tried goes to standard error by `main`."""
    lines = ["| family | result |", "|---|---|"]
    for name in names:
        lines.append(f"| {name} | {outcome(FAMILIES[name])} |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("family", nargs="*", choices=[[], *FAMILIES], help="all where none is named")
    parser.add_argument("--write", action="store_true", help="put the table into docs/models.md")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    text = table(arguments.family or list(FAMILIES))
    if arguments.write:
        import torch
        import transformers

        head = DOCS.read_text().partition("<!-- families -->")[0] if DOCS.exists() else HEAD
        versions = f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}"
        made = f"Made by `python -m tests.families --write` with {versions}."
        DOCS.write_text(f"{head}<!-- families -->\n\n{made}\n\n{text}")


HEAD = """# Models

A family works because its operations do: nothing in the compiler knows a family by name. The table says what
was tried: a tiny random configuration of each is traced, fused and paged, and the paged graph's rows for two
sequences in one batch, one of them in two chunks, are compared with those of transformers in float32 (largest
difference in units of the largest value). What does not compile is refused with the sentence shown.
Twelve families (`tests/models.py`) are compiled for both targets and compared in `tests/test_families.py`.

"""


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()

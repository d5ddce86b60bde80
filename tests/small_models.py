"""Small random models with weights that never change: tests of quantization have what they expect of each of
these, number by number. Which families compile is the business of `families.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .models import DECODER, VOCAB_SIZE

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

        base = {"common": DECODER, "gpt": _GPT, "none": {}}[self.base]
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

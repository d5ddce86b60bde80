"""Tiny mixtures of experts with random weights, one for each form of router and gate.

from tests.moe_models import MOE, tiny_moe, save_moe
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .models import DECODER, save_tokenizer
from .state_models import MODELS as STATE_MODELS

_DECODER: dict[str, Any] = {
    **DECODER,
    "intermediate_size": 48,
    "moe_intermediate_size": 48,
    "num_experts_per_tok": 2,
}

MOE: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 8}),
    "qwen2_moe": ("Qwen2Moe", {"num_experts": 6, "shared_expert_intermediate_size": 80}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 8, "norm_topk_prob": True, "head_dim": 16}),
    "olmoe": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 3}),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
        },
    ),
    "gpt_oss": ("GptOss", {"num_local_experts": 8, "head_dim": 16, "sliding_window": 12}),
}
"""Name of transformers' classes, and what differs from `_DECODER`: softmax over all or over the chosen,
normalised or not, sigmoid with groups and a bias, shared experts, clamped gates with biases.
"""

BEHIND_STATES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": (
        "Qwen3Next",
        {
            **STATE_MODELS["delta"][1],
            "mlp_only_layers": [],
            "num_experts": 6,
            "shared_expert_intermediate_size": 48,
        },
    ),
    "nemotron_h": (
        "NemotronH",
        {
            "layer_types": ["linear_attention", "moe", "full_attention", "mlp", "moe"],
            "num_hidden_layers": 5,
            "head_dim": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 24,
            "n_groups": 2,
            "chunk_size": 8,
            "n_routed_experts": 8,
            "moe_intermediate_size": 40,
            "moe_shared_expert_intermediate_size": 56,
        },
    ),
}
"""Mixtures behind a recurrence; the second one's experts have no gate."""


def moe_config(name: str, **changes: Any) -> Any:
    import transformers

    kind, options = (MOE | BEHIND_STATES)[name]
    return getattr(transformers, f"{kind}Config")(**{**_DECODER, **options, **changes})


def tiny_moe(name: str, *, seed: int = 0, **changes: Any) -> Any:
    """A float32 model in eval mode, every parameter and buffer of a router drawn."""
    import torch
    import transformers

    kind, _ = (MOE | BEHIND_STATES)[name]
    generator = torch.Generator().manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")(moe_config(name, **changes)).to(torch.float32).eval()
    with torch.no_grad():
        for label, parameter in sorted(dict(model.named_parameters()).items()):
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(drawn * (1.4 / parameter.shape[-1] ** 0.5))
            else:
                parameter.copy_(0.2 * drawn + (1.0 if label.endswith("weight") else 0.0))
        for label, buffer in sorted(dict(model.named_buffers()).items()):
            if label.endswith("correction_bias"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    return model


def save_moe(name: str, folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Writes the model as a Hugging Face folder with a tokenizer; returns the folder."""
    tiny_moe(name, seed=seed, **changes).save_pretrained(folder)
    save_tokenizer(folder)
    return folder

"""Tiny models with recurrent layers, one of each recurrence; sizes that need not divide by 16 do not."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .models import DECODER, save_tokenizer

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "selective": ("Mamba", {"state_size": 12, "conv_kernel": 4, "time_step_rank": 4}),
    "ssd": (
        "Mamba2",
        {"num_heads": 8, "head_dim": 16, "state_size": 24, "n_groups": 2, "chunk_size": 8},
    ),
    "short convolution": ("Lfm2", {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}),
    "delta": (
        "Qwen3Next",
        {
            "head_dim": 32,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 24,
            "layer_types": ["linear_attention", "full_attention"],
            "mlp_only_layers": [0, 1],
        },
    ),
    "gated linear": (
        "RecurrentGemma",
        {
            "lru_width": 64,
            "head_dim": 16,
            "conv1d_width": 4,
            "attention_window_size": 12,
            "block_types": ["recurrent", "attention"],
        },
    ),
    # Two convolutions of queries and keys, one behind the other, and values from one token back.
    "convolved attention": (
        "Zaya",
        {"head_dim": 16, "num_experts": 3, "moe_intermediate_size": 32, "router_hidden_size": 24},
    ),
    # It divides weights when it first runs, of one layer by 1, of the other by 2.
    "weighted mean": ("Rwkv", {"attention_hidden_size": 80, "rescale_every": 1}),
}
"""By the recurrence: the model's name in transformers, and what makes it small."""

RECURRENCES = {
    "selective": {"causal_conv1d": 2, "selective_scan": 2},
    "ssd": {"causal_conv1d": 2, "ssd_scan": 2},
    "short convolution": {"causal_conv1d": 1},
    "delta": {"causal_conv1d": 1, "gated_delta_rule": 1},
    "gated linear": {"causal_conv1d": 1, "linear_recurrence": 1},
    "convolved attention": {"causal_conv1d": 6},
    "weighted mean": {"causal_conv1d": 4, "wkv": 2},
}


@cache
def state_model(name: str) -> Any:
    """A float32 model with seeded random weights, every parameter drawn."""
    import transformers

    family, options = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**DECODER, **options})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(torch.float32).eval()
    with torch.no_grad():
        for label, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.4 / parameter.shape[-1] ** 0.5)
            else:
                parameter.normal_(mean=float("norm" in label and "weight" in label), std=0.2)
    return model


def save_state_model(name: str, folder: Path) -> Path:
    """Writes the model as a Hugging Face folder with a tokenizer; returns the folder."""
    state_model(name).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def state_logits(name: str, ids: list[int]) -> np.ndarray:
    """What transformers says: float32 [T, vocab]. The model that it asks is a copy: one may change itself."""
    with torch.no_grad():
        return (
            copy.deepcopy(state_model(name))(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy()
        )


def greedy(name: str, prompt: list[int], count: int) -> list[int]:
    """Tokens that transformers would answer with, computed anew for each."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(state_logits(name, ids)[-1].argmax()))
    return ids[len(prompt) :]

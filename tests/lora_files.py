"""Adapters for tests: as PEFT saves them, every matrix drawn at random (B starts at zero in PEFT, and would
test nothing), or written by hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from .models import ids_of

ROWS = [ids_of(19)[i] for i in (4, 1, 9)]
"""Tokens of the prompt whose embeddings an adapter replaces."""
TIED: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "both": {"target_modules": ["lm_head", "embed_tokens"]},
    "kept tied": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved both": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": ROWS},
    "rows of the head": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": ROWS}},
    "rows of each": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": ROWS, "lm_head": [3, 7]},
    },
    "rows and a head": {"target_modules": ["lm_head"], "trainable_token_indices": ROWS},
}
"""What PEFT is asked for over a model whose embeddings and head are one matrix."""


def adapter(model: Any, folder: Path, *, seed: int = 3, scale: float = 0.2, **options: Any) -> Any:
    """PEFT's model over `model` with every adapter weight drawn, saved to a folder."""
    import peft

    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options})
    adapted: Any = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(adapted.named_parameters()):
            if "lora_" in name:
                drawn = torch.randn(parameter.shape, generator=generator) * scale
                parameter.add_(drawn) if "magnitude" in name else parameter.copy_(drawn)
            elif (
                "modules_to_save" in name
                or "trainable_tokens_delta" in name
                or (parameter.requires_grad and name.endswith(".bias"))
            ):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    adapted.save_pretrained(str(folder))
    return adapted


def write_adapter(folder: Path, modules: Mapping[str, tuple[np.ndarray, np.ndarray]], **config: Any) -> Path:
    """A folder with A [r, K] and B [N, r] of each module, by its name in the model."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, np.ndarray] = {}
    for module, (a, b) in modules.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
    save_file(tensors, folder / "adapter_model.safetensors")
    rank = len(next(iter(modules.values()))[0])
    given = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, **config}
    (folder / "adapter_config.json").write_text(json.dumps(given))
    return folder


def edit(folder: Path, **config: Any) -> None:
    """Change keys of a folder's configuration."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def write_lora(
    path: Path,
    factors: Mapping[str, np.ndarray],
    *,
    architecture: str = "llama",
    alpha: float = 6.0,
    **keys: str,
) -> Path:
    """An adapter in a GGUF file; factors by the names of its tensors. alpha 0: they are not scaled."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {"general.type": "adapter", "adapter.type": "lora", **keys}.items():
        writer.add_string(key, value)
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, array in factors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

"""Adapters as PEFT saves them: adapter_config.json and adapter_model.safetensors.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight   [r, K]
                                                    .lora_B.weight   [N, r]
                                                    .lora_B.bias     [N]      lora_bias
                                                    .lora_magnitude_vector [N]  DoRA
    base_model.model.model.embed_tokens.lora_embedding_A             [r, V],  lora_embedding_B [D, r]
    base_model.model.lm_head.weight                                  modules_to_save
    base_model.model.model.layers.0.mlp.experts.lora_A.weight        [E · r, K]  target_parameters, of several
                                       .base_layer.lora_A.weight     parameters one in the other
    base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta  [n, D]  trainable_token_indices:
                                        n rows that take the place of the table's; without token_adapter where
                                        the adapter is nothing else (peft_type TRAINABLE_TOKENS)

Names without a base_model prefix are the model's own. https://github.com/huggingface/peft
(tuners/lora, tuners/trainable_tokens)
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from ..ir.adapters import MOST, Adapter, LowRank, OfParameters, TokenRows
from ..ir.errors import InputError, UnsupportedError
from ..ir.weights import LazyTensor, read_chunks
from .gguf import MAGIC
from .hf import read_json
from .safetensors import open_safetensors
from .text_part import text_name

_PREFIX: Final = "base_model.model."
_PARTS: Final = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector(?:\.weight)?)"
)
_ROWS: Final = re.compile(r"(?P<module>.+?)(?:\.token_adapter)?\.trainable_tokens_delta")
_OF_TOKENS: Final = "TRAINABLE_TOKENS"
_WRAPPED: Final = "base_layer"
_MOST_NESTED: Final = 64
# These start from a changed base weight, which the adapter alone does not hold.
_CHANGED_BASE: Final = ("pissa", "olora", "loftq", "corda", "lora_ga")
_DTYPES: Final = ("float32", "float16", "bfloat16")
_AGAIN: Final = "download the adapter again"
# A pattern from a stranger: a repeated group can take a regular expression for ever, and so can many
# repetitions, or some over a long name.
_DANGEROUS: Final = re.compile(r"\)[*+?]|\{|\\[1-9]|\(\?P?[=<!]")
_MOST_REPEATED: Final = 4
_LONGEST: Final = 200
"""Of patterns, and of names that they are matched with."""


def is_gguf(path: Path) -> bool:
    """Whether an adapter is a GGUF file (`lora_gguf`): by its name, or, as links lose it, by its content."""
    if path.is_dir():
        return False
    try:
        with open(path, "rb") as file:
            return path.suffix == ".gguf" or file.read(len(MAGIC)) == MAGIC
    except OSError:
        return path.suffix == ".gguf"  # what is not there is told of by its reader


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Open an adapter folder; nothing of the weights is kept in memory.

    Raises:
        InputError: a file is missing or damaged, or tensors and configuration disagree.
        UnsupportedError: an adapter of another kind than LoRA, DoRA and rows of tokens.
    """
    folder = Path(path)
    if not (folder / "adapter_config.json").is_file():
        raise InputError(
            f"adapter {folder}: no adapter_config.json there", remedy="give a folder saved by PEFT"
        )
    config = read_json(folder / "adapter_config.json")
    _check_kind(folder.name, config)
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise InputError(
            f"adapter {folder.name} has no adapter_model.safetensors"
            + (", only a pickle file, which could run code when opened" if pickled else ""),
            remedy="save the adapter with safetensors (save_pretrained in PEFT)",
        )
    modules: dict[str, _Module] = {}
    replaced: dict[str, LazyTensor] = {}
    rows: dict[str, TokenRows] = {}
    for name, tensor in open_safetensors(file).items():
        _check_values(tensor)
        full = name.removeprefix(_PREFIX)
        label, found = text_name(full), _PARTS.fullmatch(full)
        if (of_tokens := _ROWS.fullmatch(full)) is not None:
            module = text_name(of_tokens["module"])
            if module in rows:
                raise InputError(
                    f"{tensor.source} and {rows[module].rows.source} are of one module", remedy=_AGAIN
                )
            rows[module] = _token_rows(config, of_tokens["module"], tensor)
        elif found is not None:
            part = found["part"].removesuffix(".weight") if "magnitude" in found["part"] else found["part"]
            _Module.of(modules, found["module"]).add(found["module"], part, tensor)
        elif "lora_" in label:
            raise UnsupportedError(
                f"{tensor.source} is no tensor of LoRA or DoRA that llmc knows",
                remedy="merge it with PEFT (merge_and_unload) and give the merged model",
            )
        else:
            replaced[label.replace(".modules_to_save.", ".").replace(".base_layer.", ".")] = tensor
    targets = _targets(config)
    changes: dict[str, LowRank] = {}
    parameters: dict[str, OfParameters] = {}
    for label, changed in modules.items():
        if targets and changed.is_plain:
            parameters[label] = changed.of_parameters(config, targets)
        else:
            changes[label] = changed.change(config)
    if not changes and not replaced and not parameters and not rows:
        raise InputError(f"adapter {folder.name} holds no tensors", remedy=_AGAIN)
    asked = config.get("modules_to_save") or []
    names = asked if isinstance(asked, list) else []
    unasked = {n for n in replaced if not any(str(m) in n.split(".") for m in names)}
    optional = frozenset(n for n in unasked if n.endswith(".weight"))
    frozen = optional if config.get("bias", "none") != "none" else unasked
    copies = frozenset(n for n in frozen if n.rpartition(".")[0] in modules)
    return Adapter(folder.name, changes, replaced, optional, copies, parameters, rows)


@dataclass
class _Module:
    """What an adapter says of a module. `name`: in the whole model, as patterns have it. `nested`: tensors by
    their part, for each of PEFT's wrappers, the outermost first.
    """

    name: str
    nested: list[dict[str, LazyTensor]] = field(default_factory=list[dict[str, LazyTensor]])

    @staticmethod
    def of(modules: dict[str, _Module], label: str) -> _Module:
        """The module of a label, under its name in the text model."""
        name = ".".join(part for part in label.split(".") if part != _WRAPPED)
        return modules.setdefault(text_name(name), _Module(name))

    def add(self, label: str, part: str, tensor: LazyTensor) -> None:
        outside = enumerate(reversed(label.split(".")))
        depth = next((i for i, name in outside if name != _WRAPPED), _MOST_NESTED)
        if depth >= _MOST_NESTED:
            raise InputError(f"{tensor.source} is nested in no module, or too often", remedy=_AGAIN)
        while len(self.nested) <= depth:
            self.nested.append({})
        if part in self.nested[depth]:
            raise InputError(
                f"{tensor.source} and {self.nested[depth][part].source} are one tensor", remedy=_AGAIN
            )
        self.nested[depth][part] = tensor

    @property
    def is_plain(self) -> bool:
        """Whether it may be of parameters: those have factors and nothing else."""
        return all(set(parts) <= {"lora_A.weight", "lora_B.weight"} for parts in self.nested)

    def of_parameters(self, config: Mapping[str, Any], targets: Sequence[str]) -> OfParameters:
        def rules(parameter: str) -> tuple[int, float] | None:
            full = f"{self.name}.{parameter}"
            return _rules(config, full) if any(f".{full}".endswith(f".{one}") for one in targets) else None

        if missing := [i for i, parts in enumerate(self.nested) if not parts]:
            wrapper = ".".join([self.name, *[_WRAPPED] * missing[0]])
            raise InputError(f"the adapter has no {wrapper}.lora_A.weight", remedy=_AGAIN)
        factors = [_factors(parts, ("lora_A.weight", "lora_B.weight")) for parts in reversed(self.nested)]
        return OfParameters(factors, rules, partial(self.change, config))

    def change(self, config: Mapping[str, Any]) -> LowRank:
        if len(self.nested) > 1:
            tensor = next(iter(self.nested[-1].values()))
            raise InputError(
                f"{tensor.source} is nested, as changes of parameters are; adapter_config.json has no "
                "target_parameters",
                remedy="save the adapter again with PEFT",
            )
        return _change(self.name, self.nested[0], config)


def _targets(config: Mapping[str, Any]) -> list[str]:
    asked = config.get("target_parameters") or []
    if not isinstance(asked, list) or not all(isinstance(one, str) and one for one in asked):
        raise InputError(
            f"adapter_config.json: target_parameters is {str(asked)[:80]!r}, no list of names", remedy=_AGAIN
        )
    return asked


def _check_kind(name: str, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind not in ("LORA", _OF_TOKENS):
        raise UnsupportedError(f"adapter {name} is an adapter of kind {kind!r}", remedy="give a LoRA adapter")
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_CHANGED_BASE):
        raise UnsupportedError(
            f"adapter {name} was made with init_lora_weights={start!r}, which changes the base model",
            remedy="convert it to plain LoRA in PEFT (path_initial_model_for_weight_conversion)",
        )


def _token_rows(config: Mapping[str, Any], module: str, tensor: LazyTensor) -> TokenRows:
    """Rows of a module; whose they are, the configuration says: for all modules, or by the end of a name."""
    key = "token_indices" if config.get("peft_type") == _OF_TOKENS else "trainable_token_indices"
    asked = config.get(key)
    if isinstance(asked, Mapping):
        asked = next((ids for name, ids in asked.items() if f".{module}".endswith(f".{name}")), None)
    given: list[Any] = asked if isinstance(asked, list) else []
    ids = tuple(one for one in given if type(one) is int and one >= 0)
    counts = {len(set(ids)), len(given), tensor.shape[0] if len(tensor.shape) == 2 else 0}
    if len(counts) > 1 or not ids:
        raise InputError(
            f"{tensor.source} has the shape {list(tensor.shape)}; {key} in adapter_config.json does not name "
            "as many tokens, each once",
            remedy=_AGAIN,
        )
    return TokenRows(ids, tensor)


def _check_values(tensor: LazyTensor) -> None:
    if tensor.dtype not in _DTYPES:
        raise InputError(f"{tensor.source} is {tensor.dtype}, no float", remedy=_AGAIN)
    for rows in read_chunks(tensor):
        if not np.isfinite(rows.astype(np.float32)).all():
            raise InputError(f"{tensor.source} holds NaN or infinite values", remedy=_AGAIN)


def _rules(config: Mapping[str, Any], name: str) -> tuple[int, float]:
    """Rank and scaling of what is called so."""
    rank = _by_pattern(name, config, "r", "rank_pattern")
    alpha = _by_pattern(name, config, "lora_alpha", "alpha_pattern")
    return int(rank), alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _factors(parts: Mapping[str, LazyTensor], names: tuple[str, str]) -> tuple[LazyTensor, LazyTensor]:
    for name in names:
        if name not in parts:
            other = next(iter(parts.values()))
            raise InputError(f"{other.source} has no {name} beside it", remedy=_AGAIN)
    a, b = parts[names[0]], parts[names[1]]
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or a.shape[0] < 1:
        raise InputError(
            f"{a.source} {list(a.shape)} and {b.source} {list(b.shape)} are no factors of a matrix",
            remedy="llmc merges adapters of linear layers, embeddings and stacked matrices",
        )
    return a, b


def _change(module: str, parts: Mapping[str, LazyTensor], config: Mapping[str, Any]) -> LowRank:
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    a, b = _factors(parts, names)
    rank, scaling = _rules(config, module)
    if rank != a.shape[0]:
        raise InputError(
            f"{a.source} has the rank {a.shape[0]}, adapter_config.json says {rank:g}", remedy=_AGAIN
        )
    transposed = embedding or bool(config.get("fan_in_fan_out"))
    magnitude = parts.get("lora_magnitude_vector")
    if magnitude is not None and transposed:
        raise UnsupportedError(
            f"{magnitude.source}: DoRA of an embedding or a transposed weight is not merged",
            remedy="merge it with PEFT (merge_and_unload) and give the merged model",
        )
    return LowRank(a, b, scaling, transposed, magnitude, parts.get("lora_B.bias"), embedding)


def _by_pattern(module: str, config: Mapping[str, Any], key: str, patterns: str) -> float:
    """A number of the configuration, by the first pattern that ends the module's name, as PEFT has it."""
    rules = config.get(patterns) or {}
    value = config.get(key)
    if isinstance(rules, Mapping):
        for pattern, special in rules.items():
            repeated = sum(pattern.count(sign) for sign in "*+?")
            if len(pattern) > _LONGEST or _DANGEROUS.search(pattern) or repeated > _MOST_REPEATED:
                raise UnsupportedError(
                    f"{patterns} of the adapter has the pattern {pattern[:60]!r}, which is not evaluated",
                    remedy="write module names there",
                )
            if len(module) > _LONGEST:
                raise InputError(f"the name of the module {module[:60]!r}… is too long", remedy=_AGAIN)
            try:
                matches = re.match(rf"(.*\.)?({pattern})$", module)
            except re.error:
                raise InputError(f"{patterns} has the pattern {pattern!r}", remedy=_AGAIN) from None
            if matches:
                value = special
                break
    if not isinstance(value, int | float) or isinstance(value, bool) or not -MOST <= value <= MOST:
        raise InputError(
            f"adapter_config.json: {key} is {str(value)[:40]!r}, no number for it", remedy=_AGAIN
        )
    if key == "r" and value < 1:
        raise InputError(f"adapter_config.json: r is {value}, no rank", remedy=_AGAIN)
    return float(value)

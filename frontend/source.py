"""The MODEL argument, opened: a Hugging Face folder, a hub id, a GGUF file, or an `nn.Module`.

Opening reads headers and configuration only. Weights stay on disk as lazy tensors under the names of the
transformers model's parameters; `build_model` makes the module to trace, without weights in it.
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..ir.adapters import listed
from ..ir.dtypes import FLOAT8
from ..ir.errors import InputError
from ..ir.weights import ArrayTensor, LazyTensor, num_elements, quantized_of
from . import gguf_model, hf, rope
from .conversions import apply_conversions, complete, to_numpy_array
from .dense import Dense, dense_layers
from .gguf import GGUFFile
from .gguf_split import read_gguf_model
from .lora_gguf import read_gguf_adapter
from .quantized import describe_quantization, open_quantized
from .sentences import dense_places, made_encoder, reranker_facts, scored_tokens, sentence_facts
from .skeleton import Task, instantiate, instantiate_whole, is_encoder, model_class
from .text_part import text_name, text_part, text_tensors
from .weights import open_gguf_tensors

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class GenerationFacts:
    """What the model's makers say about generating with it."""

    eos_token_ids: list[int] = field(default_factory=list[int])
    bos_token_id: int | None = None
    sampling: dict[str, float] = field(default_factory=dict[str, float])  # empty: greedy


@dataclass
class ModelSource:
    """An opened model.

    Attributes:
        kind: "hf" (folder or hub id), "gguf", or "module" (an `nn.Module` from Python).
        name: for people: the hub id, the folder's or file's name, the class.
        path: folder or file; None for a module.
        config: transformers configuration; None for a module without one.
        task: "causal_lm", "encoder", "classifier", or "function" (a plain module).
        bytes_on_disk: of the weight files.
        generation: end-of-sequence ids and sampling defaults.
        gguf: the checked header of a GGUF file.
        config_only: opened without its weights.
        quantization: `quantization_config` of a folder that holds quantized weights.
        unused_tensors: checkpoint tensors that the model does not take; known once `weights` was asked for.
        rope_scaling: what `scale_rope` wrote into the configuration.
        unscaled_config: the configuration before, where only some sequences are scaled.
        whole: the type of a model that takes more than text, of which this is the text model (text_part.py).
        length: tokens of the longest sequence that is compiled for; the model's own context where None.
        scored: tokens of a language model whose logits are its scores as a classifier (sentences.py).
    """

    kind: Literal["hf", "gguf", "module"]
    name: str
    path: Path | None
    config: Any
    task: Task | Literal["function"]
    bytes_on_disk: int
    generation: GenerationFacts
    gguf: GGUFFile | None = None
    module: torch.nn.Module | None = None
    config_only: bool = False
    quantization: dict[str, Any] | None = None
    unused_tensors: list[str] = field(default_factory=list[str])
    rope_scaling: rope.RopeScaling | None = None
    unscaled_config: Any = None
    whole: str | None = None
    length: int | None = None
    scored: tuple[int, ...] = ()

    @property
    def does(self) -> Task | Literal["function"]:
        """What it is compiled to do: `task`, but a language model that is scored by tokens classifies."""
        return "classifier" if self.scored else self.task

    @property
    def pooling(self) -> str | None:
        """How an encoder makes one vector of a text, where it says: "cls", "mean", "last" or "max"."""
        if self.gguf is not None:
            return gguf_model.pooling(self.gguf)
        return hf.pooling(self.path) if self.kind == "hf" and self.path is not None else None

    @cached_property
    def dense(self) -> list[Dense]:
        """The layers that an encoder's vectors go through behind the pooling; mostly none."""
        if self.gguf is not None:
            return [Dense(self.stored[name], None, None) for name in gguf_model.DENSE if name in self.stored]
        if self.kind != "hf" or self.path is None or self.task != "encoder":
            return []
        return dense_layers(self.path, dense_places(self.path), config_only=self.config_only)

    @property
    def use(self) -> dict[str, Any]:
        """What the runtime must know to use an encoder or a classifier as its makers do; JSON values.

        An encoder: `pooling`, and where they are given `max_seq_length` and `prompts`. A classifier: `labels`
        in the order of its scores, `padding`, the token that a decoder ignores at the end, and where they are
        given `max_seq_length`, `pairs` and `prompts`.
        """
        folder = self.path if self.kind == "hf" else None
        if self.task == "encoder":
            return {"pooling": self.pooling, **(sentence_facts(folder) if folder is not None else {})}
        if self.does != "classifier":
            return {}
        decides = not self.scored and not is_encoder(self.config)
        padding = getattr(self.config.get_text_config(), "pad_token_id", None) if decides else None
        names: Mapping[int, str] = self.config.id2label
        labels = (
            ["false", "true"][-len(self.scored) :] if self.scored else [str(names[i]) for i in sorted(names)]
        )
        facts = {"labels": labels} if padding is None else {"labels": labels, "padding": padding}
        return {**facts, **(reranker_facts(folder) if folder is not None else {})}

    @cached_property
    def stored(self) -> Mapping[str, LazyTensor]:
        """The checkpoint's tensors by their own names, mapped but not read. The parts of a quantized module
        are one tensor, under the name that the weight has in the unquantized checkpoint.
        """
        if self.gguf is not None:
            return open_gguf_tensors(self.gguf)
        if self.module is not None:
            state = self.module.state_dict(keep_vars=True)
            return {
                name: ArrayTensor(to_numpy_array(one), f"{self.name}:{name}") for name, one in state.items()
            }
        tensors = self._files if self.whole is None else text_tensors(self._files)
        return self._opened(tensors)

    def _opened(self, tensors: Mapping[str, LazyTensor]) -> Mapping[str, LazyTensor]:
        """A folder's tensors with the parts of each quantized module as one."""
        if self.quantization is not None:
            config = self.quantization
            if self.whole is not None:  # which may speak of modules by the whole model's names
                config = {text_name(key): value for key, value in config.items()} | config
            return open_quantized(tensors, config, self.name, self._columns)
        bare = next((tensor for tensor in tensors.values() if tensor.dtype in (FLOAT8, "uint32")), None)
        if bare is not None:
            raise InputError(
                f"{bare.source} is {bare.dtype}, and no quantization_config in config.json says its scale",
                remedy="download config.json again, or give the unquantized model",
            )
        return tensors

    def _columns(self, name: str) -> int | None:
        """Columns of a matrix of the model by its name there, or that in a model of more or without a head;
        None where it has none of that name.
        """
        names = (name, text_name(name), f"{self._base}.{name}", name.removeprefix(f"{self._base}."))
        shape = next((self._shapes[one] for one in names if one in self._shapes), ())
        return shape[1] if len(shape) == 2 else None

    @property
    def _base(self) -> str:
        return getattr(model_class(self.config)[0], "base_model_prefix", "")

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        model: Any = instantiate(self.config)
        named = model.named_parameters(remove_duplicate=False)
        return {name: tuple(parameter.shape) for name, parameter in named}

    @cached_property
    def _files(self) -> Mapping[str, LazyTensor]:
        """The tensors of a folder's files, by their names there."""
        assert self.path is not None
        return hf.open_weights(self.path)

    @cached_property
    def weights(self) -> Mapping[str, LazyTensor]:
        """Lazy tensors by the names of `build_model()`'s parameters, tied names included.

        Raises InputError where one is missing or has another shape than the model.
        """
        if self.module is not None:
            return self.stored
        model: Any = instantiate(self.config)
        if self.gguf is not None:
            weights = gguf_model.map_weights(self.gguf, model, self.stored)
        else:
            weights = self._converted(model)
        return complete(model, weights, self.name)

    def _converted(self, model: Any) -> dict[str, LazyTensor]:
        """The checkpoint's tensors by the model's names, converted as transformers does. Those of a text part
        may have names that only the conversions of the whole model know.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping

        mapping = get_model_conversion_mapping(model)
        weights, self.unused_tensors = apply_conversions(model, self.stored, mapping)
        lacking = dict(model.named_parameters()).keys() - weights.keys()
        if not lacking or self.whole is None:
            return weights
        try:
            whole: Any = instantiate_whole(self.config)
        except Exception:  # noqa: BLE001  (a tower may need a package that is not there)
            return weights  # what is lacking is said of the text model
        mapping = get_model_conversion_mapping(whole)
        weights, self.unused_tensors = apply_conversions(whole, self._opened(self._files), mapping)
        return dict(text_tensors(weights))

    @property
    def quantization_of_source(self) -> str | None:
        """The block type that holds most of a GGUF file's elements ("Q4_1"), or the method of a folder ("gptq
        4-bit g128"); None where weights are plain floats.
        """
        if self.quantization is not None:
            return describe_quantization(self.quantization, self.name)
        if self.gguf is None:
            return None
        held: Counter[str] = Counter()
        for info in self.gguf.tensors.values():
            held[info.ggml_type] += info.nbytes // info.type_size * info.block_size
        name = held.most_common(1)[0][0] if held else "F32"
        return None if name in ("F32", "F16", "BF16") else name

    def build_model(self, attn: str = "sdpa") -> torch.nn.Module:
        """The module to trace: parameters on the meta device, buffers real, eval mode, float32.

        Args:
            attn: transformers' attention implementation, "sdpa" or "eager". A module from Python is returned
                as it is.
        """
        if self.module is not None:
            rope.refuse_unsettled(self.module, self.name)
            return self.module.eval()
        model = instantiate(self.config, attn)
        if self.rope_scaling is not None:
            self.rope_scaling.check_built(model, self.name)
        length = self.length or context_length(self.config)
        if length is not None:
            rope.settle(model, length)
        if self.unscaled_config is not None:
            from . import rope_by_length  # which needs torch

            assert length is not None, "what is scaled has a length"
            rope_by_length.install(model, instantiate(self.unscaled_config, attn), length)
        if self.gguf is not None:
            gguf_model.apply_rope_factors(model, self.stored)
        return model

    def scale_rope(self, scaling: rope.RopeScaling) -> None:
        """Make the model one with scaled rotary embeddings; `length` becomes the context that it has then.

        To be called before `build_model`. Raises InputError where there is nothing to scale, or where the
        model contradicts.
        """
        if self.module is not None or self.config is None:
            raise InputError(
                f"--rope-scaling {scaling.text}: {self.name} is a module from Python, built already",
                remedy="write rope_parameters into its configuration before it is built",
            )
        if self.gguf is not None:
            gguf_model.refuse_rope_factors(self.gguf, scaling.text)
        if scaling.needed:
            if self.does != "causal_lm":
                raise InputError(
                    f"--rope-scaling {scaling.text}: {self.name} generates nothing, so no sequence grows",
                    remedy="leave when=needed away",
                )
            self.unscaled_config = copy.deepcopy(self.config)
        self.length = scaling.apply(self.config, self.name)
        self.rope_scaling = scaling

    def merge_gguf_adapter(self, path: Path, scale: float) -> list[str]:
        """Change the tensors by an adapter in a GGUF file, before they are asked for; sentences on losses.

        Raises InputError where the model is no GGUF file, and as `read_gguf_adapter` and `merged`.
        """
        if self.gguf is None:
            raise InputError(
                f"adapter {path.name} is a GGUF file, which has the names of a GGUF model's tensors; "
                f"{self.name} is none",
                remedy="give the model as a GGUF file, or the adapter as PEFT's folder",
            )
        before = self.stored
        adapter = read_gguf_adapter(path, self.gguf.path.name, self.gguf.architecture)
        self.stored = adapter.merged(
            before, scale, tied=self.task == "causal_lm" and "output.weight" not in before
        )
        floats = sum(
            quantized_of(before[name]) is not None and quantized_of(one) is None
            for name, one in self.stored.items()
        )
        notes = [f"{floats} quantized weights became floats"] if floats else []
        return notes + ([f"{listed(adapter.norms)} are left out"] if adapter.norms else [])


def open_source(model: str | os.PathLike[str] | torch.nn.Module, *, config_only: bool = False) -> ModelSource:
    """Open a model by whatever names it.

    Args:
        model: a Hugging Face folder, a hub id ("owner/name"), a GGUF file, or an `nn.Module`.
        config_only: do not ask for weight files (for `llmc check`: nothing large is downloaded or opened).

    Raises:
        InputError: the argument names nothing, or a file is damaged, incomplete or dangerous.
        UnsupportedError: the model is sound, and nothing that llmc compiles.
    """
    if not isinstance(model, str | os.PathLike):
        return _open_module(model)
    path = Path(model)
    if path.is_dir():
        return _open_folder(path, path.resolve().name, config_only)
    if path.is_file():
        return _open_file(path)
    text = os.fspath(model)
    if hf.is_repo_id(text) and path.suffix not in (".gguf", ".safetensors", ".bin"):
        return _open_folder(hf.download(text, weights=not config_only), text, config_only)
    raise InputError(f"{text} does not exist", remedy="give a Hugging Face folder, a hub id or a GGUF file")


def _open_file(path: Path) -> ModelSource:
    if path.suffix in (".safetensors", ".json"):
        raise InputError(f"{path.name} alone is no model", remedy=f"give its folder: {path.parent}")
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise InputError(
            f"{path.name} is a pickle file, which could run code when opened",
            remedy="convert the model to safetensors (save_pretrained in transformers) and give its folder",
        )
    header = read_gguf_model(path)
    _ = header.architecture  # asked before transformers is imported: a hostile file costs only its header
    if not header.tensors:
        raise InputError(
            f"{path.name} holds no tensors (a vocabulary-only file)", remedy="give a file with weights"
        )
    config = gguf_model.read_config(header)
    if gguf_model.pooling(header) is not None:
        made_encoder(config)
    _, task = model_class(config)
    name = " ".join(str(header.metadata.get("general.name", "")).split())[:120] or header.path.stem
    facts = GenerationFacts(*gguf_model.generation_facts(header))
    source = ModelSource("gguf", name, header.path, config, task, header.size, facts, header)
    _ = source.stored  # a block type that cannot be dequantized is refused now
    return source


def _open_folder(folder: Path, name: str, config_only: bool) -> ModelSource:
    config = hf.read_config(folder)
    whole, text = config.model_type, text_part(config)
    facts = GenerationFacts(*hf.generation_facts(folder, config))
    if text is not None:
        own = GenerationFacts(*hf.generation_facts(folder, text))
        config, facts = text, facts if facts.eos_token_ids else own
    if hf.pooling(folder) is not None:
        made_encoder(config)
    _, task = model_class(config)
    files = [] if config_only else hf.weight_files(folder)
    size = sum(path.stat().st_size for path in files)
    source = ModelSource("hf", name, folder, config, task, size, facts, config_only=config_only)
    source.quantization = hf.quantization_config(folder)
    source.whole = None if text is None else whole
    source.scored = scored_tokens(folder) if task == "causal_lm" else ()
    if not config_only:
        _ = source.stored  # headers are checked now: a truncated shard is refused before anything is traced
    return source


def _open_module(module: Any) -> ModelSource:
    import torch

    if not isinstance(module, torch.nn.Module):
        raise InputError(
            f"cannot compile a {type(module).__name__}", remedy="give a path, a hub id or an nn.Module"
        )
    config = getattr(module, "config", None)
    task: Task | Literal["function"] = "function"
    facts = GenerationFacts()
    if config is not None and hasattr(config, "model_type"):
        _, task = model_class(config)
        eos = getattr(config, "eos_token_id", None)
        ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        facts = GenerationFacts(list(ids), getattr(config, "bos_token_id", None), {})
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    return ModelSource("module", type(module).__name__, None, config, task, size, facts, module=module)


def describe(source: ModelSource) -> dict[str, Any]:
    """Facts for `llmc check` and `llmc inspect`, as JSON values."""
    config = source.config
    text = config.get_text_config() if config is not None else None
    stored = {} if source.config_only else source.stored
    types = Counter(getattr(one, "ggml_type", None) or one.dtype for one in stored.values())
    parameters = sum(num_elements(one) for one in stored.values())
    if source.config_only:
        parameters = sum(param.numel() for param in source.build_model().parameters())
    return {
        "name": source.name,
        "kind": source.kind,
        "task": source.does,
        "architecture": getattr(config, "model_type", None),
        "parameters": parameters,
        "bytes": source.bytes_on_disk,
        "tensors": len(stored),
        "tensor_types": dict(sorted(types.items())),
        "quantization": source.quantization_of_source,
        "context_length": context_length(config),
        "vocab_size": getattr(text, "vocab_size", None),
        "num_layers": getattr(text, "num_hidden_layers", None),
        "hidden_size": getattr(text, "hidden_size", None),
        "eos_token_ids": source.generation.eos_token_ids,
        "bos_token_id": source.generation.bos_token_id,
    }


def context_length(config: Any) -> int | None:
    """Tokens that the model was made for, by its configuration; None where it does not say."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None

"""Target `gguf`: `targets/gguf/model.gguf`, for llama.cpp and whatever else reads GGUF.

The graph's weights go back under the names and into the order that GGUF has for the architecture, in the
blocks of a `gguf-*` scheme or of a kept GGUF file, and in floats where nothing was quantized. llmc itself
does not run this target.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ...frontend.gguf_fields import rope_parameters
from ...frontend.gguf_layout import Architecture
from ...frontend.gguf_tabled import named, paired_rows
from ...frontend.source import ModelSource
from ...ir import ops as _ops  # noqa: F401  # pyright: ignore[reportUnusedImport]  (registers the ops)
from ...ir.define import OPS
from ...ir.errors import CompileError, InputError, UnsupportedError
from ...ir.ggml import BLOCK_TYPES
from ...ir.weights import ArrayTensor, LazyTensor, num_elements
from ..target import Progress, Target
from .metadata import architecture, file_type, model_metadata
from .tensors import FLOATS, Converted, Rows, parameters
from .vocabulary import tokenizer_metadata
from .writer import TensorEntry, tensor_bytes, write_gguf

if TYPE_CHECKING:
    from ...ir.core import Graph
    from ..artifact import ArtifactWriter

_ROPE = "rope_freqs.weight"


@dataclass(frozen=True)
class Gguf(Target):
    """A file for llama.cpp: written from HF folders of known architectures and from GGUF files."""

    name: ClassVar[str] = "gguf"
    operations: ClassVar[frozenset[str]] = frozenset(OPS)

    floats: str = field(
        default="f16", metadata={"help": "type of matrices that are not quantized: f16, bf16 or f32"}
    )

    def compile(self, graph: Graph, writer: ArtifactWriter, *, progress: Progress) -> dict[str, Any]:
        raise UnsupportedError(
            "target gguf writes published models only: a graph alone has neither configuration nor tokenizer",
            remedy="compile a Hugging Face folder, a hub id or a GGUF file",
        )

    def check(self, source: ModelSource, graph: Graph) -> None:
        """See `Target.check`."""
        if self.floats not in FLOATS:
            raise InputError(f"gguf: floats={self.floats}", remedy=f"use one of {', '.join(FLOATS)}")
        model_metadata(source, architecture(source))

    def compile_source(
        self, source: ModelSource, graph: Graph, writer: ArtifactWriter, *, progress: Progress
    ) -> dict[str, Any]:
        """Write the file; the manifest entry names it as "model". See `Target.compile_source`."""
        self.check(source, graph)
        arch = architecture(source)
        rows = gguf_tensors(source, graph, arch, self.floats)
        vocab_size = rows["token_embd.weight"].shape[0]
        metadata = model_metadata(source, arch)
        metadata |= tokenizer_metadata(source, writer.partial, vocab_size)
        sizes = Counter[str]()
        for one in rows.values():
            sizes[one.ggml_type] += num_elements(one.data) if len(one.shape) > 1 else 0
        metadata["general.file_type"] = file_type(sizes.most_common(1)[0][0])
        metadata["general.quantization_version"] = 2
        entries = [_entry(name, one) for name, one in rows.items()]
        model = f"targets/{self.name}/model.gguf"
        write_gguf(
            writer.path(model), metadata, entries, progress=lambda share: progress("gguf: tensors", share)
        )
        return {
            "options": self.options(),
            "model": model,
            "weight_file": model,
            "batch_invariant": False,
            "arguments": [],
            "tensor_types": dict(sorted(Counter(one.ggml_type for one in rows.values()).items())),
        }


def gguf_tensors(source: ModelSource, graph: Graph, arch: Architecture, floats: str) -> dict[str, Rows]:
    """Everything that the file holds, by GGUF's names, in the order of the source's parameters.

    Raises UnsupportedError for a parameter that the architecture has no name for, CompileError for one that
    the graph lost.
    """
    known = source.weights
    found = parameters(graph, known, floats)
    names = named(arch, source.config.num_hidden_layers)
    out: dict[str, Rows] = {}
    for parameter in known:
        rows = found.get(parameter)
        same = [found[p] for p in known if p in found and p != parameter and known[p] is known[parameter]]
        if parameter.startswith("lm_head") and _tied(known, parameter, rows, same):
            continue  # llama.cpp takes the embedding
        rows = rows or next(iter(same), None)
        if rows is None:
            raise CompileError(
                f"gguf: the graph has no weight for {parameter}", remedy="report this with the scheme"
            )
        name = names(parameter)
        if name is None:
            raise UnsupportedError(
                f"gguf: architecture {arch.name} has no name for {parameter}", remedy="use another target"
            )
        out[name] = _stored(parameter, name, rows, source, arch)
    return out | _rope_factors(source)


def _tied(known: Mapping[str, LazyTensor], head: str, rows: Rows | None, same: Sequence[Rows]) -> bool:
    """Whether the head is the embedding, and no pass has given it a weight of its own."""
    shared = any(p != head and tensor is known[head] for p, tensor in known.items())
    return shared and (rows is None or all(one.value_name == rows.value_name for one in same))


def _stored(parameter: str, name: str, rows: Rows, source: ModelSource, arch: Architecture) -> Rows:
    """A parameter as the architecture stores it: q and k rows in another order, norms with one added."""
    part = name.split(".")[-2]
    if arch.permuted and part in ("attn_q", "attn_k"):
        heads = source.config.num_attention_heads
        if part == "attn_k":
            heads = getattr(source.config, "num_key_value_heads", None) or heads
        return rows.reordered(paired_rows(rows.shape[0], heads))
    norm = len(rows.shape) == 1 and name.endswith("norm.weight")
    # Folding gives the graph's weight a name of its own, and has added the one already.
    if arch.norm_offset and norm and rows.value_name == parameter:
        data = Converted(rows.data, "float32", plus=arch.norm_offset)
        return Rows(rows.ggml_type, rows.shape, data, rows.value_name)
    return rows


def _rope_factors(source: ModelSource) -> dict[str, Rows]:
    """Scaling with one factor a frequency: a GGUF source's tensor, or computed by transformers."""
    data: LazyTensor | None = None
    if source.gguf is not None:
        data = source.stored.get(_ROPE)
    if data is None and rope_parameters(source.config).get("rope_type") == "llama3":
        frequencies = dict(source.build_model().named_buffers())["model.rotary_emb.inv_freq"].double().numpy()
        theta = rope_parameters(source.config)["rope_theta"]
        plain = float(theta) ** -(np.arange(len(frequencies)) / len(frequencies))
        data = ArrayTensor((plain / frequencies).astype(np.float32), f"{source.name}:{_ROPE}")
    if data is None:
        return {}
    return {_ROPE: Rows("F32", tuple(data.shape), Converted(data, "float32"), _ROPE)}


def _entry(name: str, rows: Rows) -> TensorEntry:
    from gguf.constants import GGMLQuantizationType

    kind = BLOCK_TYPES.get(rows.ggml_type)
    sizes = (kind.block_size, kind.type_size) if kind is not None else (1, _WIDTHS[rows.ggml_type])
    number = int(GGMLQuantizationType[rows.ggml_type])
    return TensorEntry(name, rows.shape, number, tensor_bytes(rows.shape, *sizes), rows.data)


_WIDTHS: Mapping[str, int] = {"F32": 4, "F16": 2, "BF16": 2}

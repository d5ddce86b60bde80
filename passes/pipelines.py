"""The pipelines. Reading this file from top to bottom is reading the compiler."""

from __future__ import annotations

from .base import Pass
from .cache.paging import PageKvCache
from .cache.quantize import QuantizeKvCache
from .canonicalize.cse import DropDead, MergeEqual
from .canonicalize.dense_experts import ChooseExperts
from .canonicalize.fold import FoldConstants
from .canonicalize.moe import NormalizeExperts
from .canonicalize.parameters import WidenParameters
from .canonicalize.shapes import NormalizeShapes
from .canonicalize.stacks import Unstack
from .fuse.attention import FuseAttention
from .fuse.chunks import OneChunk
from .fuse.norm import FuseNorms
from .fuse.projections import FuseGatedMlps, MergeProjections
from .fuse.rope import FuseRotary
from .fuse.sink_scale import FuseSinkScale
from .stage import MarkStage


def canonicalize() -> list[Pass]:
    """One form for each meaning."""
    return [
        WidenParameters(),
        FoldConstants(),
        MergeEqual(),
        Unstack(),
        NormalizeShapes(),
        ChooseExperts(),
        NormalizeExperts(),
        MergeEqual(),
        DropDead(),
    ]


def fuse() -> list[Pass]:
    """Tensor ops → ops of language models. Norms and rope first: attention looks through what they leave."""
    return [
        MarkStage(stage="fused"),
        FuseNorms(),
        FuseRotary(),
        NormalizeShapes(),
        FuseRotary(),
        FuseSinkScale(),
        OneChunk(),
        FuseAttention(),
        NormalizeShapes(),
        FuseGatedMlps(),
        MergeProjections(),
        FuseGatedMlps(),
        NormalizeShapes(),
        MergeEqual(),
        DropDead(),
    ]


def page(page_size: int, kv_dtype: str) -> list[Pass]:
    """Whole sequences → the ragged step over a cache of floats, or of int8."""
    if kv_dtype == "int8":
        return [PageKvCache(page_size=page_size), QuantizeKvCache()]
    return [PageKvCache(page_size=page_size, kv_dtype=kv_dtype)]


def language_model(
    quantize: list[Pass],
    *,
    page_size: int,
    kv_dtype: str,
    extra: list[Pass] | None = None,
    adapt: list[Pass] | None = None,
) -> list[Pass]:
    """Traced model → paged step. `extra` passes (the user's) run on the fused graph, before quantization."""
    return [
        # 0. adapt the weights, which have the checkpoint's names here
        *(adapt or []),
        # 1. canonicalise
        *canonicalize(),
        MarkStage(stage="canonical"),
        # 2. fuse
        *fuse(),
        # 3. the user's passes
        *(extra or []),
        # 4. quantize
        *quantize,
        # 5. page the KV cache
        *page(page_size, kv_dtype),
        *canonicalize(),
    ]


def function(
    quantize: list[Pass], *, extra: list[Pass] | None = None, adapt: list[Pass] | None = None
) -> list[Pass]:
    """Any traced module → a function on tensors: no cache, no ragged batch."""
    return [*(adapt or []), *canonicalize(), MarkStage(stage="canonical"), *fuse(), *(extra or []), *quantize]

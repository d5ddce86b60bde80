"""llmc compiles a language model, as it is published, into one artifact that a small runtime serves.

    import llmc

    llmc.compile("path/to/model", "model.llmc", quant="int4-g64")      # needs llmc[compile]
    llm = llmc.load("model.llmc")                                      # neither torch nor transformers
    print(llm.generate("The capital of France is").text)

Importing this package imports nothing else: each name below loads what it needs on first use.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence

    # An installed tree has these modules beside this file; in the source tree, where the folders stand one
    # level up, a type checker does not find them from here (and from nowhere else does it need to look).
    from .codegen.artifact import Artifact as Artifact  # pyright: ignore[reportMissingImports]
    from .codegen.target import Target as Target  # pyright: ignore[reportMissingImports]
    from .ir.errors import LlmcError as LlmcError  # pyright: ignore[reportMissingImports]
    from .passes.base import Pass as Pass  # pyright: ignore[reportMissingImports]
    from .runtime.llm import LLM as LLM  # pyright: ignore[reportMissingImports]
    from .runtime.loader import load as load  # pyright: ignore[reportMissingImports]
    from .runtime.tools.function import tool as tool  # pyright: ignore[reportMissingImports]

__version__ = "0.1.0"

__all__ = ["LLM", "Artifact", "LlmcError", "Pass", "Target", "__version__", "compile", "load", "tool"]

_LAZY = {
    "Artifact": ".codegen.artifact",
    "LLM": ".runtime.llm",
    "LlmcError": ".ir.errors",
    "Pass": ".passes.base",
    "Target": ".codegen.target",
    "load": ".runtime.loader",
    "tool": ".runtime.tools.function",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name], __name__), name)
    globals()[name] = _with_places(value) if name == "load" else value
    return globals()[name]


def _with_places(load: Any) -> Any:
    """`load` that makes kernels with places for adapters where an artifact's own have none: the runtime
    itself knows no compiler.
    """

    @functools.wraps(load)
    def wrapped(path: Any, **options: Any) -> Any:
        if "adapters" in options or "adapter" in options:
            options.setdefault("places", _placed_kernels)
            if importlib.util.find_spec("tvm") is not None:
                options.setdefault("base", _base_weights)
        return load(path, **options)

    return wrapped


def _base_weights(artifact: Any) -> Any:
    return importlib.import_module(".codegen.tvm.base_weights", __name__).BaseWeights(artifact)


def _placed_kernels(artifact: Any, isa: str) -> Any:
    return importlib.import_module(".codegen.tvm.placed", __name__).placed_kernels(artifact, isa)


def compile(
    model: Any,
    output: str | os.PathLike[str],
    *,
    targets: Sequence[str] = ("tvm-cpu",),
    quant: str = "none",
    quant_head: str | None = None,
    bits_per_weight: float | None = None,
    context: int | None = None,
    kv_dtype: str | None = None,
    passes: Sequence[str] = (),
    lora: Sequence[str] = (),
    rope_scaling: str | None = None,
    dump_ir: str | os.PathLike[str] | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    calib: str | os.PathLike[str] | None = None,
    calib_tokens: int | None = None,
    max_ram: str | int | None = None,
    resume: bool = False,
    max_kl: float | None = None,
    max_ppl_increase: str | float | None = None,
    verdict: bool = True,
    tune: int = 0,
    adapters: bool = False,
    progress: Callable[[str, float], None] | None = None,
) -> Artifact:
    """Compiles a model into the artifact folder `output`; returns it, opened.

    Args:
        model: a Hugging Face folder, a hub id, a GGUF file, or a `torch.nn.Module` with `example_inputs`.
        targets: kernel families, `NAME[:option=value,…]` (`llmc targets` lists them).
        quant: `none`, `keep` (as the checkpoint is), `int8`, `int4-g64` (round to nearest), `gptq-int4-g64`,
            `awq-…`, `best-…` (`int4` is `best-int4-g32`), `nf4`, `gguf-q4_k_m`, …: docs/quantization.md.
        quant_head: scheme of embeddings and output head: `none`, `int8`, `int4-g32`, …; the quantizer's own
            (int8) where None.
        bits_per_weight: size of all weights together, in bits a weight: each layer gets the bits that lose
            least within it, by calibration.
        context: longest sequence in tokens; the model's own limit where None.
        kv_dtype: element type of the cache, "float32", "bfloat16", "float16", "int8" (a scale for each head
            and token) or "float8_e4m3fn" (none; not for onnx-cpu); where None, "float32" with
            quant "none", and else "bfloat16" for tvm-cpu and "float16" for others.
        passes: further passes on the fused graph, `NAME{option=value,…}` (`llmc passes` lists them).
        lora: adapters that PEFT saved, `FOLDER` or `FOLDER:scale`, merged into the weights in this order; of
            a GGUF model also `FILE.gguf`, as llama.cpp's converter writes them, merged first.
        rope_scaling: `KIND:FACTOR[,key=value…]` makes the context longer than the model was trained on:
            "yarn:4", "linear:4", "dynamic:2", "llama3:8"; with ",when=needed" for the sequences that need
            it, rather than all: docs/long-context.md.
        dump_ir: a folder that receives the graph's text after every pass, numbered.
        example_inputs: argument name → tensor, for an `nn.Module` only.
        calib: a text or JSONL file that calibrated schemes calibrate on; the text that ships with llmc where
            None.
        calib_tokens: how many tokens of it; what the scheme does well with where None.
        max_ram: cap of memory for all processes together, in bytes or as "1.5GB", "4GiB".
        resume: go on with the work that an interrupted calibrated compilation of `output` left.
        max_kl: the largest KL divergence from the source that is accepted, in nats a token.
        max_ppl_increase: the largest increase of held-out perplexity that is accepted: "5%", or 5.
        verdict: measure what quantization cost; `Artifact.quality` has it then.
        tune: seconds to search for the sizes of kernels that are fastest on this processor; what was found is
            kept (`$LLMC_CACHE`, by default `~/.cache/llmc`) and taken from there by later compilations with
            `tune`.
        adapters: make places for LoRA adapters that requests choose among (`load(…, adapters=…)`).
        progress: called with (what is being done, share of it done from 0 to 1).

    Raises:
        InputError: the model or an argument is wrong. UnsupportedError: something in the model cannot be
            compiled. CompileError: a pass or target failed. LlmcError: a limit was passed. Nothing is left
            under `output` then.
    """
    driver = importlib.import_module(".codegen.driver", __name__)
    calibrate = importlib.import_module(".codegen.calibrate", __name__)
    if isinstance(max_ram, str):
        max_ram = importlib.import_module(".codegen.memory", __name__).parse_size(max_ram)
    report = driver.compile_model(
        model,
        output,
        targets=targets,
        quant=quant,
        quant_head=quant_head,
        bits_per_weight=bits_per_weight,
        context=context,
        kv_dtype=kv_dtype,
        passes=passes,
        lora=lora,
        rope_scaling=rope_scaling,
        dump_ir=dump_ir,
        render=importlib.import_module(".runtime.chat_template", __name__).render_once,
        detect=importlib.import_module(".runtime.tool_calls", __name__).detect_once,
        example_inputs=example_inputs,
        calibration=calibrate.CalibrationOptions(calib, calib_tokens, resume),
        max_ram=max_ram,
        verdict=importlib.import_module(".codegen.verdict", __name__).VerdictOptions.parse(
            verdict=verdict, max_kl=max_kl, max_ppl_increase=max_ppl_increase
        ),
        tune=tune,
        adapters=adapters,
        **({"progress": progress} if progress is not None else {}),
    )
    return report.artifact

"""Options of `llmc compile` tried together, on families' tiny models.

    python -m tests.combinations 40 --seed 7      tries 40 draws, and prints each with what came of it
    python -m tests.combinations --only 1234      tries one again, by the number that its line begins with

Each draw is a family, a field of its configuration that is changed, the dtype of its weights, a scheme, the
type of its cache, a rotary scaling, an adapter to merge, a context. It is compiled for tvm-cpu and onnx-cpu
in one artifact: both must give the same logits but for what rounding activations does, near to those of
transformers in float32; and answers must not depend on what is computed beside them, in how many threads, in
which chunks. What llmc refuses is printed with its sentence: to be read, not to be counted.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import random
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from llmc.ir.errors import LlmcError, UnsupportedError

from .apart import run_apart
from .families import DOCS, SECONDS, reference, save_family, unfinished
from .family_configs import NOT_BUILT, changes, families, token_ids

SCHEMES = (
    *("none", "none", "int8", "int8-g32", "int4-g32", "int4-g64", "int4-g32-sym", "int4-g16", "nf4"),
    *("gguf-q4_0", "gguf-q8_0", "gguf-q4_k_m", "gguf-q5_k_m", "gguf-q6_k"),
    *(
        "gptq-int4-g32",
        "gptq-int8-g32",
        "gptq-int3-g32-sym",
        "gptq-int2-g16",
        "awq-int4-g32",
        "best-int4-g32",
    ),
)
LOSSES = {
    **dict.fromkeys(("int8", "gptq-int8", "gguf-q8"), 0.1),
    "none": 1e-3,
    "gguf-q6": 0.15,
    "gguf-q5": 0.25,
    "gptq-int3": 0.9,
    "gptq-int2": 1.2,
}
"""The relative difference from transformers that a scheme may make, by how its name begins; else MOST. These
are weights at random, which nothing made insensitive: what is looked for is what is wrong altogether.
"""
MOST = 0.7
USUAL = 0.035
"""What int8 changes of most families' results; of those that it changes more, more is expected."""
CACHES = {"float32": 0.0, "bfloat16": 0.01, "float16": 0.002, "int8": 0.03, "float8_e4m3fn": 0.12}
"""The relative difference that a type of the cache may make."""
_MLP = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "moe_intermediate_size")
_WIDTH = ("hidden_size", "d_model", "n_embd")
_HEADS = ("num_attention_heads", "n_head", "num_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
SIZES: dict[str, dict[str, int]] = {
    "mlp": {**dict.fromkeys(_MLP, 100), "vocab_size": 389},
    "heads": {
        **dict.fromkeys(_WIDTH, 120),
        **dict.fromkeys(_HEADS, 5),
        **dict.fromkeys(_KV_HEADS, 1),
        "head_dim": 24,
    },
    "wide": {
        **dict.fromkeys(_WIDTH, 320),
        **dict.fromkeys(_MLP, 416),
        **dict.fromkeys(_HEADS, 10),
        **dict.fromkeys(_KV_HEADS, 2),
        "head_dim": 32,
    },
}
"""Sizes that no group of weights and no tile divides, one head for all queries, several groups a row."""
TARGETS = ("tvm-cpu:isa=native", "onnx-cpu:accuracy_level=1")


@dataclass
class Draw:
    """One combination of options; `seed` is what it was drawn from."""

    family: str
    seed: int = 0
    changed: tuple[str, Any] | None = None
    sizes: str | None = None
    stored: str = "float32"
    quant: str = "none"
    head: str | None = None
    kv: str | None = None
    scaling: str | None = None
    lora: bool = False
    context: int = 200
    shards: bool = False
    bits: float | None = None

    @staticmethod
    def make(seed: int, family: str | None = None) -> Draw:
        rng = random.Random(seed)
        family = family or rng.choice([n for n in matching() if n not in NOT_BUILT])
        fields_of = changes(family)
        return Draw(
            family,
            seed,
            rng.choice(fields_of) if fields_of and rng.random() < 0.5 else None,
            rng.choice((None, *SIZES)),
            rng.choice(("float32", "bfloat16", "float16")),
            rng.choice(SCHEMES),
            rng.choice((None, None, None, "none", "int8", "int4-g32", "int6-g16")),
            rng.choice((None, None, *CACHES)),
            rng.choice((*(None,) * 16, "yarn:2", "linear:4", "dynamic:2", "llama3:8")),
            rng.random() < 0.25,
            rng.choice((64, 200)),
            rng.random() < 0.2,
            rng.choice((*(None,) * 9, 4.5, 6.0)),
        )

    def __str__(self) -> str:
        """What is not as usual."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return " ".join(f"{name}={value}" for name, value in given.items() if name != "seed")

    def options(self, folder: Path, task: str) -> dict[str, Any]:
        """Arguments of `llmc.compile`."""
        options: dict[str, Any] = {"quant": self.quant, "kv_dtype": self.kv, "context": self.context}
        if not self.quant.startswith(("none", "nf4", "gguf")):
            options["quant_head"] = self.head
        if self.quant.startswith(("int", "gptq", "awq")):
            options["bits_per_weight"] = self.bits
        if self.scaling is not None and task == "causal_lm":
            options["rope_scaling"] = self.scaling
        if (folder / "adapter").exists():
            options["lora"] = [str(folder / "adapter")]
        return options | {"calib_tokens": 2048}


@functools.cache
def matching() -> dict[str, float]:
    """The families that docs/families.md says to match; how far int8 is from float32, relatively."""
    known, found = families(), dict[str, float]()
    for line in DOCS.read_text().splitlines():
        name, _, result, *numbers = [cell.strip() for cell in line.strip("|").split(" | ")] + [""] * 5
        if result == "matches" and name in known:
            found[name] = float(numbers[1].strip(" !") or 0)
    return found


@dataclass
class Outcome:
    """What came of a draw: "right", "not compared" (nothing else computes it: only its neighbours were looked
    at), "differs", "refused", "not built", "bug" or "no result".

    `numbers` are relative differences, of targets from transformers, and "apart", of both targets.
    """

    status: str
    reason: str = ""
    numbers: dict[str, float] = field(default_factory=dict[str, float])
    seconds: float = 0.0


def relative(got: Any, wanted: Any) -> float:
    import numpy as np

    got, wanted = np.ravel(got), np.ravel(wanted)
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def bounds(draw: Draw) -> tuple[float, float]:
    """How far results may be from transformers', and from each other's."""
    scheme = next((x for name, x in LOSSES.items() if draw.quant.startswith(name)), MOST)
    if draw.bits is not None:  # layers may have as few bits as it takes
        scheme = max(scheme, MOST)
    if draw.head not in (None, "none") and draw.quant != "none":
        scheme = max(scheme, MOST if "4" in draw.head else 0.15)
    sensitive = max(1.0, matching().get(draw.family, 0.0) / USUAL)
    cache = CACHES[draw.kv or ("float32" if draw.quant == "none" else "float16")]
    between = 1e-4 if draw.quant == "none" else 0.08 * sensitive
    return scheme * sensitive + cache, between + (cache if cache >= 0.03 else 0.02 * (cache > 0))


def adapt(model: Any, folder: Path) -> Any:
    """A model with a LoRA adapter over some of its layers, saved to a folder; None where none is linear."""
    import torch

    from .lora_files import adapter

    linear = sorted(
        {n.rpartition(".")[2] for n, m in model.named_modules() if type(m) is torch.nn.Linear} - {"lm_head"}
    )
    return adapter(model, folder, scale=0.05, target_modules=linear[:3]).eval() if linear else None


def build(draw: Draw, folder: Path) -> tuple[Any, str]:
    """Writes the model, its tokenizer and its adapter; what transformers computes, float32 [T, …], and what
    the model does.
    """
    import torch

    from .models import save_tokenizer

    sizes: Mapping[str, Any] = SIZES.get(draw.sizes or "", {})
    changed = {} if draw.changed is None else {draw.changed[0]: draw.changed[1]}
    shards = "100KB" if draw.shards else "1GB"
    source, task = save_family(
        draw.family, folder / "model", draw.stored, sizes, changed, max_shard_size=shards
    )
    save_tokenizer(folder / "model")
    if draw.scaling is not None and task == "causal_lm":
        return None, task  # transformers is no oracle of what is scaled: both targets are compared
    if draw.lora and task == "causal_lm":
        source = adapt(source, folder / "adapter") or source
    with torch.no_grad():
        return reference(source, token_ids(40), task).numpy(), task


def attempt(draw: Draw, folder: Path) -> Outcome:
    """Tries a draw, in this process."""
    import llmc

    try:
        wanted, task = build(draw, folder)
    except Exception as error:  # noqa: BLE001  (whatever transformers and PEFT raise)
        return Outcome("not built", f"{type(error).__name__}: {str(error)[:160]}")
    targets = TARGETS[:1] if draw.kv in ("float8_e4m3fn", "bfloat16") else TARGETS
    paths, options = (str(folder / "model"), folder / "out.llmc"), draw.options(folder, task)
    try:
        try:
            llmc.compile(*paths, targets=targets, **options)
        except UnsupportedError as error:
            if "onnx-cpu cannot emit" not in str(error):
                raise
            targets = targets[:1]
            llmc.compile(*paths, targets=targets, **options)
        names = [target.partition(":")[0] for target in targets]
        return judged(draw, wanted, {name: results(paths[1], name, task) for name in names})
    except LlmcError as error:
        return Outcome("refused", f"{type(error).__name__}: {error}")


def results(artifact: Path, target: str, task: str) -> Any:
    """Rows of a sequence; raises AssertionError where answers depend on their neighbours."""
    import llmc
    import numpy as np

    ids = token_ids(40)
    prompts = [ids[:9], ids[:33], ids[5:22]]
    with llmc.load(artifact, target=target, threads=2, kv_tokens=1024) as model:
        rows = np.asarray(model.logits(ids))
        if not target.startswith("tvm") or task != "causal_lm":
            return rows
        goes_back = model.artifact is None or "state" not in model.artifact.model
        together = [a.token_ids for a in model.generate_batch(prompts, max_tokens=12, temperature=0)]
    other: dict[str, Any] = {"threads": 1, "max_batch_tokens": 16, "max_sequences": 2, "prefix_cache": False}
    other |= {"speculate": 2 if goes_back else 0}
    with llmc.load(artifact, target=target, kv_tokens=1024, **other) as model:
        alone = [model.generate(p, max_tokens=12, temperature=0).token_ids for p in prompts]
        assert np.array_equal(model.logits(ids), rows), "logits depend on threads or on chunks"
    assert together == alone, f"answers depend on what is beside them: {together}, alone {alone}"
    return rows


def judged(draw: Draw, wanted: Any, found: Mapping[str, Any]) -> Outcome:
    import numpy as np

    far, apart = bounds(draw)
    outcome = Outcome("right" if wanted is not None or len(found) == 2 else "not compared")
    for name, got in found.items():
        if not np.isfinite(got).all():
            return Outcome("differs", f"{name}: not finite")
        if wanted is not None:
            outcome.numbers[name] = relative(got, wanted)
    if len(found) == 2:
        outcome.numbers["apart"] = relative(*found.values())
    for name, x in outcome.numbers.items():
        most = apart if name == "apart" else far
        if x > most:
            outcome.status, outcome.reason = "differs", f"{name} {x:.2g} > {most:.2g}"
    return outcome


def tried(draw: Draw) -> Outcome:
    """Tries a draw in a process of its own."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found, bug = run_apart(lambda: attempt(draw, Path(folder)), SECONDS)
    found = found or unfinished(Outcome, bug)
    found.seconds = round(time.monotonic() - begun, 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("count", nargs="?", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--family")
    parser.add_argument("--only", type=int)
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import llmc.codegen.driver
    import llmc.frontend.trace
    import llmc.passes.pipelines
    import llmc.runtime.llm  # noqa: F401  (before the processes fork)
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    first = arguments.seed * 1000
    seeds = [arguments.only] if arguments.only is not None else range(first, first + arguments.count)
    for seed in seeds:
        draw = Draw.make(seed, arguments.family)
        found = tried(draw)
        numbers = " ".join(f"{name} {x:.2g}" for name, x in found.numbers.items())
        print(
            f"{seed} {found.status.upper()} {draw} | {numbers} {found.reason} [{found.seconds} s]", flush=True
        )


if __name__ == "__main__":
    main()

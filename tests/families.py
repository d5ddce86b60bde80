"""Which of transformers' families compile, tried on tiny random configurations.

    python -m tests.families                 tries what changed since the last run, and prints the table
    python -m tests.families --write         writes it into docs/families.md as well
    python -m tests.families gemma opt       tries some
    python -m tests.families --failed        tries again what does not match

For each family: a model with random weights is saved as a Hugging Face folder, opened, traced, fused and
paged as `llmc compile` does it; the interpreter runs the paged graph over two sequences in one batch, one of
them in two chunks, and its rows are compared with those of transformers in float32. The same once more after
the scheme `int8`. Each family is tried in a process of its own, which has a limited time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llmc.ir.errors import LlmcError

from . import family_configs
from .apart import run_apart
from .family_configs import NOT_BUILT, families, random_model, small_config, token_ids, type_of

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "families.md"
RESULTS = Path("~/.cache/llmc-tests/families.json").expanduser()
TOLERANCE = 2e-3
"""Of float32: the largest absolute difference of any logit or hidden state."""
INT8_TOLERANCE = 0.1
"""Of int8: root mean square of the difference over that of the values."""
MOST_BYTES = 8 << 30
"""Of a process that tries a family."""
SECONDS = 180
STATUSES = ("equal", "differs", "bug", "no result", "refused", "not built", "not tried")


@dataclass
class Outcome:
    """What came of a family. `status`: "equal", "differs", "refused" (by llmc, `reason` is its sentence), or
    "not built" (our small configuration of it does not run in transformers, or takes gigabytes).

    Differences are None where it did not come to that: `float32` the largest absolute one, `int8` relative.
    """

    status: str
    reason: str = ""
    task: str = ""
    float32: float | None = None
    int8: float | None = None
    int8_reason: str = ""
    largest: float | None = None
    seconds: float = 0.0
    key: str = ""


def reference(model: Any, ids: Sequence[int], task: str) -> Any:
    """What transformers computes of one sequence, float32."""
    import torch

    with torch.no_grad():
        given = torch.tensor([list(ids)])
        out = model(input_ids=given, use_cache=False).logits if task == "causal_lm" else model(given)[0]
    return out[0].float()


def rows_of(graph: Any, task: str, first: list[int], second: list[int]) -> list[Any]:
    """What the paged graph gives for both sequences."""
    import torch

    from .graphs import PagedRun

    paged = PagedRun(graph)
    if task != "causal_lm":
        if graph.facts.get("alone"):
            a, b = (PagedRun(graph).step([("a", one)])[0] for one in (first, second))
        else:
            b, a = paged.step([("b", second), ("a", first)])
        pooling = {"cls": slice(1), "last": slice(-1, None)}.get(graph.facts.get("pooling"), slice(None))
        kept = pooling if task == "encoder" else slice(1)
        return [a[kept], b[kept]]
    head = paged.step([("a", first[:17])])[0]
    tail, whole = paged.step([("a", first[17:]), ("b", second)])
    return [torch.cat([head, tail]), whole]


def compared(got: list[Any], wanted: list[Any]) -> tuple[float, float]:
    """The largest absolute difference, and the relative one."""
    import torch

    ours, theirs = (torch.cat([x.reshape(-1) for x in some]).double() for some in (got, wanted))
    difference = ours - theirs
    return float(difference.abs().max()), float(difference.norm() / theirs.norm())


def save_family(
    family: str,
    folder: Path,
    stored: str = "float32",
    sizes: Mapping[str, Any] = MappingProxyType({}),
    changed: Mapping[str, Any] = MappingProxyType({}),
    **options: Any,
) -> tuple[Any, str]:
    """Writes a family's tiny model as a Hugging Face folder; the model in float32, of weights that `stored`
    holds, and what it does. `sizes`, `changed`: those of `small_config`; options of `save_pretrained`.
    """
    import torch
    from llmc.frontend.skeleton import model_class

    config = small_config(family, sizes, changed)
    cls, task = model_class(config)
    model, kind = random_model(config, cls), getattr(torch, stored)
    state = {name: x.to(kind) if x.is_floating_point() else x for name, x in model.state_dict().items()}
    model.load_state_dict(state)  # rounded
    model.save_pretrained(folder, state_dict=state, **options)
    return model, task


def attempt(
    family: str, folder: Path, stored: str = "float32", changed: Mapping[str, Any] = MappingProxyType({})
) -> Outcome:
    """Tries one family, in this process, from weights of a dtype; `changed` as in `small_config`."""
    from llmc.frontend.source import open_source
    from llmc.frontend.trace import trace_source
    from llmc.passes.quantize.scheme import weight_passes

    from .graphs import lowered

    first, second = token_ids(40), token_ids(21, seed=3)
    try:
        model, task = save_family(family, folder, stored, changed=changed)
        wanted = [reference(model, ids, task) for ids in (first, second)]
    except LlmcError as error:
        return Outcome("refused", error.message)
    except Exception as error:  # noqa: BLE001  (whatever transformers raises on a configuration of ours)
        line = (str(error).strip().splitlines() or [""])[0]
        return Outcome("not built", f"{type(error).__name__}: {line[:160]}")
    try:
        graph = trace_source(open_source(folder))
        paged, _ = lowered(graph, "paged")
        worst, _ = compared(rows_of(paged, task, first, second), wanted)
    except LlmcError as error:
        return Outcome("refused", error.message, task)
    found = Outcome("equal" if worst <= TOLERANCE else "differs", task=task, float32=worst)
    found.largest = max(float(w.abs().max()) for w in wanted)
    try:
        quantized, _ = lowered(graph, "paged", weight_passes("int8"))
        found.int8 = compared(rows_of(quantized, task, first, second), wanted)[1]
    except LlmcError as error:
        found.int8_reason = error.message
    return found


def tried(family: str, stored: str = "float32") -> Outcome:
    """Tries one family in a process of its own."""
    if family in NOT_BUILT:
        return Outcome("not built", NOT_BUILT[family])
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / family.replace(" ", "-")
        # A configuration that our options do not make small must not take the machine with it.
        found, bug = run_apart(lambda: attempt(family, place, stored), SECONDS, MOST_BYTES)
    found = found or unfinished(Outcome, bug)
    found.seconds = round(time.monotonic() - begun, 1)
    return found


def unfinished(kind: Any, bug: str) -> Any:
    """The outcome, of a kind, of what raised an error or gave none."""
    return kind("bug", bug) if bug else kind("no result", f"the process died, or took more than {SECONDS} s")


def key_of(family: str) -> str:
    """What a family's result depends on: the compiler's sources, its options, versions."""
    return hashlib.sha256(f"{_sources()} {family} {_options(family)}".encode()).hexdigest()[:16]


def _options(family: str) -> str:
    some = family_configs.OPTIONS
    return repr((some.get(type_of(family)), some.get(family), NOT_BUILT.get(family)))


def _sources() -> str:
    import torch
    import transformers

    total = hashlib.sha256(f"{transformers.__version__} {torch.__version__}".encode())
    folders = ("ir", "frontend", "passes")
    files = [p for folder in folders for p in sorted((ROOT / folder).rglob("*.py"))]
    for path in (*files, Path(__file__), Path(__file__).parent / "graphs.py"):
        total.update(path.read_bytes())
    return total.hexdigest()


HEAD = """# Families

A family works because its operations do: nothing in the compiler knows a family by name (a test searches
for such names). This table lists every family of text models that the installed transformers has: those it
offers for generation, for masked words and for classification, and base models that take token ids. Of each
a small model with random weights is saved as a folder, opened, traced, fused and paged as `llmc compile`
does it; the interpreter runs the paged graph over two sequences in one batch, one of them in two chunks,
and the rows are compared with those of transformers in float32.

- **float32**: largest absolute difference of a logit (of a hidden state, for encoders); to match is ≤
  {tolerance:g}.
- **int8**: after the scheme `int8`, the root mean square of the difference over that of the values. More
  than {int8:g} is marked !: random weights have no margins, and where a router chooses experts, or a softmax
  is nearly hard, rounding a weight turns choices that it would not turn in a trained model.
- What does not compile is refused, with the sentence shown. `llmc check` says the same from the
  configuration alone.
- A model that "takes more than text" is compiled as its text model, with or without a class of its own for
  that (Gemma 3, Qwen3.5, Qwen3-VL, Mistral 3, LLaVA, …: `tests/test_text_part.py`); for this table it is not
  built whole.

Kernels are compared in `tests/test_families.py`: twelve families (`tests/models.py`) with both targets, and
`pytest -m slow tests/test_family_table.py` compiles one family of each kind of attention for tvm-cpu.

"""


def _cells(family: str, found: Outcome) -> list[str]:
    matches = found.status == "equal"
    int8 = "" if found.int8 is None else f"{found.int8:.3f}" + ("" if found.int8 <= INT8_TOLERANCE else " !")
    result = {"equal": "matches", "bug": "fails"}.get(found.status, found.status)
    numbers = ["" if found.float32 is None else f"{found.float32:.0e}", int8]
    reason = "" if matches and not found.int8_reason else found.reason or found.int8_reason
    return [family, found.task.replace("_", " "), result, *numbers, reason.replace("|", "\\|").rstrip(".")]


def document(known: dict[str, Outcome]) -> str:
    """docs/families.md."""
    import torch
    import transformers

    untried = Outcome("not tried")
    rows = [(n, known.get(n, untried)) for n in families()]
    matching = {type_of(n) for n, found in rows if found.status == "equal"}
    counts = {status: sum(found.status == status for _, found in rows) for status in STATUSES}
    versions = f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}"
    lines = [
        HEAD.format(tolerance=TOLERANCE, int8=INT8_TOLERANCE)
        + f"Made by `python -m tests.families --write` with {versions}: {len(matching)} families match; of "
        f"{len(rows)} rows " + ", ".join(f"{n} {status}" for status, n in counts.items() if n) + ".",
        "",
        "| family | does | result | float32 | int8 | reason |",
        "|---|---|---|---|---|---|",
        *("| " + " | ".join(_cells(n, found)) + " |" for n, found in rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("family", nargs="*", help="all where none is named")
    parser.add_argument("--failed", action="store_true", help="only those that do not match")
    parser.add_argument("--write", action="store_true", help="put the table into docs/families.md")
    parser.add_argument("--stored", default="float32", help="dtype of the weights; only printed for another")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import llmc.frontend.trace
    import llmc.passes.pipelines  # noqa: F401  (before the processes fork)
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    known = {n: Outcome(**o) for n, o in json.loads(RESULTS.read_text()).items()} if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        attempt("llama", Path(folder))  # what is imported on the way is then there in every process
    if arguments.stored != "float32":
        for family in arguments.family or sorted(families()):
            found = tried(family, arguments.stored)
            print(f"{family}: {found.status} {found.float32} {found.int8} {found.reason}", flush=True)
        return
    for family in arguments.family or sorted(families(), key=lambda name: name in known):
        before = known.get(family)
        if not arguments.family and before is not None:
            if arguments.failed and before.status == "equal":
                continue
            if not arguments.failed and before.key == key_of(family):
                continue
        found = tried(family)
        found.key = key_of(family)
        known[family] = found
        numbers = "" if found.float32 is None else f" {found.float32:.1e} {found.int8} {found.int8_reason}"
        print(f"{family}: {found.status}{numbers} {found.reason} [{found.seconds} s]", flush=True)
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps({n: asdict(o) for n, o in sorted(known.items())}, indent=1))
    if arguments.write:
        DOCS.write_text(document(known))


if __name__ == "__main__":
    main()

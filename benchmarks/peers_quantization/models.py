"""What all tools share: the float model as a Hugging Face folder, and windows of token ids.

GGUF file → float32 safetensors under transformers' names, `config.json`, `tokenizer.json`
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..commands import shared_data
from ..published_models import fetch

MODELS = {"smollm2": "smollm2", "qwen": "qwen2.5-coder", "gemma": "gemma3"}
LENGTH = 512
WINDOW = 1024

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Shared:
    """One model for all tools.

    Attributes:
        name: "smollm2". gguf: the published file. folder: the same as float32 for transformers.
        bos: the id that begins every window, where the tokenizer puts one before every text.
    """

    name: str
    gguf: Path
    folder: Path
    bos: int | None

    def encode(self, text: str) -> list[int]:
        from tokenizers import Tokenizer

        tokenizer: Any = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        return list(tokenizer.encode(text, add_special_tokens=False).ids)


def shared_model(name: str, cache: Path) -> Shared:
    """The model, its folder made on first use in `cache`."""
    from llmc.frontend.source import open_source

    gguf = fetch(MODELS[name])
    folder = cache / name / "float"
    facts = folder / "llmc.json"
    if not facts.is_file():
        partial = folder.with_name("float.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        source = open_source(gguf)
        bos = _write(source, partial)
        (partial / "llmc.json").write_text(json.dumps({"bos": bos}) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    return Shared(name, gguf, folder, json.loads(facts.read_text(encoding="utf-8"))["bos"])


def _write(source: Any, folder: Path) -> int | None:
    """Everything of a source that transformers loads; the id of BOS where texts begin with it."""
    from llmc.cli.peer import load_transformers
    from llmc.frontend.tokenizer import export_tokenizer

    load_transformers(str(source.path), "float32").save_pretrained(folder)
    facts = export_tokenizer(source, folder)
    assert facts is not None
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= {
        f"{role}_token": text for role, text in facts.special_tokens.items() if role in ("bos", "eos")
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings) + "\n", encoding="utf-8")
    return source.generation.bos_token_id if facts.adds_bos else None


def cut(ids: list[int], length: int, count: int, bos: int | None) -> Array:
    """int64 [count, length]: consecutive pieces, each behind `bos` where there is one.

    Raises ValueError where the text does not fill them.
    """
    fresh = length - (bos is not None)
    if len(ids) < count * fresh:
        raise ValueError(f"the text has {len(ids)} tokens, {count} x {fresh} were asked for")
    rows = np.array(ids[: count * fresh], np.int64).reshape(count, fresh)
    return rows if bos is None else np.concatenate([np.full((count, 1), bos, np.int64), rows], axis=1)


def scored_windows(model: Shared, count: int) -> Array:
    """int64 [count, 1024] of WikiText-2's test part, as `llmc eval` cuts it."""
    text = (shared_data() / "wikitext2_raw" / "wiki.test.raw").read_text(encoding="utf-8")
    return cut(model.encode(text), WINDOW, count, model.bos)


@dataclass(frozen=True)
class CalibrationText:
    """`ids` int64 [sequences, 512], also as the file `path`; `sha256` of the text they came from."""

    name: str
    path: Path
    ids: Array
    held: Array
    sha256: str


def calibration(model: Shared, name: str, sequences: int, cache: Path) -> CalibrationText:
    """The first `sequences` x 512 tokens of "wikitext" (its train part), "c4" or a UTF-8 text file; the last
    8 x 512 of the text are held out for tools that choose by them.
    """
    text = _calibration_text(name)
    ids, held = model.encode(text), 8
    rows = cut(ids, LENGTH, sequences, model.bos)
    rest = ids[sequences * LENGTH :][-held * LENGTH :]
    path = cache / model.name / f"calibration-{Path(name).stem}-{sequences}.npy"
    np.save(path, rows)
    count = min(held, len(rest) // LENGTH)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return CalibrationText(Path(name).stem, path, rows, cut(rest, LENGTH, count, model.bos), sha256)


def _calibration_text(name: str) -> str:
    if name == "wikitext":
        return (shared_data() / "wikitext2_raw" / "wikitext2_train_5k.txt").read_text(encoding="utf-8")
    if name == "c4":
        lines = (shared_data() / "sft" / "c4_demo.jsonl").read_text(encoding="utf-8").splitlines()
        return "\n\n".join(json.loads(line)["text"] for line in lines)
    return Path(name).read_text(encoding="utf-8")


def parameters(model: Shared, names: Iterable[str] | None = None) -> dict[str, Any]:
    """The float parameters as torch tensors, mapped from the folder; all, or those named."""
    from safetensors import safe_open

    found: dict[str, Any] = {}
    wanted = None if names is None else set(names)
    for path in sorted(model.folder.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            found |= {n: file.get_tensor(n) for n in file.keys() if wanted is None or n in wanted}  # noqa: SIM118  (no mapping)
    return found

"""Hugging Face folders and hub ids: which files, checked how.

Only configuration, tokenizer and safetensors files are read or downloaded. Code in a repository (`auto_map`,
*.py) is never executed and pickled weights (*.bin) are never opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final, TypeGuard

from ..ir.errors import InputError
from ..ir.weights import LazyTensor
from .quantized import is_mlx, quantization_method
from .safetensors import open_safetensors

MAX_JSON_BYTES: Final = 64 << 20
_SINGLE: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"
_REPO_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

_PLACE: Final = re.compile(r"[\w-]+")

_SMALL_FILES: Final = (
    "config.json", "hf_quant_config.json", "generation_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "chat_template.jinja", "chat_template.json",
    "1_Pooling/config.json", "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json",
)  # fmt: skip
_SAMPLING: Final = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


POOLINGS: Final = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_max_tokens": "max",
}
"""Ways of sentence-transformers to make one vector of a text's hidden states, and our names of them."""


def pooling(folder: Path) -> str | None:
    """How a folder of sentence-transformers pools (`1_Pooling/config.json`); None for other folders.

    Raises InputError where it pools in a way, or in several ways at once, that the runtime does not.
    """
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return None
    config = read_json(path)
    asked = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
    if isinstance(config.get("pooling_mode"), str):  # the form since sentence-transformers 5.2
        asked = [name for name, ours in POOLINGS.items() if ours == config["pooling_mode"]] or [
            "pooling_mode"
        ]
    if len(asked) != 1 or asked[0] not in POOLINGS:
        raise InputError(
            f"{path} asks for {', '.join(asked) or 'no pooling'}",
            remedy=f"known: {', '.join(POOLINGS)}, one of them",
        )
    return POOLINGS[asked[0]]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size; InputError naming the file otherwise."""
    value = _read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path.name} holds no JSON object", remedy="download the file again")
    return value


def read_json_list(path: Path) -> list[dict[str, Any]]:
    """A list of JSON objects, as `read_json`."""
    value = _read_json(path)
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise InputError(f"{path.name} holds no list of JSON objects", remedy="download the file again")
    return value


def read_json_any(path: Path) -> Any:
    """What a file of bounded size holds in JSON; InputError naming the file otherwise."""
    return _read_json(path)


def _read_json(path: Path) -> Any:
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise InputError(
                f"{path.name} has {size} bytes, more than a configuration can need", remedy="check the file"
            )
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}", remedy="check the path and its permissions"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path.name} is no valid JSON ({error})", remedy="download the file again"
        ) from None


def is_repo_id(text: str) -> bool:
    """Whether a MODEL argument that is no path could be a hub id."""
    return bool(_REPO_ID.fullmatch(text)) and ".." not in text and "--" not in text


def download(repo_id: str, *, weights: bool) -> Path:
    """The folder of a hub repository in the local cache, fetched where needed (`HF_HUB_OFFLINE=1` is
    respected).
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    disable_progress_bars()
    try:
        folder = Path(snapshot_download(repo_id, allow_patterns=[*_SMALL_FILES, _INDEX]))
        names = _part_files(folder, weights=weights)
        if weights:
            sharded = (folder / _INDEX).is_file()
            names += sorted(set(_weight_map(folder).values())) if sharded else [_SINGLE]
        return Path(snapshot_download(repo_id, allow_patterns=names)) if names else folder
    except InputError:
        raise
    except Exception as error:  # network, authorisation, unknown repository, offline without a cached copy
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{repo_id} is no file or folder here, and the hub does not give it: {reason}",
            remedy="check the name, the network, HF_TOKEN, or HF_HUB_OFFLINE",
        ) from error
    finally:
        enable_progress_bars()


def _part_files(folder: Path, *, weights: bool) -> list[str]:
    """The files of what sentence-transformers puts behind a model, by its list (modules.json)."""
    path = folder / "modules.json"
    parts = read_json_list(path) if path.is_file() else []
    places = [str(part.get("path", "")) for part in parts]
    kept = ("config.json", _SINGLE) if weights else ("config.json",)
    return [f"{place}/{name}" for place in places if _PLACE.fullmatch(place) for name in kept]


def downloaded(repo_id: str) -> Path | None:
    """A hub repository in the local cache, without asking the hub; None where it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def read_config(folder: Path) -> Any:
    """The transformers configuration of a folder. Custom code is never run.

    Raises InputError where config.json is missing, damaged, or names a model type that transformers does not
    implement.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(
            f"{folder} has no config.json", remedy="give a Hugging Face model folder or a GGUF file"
        )
    raw = read_json(path)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise InputError(f"{path} has no model_type", remedy="give a Hugging Face model folder")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

    if model_type not in CONFIG_MAPPING:
        code = " (its own code, named by auto_map, is never run)" if "auto_map" in raw else ""
        names = ", ".join(map(str, raw.get("architectures") or [])) or "no architectures"
        raise InputError(
            f"unknown architecture {model_type} ({names}) in {folder.name}/config.json{code}",
            remedy="give a model whose architecture transformers implements",
        )
    if raw.get("quantization_config") is not None:
        quantization_method(raw["quantization_config"], folder.name)  # a method that is not read is refused
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        # The module that is traced is the unquantized one: its weights are what the codes stand for.
        vars(config).pop("quantization_config", None)
        return config
    except Exception as error:  # transformers validates each field in its own way
        raise InputError(
            f"{path} is refused by transformers: {_line(error)}", remedy="correct the file"
        ) from error


def quantization_config(folder: Path) -> dict[str, Any] | None:
    """`quantization_config` of a folder whose configuration `read_config` has taken; None: plain floats.

    ModelOpt has written it into a file of its own (hf_quant_config.json).
    """
    raw = read_json(folder / "config.json")
    found = raw.get("quantization_config")
    if not (isinstance(found, dict) and "quant_method" in found):
        found = _by_mlx(raw) or found
    beside = folder / "hf_quant_config.json"
    if found is None and beside.is_file():
        own = read_json(beside).get("quantization")
        own = own if isinstance(own, dict) else {}
        # Without an algorithm the cache alone is in fewer bits at run time, weights are plain floats.
        return {**own, "quant_method": "modelopt"} if own.get("quant_algo", "") is not None else None
    return found


def _by_mlx(raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """What MLX says of quantized weights by a key of its own, which was its only one at first."""
    found = raw.get("quantization")
    return found if is_mlx(found) else None


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (text if len(text) <= 300 else text[:300] + "…") or type(error).__name__


def generation_facts(folder: Path, config: Any) -> tuple[list[int], int | None, dict[str, float]]:
    """End-of-sequence ids, the begin id, and the sampling defaults that the model's makers set (empty:
    greedy).
    """
    path = folder / "generation_config.json"
    raw = read_json(path) if path.is_file() else {}
    eos = raw.get("eos_token_id", getattr(config, "eos_token_id", None))
    bos = raw.get("bos_token_id", getattr(config, "bos_token_id", None))
    eos_ids: list[int] = [one for one in (eos if isinstance(eos, list) else [eos]) if _is_id(one)]
    sampling = {name: float(raw[name]) for name in _SAMPLING if isinstance(raw.get(name), int | float)}
    return eos_ids, bos if _is_id(bos) else None, sampling if raw.get("do_sample") is True else {}


def _is_id(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: one, or the shards that the index names.

    Raises InputError for pickled weights, a missing shard, or an index that points outside the folder.
    """
    index = folder / _INDEX
    single = folder / _SINGLE
    if single.is_file():
        return [single]
    if index.is_file():
        return [folder / name for name in sorted(set(_index(folder).values()))]
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
    if pickled:
        raise InputError(
            f"{folder.name} has its weights in {pickled[0]}, a pickle file, which could run code when opened",
            remedy="convert it to safetensors: save_pretrained in transformers, where you trust the file",
        )
    raise InputError(f"{folder.name} has neither {_SINGLE} nor {_INDEX}", remedy="download the weights")


def _index(folder: Path) -> dict[str, str]:
    """{tensor: file} of the index, where every file exists."""
    weight_map = _weight_map(folder)
    for name in sorted(set(weight_map.values())):
        if not (folder / name).is_file():
            raise InputError(f"shard {name} of {folder.name} is missing", remedy="download it")
    return weight_map


def _weight_map(folder: Path) -> dict[str, str]:
    """{tensor: file} of the index, every file checked to be a plain name of a safetensors file."""
    weight_map = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{_INDEX} in {folder.name} has no weight_map", remedy="download the file again")
    for tensor, name in weight_map.items():
        plain = (
            isinstance(name, str) and name not in ("", ".", "..") and "\\" not in name and "\0" not in name
        )
        if not plain or PurePosixPath(name).name != name:
            raise InputError(
                f"{_INDEX} in {folder.name} puts tensor {tensor!r} in {name!r}, which is no file in it",
                remedy="do not use this checkpoint: such an index reaches for other files",
            )
        if not name.endswith(".safetensors"):
            raise InputError(
                f"{_INDEX} in {folder.name} names {name!r}, which is no safetensors file",
                remedy="convert the checkpoint to safetensors",
            )
    return weight_map


def open_weights(folder: Path) -> dict[str, LazyTensor]:
    """Every tensor of a folder's safetensors files, by its name in the checkpoint, mapped but not read."""
    files = weight_files(folder)
    opened: dict[Path, Mapping[str, LazyTensor]] = {path: open_safetensors(path) for path in files}
    if files == [folder / _SINGLE]:
        return dict(opened[files[0]])
    tensors: dict[str, LazyTensor] = {}
    for name, shard in _index(folder).items():
        if name not in opened[folder / shard]:
            raise InputError(
                f"tensor {name!r} is not in {shard}, where {_INDEX} places it",
                remedy="download the shard again",
            )
        tensors[name] = opened[folder / shard][name]
    return tensors

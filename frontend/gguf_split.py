"""Models in several GGUF files, as llama-gguf-split and gguf-py's writer cut them.

    model-00001-of-00003.gguf      metadata of the model, split.count = 3, split.no = 0, maybe no tensors
    model-00002-of-00003.gguf      split.count = 3, split.no = 1

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (section "Naming Convention", Shard)
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Final

from ..ir.errors import InputError
from .gguf import GGUFFile, GGUFTensorInfo, read_gguf

_PART: Final = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_AGAIN: Final = "download all parts into one folder"


def read_gguf_model(path: str | os.PathLike[str]) -> GGUFFile:
    """The header of a GGUF file; of one of several parts, in any of which the model may be named, that of the
    first, with the tensors of all.

    Raises InputError as `read_gguf`, and where parts are missing or belong to different models.
    """
    given = read_gguf(path)
    count = _number(given, "split.count")
    if count <= 1:
        return given
    found = _PART.fullmatch(given.path.name)
    if found is None or int(found["count"]) != count:
        raise InputError(
            f"{given.path.name} is one of {count} parts, and its name does not tell the others'",
            remedy=f"name them NAME-00001-of-{count:05}.gguf and so on",
        )
    tensors: dict[str, GGUFTensorInfo] = {}
    parts: list[GGUFFile] = []
    for number in range(count):
        other = given.path.with_name(f"{found['stem']}-{number + 1:05}-of-{count:05}.gguf")
        if not other.is_file():
            raise InputError(f"{given.path.name} is one of {count} parts; {other} is missing", remedy=_AGAIN)
        part = given if number == int(found["number"]) - 1 else read_gguf(other)
        if (_number(part, "split.no"), _number(part, "split.count")) != (number, count):
            raise InputError(
                f"{other.name} is not part {number + 1} of {count} by its metadata", remedy=_AGAIN
            )
        twice = next((name for name in part.tensors if name in tensors), None)
        if twice is not None:
            raise InputError(f"{other.name} has the tensor {twice}, as a part before it", remedy=_AGAIN)
        tensors |= part.tensors
        parts.append(part)
    first = parts[0]
    expected = _number(first, "split.tensors.count")
    if expected != len(tensors):
        raise InputError(
            f"{first.path.name} says {expected} tensors, its {count} parts have {len(tensors)}", remedy=_AGAIN
        )
    return replace(first, size=sum(part.size for part in parts), tensors=tensors, parts=tuple(parts))


def _number(file: GGUFFile, key: str) -> int:
    """A number of a part's metadata, 0 where it is not there."""
    value = file.metadata.get(key, 0)
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise InputError(f"{Path(file.path).name}: {key} is {value!r}, no number of parts", remedy=_AGAIN)
    return value

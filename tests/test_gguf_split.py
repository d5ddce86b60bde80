"""Models in several GGUF files, written by gguf-py's writer, beside the same model in one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from llmc.cli.inspect import command
from llmc.codegen.calibrate import source_digest
from llmc.frontend.gguf import read_gguf
from llmc.frontend.gguf_split import read_gguf_model
from llmc.frontend.source import open_source
from llmc.frontend.template_file import published_template
from llmc.frontend.weights import open_gguf_tensors
from llmc.ir.errors import InputError

from .models import real_model


def split(whole: Path, folder: Path, **options: Any) -> list[Path]:
    """Write a model again, in several files."""
    import gguf

    reader = gguf.GGUFReader(str(whole))
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama", **options)
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            kind = field.types[-1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=kind)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def whole() -> Path:
    return real_model("smollm2")


@pytest.fixture(scope="module", params=["tensors first", "metadata first"])
def parts(
    request: pytest.FixtureRequest, whole: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    folder = tmp_path_factory.mktemp("split") / "m"
    return split(whole, folder, split_max_tensors=120, small_first_shard=request.param == "metadata first")


@pytest.mark.parametrize("given", [0, -1])
def test_any_part_names_the_model(given: int, parts: list[Path], whole: Path) -> None:
    file, one = read_gguf_model(parts[given]), read_gguf(whole)
    assert len(parts) == 3 + (not read_gguf(parts[0]).tensors)
    assert file.path == parts[0] and file.size == sum(path.stat().st_size for path in parts)
    for key, value in one.metadata.items():
        assert np.array_equal(file.metadata[key], value), key
    found, wanted = open_gguf_tensors(file), open_gguf_tensors(one)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        other = found[name]
        assert (other.shape, other.ggml_type) == (tensor.shape, tensor.ggml_type)
        assert np.array_equal(other.blocks(), tensor.blocks()), name


def test_its_source_has_the_same_weights_template_and_listing(parts: list[Path], whole: Path) -> None:
    source, one = open_source(parts[1]), open_source(whole)
    assert source.config.to_dict() == one.config.to_dict()
    assert source.bytes_on_disk == sum(path.stat().st_size for path in parts)
    name = "model.layers.29.mlp.down_proj.weight"
    assert np.array_equal(source.weights[name].read(), one.weights[name].read())
    template, wanted = published_template(parts[-1]), published_template(whole)
    assert template is not None and wanted is not None and template.text == wanted.text
    shown, of_whole = (
        json.loads(CliRunner().invoke(command, [str(path), "--json"], standalone_mode=False).stdout)
        for path in (parts[1], whole)
    )
    assert shown["bytes"] == source.bytes_on_disk and shown["types"] == of_whole["types"]


def test_resumed_work_is_told_by_all_parts(parts: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(parts[0].parent, folder)
    digests = {source_digest(open_source(folder / path.name)) for path in parts}
    assert digests == {source_digest(open_source(parts[0]))}
    with open(folder / parts[-1].name, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xa5")
    assert source_digest(open_source(folder / parts[0].name)) not in digests


def test_bad_parts_are_refused_by_name(parts: list[Path], tmp_path: Path) -> None:
    names = [path.name for path in parts]
    folder = tmp_path / "m"
    shutil.copytree(parts[0].parent, folder)
    (folder / names[-1]).rename(folder / "kept")
    with pytest.raises(InputError, match=f"is one of {len(names)} parts; .*{names[-1]} is missing"):
        read_gguf_model(folder / names[0])
    shutil.copy(folder / names[1], folder / names[-1])
    with pytest.raises(InputError, match=f"{names[-1]} is not part {len(names)} of {len(names)} by its"):
        read_gguf_model(folder / names[0])
    (folder / "kept").replace(folder / names[-1])
    alone = folder / "other.gguf"
    shutil.copy(folder / names[0], alone)
    with pytest.raises(InputError, match=r"other\.gguf is one of .* parts, and its name does not tell"):
        read_gguf_model(alone)
    data = (folder / names[0]).read_bytes()
    key = b"split.tensors.count"
    place = data.index(key) + len(key) + 4  # behind the type of its value
    count = int.from_bytes(data[place : place + 4], "little")
    (folder / names[0]).write_bytes(data[:place] + (count + 1).to_bytes(4, "little") + data[place + 4 :])
    with pytest.raises(InputError, match=f"says {count + 1} tensors, its {len(names)} parts have {count}"):
        read_gguf_model(folder / names[1])

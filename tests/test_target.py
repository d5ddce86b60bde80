"""Targets: the registry, option parsing, and what is said when either goes wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, ClassVar

import pytest
from llmc.codegen.null import Null
from llmc.codegen.target import Target, collect, get_target, list_targets, make_target, parse_spec
from llmc.ir.errors import InputError
from llmc.plugins.version import API_VERSION


@dataclass(frozen=True)
class Toy(Target):
    name: ClassVar[str] = "toy"
    width: int = field(default=4, metadata={"help": "lanes"})
    fast: bool = False
    isa: str = "any"

    def compile(self, graph: Any, writer: Any, *, progress: Any) -> dict[str, Any]:
        return {}


def _point(name: str, value: str, package: str) -> metadata.EntryPoint:
    class Distribution(metadata.Distribution):
        def read_text(self, filename: str) -> str:
            if filename == "entry_points.txt":
                return f"[llmc.plugins]\n{API_VERSION} = {package}\n"
            return f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n"

        def locate_file(self, path: Any) -> Any:
            raise NotImplementedError

    return metadata.EntryPoint(name, value, "llmc.targets")._for(Distribution())  # type: ignore[attr-defined]


def test_builtin_targets_are_registered_by_entry_points() -> None:
    entries = {entry.name: entry for entry in list_targets()}
    assert {"null", "tvm-cpu"} <= set(entries)
    assert entries["null"].package == "llmc"
    assert entries["null"].load() is Null
    assert get_target("null") == Null()


def test_options_are_parsed_by_type_and_printed_back() -> None:
    name, texts = parse_spec("toy:width=8,fast=yes,isa=avx2+avx512vnni")
    toy = make_target(Toy, texts)
    assert (name, toy) == ("toy", Toy(width=8, fast=True, isa="avx2+avx512vnni"))
    assert str(toy) == "toy:width=8,fast=true,isa=avx2+avx512vnni"
    assert str(Toy()) == "toy"
    assert toy.options() == {"width": 8, "fast": True, "isa": "avx2+avx512vnni"}


def test_entry_lists_options_with_help() -> None:
    (entry,) = collect([_point("toy", f"{__name__}:Toy", "toys")])
    first = entry.options()[0]
    assert (first.name, first.type, first.default, first.help) == ("width", "int", 4, "lanes")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("toy:width", "'width' is no option=value; write NAME:option=value"),
        ("toy:=4", "'=4' is no option=value"),
        ("toy:", "'' is no option=value"),
        ("toy:width=1,width=2", "gives width twice"),
        (":width=1", "has no name"),
    ],
)
def test_malformed_specs_are_refused(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_spec(spec)


def test_unknown_names_list_what_exists() -> None:
    with pytest.raises(InputError, match=r"no target is named 'gpu'; targets: gguf, null, .*tvm-cpu"):
        get_target("gpu")
    with pytest.raises(InputError, match="target toy has no option 'lanes'; options: width, fast, isa"):
        make_target(Toy, {"lanes": "4"})
    with pytest.raises(InputError, match="target null has no option 'x'; options: none"):
        get_target("null:x=1")


@pytest.mark.parametrize(("key", "text", "kind"), [("width", "wide", "int"), ("fast", "maybe", "bool")])
def test_values_of_the_wrong_type_are_refused(key: str, text: str, kind: str) -> None:
    with pytest.raises(InputError, match=f"{key}='{text}' is no {kind}"):
        make_target(Toy, {key: text})


def test_two_packages_with_one_name_are_both_named() -> None:
    points = [_point("toy", "a.b:Toy", "toys"), _point("toy", "c.d:Toy", "more-toys")]
    with pytest.raises(
        InputError, match=r"llmc.targets: toy comes from both more-toys and toys; uninstall one"
    ):
        collect(points)[0].load()
    assert len(collect([points[0], points[0]])) == 1  # one package seen twice is no clash


def test_a_plugin_that_fails_is_named() -> None:
    (broken,) = collect([_point("toy", "no_such_module_here:Toy", "toys")])
    with pytest.raises(InputError, match="target toy of package toys cannot be imported"):
        broken.load()
    (wrong,) = collect([_point("other", f"{__name__}:Toy", "toys")])
    with pytest.raises(InputError, match="entry point other of package toys is no Target class"):
        wrong.load()

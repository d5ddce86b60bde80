"""Passes, quantizers and targets by name: options, errors, and a real plugin package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from llmc.ir.errors import InputError
from llmc.passes.base import Pass
from llmc.passes.fuse.attention import FuseAttention
from llmc.passes.quantize.walk import QuantizeRtn
from llmc.passes.registry import collect, make_pass, quantization_passes, registered
from llmc.plugins.version import API_VERSION

PLUGIN = Path(__file__).resolve().parent / "toy_plugin"


def point(
    name: str, value: str, package: str, group: str = "llmc.passes", api: str = API_VERSION
) -> metadata.EntryPoint:
    """An entry point of a package that is not there; `api` "" for one that does not say what it suits."""

    class Distribution(metadata.Distribution):
        def read_text(self, filename: str) -> str:
            if filename == "entry_points.txt":
                return f"[llmc.plugins]\n{api} = {package}\n" if api else ""
            return f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n"

        def locate_file(self, path: Any) -> Any:
            raise NotImplementedError

    return metadata.EntryPoint(name, value, group)._for(Distribution())  # type: ignore[attr-defined]


def test_own_passes_are_registered_as_anyones_are() -> None:
    passes = registered("llmc.passes")
    assert list(passes) == sorted(passes)
    assert {item.origin for item in passes.values()} >= {"llmc"}
    for name, item in passes.items():
        kind = item.entry.load()
        assert issubclass(kind, Pass) and kind.name == name, "the entry point's name is the class's"
        assert (kind.__doc__ or "").strip(), f"{name} says nothing about itself"


def test_a_pass_by_name_with_options() -> None:
    assert make_pass("fuse-attention") == FuseAttention()
    made = make_pass(" quantize-rtn{bits=8, group=64,symmetric=yes} ")
    assert made == QuantizeRtn(bits=8, group=64, symmetric=True)
    assert make_pass(str(made)) == made, "the text of a pass makes it again"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("fuse-magic", "no pass is named 'fuse-magic'; known: choose-bits, choose-experts, drop-dead, "),
        ("fuse-magic{a=1}", "no pass is named 'fuse-magic'; known: "),
        ("quantize-rtn{bits=4", "'quantize-rtn{bits=4' is no pass; write NAME or NAME{option=value,…}"),
        ("quantize-rtn{bitz=4}", "pass quantize-rtn has no option 'bitz'; options: bits, group, "),
        ("quantize-rtn{bits=four}", "pass quantize-rtn: bits='four' is no int; give a value of that type"),
        ("quantize-rtn{bits=}", "pass quantize-rtn: bits='' is no int; give a value of that type"),
        ("quantize-rtn{symmetric=perhaps}", "pass quantize-rtn: symmetric='perhaps' is no bool; "),
        ("quantize-rtn{bits=4,bits=8}", "pass quantize-rtn: bits is given twice; give it once"),
        ("quantize-rtn{bits=11}", "pass quantize-rtn: bits=11; use 2 to 8 bits"),
        ("fuse-rope{x=1}", "pass fuse-rope has no option 'x'; options: none"),
        ("", "'' is no pass; "),
    ],
)
def test_what_is_wrong_is_named(text: str, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        make_pass(text)
    assert str(caught.value).startswith(sentence) and caught.value.exit_code == 2


def test_two_of_one_name_are_an_error_that_names_both() -> None:
    entries = [point("fuse-rope", "a:B", "one"), point("fuse-rope", "c:D", "other")]
    with pytest.raises(InputError, match=r"llmc\.passes: fuse-rope comes from both one and other; uninstall"):
        collect("llmc.passes", entries)["fuse-rope"].load()
    same_class = [point("fuse-rope", "a:B", "one"), point("fuse-rope", "a:B", "other")]
    with pytest.raises(InputError, match="comes from both one and other"):
        collect("llmc.passes", same_class)["fuse-rope"].load()


def test_one_package_found_twice_is_no_clash() -> None:
    found = collect("llmc.passes", [point("p", "a:B", "one"), point("p", "a:B", "one")])
    assert list(found) == ["p"] and found["p"].origin == "one"


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (
            "no_such_module:Pass",
            "pass broken of package bad cannot be imported (ModuleNotFoundError: No module",
        ),
        ("json:JSONDecoder", "entry point broken of package bad is no Pass class; report it to the authors"),
        ("json:dumps", "entry point broken of package bad is no Pass class; report it to the authors"),
    ],
)
def test_a_broken_plugin_is_named(value: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = collect("llmc.passes", [point("broken", value, "bad")])
    monkeypatch.setattr("llmc.passes.registry.registered", lambda group: entries)
    with pytest.raises(InputError) as caught:
        make_pass("broken")
    assert str(caught.value).startswith(sentence)


def test_a_scheme_that_two_quantizers_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    own = "llmc.passes.quantize.walk:RoundToNearest"
    entries = collect("llmc.quantizers", [point("a", own, "one"), point("b", own, "other")])
    monkeypatch.setattr("llmc.passes.registry.registered", lambda group: entries)
    with pytest.raises(InputError, match="scheme 'int8' comes from both a of one and b of other"):
        quantization_passes("int8")


# -- a real package
@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the toy plugin installed, as `pip install --target` leaves it."""
    work = tmp_path_factory.mktemp("plugin")
    shutil.copytree(PLUGIN, work / "source")  # setuptools leaves its build folder where it builds
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    command += ["--disable-pip-version-check", "--target", str(work / "site"), str(work / "source")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return work / "site"


def python(code: str, *folders: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )


def llmc(*arguments: str, site: Path) -> dict[str, Any]:
    done = python(f"from llmc.cli.main import main; main({list(arguments)!r})", site)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_command_line_lists_a_plugin_with_its_origin(plugin: Path) -> None:
    listed = llmc("passes", "--json", site=plugin)
    (toy,) = [row for row in listed["passes"] if row["name"] == "toy-rename"]
    assert toy["package"] == "llmc-toy" and toy["summary"] == "Give the graph another name."
    assert [option["name"] for option in toy["options"]] == ["to", "loud"]
    (quantizer,) = [row for row in listed["quantizers"] if row["package"] == "llmc-toy"]
    assert quantizer["schemes"] == ["toy-int4"]
    (target,) = [row for row in llmc("targets", "--json", site=plugin)["targets"] if row["name"] == "toy"]
    assert target["package"] == "llmc-toy"


USE = """
import json
from llmc.codegen.target import get_target
from llmc.ir.core import Graph
from llmc.passes.base import PassContext
from llmc.passes.registry import make_pass, quantization_passes
made = make_pass("toy-rename{to=hello,loud=true}")
result = made.run(Graph("g"), PassContext())
(step,) = quantization_passes("toy-int4")
print(json.dumps([str(made), result.graph.name, result.notes, str(get_target("toy:width=8")), step.group]))
"""


def test_a_plugin_is_used_by_name_with_options(plugin: Path) -> None:
    done = python(USE, plugin)
    assert done.returncode == 0, done.stderr
    made, name, said, target, group = json.loads(done.stdout)
    assert made == "toy-rename{to=hello,loud=True}" and name == "HELLO" and said == ["renamed to HELLO"]
    assert target == "toy:width=8" and group == 8


def test_a_plugin_that_takes_a_name_of_ours_is_named_and_ours_goes_on(plugin: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    shutil.copytree(plugin, site)
    (entries,) = site.glob("llmc_toy-*.dist-info/entry_points.txt")
    entries.write_text(
        entries.read_text().replace("toy-rename =", "fuse-rope =").replace("toy = ", "null = ")
    )
    done = python("from llmc.passes.registry import make_pass; print(repr(make_pass('fuse-rope')))", site)
    assert done.returncode == 0 and done.stdout == "FuseRotary()\n"
    assert "pass fuse-rope is llmc's own: that of package llmc-toy is not used; uninstall" in done.stderr
    done = python("from llmc.codegen.target import get_target; print(repr(get_target('null')))", site)
    assert done.returncode == 0 and done.stdout == "Null()\n"
    assert "target null is llmc's own: that of package llmc-toy is not used" in done.stderr


def test_without_the_plugin_its_names_are_unknown() -> None:
    with pytest.raises(InputError, match="no pass is named 'toy-rename'"):
        make_pass("toy-rename")
    with pytest.raises(InputError, match="no quantization scheme is named 'toy-int4'"):
        quantization_passes("toy-int4")

"""Where tools come from: functions, files, entry points, the example."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from llmc.ir.errors import InputError
from llmc.runtime.tool_calls import ToolCall
from llmc.runtime.tools import registry
from llmc.runtime.tools.calculate import calculate
from llmc.runtime.tools.function import tool
from llmc.runtime.tools.registry import ToolBox, collect, tools_of_file

from .test_registry import point


def add(a: int, b: int) -> int:
    """Add."""
    return a + b


def call(name: str, **arguments: Any) -> ToolCall:
    return ToolCall("c1", name, json.dumps(arguments))


def names(box: ToolBox) -> list[str]:
    return [one.spec.name for one in box]


def test_two_tools_of_one_name_are_an_error_that_names_both() -> None:
    @tool(name="add")
    def other() -> None:
        """Another."""

    box = ToolBox([add])
    box.add(add)
    assert names(box) == ["add"], "the same function twice is one tool"
    with pytest.raises(
        InputError, match=r"two tools are named add: one of tests.test_tools_sources and one of there; "
    ):
        box.add(other, origin="there")
    with pytest.raises(InputError, match="more than 128 tools; leave some out"):
        ToolBox(tool(name=f"t{i}")(lambda: None) for i in range(129))


MARKED = """
from __future__ import annotations
import dataclasses
from llmc.runtime.tools.function import tool

@dataclasses.dataclass
class Point:
    x: int

@tool
def draw(point: Point) -> int:
    return point.x + _helper(1)

@tool(name="wipe", effects=True)
async def wipe_all() -> str:
    return "clean"

def public(x: int) -> int:
    return x

def _helper(x: int) -> int:
    return x
"""


def test_a_file_gives_its_marked_functions(tmp_path: Path) -> None:
    (tmp_path / "my tools.py").write_text(MARKED)
    with ToolBox() as box:
        box.load(str(tmp_path / "my tools.py"))
        assert [(one.spec.name, one.effects) for one in box] == [("draw", False), ("wipe", True)]
        assert {one.origin for one in box} == {str(tmp_path / "my tools.py")}
        assert box.run(call("draw", point={"x": 2})).text == "3"


def test_a_file_without_marks_gives_its_public_typed_functions(tmp_path: Path) -> None:
    path = tmp_path / "plain.py"
    path.write_text(
        "from json import dumps\nfrom os.path import join\n"
        "def add(a: int) -> int: return a\ndef untyped(a): return a\ndef _hidden(a: int) -> int: return a\n"
        "class C:\n  def method(self, a: int) -> int: return a\nvalue = 3\n"
    )
    assert [one.spec.name for one in tools_of_file(path)] == ["add"]
    before = set(sys.modules)
    tools_of_file(path)
    assert {name.split("_")[-1] for name in set(sys.modules) - before} == {"plain"}, "a module of its own"


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("x = 1\ny = (\n", r"t.py, line 2: SyntaxError: '\(' was never closed .*; correct the file"),
        ("x = 1\nimport no_such_module\n", "t.py, line 2: ModuleNotFoundError: No module named 'no_such_m"),
        ("import sys\nsys.exit(2)", "t.py, line 2: SystemExit: 2; correct the file"),
        ("x = 3", "t.py has no tools; define a function whose parameters have types, or mark one with @tool"),
        ("def f(x): pass", "t.py has no tools"),
        (
            "def f(x: set) -> int: return 1",
            "t.py: tool f: parameter x has the type set; .* mark the tools of",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_named(source: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "t.py").write_text(source)
    with pytest.raises(InputError, match=sentence):
        ToolBox().load(str(tmp_path / "t.py"))


def test_no_file_and_no_name() -> None:
    with pytest.raises(InputError, match=r"nowhere/t.py: no such file; give a Python file"):
        ToolBox().load("nowhere/t.py")
    with pytest.raises(
        InputError, match=r"no tools are named 'weather'; give FILE.py, mcp:COMMAND, or one of:"
    ):
        ToolBox().load("weather")


GROUPS = 3
PLUGIN_TOOLS = [add, calculate]


def test_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        point("one", "tests.test_tools_sources:add", "p", registry.GROUP),
        point("both", "tests.test_tools_sources:PLUGIN_TOOLS", "q", registry.GROUP),
        point("bad", "tests.test_tools_sources:GROUPS", "r", registry.GROUP),
        point("gone", "tests.no_such:thing", "s", registry.GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: entries)
    box = ToolBox()
    box.add_builtin()
    box.load("one")
    box.load("both")
    assert [(one.spec.name, one.origin) for one in box] == [("calculate", "q"), ("add", "q")]
    with pytest.raises(InputError, match=r"no tools are named 'x'; .* one of: bad, both, gone, one"):
        box.load("x")
    with pytest.raises(InputError, match="entry point bad of package r is neither a function nor a list"):
        box.load("bad")
    with pytest.raises(InputError, match=r"tools gone of package s cannot be imported .ModuleNotFoundError"):
        box.load("gone")
    twice = [point("t", "a:B", "one", registry.GROUP), point("t", "c:D", "other", registry.GROUP)]
    with pytest.raises(InputError, match=r"llmc\.tools: t comes from both one and other; uninstall one"):
        collect(twice)["t"].load()
    assert list(collect([twice[0], twice[0]])) == ["t"]


def test_the_example_is_a_file_of_tools() -> None:
    path = Path(__file__).resolve().parent.parent / "examples" / "tools_weather.py"
    with ToolBox() as box:
        box.load(str(path))
        assert [(one.spec.name, one.effects) for one in box] == [("forecast", False), ("remind", True)]
        result = box.run(call("forecast", city="Oslo", day="tomorrow"))
        assert json.loads(result.text) == {
            "city": "Oslo",
            "day": "tomorrow",
            "sky": "rain",
            "temperature": 13.0,
        }
        assert box.run(call("forecast", city="Rome")).content.startswith(
            "error: LookupError: there is no fore"
        )
        assert box.run(call("forecast", city="Oslo", day="someday")).kind == "arguments"

"""Python functions as tools: schema, conversion and running within limits."""

from __future__ import annotations

import enum
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, Optional, TypedDict

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llmc.ir.errors import InputError
from llmc.runtime.tool_calls import ToolCall
from llmc.runtime.tools.base import ArgumentError
from llmc.runtime.tools.docstring import read_docstring
from llmc.runtime.tools.function import function_tool, tool
from llmc.runtime.tools.registry import ToolBox
from llmc.runtime.tools.runner import MAX_ABANDONED, canonical

from .server_harness import wait_until


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.Enum):
    LOW = 1
    HIGH = 2


class Place(TypedDict):
    city: Annotated[str, "its name"]
    country: NotRequired[str]


@dataclass
class Size:
    """A size.

    Attributes:
        width: In metres.
    """

    width: float
    height: float = 1.0
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.width < 0:
            raise ValueError("a width below 0")


class Node:
    pass


@dataclass
class Tree:
    children: list[Tree]


def everything(
    text: str,
    count: int,
    share: float,
    flag: bool,
    nothing: None,
    unit: Literal["C", "F", 1],
    color: Color,
    level: Level,
    place: Place,
    size: Size,
    names: list[str],
    table: dict[str, int],
    either: int | str,
    maybe: Optional[Literal["a"]] = None,  # noqa: UP045  (the older spelling must work too)
    more: Annotated[Sequence[int], "some numbers"] = (),
    any: Any = 3,
    limit: int = 5,
) -> None:
    """Take one of each."""


def schema_of(function: Callable[..., Any]) -> Mapping[str, Any]:
    schema = function_tool(function).spec.parameters
    jsonschema.Draft202012Validator.check_schema(schema)
    return schema


def test_the_schema_of_every_type() -> None:
    schema = schema_of(everything)
    assert schema["required"] == list(schema["properties"])[:13] and schema["additionalProperties"] is False
    assert schema["properties"] == {
        "text": {"type": "string"},
        "count": {"type": "integer"},
        "share": {"type": "number"},
        "flag": {"type": "boolean"},
        "nothing": {"type": "null"},
        "unit": {"enum": ["C", "F", 1]},
        "color": {"enum": ["red", "blue"]},
        "level": {"enum": ["LOW", "HIGH"]},
        "place": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "its name"},
                "country": {"type": "string"},
            },
            "required": ["city"],
            "additionalProperties": False,
        },
        "size": {
            "type": "object",
            "properties": {
                "width": {"type": "number", "description": "In metres."},
                "height": {"type": "number", "default": 1.0},
                "tags": {"type": "array", "items": {"type": "string"}},
            },
            "required": ["width"],
            "additionalProperties": False,
        },
        "names": {"type": "array", "items": {"type": "string"}},
        "table": {"type": "object", "additionalProperties": {"type": "integer"}},
        "either": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
        "maybe": {"anyOf": [{"enum": ["a"]}, {"type": "null"}]},
        "more": {"type": "array", "items": {"type": "integer"}, "description": "some numbers"},
        "any": {"default": 3},
        "limit": {"type": "integer", "default": 5},
    }


GOOD: dict[str, Any] = {
    "text": "x",
    "count": 3,
    "share": 1,
    "flag": True,
    "nothing": None,
    "unit": 1,
    "color": "blue",
    "level": "HIGH",
    "place": {"city": "Oslo"},
    "size": {"width": 2},
    "names": ["a"],
    "table": {"k": 1},
    "either": "7",
}


def converted(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    made = function_tool(function)
    return made.arguments.convert(arguments, "argument ")


def test_arguments_become_values_of_the_types() -> None:
    assert not list(jsonschema.Draft202012Validator(schema_of(everything)).iter_errors(GOOD))
    values = converted(everything, GOOD)
    assert values == GOOD | {"color": Color.BLUE, "level": Level.HIGH, "size": Size(2.0)}
    assert isinstance(values["share"], float) and isinstance(values["size"].width, float)
    # "7" fits the union's text as it is; where nothing fits as it is, the kind reading of a number does.
    assert converted(everything, GOOD | {"count": " -25 ", "share": "1.5", "flag": "true"})["count"] == -25
    assert converted(everything, GOOD | {"count": 3.0})["count"] == 3


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"text": 3}, "argument text is 3; give a text in quotes"),
        ({"count": "three"}, "argument count is the text 'three'; give a whole number"),
        ({"count": 2.5}, "argument count is 2.5; give a whole number"),
        ({"count": True}, "argument count is true; give a whole number"),
        ({"share": "nan"}, "argument share is the text 'nan'; give a number"),
        ({"share": 10**400}, "argument share is 1000"),
        ({"flag": "yes"}, "argument flag is the text 'yes'; give true or false"),
        ({"nothing": 0}, "argument nothing is 0; give null"),
        ({"unit": True}, "argument unit is true; give one of 'C', 'F', 1"),
        ({"color": "green"}, "argument color is the text 'green'; give one of 'red', 'blue'"),
        ({"level": 2}, "argument level is 2; give one of 'LOW', 'HIGH'"),
        ({"place": {}}, "argument place.city is missing; give city"),
        ({"place": {"city": "O", "zip": 1}}, "argument place.zip is unknown; known: city, country"),
        ({"place": {"city": 5}}, "argument place.city is 5; give a text in quotes"),
        ({"size": {"width": -1}}, "argument size: ValueError: a width below 0"),
        ({"size": [2]}, "argument size is a list; give an object"),
        ({"names": ["a", 1]}, "argument names[1] is 1; give a text in quotes"),
        ({"names": "a"}, "argument names is the text 'a'; give a list"),
        ({"table": {"k": "x"}}, "argument table['k'] is the text 'x'; give a whole number"),
        ({"either": None}, "argument either is null; give a whole number or a text in quotes"),
        ({"colour": "red"}, "argument colour is unknown; known: text, count, "),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        converted(everything, GOOD | change)
    assert str(caught.value).startswith(sentence)


def test_a_missing_argument_is_named() -> None:
    with pytest.raises(ArgumentError, match="argument text is missing; give text"):
        converted(everything, {})


def no_type(x) -> None: ...  # type: ignore[no-untyped-def]
def bad_type(x: Node) -> None: ...
def many(*xs: int) -> None: ...
def recursive(x: Tree) -> None: ...
def keys(x: dict[int, str]) -> None: ...
def unknown(x: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (no_type, "tool no_type: parameter x has no type; write x: str"),
        (bad_type, "tool bad_type: parameter x has the type Node; use str, int, float, bool, "),
        (many, r"tool many takes any number of arguments .xs.; name each of them"),
        (recursive, "parameter x, field children: Tree holds itself; use a type of bounded depth"),
        (keys, "parameter x: keys of an object are texts"),
        (unknown, "tool unknown: its types cannot be read .NameError: name 'Nowhere'"),
        (tool(name="a b")(lambda: None), "'a b' cannot be the name of a tool; use 1 to 64 of"),
        (tool(name="x" * 65)(lambda: None), "cannot be the name of a tool"),
        (len, "is no function; give a function with typed parameters"),
    ],
)
def test_what_cannot_be_a_tool_is_named(function: Callable[..., Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        function_tool(function)


GOOGLE = """Get the weather.

    Of a city,
    now.

    Args:
        city (str): The city's name,
            in English: as on maps.
        unit: Celsius or not.

    Returns:
        Words: many.
    """
NUMPY = """Get the weather.

    Of a city,
    now.

    Parameters
    ----------
    city : str
        The city's name,
        in English: as on maps.
    unit
        Celsius or not.

    Returns
    -------
    str
        Words.
    """
SPHINX = """Get the weather.

    Of a city,
    now.

    :param str city: The city's name,
        in English: as on maps.
    :param unit: Celsius or not.
    :returns: Words.
    """


@pytest.mark.parametrize("text", [GOOGLE, NUMPY, SPHINX], ids=["google", "numpy", "sphinx"])
def test_docstrings_of_three_styles(text: str) -> None:
    found = read_docstring(text)
    assert found.description == "Get the weather.\nOf a city, now."
    assert found.arguments == {"city": "The city's name, in English: as on maps.", "unit": "Celsius or not."}


@given(st.text(alphabet=":-\n Aargsx()*_Para:metrs", max_size=200))
def test_any_docstring_is_read(text: str) -> None:
    found = read_docstring(text)
    assert all(name.isidentifier() or name[0].isdigit() for name in found.arguments)


def test_marks_of_the_decorator() -> None:
    @tool(name="send-it", effects=True, timeout=2.5)
    def send(to: Annotated[str, "whom"], /, text: str = "hi") -> str:
        """Send it."""
        return f"{to}: {text}"

    made = function_tool(send, origin="here")
    assert (made.spec.name, made.spec.description) == ("send-it", "Send it.")
    assert (made.effects, made.timeout, made.origin) == (True, 2.5, "here")
    assert made.bind({"to": "me", "text": "x"})(1) == "me: x" and made.bind({"to": "me"})(1) == "me: hi"
    assert send("you") == "you: hi", "the function is what it was"


# Running ---------------------------------------------------------------------------------------------------


def call(name: str, **arguments: Any) -> ToolCall:
    return ToolCall("c1", name, json.dumps(arguments))


def add(a: int, b: int) -> int:
    """Add."""
    return a + b


async def later(text: str) -> str:
    """Say it later."""
    return f"later {text}"


def throws(kind: str) -> str:
    """Throw."""
    if kind == "exit":
        raise SystemExit(3)
    raise RuntimeError("no\nluck \x1b[31m")


def big() -> str:
    """Say much."""
    return "é" * 5_000_000


def odd(kind: str) -> Any:
    """Return something."""
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    return {
        "size": Size(1.0),
        "set": {"b", "a"},
        "color": Color.RED,
        "nested": {"c": Color.RED, "p": Path("x")},
        "none": None,
        "cyclic": cyclic,
        "surrogate": "a\ud800",
    }[kind]


BOX = ToolBox([add, later, throws, big, odd], timeout=20)


def test_a_call_gives_text() -> None:
    assert BOX.run(call("add", a=1, b=2)).content == "3"
    assert BOX.run(call("later", text="x")).text == "later x"
    assert BOX.run(call("odd", kind="size")).text == '{"width": 1.0, "height": 1.0, "tags": []}'
    assert BOX.run(call("odd", kind="set")).text == '["a", "b"]'
    assert BOX.run(call("odd", kind="color")).text == "red"
    assert BOX.run(call("odd", kind="nested")).text == '{"c": "red", "p": "x"}'
    assert BOX.run(call("odd", kind="none")).text == "null"
    assert BOX.run(call("odd", kind="surrogate")).text == "a?"
    assert BOX.run(ToolCall("c", "odd", "")).content == "error: argument kind is missing; give kind"


def test_what_a_tool_raises_becomes_a_result() -> None:
    result = BOX.run(call("throws", kind="error"))
    assert (result.kind, result.content) == ("error", "error: RuntimeError: no luck  [31m")
    assert BOX.run(call("throws", kind="exit")).content == "error: SystemExit: 3"
    assert BOX.run(call("odd", kind="cyclic")).content.startswith("error: ValueError: Circular reference")


def test_a_large_result_is_cut_with_a_note() -> None:
    result = BOX.run(call("big"))
    assert result.cut_bytes == 10_000_000 - 16_384
    assert result.text == "é" * 8192 + "\n[cut here: 9983616 of 10000000 bytes are not shown]"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ('{"a": 1, "b": ', "the arguments are not JSON ("),
        ("[1, 2]", "the arguments are no JSON object; give {"),
        ('{"a": NaN, "b": 1}', "the arguments are not JSON (ValueError: NaN is no number of JSON)"),
        ('{"a": 1, "b": ' + "9" * 5000 + "}", "the arguments are not JSON ("),
        ('{"a": ' + "[" * 100_000 + "1" + "]" * 100_000 + "}", "the arguments are not JSON (RecursionError"),
        (r'{"a": "\ud800", "b": 1}', "the arguments hold half a character"),
        ('{"a": "' + "x" * (1 << 20) + '"}', "the arguments have 1048585 characters; at most 1048576"),
    ],
)
def test_broken_arguments_become_a_result(arguments: str, sentence: str) -> None:
    result = BOX.run(ToolCall("c", "add", arguments))
    assert result.kind == "arguments" and result.text.startswith(sentence)


def test_an_unknown_tool_becomes_a_result_that_names_those_there_are() -> None:
    result = BOX.run(call("subtract", a=1))
    assert result.kind == "unknown_tool"
    assert result.text == "no tool is named 'subtract'; tools: add, later, throws, big, odd"
    assert ToolBox().run(call("x")).text.endswith("tools: there are none")


def test_a_hanging_tool_is_given_up_and_the_others_go_on() -> None:
    released = threading.Event()
    ended: list[str] = []

    def hang() -> str:
        """Hang."""
        released.wait(60)
        return "late"

    async def hang_async() -> str:
        """Hang."""
        import asyncio

        try:
            await asyncio.sleep(60)
        finally:
            ended.append("cancelled")
        return "late"

    box = ToolBox([hang, hang_async, add], timeout=0.05)
    result = box.run(call("hang"))
    assert (result.kind, result.text) == ("timeout", "the call took longer than 0.05 s and was given up")
    assert box.run(call("hang_async")).kind == "timeout"
    assert box.run(call("add", a=1, b=1), seconds=20).text == "2"
    for _ in range(MAX_ABANDONED):
        box.run(call("hang"), seconds=0.001)
    full = box.run(call("add", a=1, b=1))
    assert full.text == f"{MAX_ABANDONED} earlier calls still run; no further one can"
    released.set()
    wait_until(lambda: box.run(call("add", a=1, b=1), seconds=20).kind == "ok")
    wait_until(lambda: ended == ["cancelled"])


def test_effects_need_leave() -> None:
    done: list[str] = []

    @tool(effects=True)
    def erase(what: str) -> str:
        """Erase it."""
        done.append(what)
        return "gone"

    box = ToolBox([erase])
    asked: list[Any] = []

    def allow(one: Any, arguments: Mapping[str, Any]) -> bool:
        asked.append((one.spec.name, arguments))
        return arguments["what"] == "b"

    assert box.run(call("erase", what="a")).kind == "refused" and not done
    assert box.run(call("erase", what="a"), allow=allow).content == "error: the user did not allow this call"
    assert box.run(call("erase", what=3), allow=allow).kind == "arguments", "a wrong call is not asked about"
    assert box.run(call("erase", what="b"), allow=allow).text == "gone" and done == ["b"]
    assert asked == [("erase", {"what": "a"}), ("erase", {"what": "b"})]


def test_calls_that_mean_the_same_are_the_same() -> None:
    one, other = ToolCall("1", "f", '{"a": 1, "b": [2]}'), ToolCall("2", "f", '{"b":[2],"a":1}')
    assert canonical(one) == canonical(other) != canonical(ToolCall("3", "f", '{"a": 1, "b": [3]}'))
    assert canonical(ToolCall("1", "f", "{broken")) == "f {broken"

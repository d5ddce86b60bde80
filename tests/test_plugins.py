"""Plugins of another version, or whose passes and quantizers are broken or in the way: what is said of them,
and that nothing else suffers.
"""

from __future__ import annotations

import importlib
import logging
import sys
from typing import Any

import pytest
from llmc.ir.core import Graph
from llmc.ir.errors import CompileError, InputError, VerifyError
from llmc.passes.base import PassContext
from llmc.passes.manager import run_passes
from llmc.passes.registry import make_pass, quantization_passes
from llmc.plugins.listing import installed as list_installed
from llmc.plugins.version import is_compatible, refusal

from .plugin_packages import PASSES, QUANTIZERS, Use, a_pass, small, use

__all__ = ["use"]  # a fixture


# Versions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("declared", "fits"),
    [
        ("1.0", True),
        ("1.1", False),
        ("0.9", False),
        ("2.0", False),
        ("1", False),
        ("1.0.0", False),
        ("", False),
    ],
)
def test_the_major_number_must_be_ours_and_the_minor_no_later(declared: str, fits: bool) -> None:
    assert is_compatible(declared) is fits
    assert (refusal("p", [declared]) is None) is fits


def test_later_minor_numbers_take_earlier_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.plugins.version.API_VERSION", "1.4")
    assert [is_compatible(f"1.{minor}") for minor in (0, 3, 4, 5, 10)] == [True, True, True, False, False]


def test_a_package_may_suit_several_versions() -> None:
    assert refusal("p", ["2.0", "1.0"]) is None
    assert refusal("p", ["2.0", "3.0"]) == (
        "package p was made for plugin API 2.0 and 3.0, this llmc has 1.0",
        "upgrade llmc, or install a p made for API 1.x",
    )


@pytest.mark.parametrize(
    ("api", "message"),
    [
        (
            "2.0",
            "pass bad: package bad-plugin was made for plugin API 2.0, this llmc has 1.0; upgrade llm",
        ),
        (
            "1.7",
            "package bad-plugin was made for plugin API 1.7, this llmc has 1.0; upgrade llmc, or ins",
        ),
        (
            "0.3",
            "package bad-plugin was made for plugin API 0.3, this llmc has 1.0; upgrade bad-plugin, ",
        ),
        (
            None,
            "package bad-plugin does not say which plugin API of llmc it was made for .this is 1.0.;",
        ),
    ],
)
def test_a_plugin_of_another_version_is_refused_before_it_is_imported(
    use: Use, api: str | None, message: str
) -> None:
    use("raise RuntimeError('imported')", PASSES, api=api)
    with pytest.raises(InputError, match=message) as caught:
        make_pass("bad")
    assert caught.value.exit_code == 2 and "bad_plugin" not in sys.modules
    assert str(make_pass("fuse-rope")) == "fuse-rope"
    (plugin,) = [one for one in list_installed() if one.package == "bad-plugin"]
    assert plugin.error is not None and "bad_plugin" not in sys.modules


def test_tools_need_not_say_and_are_checked_where_they_do(use: Use) -> None:
    from llmc.runtime.tools import registry

    entries = {"llmc.tools": {"late": "bad_plugin:f"}}
    use("def f(x: int) -> int:\n    '''F.'''\n    return x", entries, api=None)
    assert len(registry.registered()["late"].load()) == 1
    use(
        "raise RuntimeError('imported')",
        {"llmc.tools": {"new": "other_plugin:f"}},
        name="other-plugin",
        api="9.0",
    )
    with pytest.raises(InputError, match=r"tools new: package other-plugin was made for plugin API 9.0"):
        registry.registered()["new"].load()


# Names -----------------------------------------------------------------------------------------------------


def test_a_name_of_ours_stays_ours(use: Use, caplog: pytest.LogCaptureFixture) -> None:
    use("raise RuntimeError('imported')", {"llmc.passes": {"fuse-rope": "bad_plugin:Bad"}})
    with caplog.at_level(logging.WARNING, "llmc.plugins"):
        for _ in range(2):
            assert type(make_pass("fuse-rope")).__module__ == "llmc.passes.fuse.rope"
    assert [record.message for record in caplog.records] == [
        "pass fuse-rope is llmc's own: that of package bad-plugin is not used; uninstall bad-plugin, or "
        "ask its authors for another name"
    ]
    (plugin,) = list_installed()
    assert [one.error for one in plugin.brings] == ["pass fuse-rope is llmc's own: this one is not used"]


def test_two_packages_of_one_name_are_an_error_for_that_name_alone(use: Use) -> None:
    use(a_pass("return PassResult(graph, False)"), PASSES)
    use("", {"llmc.passes": {"bad": "other:Bad"}}, name="other")
    with pytest.raises(
        InputError, match=r"llmc.passes: bad comes from both bad-plugin and other; uninstall one"
    ):
        make_pass("bad")
    assert str(make_pass("fuse-rope")) == "fuse-rope"
    assert [one.brings[0].error is None for one in list_installed()] == [False, False]


def test_a_class_that_calls_itself_otherwise_is_no_match(use: Use) -> None:
    use(a_pass("return PassResult(graph, False)", name="worse"), PASSES)
    with pytest.raises(
        InputError, match=r"entry point bad of package bad-plugin is a pass that calls itself 'worse'"
    ):
        make_pass("bad")


# Passes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise ValueError('no luck')", "ValueError: no luck at bad_plugin.py:1"),
        ("import sys; sys.exit(3)", "SystemExit: 3 at bad_plugin.py:1"),
        ("import no_such_thing", "ModuleNotFoundError: No module named 'no_such_thing'"),
        ("def (", "SyntaxError: "),
        ("from llmc.plugins import Nothing", "ImportError: cannot import name 'Nothing'"),
        ("x = 1", "AttributeError: module 'bad_plugin' has no attribute 'Bad'"),
    ],
)
def test_an_import_that_fails_names_the_package(use: Use, text: str, said: str) -> None:
    use(text, PASSES)
    with pytest.raises(InputError, match=r"pass bad of package bad-plugin cannot be imported") as caught:
        make_pass("bad")
    assert said in caught.value.message and caught.value.remedy == "upgrade or uninstall bad-plugin"
    assert str(make_pass("fuse-rope")) == "fuse-rope"


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        (
            "raise KeyError('lost')",
            CompileError,
            "pass bad of package bad-plugin raised KeyError: 'lost' at bad_pl",
        ),
        ("raise CompileError('no', remedy='go')", CompileError, "^pass bad of package bad-plugin: no; go$"),
        (
            "return None",
            CompileError,
            "pass bad of package bad-plugin: its run gave a NoneType, not a PassResult",
        ),
        (
            "return graph",
            CompileError,
            "pass bad of package bad-plugin: its run gave a Graph, not a PassResult",
        ),
        (
            "return PassResult(None, True)",
            CompileError,
            "as the graph of its result, gave a NoneType, not a Graph",
        ),
        ("import sys; sys.exit(0)", CompileError, "pass bad of package bad-plugin raised SystemExit: 0"),
        (
            "graph.outputs[0].type = graph.outputs[0].type.with_shape((7,)); return PassResult(graph, True)",
            VerifyError,
            "after pass bad of package bad-plugin: .*result is typed float32.7., operands give",
        ),
        (
            "graph.outputs = [object()]; return PassResult(graph, True)",
            VerifyError,
            "after pass bad of package bad",
        ),
        (
            "graph.stage = 'odd'; return PassResult(graph, True)",
            VerifyError,
            "bad-plugin: no stage is named odd",
        ),
    ],
)
def test_a_pass_that_goes_wrong_names_its_package(
    use: Use, body: str, kind: type[Exception], message: str
) -> None:
    use(a_pass(body), PASSES)
    with pytest.raises(kind, match=message) as caught:
        run_passes(small(), [make_pass("bad{size=2}")], PassContext())
    assert isinstance(caught.value, CompileError | VerifyError) and caught.value.remedy


def test_what_runs_out_of_memory_is_not_the_packages_fault(use: Use) -> None:
    use(a_pass("raise MemoryError"), PASSES)
    with pytest.raises(MemoryError):
        run_passes(small(), [make_pass("bad")], PassContext())


def test_errors_of_ours_stay_as_they_are() -> None:
    class Broken(type(make_pass("fuse-rope"))):  # type: ignore[misc]
        __module__ = "llmc.passes.broken"

        def run(self, graph: Graph, context: PassContext) -> Any:
            raise KeyError("ours")

    with pytest.raises(KeyError, match=r"ours"):
        run_passes(small(), [Broken()], PassContext())


# Quantizers ------------------------------------------------------------------------------------------------


def a_quantizer(body: str) -> str:
    return f"""
from llmc.plugins import Quantizer

class Bad(Quantizer):
    forms = ("bad-int4", "int8")

    def passes(self, scheme):
        {body}
"""


def test_a_scheme_of_ours_asks_no_plugin(use: Use) -> None:
    use("raise RuntimeError('imported')", QUANTIZERS)
    assert quantization_passes("int8") and "bad_plugin" not in sys.modules
    with pytest.raises(InputError, match=r"no quantization scheme is named 'int5'") as caught:
        quantization_passes("int5")
    assert "not asked: quantizer bad of package bad-plugin cannot be imported" in caught.value.remedy


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "raise OSError('x')",
            "quantizer bad, asked for scheme 'bad-int4', of package bad-plugin raised OSError: x",
        ),
        (
            "return ['int8']",
            "quantizer bad of package bad-plugin gave no list of passes for scheme 'bad-int4'",
        ),
        ("return 'int8'", "quantizer bad of package bad-plugin gave no list of passes for scheme 'bad-int4'"),
    ],
)
def test_a_quantizer_that_goes_wrong_names_its_package(use: Use, body: str, message: str) -> None:
    use(a_quantizer(body), QUANTIZERS)
    with pytest.raises(CompileError, match=message):
        quantization_passes("bad-int4")
    assert quantization_passes("int8")


def test_a_quantizer_that_claims_our_scheme_is_listed_as_wrong(use: Use) -> None:
    use(a_quantizer("return None"), QUANTIZERS)
    (plugin,) = list_installed()
    assert plugin.brings[0].error is not None and "scheme int8 is llmc's own" in plugin.brings[0].error


def test_rows_that_are_quantized_wrongly_name_the_package(use: Use) -> None:
    from llmc.plugins.testing import tiny_model

    use(
        "import numpy as np\ndef rows(w): return np.zeros(3)\ndef other(w): raise IndexError('row')",
        {},
    )
    module = importlib.import_module("bad_plugin")
    from llmc.plugins import quantize_by_rows

    for function, said in ((module.rows, "rows gave a ndarray"), (module.other, "raised IndexError: row")):
        graph = tiny_model(layers=1)
        assert quantize_by_rows(graph, function, bits=4, group=16) == 6
        codes = next(v for name, v in graph.weights.items() if name.endswith(".q"))
        assert codes.weight is not None
        with pytest.raises(CompileError, match=f"quantizing layers.0.* of package bad-plugin.*{said}"):
            codes.weight.read()

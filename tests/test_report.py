"""The HTML report: whole, without requests, and with everything that comes from a file escaped."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from llmc.cli.main import main
from llmc.cli.quality import verdict_facts, worst_layers
from llmc.cli.report import page, quantized_layers

HOSTILE = '<script>alert("x")</script>\'"&</title></svg>'
QUALITY: dict[str, Any] = {
    "text": {"name": HOSTILE, "sha256": "ab" * 32, "sequences": 4, "length": 512},
    "tokens": 2044,
    "ppl": 22.0,
    "ppl_source": 20.0,
    "ppl_increase_percent": 10.0,
    "kl": 0.1,
    "top1_agreement": 0.8,
    "output_error": 0.25,
    "layers": [
        {"name": "embedding", "error": 0.01},
        {"name": HOSTILE, "error": 0.2},
        {"name": "model.layers.1", "error": None},
        {"name": "model.layers.2", "error": 0.05},
    ],
    "how": "words",
}
REPORT: dict[str, Any] = {
    "kind": "artifact",
    "artifact_kind": "causal_lm",
    "path": "a.llmc",
    "bytes": 123456,
    "model": {"name": HOSTILE, "architecture": "llama", "num_layers": 3},
    "quantization": {"scheme": HOSTILE, "bits_per_weight": 4.6},
    "targets": {HOSTILE: {}},
    "files": {HOSTILE: 17, "manifest.json": 5},
    "command": ["llmc", HOSTILE],
}
IR = r"""
graph "x" stage="paged"
weight @"model.norm.weight" : float32[64]
weight @"model.layers.0.self_attn.o_proj.weight.q" : uint8[64, 64]<q4:g32:asym:float16:row_major>
weight @"model.layers.0.self_attn.o_proj.weight.scale" : float16[64, 2]
weight @"model.layers.0.mlp.down_proj.weight.q" : uint8[64, 192]<q8:g64:sym:float16:row_major>
weight @"model.layers.1.mlp.down_proj.weight.q" : uint8[8, 8]<q4:g8:sym:float32:row_major:nf4>
weight @"lm_\"head.weight.q" : uint8[8, 8]<q4:g8:sym:float16:row_major>
weight @"later" : uint8[8, 8]<from:a:newer:llmc>
"""


class Balanced(HTMLParser):
    """Fails on a tag that is not closed in turn; collects tags, attributes and texts."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(html: str) -> Balanced:
    parser = Balanced()
    parser.feed(html)
    parser.close()
    assert not parser.open
    return parser


def test_hostile_names_stay_text_and_nothing_is_asked_for() -> None:
    html = page(REPORT, QUALITY, quantized_layers(IR))
    found = parsed(html)
    names = {tag for tag, _ in found.tags}
    assert not names & {"script", "img", "link", "iframe", "object", "image", "use", "a"}
    attributes = {key for _, attrs in found.tags for key in attrs}
    assert not attributes & {"src", "href", "srcset", "xlink:href"}
    assert not [key for key in attributes if key.startswith("on")]
    assert not re.search(r"https?:|url\(|@import", html)
    assert found.text.count(HOSTILE) >= 5, "shown as it is, once a place"
    assert "default-src 'none'" in html


def test_the_picture_has_a_title_and_its_numbers_beside_it() -> None:
    html = page(REPORT, QUALITY, [])
    svg = ElementTree.fromstring(html[html.index("<svg") : html.index("</svg>") + 6])
    assert svg.attrib["role"] == "img"
    ids = {child.attrib["id"]: child.text or "" for child in svg if "id" in child.attrib}
    assert set(svg.attrib["aria-labelledby"].split()) == set(ids)
    assert "3 bars, worst first" in ids["bars-desc"]
    widths = [float(child.attrib["width"]) for child in svg if child.tag == "rect"]
    assert widths == sorted(widths, reverse=True)
    assert widths[1] == pytest.approx(widths[0] / 4, abs=0.1), "lengths are as the errors"
    cells = parsed(html).text
    for percent in ("20.000%", "5.000%", "1.000%"):
        assert percent in cells


def test_layers_are_read_from_the_graphs_text() -> None:
    layers = quantized_layers(IR)
    assert [layer["name"] for layer in layers] == ["model.layers.0", "model.layers.1", 'lm_\\"head.weight']
    first = layers[0]
    assert (first["matrices"], first["elements"]) == (2, 64 * 64 + 64 * 192)
    assert first["bits"] == pytest.approx((4 * 64 + 8 * 192) / 256)
    assert first["grids"] == {
        "4 bits, groups of 32, zero points": 1,
        "8 bits, groups of 64, symmetric": 1,
    }
    assert list(layers[1]["grids"]) == ["4 bits, groups of 8, nf4"]


def test_a_report_without_quality_says_so() -> None:
    text = parsed(page({**REPORT, "quantization": None, "files": {}}, None, [])).text
    assert "No quality was measured when this was made." in text
    assert not [part for part in text if "Errors of the layers" in part]


def test_verdicts_of_odd_content_are_shown_without_what_they_lack() -> None:
    shown = dict(
        verdict_facts({"reason": "there is no held-out text", "layers": [3, {"name": 1}], "kl": "x"})
    )
    assert {key: value for key, value in shown.items() if value} == {
        "quality": "not measured: there is no held-out text"
    }
    assert worst_layers({"layers": "x"}) == []
    assert verdict_facts(None) == []
    shown = dict(verdict_facts(QUALITY))
    assert shown["perplexity"] == "+10.00 % (20.000 → 22.000)"
    assert shown["worst layer"] == f"{HOSTILE}, error 20.00%"


def test_inspect_writes_the_page_of_a_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_folder: Any
) -> None:
    target = tmp_path / "report.html"
    assert main(["inspect", str(tiny_folder("llama")), "--html", str(target), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "folder"
    text = parsed(target.read_text(encoding="utf-8")).text
    assert "LlamaForCausalLM" in text
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert main(["inspect", str(tiny_folder("llama")), "--html", str(tmp_path / "no" / "x.html")]) == 2
    assert "no such file or directory" in capsys.readouterr().err

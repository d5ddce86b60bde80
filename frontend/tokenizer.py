"""The tokenizer and the chat template of a model, written for the runtime and proven equal to the source's.

The runtime reads `tokenizer.json` with the tokenizers library alone. Before that file is left in an artifact,
its ids are compared with the source's on the hard strings: with transformers' tokenizer for a Hugging Face
folder, with an independent encoder of the GGUF rules for a GGUF file. A difference is an error: a model fed
with other ids than it was trained on answers worse without anyone noticing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from ..ir.errors import CompileError, InputError, UnsupportedError
from . import tokenizer_gguf
from .chat_shapes import MESSAGE_SHAPES, MessageShape, Renderer, check_template, pair_shape
from .gguf import GGUFFile
from .hard_strings import hard_strings
from .hf import read_json
from .memory import release_freed_memory
from .source import ModelSource
from .tokenizer_reference import ReferenceEncoder
from .tokenizer_rules import read_tokenizer

TOKENIZER_FILE: Final = "tokenizer.json"
TEMPLATE_FILE: Final = "chat_template.jinja"

Encode = Callable[[str, bool], list[int]]
# template, special tokens by name → how the template writes tool calls, for the manifest
DetectTools = Callable[[str, Mapping[str, str]], dict[str, Any]]


@dataclass(frozen=True)
class TokenizerFacts:
    """What the manifest says about the tokenizer.

    Attributes:
        kind: "byte-level BPE", "SentencePiece BPE", "WordPiece", … as the vocabulary is made.
        vocab_size: ids, added tokens included.
        path, chat_template: file names in the folder written to; None without a template.
        special_tokens: text of `bos_token`, `eos_token`, `pad_token`, `unk_token` where there is one.
        special_token_ids: the same names → ids.
        adds_bos, adds_eos: whether encoding a text with special tokens adds them (chat templates write their
            own).
        checked_strings: how many texts were compared.
        refused_shapes: message shapes that the chat template refuses, by their names in `chat_shapes`.
        tool_calls: how the chat template writes tool calls, as the runtime detects it; None where it was not
            asked.
    """

    kind: str
    vocab_size: int
    path: str
    chat_template: str | None
    special_tokens: dict[str, str] = field(default_factory=dict[str, str])
    special_token_ids: dict[str, int] = field(default_factory=dict[str, int])
    adds_bos: bool = False
    adds_eos: bool = False
    checked_strings: int = 0
    refused_shapes: list[str] = field(default_factory=list[str])
    tool_calls: dict[str, Any] | None = None


def export_tokenizer(
    source: ModelSource, out_dir: Path, render: Renderer | None = None, detect: DetectTools | None = None
) -> TokenizerFacts | None:
    """Write `tokenizer.json`, and `chat_template.jinja` where there is one, into `out_dir`.

    Returns None for a model without a tokenizer (an `nn.Module`). `render` is as in `check_chat_template`;
    `detect` is the runtime's too, and finds how the template writes tool calls.

    Raises:
        CompileError: naming a text on which the exported tokenizer gives other ids than the source, with both
            lists.
        InputError: a tokenizer file that is missing or damaged, or a chat template that reaches out of its
            sandbox.
        UnsupportedError: a tokenizer of a kind that the runtime cannot run.
    """
    if source.gguf is not None:
        facts = _export_gguf(source.gguf, out_dir)
        template = source.gguf.metadata.get("tokenizer.chat_template")
    elif source.kind == "hf" and source.path is not None:
        facts, template = _export_hf(source.path, source.name, out_dir)
    else:
        return None
    release_freed_memory()
    pairs = source.use.get("pairs")
    if not isinstance(template, str) or not template.strip():
        if pairs is not None:
            raise InputError(
                f"{source.name} puts pairs of texts into a chat template, and has none",
                remedy="add chat_template.jinja to its folder",
            )
        return facts
    shapes = MESSAGE_SHAPES if pairs is None else (pair_shape(pairs),)
    refused = check_chat_template(template, facts.special_tokens, source.name, render, shapes)
    (out_dir / TEMPLATE_FILE).write_text(template, encoding="utf-8", newline="")
    calls = detect(template, facts.special_tokens) if detect is not None and pairs is None else None
    return replace(facts, chat_template=TEMPLATE_FILE, refused_shapes=refused, tool_calls=calls)


def compare(name: str, exported: Encode, expected: Encode, texts: Iterable[str]) -> int:
    """Compare two encoders on texts, with and without added special tokens; the number of texts.

    Raises CompileError at the first difference.
    """
    count = 0
    for text in texts:
        for special in (False, True):
            got, want = exported(text, special), expected(text, special)
            if got != want:
                raise CompileError(
                    f"the exported tokenizer of {name} differs on {text[:80]!r}: "
                    f"{_shortened(got)} instead of {_shortened(want)}",
                    remedy="report the model: its tokenizer has a rule that llmc does not export",
                )
        count += 1
    return count


def _shortened(ids: list[int]) -> str:
    return f"{ids}" if len(ids) <= 24 else f"{ids[:24]}… ({len(ids)} ids)"


def _encoder(tokenizer: Any) -> Encode:
    return lambda text, special: tokenizer.encode(text, add_special_tokens=special).ids


def _save(tokenizer: Any, path: Path) -> None:
    # Not by the library's own `save`: it would turn a full disk into a bare Exception.
    path.write_text(_with_short_merges(tokenizer.to_str(pretty=False)), encoding="utf-8", newline="")


def _with_short_merges(text: str) -> str:
    """A `tokenizer.json` whose merges are "a b" instead of ["a", "b"]: the library reads both, this form in a
    quarter less time, which every start of a program waits for. As it is where a merge cannot be written so.
    """
    file = json.loads(text)
    merges = file["model"].get("merges")
    if not merges or not all(isinstance(pair, list) and _is_plain(*pair) for pair in merges):
        return text
    file["model"]["merges"] = [f"{one} {other}" for one, other in merges]
    return json.dumps(file, ensure_ascii=False, separators=(",", ":"))


def _is_plain(one: str, other: str) -> bool:
    """Whether a space tells the two apart, and the library takes their line for no comment."""
    return " " not in one and " " not in other and not one.startswith("#version")


def _reload(path: Path, name: str) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CompileError(f"the tokenizer written for {name} cannot be read again: {error}") from error


def _export_gguf(file: GGUFFile, out_dir: Path) -> TokenizerFacts:
    rules = read_tokenizer(file)
    path = out_dir / TOKENIZER_FILE
    _save(tokenizer_gguf.build(file.path.name, rules), path)
    exported = _reload(path, file.path.name)
    reference = ReferenceEncoder(rules)
    added = [rules.tokens[i] for i in sorted(rules.special_ids())]
    checked = compare(file.path.name, _encoder(exported), reference.encode, hard_strings(added))
    named = {"bos_token": rules.bos, "eos_token": rules.eos, "pad_token": rules.pad, "unk_token": rules.unk}
    ids = {key: value for key, value in named.items() if value is not None}
    kinds = {"bpe": "byte-level BPE", "wordpiece": "WordPiece", "unigram": "Unigram"}
    return TokenizerFacts(
        kind=kinds.get(rules.kind, "SentencePiece BPE"),
        vocab_size=exported.get_vocab_size(with_added_tokens=True),
        path=TOKENIZER_FILE,
        chat_template=None,
        special_tokens={key: rules.tokens[value] for key, value in ids.items()},
        special_token_ids=ids,
        adds_bos=rules.add_bos and rules.bos is not None,
        adds_eos=rules.add_eos and rules.eos is not None,
        checked_strings=checked,
    )


def _export_hf(folder: Path, name: str, out_dir: Path) -> tuple[TokenizerFacts, str | None]:
    wanted = _load_hf(folder, name)
    inner = getattr(wanted, "backend_tokenizer", None)
    if inner is None:
        raise UnsupportedError(
            f"the tokenizer of {name} is Python code ({type(wanted).__name__}), which the runtime cannot run",
            remedy="give a model with a tokenizer.json",
        )
    path = out_dir / TOKENIZER_FILE
    # Saved limits (a maximum length, padding to it) are settings of somebody's training run.
    inner.no_truncation()
    inner.no_padding()
    _save(inner, path)
    exported = _reload(path, name)

    def expected(text: str, special: bool) -> list[int]:
        return list(wanted(text, add_special_tokens=special, truncation=False, padding=False)["input_ids"])

    added = [token.content for _, token in sorted(wanted.added_tokens_decoder.items())]
    checked = compare(name, _encoder(exported), expected, hard_strings(added))
    tokens = {key: getattr(wanted, key, None) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    texts = {key: str(value) for key, value in tokens.items() if value is not None}
    ids = {key: exported.token_to_id(text) for key, text in texts.items()}
    bare, full = expected("a", False), expected("a", True)
    facts = TokenizerFacts(
        kind=type(inner.model).__name__,
        vocab_size=exported.get_vocab_size(with_added_tokens=True),
        path=TOKENIZER_FILE,
        chat_template=None,
        special_tokens=texts,
        special_token_ids={key: value for key, value in ids.items() if value is not None},
        adds_bos=len(full) > len(bare) and full[: len(bare)] != bare,
        adds_eos=len(full) > len(bare) and full[-len(bare) :] != bare,
        checked_strings=checked,
    )
    return facts, _hf_template(folder, wanted)


def _load_hf(folder: Path, name: str) -> Any:
    """transformers' tokenizer of a folder; its own code, if it brings any, is not run."""
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    config = folder / "tokenizer_config.json"
    raw = read_json(config) if config.is_file() else {}
    present = [
        f for f in (TOKENIZER_FILE, "tokenizer.model", "vocab.json", "vocab.txt") if (folder / f).is_file()
    ]
    if not present:
        raise InputError(f"{name} has no tokenizer.json", remedy="download the tokenizer's files")
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)  # advice about a tokenizer's settings is not for the one who compiles
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:
        code = " (it brings its own code, which is never run)" if "auto_map" in raw else ""
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"the tokenizer of {name} cannot be loaded{code}: {lines[0]}", remedy="check its tokenizer files"
        ) from error
    finally:
        logger.setLevel(level)


def _hf_template(folder: Path, tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default") or next(iter(template.values()), None)
    if template is None and (folder / "chat_template.json").is_file():
        template = read_json(folder / "chat_template.json").get("chat_template")
    return template if isinstance(template, str) else None


def check_chat_template(
    template: str,
    special_tokens: Mapping[str, str],
    name: str,
    render: Renderer | None = None,
    shapes: Sequence[MessageShape] = MESSAGE_SHAPES,
) -> list[str]:
    """Try a template on the message shapes of `chat_shapes`; the names of those that it refuses by itself.

    Args:
        render: the runtime's renderer (the frontend does not import the runtime); without it, the template is
            only searched for names like `__class__`.
        shapes: those that it is tried on.

    Raises InputError naming the template's line, where it is not jinja2, fails on a plain conversation, or
    reaches for attributes that the sandbox guards.
    """
    check = check_template(template, special_tokens, render, shapes)
    if check.fault is not None:
        shape, problem = check.fault
        line = f" (line {problem.line})" if problem.line else ""
        raise InputError(
            f"the chat template of {name}{line} fails on {shape}: {problem.reason}",
            remedy="correct the template, or remove it to compile without one",
        )
    return check.refused

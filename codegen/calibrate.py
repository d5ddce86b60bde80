"""What a calibrated compilation has besides its graph: token sequences, and the folder for --resume."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc import __version__

from ..frontend.calibration import TextEncoder, make_sequences, parse_text, read_text_file
from ..frontend.chat_shapes import Renderer
from ..frontend.hf import weight_files
from ..frontend.source import ModelSource, describe
from ..frontend.tokenizer import TEMPLATE_FILE, TokenizerFacts
from ..ir.errors import InputError
from ..ir.weights import LazyTensor, read_chunks
from ..passes.base import PassContext
from ..passes.calibration import DEFAULT_FILE, HELD_TOKENS, LENGTH, TOKENS, Calibration, default_text
from ..passes.work import WorkFolder

_CHUNK = 8 << 20


@dataclass(frozen=True)
class CalibrationOptions:
    """`calib`: a text or JSONL file, None for the text that ships with llmc. `resume`: go on with the work
    that an interrupted compilation of the same output left.
    """

    calib: str | os.PathLike[str] | None = None
    tokens: int | None = None
    resume: bool = False

    def command(self) -> list[str]:
        """The options that decide about the result, without folders."""
        words = [] if self.calib is None else ["--calib", Path(self.calib).name]
        return words if self.tokens is None else [*words, "--calib-tokens", str(self.tokens)]


def say_nothing(text: str) -> None:
    """For those who do not listen."""


def describe_calibration(calibration: Calibration) -> dict[str, Any]:
    """The manifest's entry."""
    return {"name": calibration.name, "sha256": calibration.sha256, "tokens": calibration.tokens}


@dataclass(frozen=True)
class TextSource:
    """Where a compilation's text comes from, and what makes token ids of it: the tokenizer that was exported
    into `folder`, None where the model has none; `render` writes chats.
    """

    source: ModelSource
    folder: Path
    tokenizer: TokenizerFacts | None
    options: CalibrationOptions
    render: Renderer | None


def prepare_calibration(
    text: TextSource, context: int | None, tokens: int = TOKENS
) -> tuple[Calibration, list[str]]:
    """The sequences, none longer than `context`, and notes for the user; `tokens` of them where the options
    do not say.

    Raises InputError where the model reads no text, or where the file will not do (frontend/calibration.py).
    """
    source, facts, options = text.source, text.tokenizer, text.options
    if facts is None:
        raise InputError(
            f"{source.name} has no tokenizer, and calibration is on text",
            remedy="use a scheme without calibration, such as int4-g32 or int8",
        )
    content = (
        parse_text(default_text(), DEFAULT_FILE)
        if options.calib is None
        else read_text_file(Path(options.calib))
    )
    template = (text.folder / TEMPLATE_FILE).read_text(encoding="utf-8") if facts.chat_template else None
    encoder = TextEncoder(text.folder / facts.path, template, facts.special_tokens, text.render)
    made = make_sequences(
        content,
        encoder,
        tokens=tokens if options.tokens is None else options.tokens,
        held_tokens=HELD_TOKENS,
        length=min(LENGTH, context or LENGTH),
    )
    _check_ids(source, content.name, max(int(one.max()) for one in (*made.sequences, *made.held)))
    name = "built-in" if options.calib is None else content.name
    return Calibration(made.sequences, made.held, name, content.sha256), list(made.notes)


def begin_calibration(
    context: PassContext,
    text: TextSource,
    output: Path,
    key: Mapping[str, Any],
    tokens: int,
    say: Callable[[str], None],
) -> None:
    """Give a compilation that calibrates its sequences and its work folder, and say what --resume found.

    Args:
        output: the artifact's path, beside which the folder lies.
        key: what the work depends on besides model and text.
        tokens: of the sequences where the options do not say.
    """
    context.calibration, notes = prepare_calibration(text, context.context_length, tokens)
    context.notes += notes
    resume = text.options.resume
    context.work = open_work(output, text.source, context.calibration, key, resume=resume)
    if context.work.resumed:
        found = f"{context.work.resumed} finished parts of an earlier run are in {context.work.path.name}"
        say(f"resumed: {found}")
    elif resume:
        say("nothing to resume: starting from the beginning")


def _check_ids(source: ModelSource, name: str, largest: int) -> None:
    size = describe(source)["vocab_size"]
    if isinstance(size, int) and largest >= size:
        raise InputError(
            f"calibration file {name}: the tokenizer of {source.name} gives id {largest}, and its embedding "
            f"has {size} rows",
            remedy="give a text without the tokens that were added to the tokenizer",
        )


def open_work(
    output: Path, source: ModelSource, calibration: Calibration, options: Mapping[str, Any], *, resume: bool
) -> WorkFolder:
    """The work folder beside the artifact, OUT.llmc.work; `options` are the compilation's, by their names."""
    key = {name: str(value) for name, value in options.items()}
    key |= {
        "model": source_digest(source),
        "calibration": calibration.sha256,
        "calibration tokens": f"{calibration.tokens}+{sum(len(one) for one in calibration.held)}",
        "llmc": __version__,
        # Results are the same bytes for the same arithmetic only.
        "torch": _torch_version(),
        "machine": platform.machine(),
    }
    return WorkFolder.open(work_path(output), key, resume=resume)


@contextmanager
def finishing(context: PassContext, say: Callable[[str], None]) -> Generator[None]:
    """Delete the work folder of `context` where all went well; keep it for --resume where not."""
    try:
        yield
    except BaseException:
        if context.work is not None and context.work.close(keep=True):
            say(f"finished parts are kept in {context.work.path}: compile with --resume to go on")
        raise
    if context.work is not None:
        context.work.close(keep=False)


def work_path(output: Path) -> Path:
    """Where the unfinished work of an output lies."""
    return output.with_name(output.name + ".work")


def source_digest(source: ModelSource) -> str:
    """sha256 over the contents of all that defines a model: weights, configuration, tokenizer. Neither names
    of folders nor times are in it.
    """
    digest = hashlib.sha256()
    for path in _files(source):
        with open(path, "rb") as file:
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    if source.module is not None:
        for name in sorted(source.stored):
            digest.update(f"{name}\0{source.stored[name].dtype}\0{source.stored[name].shape}\0".encode())
            for rows in _bytes(source.stored[name]):
                digest.update(rows)
    return digest.hexdigest()


def _files(source: ModelSource) -> Iterable[Path]:
    if source.path is None:
        return []
    if source.gguf is not None:
        return [part.path for part in source.gguf.parts or (source.gguf,)]
    small = sorted(p for p in source.path.iterdir() if p.suffix in (".json", ".jinja", ".model", ".txt"))
    return [*small, *(path for path in weight_files(source.path) if path not in small)]


def _bytes(tensor: LazyTensor) -> Iterator[bytes]:
    for rows in read_chunks(tensor, _CHUNK):
        yield rows.tobytes()


def _torch_version() -> str:
    import torch

    return str(torch.__version__)

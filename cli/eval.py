"""`llmc eval`: perplexity of a text, and how far one artifact is from another."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..ir.errors import InputError
from .output import emit, facts, json_option
from .progress import Progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from ..runtime.llm import LLM


@click.command("eval", short_help="Measure perplexity, and distance from another artifact.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--ppl",
    "text",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE",
    help="UTF-8 text to score.",
)
@click.option(
    "--against", type=click.Path(path_type=Path), metavar="ART2", help="Compare with this artifact too."
)
@click.option("--windows", type=click.IntRange(min=1), help="Only the first N windows.  [default: all]")
@click.option(
    "--window", type=click.IntRange(min=2), default=1024, show_default=True, help="Tokens of a window."
)
@click.option(
    "--target", metavar="NAME", help="Which of the artifact's targets.  [default: the first that runs]"
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads to compute with.  [default: one a core]")
@json_option
def command(
    artifact: Path,
    text: Path,
    against: Path | None,
    windows: int | None,
    window: int,
    target: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Score the text of --ppl FILE with ARTIFACT.

    The text is cut into consecutive windows of --window tokens that do not overlap; each is scored alone, its
    first token predicting nothing. A tokenizer that begins texts with BOS has every window begin with it.

    With --against, KL is the mean over predictions of D(ART2 || ARTIFACT) in nats, and top-1 agreement the
    share of predictions whose most likely token is the same.
    """
    from ..runtime.loader import load
    from .scoring import score

    paths = [path for path in (artifact, against) if path is not None]
    with contextlib.ExitStack() as stack, Progress() as progress:
        # Room for one window is all the cache it takes; the default would be most of the memory, twice.
        llms = [
            stack.enter_context(
                load(path, target=target, threads=threads, kv_tokens=window, prefix_cache=False)
            )
            for path in paths
        ]
        pieces = windows_of(llms, text, window=window, count=windows)
        vocab_size = llms[0].executor.vocab_size
        total = score(pieces, *(one.iter_logits for one in llms), vocab_size=vocab_size, progress=progress)
    result = {
        "artifact": str(artifact),
        "text": str(text),
        "windows": len(pieces),
        "window": window,
        **total.result(against=against is not None),
    }
    emit(result, as_json=as_json, text=_text(result))


def windows_of(llms: Sequence[LLM], text: Path, *, window: int, count: int | None) -> list[np.ndarray]:
    """The windows of token ids, int32, that the command scores; at most `count` of them.

    Raises InputError where a model predicts no tokens, the models differ in their tokens, or the text does
    not fill one window.
    """
    from .scoring import cut

    for one in llms:
        assert one.artifact is not None
        if one.kind != "causal_lm":
            raise InputError(f"an {one.kind} predicts no tokens", remedy="evaluate a language model")
        context = one.artifact.model["context_length"]
        if window > context:
            raise InputError(
                f"--window {window}: the context of {one.artifact.root} is {context} tokens",
                remedy=f"pass --window {context}",
            )
    content = _read(text)
    ids = llms[0].encode(content, add_special_tokens=False)
    if any(other.encode(content, add_special_tokens=False) != ids for other in llms[1:]):
        raise InputError(
            f"the two artifacts turn {text} into different tokens", remedy="compare artifacts of one model"
        )
    pieces = cut(ids, window=window, count=count, bos=_bos(llms[0]))
    if not pieces:
        raise InputError(
            f"{text} has {len(ids)} tokens, less than a window of {window}", remedy="pass a smaller --window"
        )
    return pieces


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start})", remedy="convert it to UTF-8") from None


def _bos(llm: LLM) -> int | None:
    """The beginning-of-sequence id where the tokenizer puts one before every text by itself."""
    bos = llm.artifact.model.get("bos_token_id") if llm.artifact is not None else None
    return bos if bos is not None and llm.encode("")[:1] == [bos] else None


def _text(result: dict[str, Any]) -> str:
    return facts(
        [
            ("perplexity", f"{result['ppl']:.4f}"),
            ("predictions", f"{result['tokens']} ({result['windows']} windows of {result['window']} tokens)"),
            ("perplexity of the other", f"{result['ppl_against']:.4f}" if "ppl_against" in result else None),
            ("KL divergence", f"{result['kl']:.6f} nats" if "kl" in result else None),
            ("top-1 agreement", f"{result['top1_agreement']:.2%}" if "kl" in result else None),
        ]
    )

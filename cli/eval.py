"""`llmc eval`: perplexity of a text, and how far one artifact is from another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..ir.errors import InputError
from .output import emit, facts, json_option
from .progress import Progress

if TYPE_CHECKING:
    import numpy as np

    from ..codegen.artifact import Artifact
    from ..runtime.tokenizer import Tokenizer


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
    from ..codegen.artifact import Artifact
    from ..runtime.executor import open_executor
    from .scoring import WindowRunner, score

    opened = [Artifact.open(path) for path in (artifact, against) if path is not None]
    pieces = _windows(opened, text, window, windows)
    runners = [WindowRunner(open_executor(one, target, threads=threads), window) for one in opened]
    with Progress() as progress:
        total = score(pieces, *runners, progress=progress)
    result = {
        "artifact": str(artifact),
        "text": str(text),
        "windows": len(pieces),
        "window": window,
        **total.result(against=against is not None),
    }
    emit(result, as_json=as_json, text=_text(result))


def windows(artifact: Path, text: Path, *, window: int, count: int | None) -> list[np.ndarray]:
    """The windows of token ids, int32, that the command scores; at most `count` of them.

    Raises InputError where the artifact predicts no tokens, or the text does not fill one window.
    """
    from ..codegen.artifact import Artifact

    return _windows([Artifact.open(artifact, verify="size")], text, window, count)


def _windows(artifacts: list[Artifact], text: Path, window: int, count: int | None) -> list[np.ndarray]:
    from .scoring import cut

    _check_window(artifacts, window)
    tokenizers = [_tokenizer(one) for one in artifacts]
    content = _read(text)
    ids = tokenizers[0].encode(content, add_special_tokens=False)
    if any(other.encode(content, add_special_tokens=False) != ids for other in tokenizers[1:]):
        names = " and ".join(str(one.root) for one in artifacts)
        raise InputError(
            f"{names} turn {text} into different tokens", remedy="compare artifacts of one model"
        )
    pieces = cut(ids, window=window, count=count, bos=_bos(artifacts[0], tokenizers[0]))
    if not pieces:
        raise InputError(
            f"{text} has {len(ids)} tokens, less than a window of {window}", remedy="pass a smaller --window"
        )
    return pieces


def _tokenizer(artifact: Artifact) -> Tokenizer:
    from ..runtime.tokenizer import Tokenizer

    if artifact.kind != "causal_lm":
        raise InputError(
            f"{artifact.root} is of kind {artifact.kind}: it predicts no tokens",
            remedy="evaluate a language model",
        )
    return Tokenizer.from_file(artifact.path(artifact.manifest["tokenizer"]["path"]))


def _check_window(artifacts: list[Artifact], window: int) -> None:
    for one in artifacts:
        context = one.model["context_length"]
        if window > context:
            raise InputError(
                f"--window {window} is more than the context of {one.root}, {context} tokens",
                remedy=f"pass --window {context} or compile with a larger --context",
            )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start})", remedy="convert it to UTF-8") from None


def _bos(artifact: Artifact, tokenizer: Tokenizer) -> int | None:
    """The beginning-of-sequence id where the tokenizer puts one before every text by itself."""
    bos = artifact.model.get("bos_token_id")
    return bos if bos is not None and tokenizer.encode("")[:1] == [bos] else None


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

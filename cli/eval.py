"""`llmc eval`: perplexity of a text, and how far one artifact is from another."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..ir.errors import InputError
from .output import emit, facts, json_option, note, table
from .progress import Progress
from .sampling import sinks_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from ..runtime.llm import LLM
    from .mcq import Task

# Tokens of cache for multiple choice: several questions at once, and the examples that they share.
_QUESTION_TOKENS = 8192


@click.command("eval", short_help="Measure perplexity, multiple choice, distance.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--ppl", "text", type=click.Path(path_type=Path), metavar="FILE", help="UTF-8 text to score.")
@click.option(
    "--mcq",
    "questions",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Multiple-choice questions: JSONL, or an MMLU folder; repeatable.",
)
@click.option(
    "--against", type=click.Path(path_type=Path), metavar="ART2", help="Compare with this artifact too."
)
@click.option(
    "--moe",
    "routed",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="UTF-8 text for a mixture of experts: its load-balancing loss, each expert's share.",
)
@click.option(
    "--picture",
    type=click.Path(path_type=Path),
    metavar="FILE.svg",
    help="With --moe: write the experts' shares as a picture there.",
)
@click.option("--windows", type=click.IntRange(min=1), help="Only the first N windows.  [default: all]")
@click.option(
    "--window", type=click.IntRange(min=2), default=1024, show_default=True, help="Tokens of a window."
)
@click.option(
    "--context",
    type=click.IntRange(min=1),
    help="With --sinks: tokens in the cache.  [default: the artifact's]",
)
@sinks_option
@click.option("--rolling", is_flag=True, help="Predict every token, the first of a window too.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first N questions of each file.")
@click.option(
    "--shots",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Examples before each question of an MMLU folder, from its dev files.",
)
@click.option(
    "--target", metavar="NAME", help="Which of the artifact's targets.  [default: the first that runs]"
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads to compute with.  [default: one a core]")
@click.option(
    "--adapter", metavar="PATH", help="Measure ARTIFACT with this LoRA adapter (PEFT's folder, or GGUF file)."
)
@json_option
def command(
    artifact: Path,
    text: Path | None,
    questions: tuple[Path, ...],
    against: Path | None,
    routed: Path | None,
    picture: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Score the text of --ppl FILE, or the questions of --mcq FILE, with ARTIFACT, or tell how its experts
    share the text of --moe FILE.

    The text is cut into consecutive windows of --window tokens that do not overlap; each is scored alone, its
    first token predicting nothing. A tokenizer that begins texts with BOS has every window begin with it.

    With --rolling every token of the text is predicted, the first of a window from the last token of the
    window before it (the first of all from BOS, or EOS where there is none): lm-evaluation-harness's rolling
    log-likelihood with max_length = --window, from which perplexities by word and byte follow.

    With --sinks a window may be longer than the cache of --context tokens: older tokens are evicted as from
    an answer (docs/long-context.md).

    With --against, KL is the mean over predictions of D(ART2 || ARTIFACT) in nats, and top-1 agreement the
    share of predictions whose most likely token is the same.

    Questions are scored as lm-evaluation-harness does: acc takes the choice of the highest log-likelihood,
    acc_norm divides it by the choice's length in characters, acc_bytes by its length in UTF-8 bytes. A line
    of a JSONL file has "choices", "gold" (number of the right one, from 0) and "query" or "context".

    With --moe, windows of the text run through the artifact's own graph and weights in torch, without its
    kernels. The loss is that of Switch Transformers for k experts a token, as transformers defines it: k
    where the experts are used alike. An expert with less than a tenth of an even share is warned of.
    """
    if text is None and not questions and routed is None:
        raise click.UsageError("nothing to measure: pass --ppl FILE, --mcq FILE or --moe FILE")
    if picture is not None and routed is None:
        raise click.UsageError("--picture shows what --moe measures: pass --moe FILE too")
    if routed is not None and options["adapter"] is not None:
        raise click.UsageError("--moe runs the artifact's own weights: leave --adapter away")
    if options["sinks"] is not None and (text is None or questions or routed is not None):
        raise click.UsageError("--sinks is for windows of a text: pass --ppl FILE alone")
    if options["context"] is not None and options["sinks"] is None:
        raise click.UsageError("--context is the cache of --sinks: pass --sinks N, or a smaller --window")
    if options["rolling"] and options["windows"] is not None:
        raise click.UsageError("--rolling scores the whole text: leave --windows away")
    paths = [path for path in (artifact, against) if path is not None]
    result: dict[str, Any] = {"artifact": str(artifact)}
    with Progress() as progress:
        if text is not None:
            result |= _perplexity(paths, text, options, progress)
        if questions:
            result |= _choices(paths, questions, options, progress)
        if routed is not None:
            result["moe"] = _experts(artifact, routed, picture, options, progress)
    emit(result, as_json=as_json, text=_text(result))


def _perplexity(
    paths: Sequence[Path], text: Path, options: dict[str, Any], progress: Progress
) -> dict[str, Any]:
    from .loading import load
    from .scoring import lengths, score

    window, sinks = options["window"], options["sinks"]
    with contextlib.ExitStack() as stack:
        llms = [
            stack.enter_context(
                load(
                    path,
                    target=options["target"],
                    threads=options["threads"],
                    kv_tokens=_cache(path, options),
                    context=options["context"],
                    sinks=sinks,
                    prefix_cache=False,
                    adapter=None if number else options["adapter"],
                )
            )
            for number, path in enumerate(paths)
        ]
        firsts: list[int] | None = None
        if options["rolling"]:
            pieces, firsts = rolling_windows(llms, text, window=window, endless=sinks is not None)
        else:
            count = options["windows"]
            pieces = windows_of(llms, text, window=window, count=count, endless=sinks is not None)
        total = score(
            pieces,
            *(one.iter_logits for one in llms),
            vocab_size=llms[0].executor.vocab_size,
            firsts=firsts,
            progress=progress,
        )
    result = {
        "text": str(text),
        "windows": len(pieces),
        "window": window,
        **total.result(against=len(paths) > 1),
    }
    return result | (total.by_length(*lengths(_read(text))) if options["rolling"] else {})


def _cache(path: Path, options: dict[str, Any]) -> int:
    """Tokens of the KV cache: room for one window is all that it takes, where nothing is evicted; the default
    would be most of the memory, twice.
    """
    if options["sinks"] is None:
        return options["window"]
    from ..codegen.artifact import Artifact

    return options["context"] or int(Artifact.open(path, "size").model["context_length"])


def _experts(
    path: Path, text: Path, picture: Path | None, options: dict[str, Any], progress: Progress
) -> dict[str, Any]:
    from . import experts
    from .loading import load

    window = options["window"]
    with load(path, target=options["target"], threads=1, kv_tokens=window, prefix_cache=False) as llm:
        pieces = windows_of([llm], text, window=window, count=options["windows"])
        assert llm.artifact is not None
        found = experts.measure_experts(llm.artifact, pieces, progress)
    result = {"text": str(text), "windows": len(pieces), "window": window, **found.result()}
    for warning in found.warnings():
        note(f"warning: {warning}")
    if picture is not None:
        picture.write_text(experts.picture(result), encoding="utf-8")
    return result


def _choices(
    paths: Sequence[Path], files: Sequence[Path], options: dict[str, Any], progress: Progress
) -> dict[str, Any]:
    """`mcq`, one entry a file, and `accuracy`, the mean of their acc."""
    from . import mcq

    tasks = [mcq.read_tasks(file, shots=options["shots"], limit=options["limit"]) for file in files]
    entries: list[dict[str, Any]] = [{"file": str(file), "shots": options["shots"]} for file in files]
    for number, path in enumerate(paths):
        asked = {**options, "adapter": None} if number else options
        for entry, found in zip(entries, _accuracies(path, tasks, asked, progress), strict=True):
            entry.update({"against": found} if number else found)
    return {"mcq": entries, "accuracy": sum(entry["acc"] for entry in entries) / len(entries)}


def _accuracies(
    path: Path, files: Sequence[list[Task]], options: dict[str, Any], progress: Progress
) -> list[dict[str, Any]]:
    from . import mcq
    from .loading import load

    def opened(kv_tokens: int) -> LLM:
        chosen = {name: options[name] for name in ("target", "threads", "adapter")}
        return load(path, kv_tokens=kv_tokens, **chosen)

    llm = opened(_QUESTION_TOKENS)
    try:
        if llm.kind != "causal_lm":
            raise InputError(f"an {llm.kind} predicts no tokens", remedy="evaluate a language model")
        prepared = [mcq.prepare(llm, tasks) for tasks in files]
        needed = max(one.kv_tokens for tasks in prepared for one in tasks)
        if needed > llm.kv_cache.tokens:  # rare: one question that is longer than most models' contexts
            llm.close()
            llm = opened(needed)
        found: list[dict[str, Any]] = []
        for number, tasks in enumerate(prepared):
            title = f"{path.name}: questions of {len(prepared)} files"

            def step(share: float, number: int = number, title: str = title) -> None:
                progress(title, (number + share) / len(prepared))

            found.append(mcq.evaluate(llm, tasks, step))
        return found
    finally:
        llm.close()


def windows_of(
    llms: Sequence[LLM], text: Path, *, window: int, count: int | None, endless: bool = False
) -> list[np.ndarray]:
    """The windows of token ids, int32, that the command scores; at most `count` of them. `endless`: whether
    they may be longer than the models' contexts.

    Raises InputError where a model predicts no tokens, the models differ in their tokens, or the text does
    not fill one window.
    """
    from .scoring import cut

    ids = _encoded(llms, text, window=None if endless else window, special=False)
    pieces = cut(ids, window=window, count=count, bos=_bos(llms[0]))
    if not pieces:
        raise InputError(
            f"{text} has {len(ids)} tokens, less than a window of {window}", remedy="pass a smaller --window"
        )
    return pieces


def rolling_windows(
    llms: Sequence[LLM], text: Path, *, window: int, endless: bool = False
) -> tuple[list[np.ndarray], list[int]]:
    """The windows of --rolling and the first token that each predicts; `endless` as above. Raises as
    `windows_of` does, and where the model has neither BOS nor EOS to predict the text's first token from.
    """
    from .scoring import roll

    ids = _encoded(llms, text, window=None if endless else window, special=True)
    if not ids:
        raise InputError(f"{text} is empty", remedy="give a text")
    return roll(ids, window=window, prefix=_prefix(llms[0]))


def _encoded(llms: Sequence[LLM], text: Path, *, window: int | None, special: bool) -> list[int]:
    """The text in tokens that all models agree on; `special`: with those that the tokenizer adds to texts.
    `window`: tokens that their contexts must hold.
    """
    for one in llms:
        assert one.artifact is not None
        if one.kind != "causal_lm":
            raise InputError(f"an {one.kind} predicts no tokens", remedy="evaluate a language model")
        context = one.artifact.model["context_length"]
        if window is not None and window > context:
            raise InputError(
                f"--window {window}: the context of {one.artifact.root} is {context} tokens",
                remedy=f"pass --window {context}",
            )
    content = _read(text)
    ids = llms[0].encode(content, add_special_tokens=special)
    if any(other.encode(content, add_special_tokens=special) != ids for other in llms[1:]):
        raise InputError(
            f"the two artifacts turn {text} into different tokens", remedy="compare artifacts of one model"
        )
    return ids


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start})", remedy="convert it to UTF-8") from None


def _bos(llm: LLM) -> int | None:
    """The beginning-of-sequence id where the tokenizer puts one before every text by itself."""
    bos = llm.artifact.model.get("bos_token_id") if llm.artifact is not None else None
    return bos if bos is not None and llm.encode("")[:1] == [bos] else None


def _prefix(llm: LLM) -> int:
    """What the first token of a text is predicted from: BOS, or EOS where the model has none."""
    model: dict[str, Any] = llm.artifact.model if llm.artifact is not None else {}
    known = [model.get("bos_token_id"), *(model.get("eos_token_ids") or ())]
    found = next((token for token in known if token is not None), None)
    if found is None:
        raise InputError("the model has neither BOS nor EOS", remedy="leave --rolling away")
    return found


def _text(result: dict[str, Any]) -> str:
    parts: list[str] = []
    if "ppl" in result:
        windows = f"{result['windows']} windows of {result['window']} tokens"
        parts.append(
            facts(
                [
                    ("perplexity", f"{result['ppl']:.4f}"),
                    ("predictions", f"{result['tokens']} ({windows})"),
                    *((name.replace("_", " "), _decimal(result.get(name))) for name in _BY_LENGTH),
                    ("perplexity of the other", _decimal(result.get("ppl_against"))),
                    ("KL divergence", f"{result['kl']:.6f} nats" if "kl" in result else None),
                    ("top-1 agreement", f"{result['top1_agreement']:.2%}" if "kl" in result else None),
                ]
            )
        )
    if "mcq" in result:
        header = ("questions", "", "acc", "acc_norm", *(("acc of the other",) if _compared(result) else ()))
        parts.append(table(header, [_row(entry) for entry in result["mcq"]]))
    if "moe" in result:
        from .experts import experts_text

        parts.append(experts_text(result["moe"]))
    return "\n\n".join(parts)


_BY_LENGTH = ("word_perplexity", "byte_perplexity", "bits_per_byte")


def _decimal(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def _compared(result: dict[str, Any]) -> bool:
    return "against" in result["mcq"][0]


def _row(entry: dict[str, Any]) -> list[str]:
    row = [entry["file"], str(entry["questions"]), _percent(entry, "acc"), _percent(entry, "acc_norm")]
    return row + ([_percent(entry["against"], "acc")] if "against" in entry else [])


def _percent(entry: dict[str, Any], name: str) -> str:
    error = entry[f"{name}_stderr"]
    return f"{entry[name]:.2%}" + ("" if error is None else f" ± {100 * error:.2f}")

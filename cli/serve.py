"""`llmc serve`: an OpenAI-compatible server."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..ir.errors import InputError
from .output import emit, json_option, note, notes_from_logging
from .sampling import sinks_option

if TYPE_CHECKING:
    from ..runtime.llm import LLM

KEY_VARIABLE = "LLMC_API_KEY"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@click.command("serve", short_help="Serve models over an OpenAI-compatible API.")
@click.argument("artifacts", nargs=-1, required=True, metavar="[NAME=]ARTIFACT...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one."
)
@click.option(
    "--api-key",
    multiple=True,
    metavar="KEY",
    help=f"Ask for this key; repeatable. ${KEY_VARIABLE} does the same and shows in no list of processes.",
)
@click.option(
    "--context", type=click.IntRange(min=1), help="Longest sequence, in tokens.  [default: the artifact's]"
)
@sinks_option
@click.option("--threads", type=click.IntRange(min=1), help="Threads to compute with.  [default: one a core]")
@click.option(
    "--target", metavar="NAME", help="Which of the artifacts' targets.  [default: the first that runs]"
)
@click.option(
    "--kv-tokens", type=click.IntRange(min=1), help="Size of the KV cache.  [default: from the free memory]"
)
@click.option(
    "--max-sequences",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Sequences computed together.",
)
@click.option(
    "--max-batch-tokens",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Tokens of a step at most.",
)
@click.option(
    "--max-queue",
    type=click.IntRange(min=0),
    default=256,
    show_default=True,
    help="Requests that may wait; further ones get 429.",
)
@click.option("--request-timeout", type=float, default=600.0, show_default=True, help="Seconds; 0 is none.")
@click.option(
    "--drain-timeout", type=float, default=30.0, show_default=True, help="Seconds to finish after SIGTERM."
)
@click.option(
    "--max-body",
    type=click.IntRange(min=1024),
    default=8 << 20,
    show_default=True,
    help="Bytes of a request.",
)
@click.option("--allowed-host", multiple=True, metavar="NAME", help="Host header to answer; repeatable.")
@click.option(
    "--cors-origin", multiple=True, metavar="ORIGIN", help="Let pages of ORIGIN call; repeatable, * is any."
)
@click.option(
    "--speculate",
    type=click.IntRange(min=0, max=15),
    default=0,
    show_default=True,
    help="Guess N tokens at a time where few sequences run; answers are the same.",
)
@click.option("--draft", metavar="ARTIFACT", help="A smaller model that guesses; else the text's own past.")
@click.option(
    "--sampler",
    metavar="NAME[{option=value,…}]",
    help="A plugin's sampler, for requests that name none (llmc_sampler).",
)
@click.option("--no-prefix-cache", is_flag=True, help="Compute every prompt from its first token.")
@click.option(
    "--prefix-cache",
    metavar="DIR[,size=SIZE]",
    help="Keep what was computed of prompts there beyond this process, at most SIZE.  [default size: 10GiB]",
)
@click.option(
    "--documents",
    multiple=True,
    metavar="[NAME=]KB",
    help="Answer from these documents (llmc rag index); repeatable.",
)
@click.option(
    "--documents-writable/--documents-read-only",
    "documents_writable",
    default=None,
    help="Whether requests may add and delete documents.  [default: on a loopback address]",
)
@click.option(
    "--max-upload",
    type=click.IntRange(min=1024),
    default=32 << 20,
    show_default=True,
    help="Bytes of a document that is added.",
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="[MODEL:]NAME=PATH",
    help="Serve this LoRA adapter (PEFT's folder, or GGUF file) as the model NAME; repeatable.",
)
@click.option(
    "--allow-adapter-updates",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Let requests load adapters from FOLDER, and unload them (/v1/load_lora_adapter).",
)
@click.option(
    "--max-adapters",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Most adapters at a time, where requests load them.",
)
@click.option("--no-page", is_flag=True, help="Do not serve the web page.")
@json_option
def command(artifacts: tuple[str, ...], as_json: bool, **options: Any) -> int:
    """Serve each ARTIFACT, under its folder's name or NAME, until SIGTERM or Ctrl-C.

    Then running requests are finished first. Clients of OpenAI's API point their base URL at
    http://HOST:PORT/v1; a web page is at /, numbers for Prometheus at /metrics. With --json one object with
    the address is printed once the server listens.
    """
    from ..runtime.server.app import create_app
    from ..runtime.server.run import listen, run

    notes_from_logging()
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    named = _named(artifacts)
    adapters = _adapters(named, options)
    documents = _named_documents(options["documents"])
    settings = _settings(options)
    listener = listen(options["host"], options["port"])
    with ExitStack() as stack:
        stack.callback(listener.close)
        # Documents first: what is wrong with them shows at once, and not after models are loaded.
        knowledge = {name: stack.enter_context(_open(at)) for name, at in documents.items()}
        for one in knowledge.values():
            one.prepare(wait=False)  # while the models are loaded
        models = {
            name: stack.enter_context(_load(path, options, adapters.get(name)))
            for name, path in named.items()
        }
        app = create_app(models, settings, knowledge)
        address, port = listener.getsockname()[:2]
        url = f"http://{f'[{address}]' if ':' in address else address}:{port}"
        served = list(app.state.service.models)
        result: dict[str, Any] = {"url": url, "models": served}
        if knowledge:
            result |= {"documents": list(knowledge), "documents_writable": settings.documents_writable}
        emit(
            result,
            as_json=as_json,
            text=f"serving {', '.join([*served, *knowledge])} at {url} (page: {url}/, API: {url}/v1)",
        )
        if address not in _LOOPBACK and not settings.api_keys:
            note("anyone who reaches this address may use it: --api-key asks for a key")
        return 0 if run(app, listener) else 1


def _named(artifacts: tuple[str, ...]) -> dict[str, Path]:
    """NAME=ARTIFACT or ARTIFACT → the names to serve. Raises InputError for two of one name."""
    named: dict[str, Path] = {}
    for given in artifacts:
        name, separator, path = given.partition("=")
        if not separator or Path(given).exists():
            path, name = given, Path(given).resolve().name.removesuffix(".llmc")
        if not name or not path:
            raise InputError(f"{given!r} is no [NAME=]ARTIFACT", remedy="for example chat=model.llmc")
        if name in named:
            raise InputError(f"two artifacts are called {name!r}", remedy="name one: NAME=ARTIFACT")
        named[name] = Path(path)
    return named


def _adapters(named: dict[str, Path], options: dict[str, Any]) -> dict[str, dict[str, Path]]:
    """The adapters that models are opened with, by the model's name: {} for one that requests may give some.

    Raises InputError where requests may, and no model takes any.
    """
    found = _named_adapters(options["adapters"], list(named))
    if options["allow_adapter_updates"] is not None:
        from ..codegen.artifact import Artifact

        takers = [name for name, path in named.items() if Artifact.open(path, "size").kind == "causal_lm"]
        if not takers:
            raise InputError(
                f"--allow-adapter-updates: no language model is served, only {', '.join(named)}",
                remedy="leave it away, or compile the adapter into the model with --lora",
            )
        found = {name: {} for name in takers} | found
    return found


def _named_adapters(given: tuple[str, ...], models: list[str]) -> dict[str, dict[str, Path]]:
    """[MODEL:]NAME=PATH → by the model's name, the adapters' folders by theirs. Raises InputError."""
    found: dict[str, dict[str, Path]] = {}
    for one in given:
        name, _, path = one.partition("=")
        model, _, alone = name.partition(":")
        if alone and model in models:
            name = alone
        elif len(models) == 1:
            model = models[0]
        else:
            raise InputError(
                f"--adapter {one!r} does not say of which model", remedy=f"write {models[0]}:NAME=PATH"
            )
        if not name or not path:
            raise InputError(f"--adapter {one!r} is no NAME=PATH", remedy="for example sql=adapters/sql")
        if name in models or any(name in others for others in found.values()):
            raise InputError(f"two models or adapters are called {name!r}", remedy="choose another name")
        found.setdefault(model, {})[name] = Path(path)
    return found


def _named_documents(given: tuple[str, ...]) -> dict[str, str]:
    """NAME=KB or KB → the names to serve. A KB is a file, an indexed folder, or a postgresql:// URL, in whose
    parameters a "=" may stand.
    """
    named: dict[str, str] = {}
    for one in given:
        name, separator, place = one.partition("=")
        if not separator or "/" in name or Path(one).exists():
            place, name = one, one.split("?")[0].rstrip("/").rpartition("/")[2].removesuffix(".kb")
        if not name or not place:
            raise InputError(f"{one!r} is no [NAME=]KB", remedy="for example notes=notes.kb")
        if name in named:
            raise InputError(f"two knowledge bases are called {name!r}", remedy="name one: NAME=KB")
        named[name] = place
    return named


def _open(place: str) -> Any:
    from ..runtime.rag.knowledge import KnowledgeBase, locate

    return KnowledgeBase.open(locate(place))


def _settings(options: dict[str, Any]) -> Any:
    from ..runtime.server.settings import ServerSettings

    keys = [key for key in (*options["api_key"], os.environ.get(KEY_VARIABLE, "")) if key]
    hosts = list(options["allowed_host"])
    if not hosts and options["host"] in _LOOPBACK:
        hosts = list(_LOOPBACK)
    return ServerSettings(
        api_keys=tuple(keys),
        allowed_hosts=tuple(host.lower() for host in hosts),
        allowed_origins=options["cors_origin"],
        max_body_bytes=options["max_body"],
        request_seconds=options["request_timeout"] or None,
        drain_seconds=options["drain_timeout"],
        page=not options["no_page"],
        documents_writable=_writable(options),
        adapter_folder=options["allow_adapter_updates"],
        max_adapters=options["max_adapters"],
        max_upload_bytes=options["max_upload"],
    )


def _writable(options: dict[str, Any]) -> bool:
    """On loopback whoever asks uses the machine already. From elsewhere (another address, a proxy's or a
    page's name), the right to ask is not the right to change what others are answered from.
    """
    given: bool | None = options["documents_writable"]
    alone = options["host"] in _LOOPBACK and not options["cors_origin"]
    alone = alone and all(name.lower() in _LOOPBACK for name in options["allowed_host"])
    return alone if given is None else given


def _prefix_cache(text: str | None) -> tuple[str | None, int | None]:
    """Folder and bytes of `DIR[,size=SIZE]`."""
    folder, separator, size = (text or "").rpartition(",size=")
    if not separator:
        return text, None
    if not folder:
        raise InputError(f"--prefix-cache {text} names no folder", remedy="write DIR,size=20GB")
    from ..codegen.memory import parse_size

    return folder, parse_size(size)


def _load(path: Path, options: dict[str, Any], adapters: dict[str, Path] | None) -> LLM:
    from .loading import load

    folder, size = _prefix_cache(options["prefix_cache"])
    llm = load(
        path,
        target=options["target"],
        threads=options["threads"],
        context=options["context"],
        sinks=options["sinks"],
        kv_tokens=options["kv_tokens"],
        max_batch_tokens=max(options["max_batch_tokens"], options["max_sequences"]),
        max_sequences=options["max_sequences"],
        speculate=options["speculate"],
        draft=options["draft"],
        prefix_cache=not options["no_prefix_cache"],
        prefix_cache_dir=folder,
        prefix_cache_bytes=size,
        max_waiting=options["max_sequences"] + options["max_queue"],
        adapters=adapters,
    )
    if options["sampler"] is not None:
        llm.prefer(sampler=options["sampler"])
    return llm

"""From the name of an embedder to a compiled artifact on this machine.

Models are compiled once, by `llmc compile` in a process of its own, so that nothing of the compiler is loaded
here. The user's cache holds

    encoders/NAME-KEY.llmc       the artifact; KEY is of the model's files, or of the hub id
    encoders/NAME-KEY.json       for a folder: its files' sizes and times when they were hashed
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ...codegen.artifact import MANIFEST
from ...ir.errors import InputError, LlmcError
from ..cache_folder import cache_folder, write_whole

DEFAULT = "sentence-transformers/all-MiniLM-L6-v2"
"""22 million parameters, 384 dimensions, Apache-2.0: small enough for a processor, and good for its size."""

SCHEME = "int8"
_REVISION = "2"
"""Of what is made of a model's files: a compilation of an earlier revision is not taken."""
VARIABLE = "LLMC_EMBEDDER"
_NONE = ("", "none")
_HUB_SECONDS = 3.0
"""What "auto" waits for the hub before it goes on without."""
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "modules.json",
    "1_Pooling/config.json",
    "chat_template.jinja",
    "chat_template.json",
)
_OF_PARTS = ("config.json", "model.safetensors")

Say = Callable[[str], None]


def say_on_stderr(text: str) -> None:
    """Where standard output belongs to results."""
    print(text, file=sys.stderr, flush=True)


def find_artifact(spec: str | None, say: Say) -> Path | None:
    """The artifact that `spec` names, compiled where it has to be (`open_embedder`); None for none."""
    if spec is None or spec in _NONE:
        return None
    if spec != "auto":
        return named_artifact(spec, say)
    given = os.environ.get(VARIABLE)
    if given is not None and given != "auto":
        return None if given in _NONE else named_artifact(given, say)
    return _default(say)


def named_artifact(spec: str, say: Say) -> Path:
    """The artifact of a path or hub id. Raises InputError where there is no such model."""
    path = Path(os.path.expanduser(spec))
    # os.path says no of a name that is none, where Path raises.
    if os.path.isfile(path / MANIFEST):
        return path
    if os.path.isdir(path):
        return _compiled(str(path), _folder_key(path), path.resolve().name, say)
    if os.path.exists(path) or not _REPO_ID.fullmatch(spec):
        raise InputError(
            f"{spec[:200]!r} is neither an artifact nor a model's folder or hub id",
            remedy=f"give an artifact, a Hugging Face folder, a hub id such as {DEFAULT}, or none",
        )
    return _of_hub(spec, say)


def _of_hub(repo: str, say: Say) -> Path:
    """Of a hub id what was compiled first is kept: the hub is not asked again."""
    folder = _snapshot(repo)
    if folder is not None and not _says_all(folder) and _unreachable() is None:
        folder = None  # another program has put it there, and left out how vectors are made
    return _compiled(str(folder or repo), _hub_key(repo), repo.replace("/", "--"), say)


def _hub_key(repo: str) -> str:
    return hashlib.sha256(f"{repo} {_REVISION}".encode()).hexdigest()[:16]


def _default(say: Say) -> Path | None:
    """The default embedder, or None with a note of what that costs."""
    name, key = DEFAULT.replace("/", "--"), _hub_key(DEFAULT)
    reason = None
    if not (_place(name, key) / MANIFEST).is_file() and _snapshot(DEFAULT) is None:
        reason = _unreachable()
    if reason is None:
        try:
            return _of_hub(DEFAULT, say)
        except LlmcError as error:
            reason = error.message
    say(
        f"no embedder ({reason}): search goes by words, names and links alone, and finds less where a "
        "question is worded unlike its answer. To add one later: llmc rag embed KB --embedder FOLDER "
        f"(or set {VARIABLE}); --embedder none stops this note"
    )
    return None


# The hub -------------------------------------------------------------------------------------------------


def _snapshot(repo: str) -> Path | None:
    """The folder of a repository in Hugging Face's own cache, where it is there whole (its layout:
    models--OWNER--NAME/snapshots/REVISION, the newest one named by refs/main).
    """
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()
    folder = hub / f"models--{repo.replace('/', '--')}"
    try:
        revision = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    snapshot = folder / "snapshots" / revision
    whole = ("config.json", "tokenizer.json", "model.safetensors")
    return snapshot if revision.isalnum() and all((snapshot / name).is_file() for name in whole) else None


def _says_all(snapshot: Path) -> bool:
    """Whether a snapshot has sentence-transformers' files with all that they name, or is known to have none
    (the cache keeps the names of files that the hub does not have).
    """
    names = snapshot / "modules.json"
    if not names.is_file():
        return (snapshot.parent.parent / ".no_exist" / snapshot.name / names.name).exists()
    parts = _read(names)
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        return True  # what is wrong with it is the compiler's to say
    held = [(snapshot / str(part.get("path", "")), str(part.get("type", ""))) for part in parts]
    needed = [path / "config.json" for path, kind in held if not kind.endswith(("Transformer", "Normalize"))]
    needed += [path / "model.safetensors" for path, kind in held if kind.endswith("Dense")]
    return all(path.is_file() for path in needed)


def _unreachable() -> str | None:
    """Why the hub cannot be asked; None where it can, or only trying will tell (behind a proxy)."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            return f"{DEFAULT} is not on this machine, and {name} forbids asking the hub"
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return None
    hub = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    host, port = hub.hostname or "huggingface.co", hub.port or (80 if hub.scheme == "http" else 443)
    # In a process of its own: resolving a name takes no timeout, and cannot be given up.
    probe = [sys.executable, "-I", "-c", _PROBE, host, str(port), str(_HUB_SECONDS)]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(probe, timeout=_HUB_SECONDS, capture_output=True, check=False)
        if done.returncode == 0:
            return None
    return f"{DEFAULT} is not on this machine, and the hub cannot be reached"


_PROBE = """
import socket, sys
socket.create_connection((sys.argv[1], int(sys.argv[2])), float(sys.argv[3])).close()
"""


# The cache -----------------------------------------------------------------------------------------------


def _place(name: str, key: str) -> Path:
    plain = re.sub(r"[^\w.-]", "_", name)[:80]
    return cache_folder() / "encoders" / f"{plain}-{key}.llmc"


def _folder_key(folder: Path) -> str:
    """16 hex digits of the content of a model's files. Hashes are kept beside the artifact with the files'
    times, so that a large model is not read again at every start.
    """
    files = [folder / name for name in _FILES if (folder / name).is_file()]
    files += sorted(folder.glob("*.safetensors"))
    files += sorted(path for name in _OF_PARTS for path in folder.glob(f"*/{name}") if path not in files)
    if not files:
        raise InputError(
            f"{folder} holds neither an artifact nor a model", remedy="give a folder with config.json"
        )
    try:
        state = {
            path.relative_to(folder).as_posix(): [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino]
            for path in files
            for s in (path.stat(),)
        }
        place = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
        record = cache_folder() / f"{place}.json"
        known = _read(record)
        fresh = isinstance(known, dict) and known.get("files") == state and known.get("of") == _REVISION
        if fresh and isinstance(known.get("key"), str):
            return str(known["key"])
        key = _hashed(folder, files)
    except OSError as error:
        raise InputError(
            f"cannot read {error.filename or folder}: {error.strerror}", remedy="check its permissions"
        ) from None
    with contextlib.suppress(OSError):  # costs the hashing next time
        write_whole(record, json.dumps({"files": state, "of": _REVISION, "key": key}).encode())
    return key


def _hashed(folder: Path, files: Sequence[Path]) -> str:
    whole = hashlib.sha256(_REVISION.encode())
    for path in files:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{path.relative_to(folder).as_posix()} {digest}\n".encode())
    return whole.hexdigest()[:16]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _compiled(model: str, key: str, name: str, say: Say) -> Path:
    """The cached artifact of a model, compiled first where it is not there."""
    place = _place(name, key)
    if (place / MANIFEST).is_file():
        return place
    with _alone(place):
        if not (place / MANIFEST).is_file():  # nobody made it meanwhile
            say(f"compiling {name.replace('--', '/')} (once; {SCHEME}, for {place})")
            _compile(model, place)
    return place


@contextlib.contextmanager
def _alone(place: Path) -> Generator[None]:
    """While this is open, no other process compiles for `place`: the second one waits."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = open(place.with_suffix(".lock"), "w", encoding="utf-8")  # noqa: SIM115  (closed below)
    except OSError as error:
        raise InputError(
            f"the cache {place.parent} cannot be written: {error.strerror}",
            remedy="set LLMC_CACHE to a folder that can, or compile the model and give the artifact",
        ) from None
    with lock:
        with contextlib.suppress(OSError):  # a file system without locks: both compile, one is refused
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(model: str, place: Path) -> None:
    """`llmc compile`. Raises InputError with its own words where it fails."""
    command = [sys.executable, "-P", "-m", "llmc.cli.main", "compile", model, "-o", str(place)]
    command += ["--quant", SCHEME, "--no-verdict", "--json"]
    waits = {"HF_HUB_ETAG_TIMEOUT": "5", "HF_HUB_DOWNLOAD_TIMEOUT": "10"}
    done = subprocess.run(
        command, env={**waits, **os.environ}, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, check=False
    )
    if done.returncode != 0:
        try:
            cause = str(json.loads(done.stdout)["error"])
        except (ValueError, KeyError, TypeError):
            cause = f"llmc compile ended with status {done.returncode}"
        raise InputError(f"{model} cannot be compiled: {cause}", remedy="give another model, or none")
